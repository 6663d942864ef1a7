# SPDX-License-Identifier: Apache-2.0
"""The plugin honours the contract of a wrapper."""

from weights_consumable.plugin import ConsumablePlugin
from weights_core.testing import WrapperContract


class TestConsumable(WrapperContract):
    name = "consumable"
    plugin = ConsumablePlugin
