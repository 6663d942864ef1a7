# SPDX-License-Identifier: Apache-2.0
"""The plugin honours the contract of a source, on folders that were cut for one rank."""

from weights_core.testing import SourceContract
from weights_presharded import contract
from weights_presharded.plugin import PreshardedPlugin


class TestPresharded(SourceContract):
    name = "presharded"
    plugin = PreshardedPlugin
    prepare = staticmethod(contract.prepare)
    oracle = staticmethod(contract.oracle)
    exclusions = contract.EXCLUSIONS

    def config(self, folder):
        return contract.SETTINGS
