# SPDX-License-Identifier: Apache-2.0
"""The plugin honours the contract of an owner, with a broker of its own for each clause."""

from weights_core.testing import OwnerContract
from weights_gms.plugin import GmsPlugin


class TestGms(OwnerContract):
    name = "gms"
    plugin = GmsPlugin
    settle = 15.0
    exclusions = dict.fromkeys(
        ("two_hosts_do_not_interfere", "loads_in_threads_do_not_interfere"),
        "a slot is of one model: a load of another under the same tag is refused by name, never mixed up",
    )

    def config(self, folder):
        return {"socket_path": str(folder / "vault" / "s")}
