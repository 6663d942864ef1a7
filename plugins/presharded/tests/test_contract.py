# SPDX-License-Identifier: Apache-2.0
"""The plugin honours the contract of a source, on folders that were cut for one rank, and on a peer."""

from weights_core.cli.checking import tried
from weights_core.testing import SourceContract
from weights_core.testing.checkpoints import read_with_safetensors
from weights_presharded import contract
from weights_presharded.peer.neighbour import Neighbour
from weights_presharded.plugin import PreshardedPlugin


class TestFromDisk(SourceContract):
    name = "presharded"
    plugin = PreshardedPlugin
    prepare = staticmethod(contract.prepare)
    oracle = staticmethod(contract.oracle)
    exclusions = contract.EXCLUSIONS

    def config(self, folder):
        return contract.SETTINGS


NEIGHBOUR = Neighbour()


class TestFromAPeer(SourceContract):
    name = "presharded"
    plugin = PreshardedPlugin
    exclusions = contract.PEER_EXCLUSIONS
    in_place = True

    def config(self, folder):
        return contract.peer_settings(folder, in_place=self.in_place)

    def prepare(self, folder, tensors):
        return NEIGHBOUR.prepare(folder, tensors)

    def oracle(self, checkpoint):
        return read_with_safetensors(checkpoint)


class TestFromAPeerToOwnMemory(TestFromAPeer):
    exclusions = contract.OWN_EXCLUSIONS
    in_place = False


def test_weights_check_tries_both():
    headings = [heading.partition(": ")[2] for heading, _ in tried("presharded", None, {})]
    assert headings == [
        "presharded as a source, of folders that were cut",
        "presharded as a source, of what a peer has, into its parameters",
        "presharded as a source, of what a peer has, into memory of their own",
    ]
