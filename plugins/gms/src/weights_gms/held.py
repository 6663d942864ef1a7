# SPDX-License-Identifier: Apache-2.0
"""What the slot of an engine serves already, for engines that budget their memory before they load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weights_core.backing import backing_for
from weights_gms.client import ask_once
from weights_gms.owner import endpoint_of, slot_name

if TYPE_CHECKING:
    from weights_core import EngineInfo
    from weights_gms.plugin import GmsConfig


def held_bytes(config: GmsConfig, info: EngineInfo) -> int:
    """Return the bytes that the slot of an engine serves now; 0 if there is nothing, or no broker.

    Raises:
        VaultError: the broker does not answer.
    """
    if config.backend == "dynamo" or config.mode == "rw":  # not known; made anew
        return 0
    told = ask_once(endpoint_of(config), {"op": "status"}) or {"slots": []}
    name = slot_name(config.tag, backing_for(info).device, info)
    served = [
        g for slot in told["slots"] if slot["slot"] == name for g in slot["generations"] if g["serving"]
    ]
    return sum(int(g["bytes"]) for g in served)
