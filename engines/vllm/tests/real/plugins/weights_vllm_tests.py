# SPDX-License-Identifier: Apache-2.0
"""Plugins that the tests give to the engines: one that stops half-way, one that wants what is refused."""

import time
from pathlib import Path

import attrs

import weights_core as w


@attrs.frozen
class StallsConfig:
    marker: str = ""


class Stalls(w.ProviderPlugin[StallsConfig]):
    """Gives half of the tensors, says so in a file, and waits until it is killed."""

    Config = StallsConfig

    @w.hookimpl
    def resolve_format(self, request):
        if "stalls" not in request.format:
            return w.FormatClaim.refuse("only when named")
        return w.FormatClaim(roles={w.Role.SOURCE}, reason="stops half-way")

    @w.hookimpl
    def load_weights(self, source):
        return Half(source.open(), Path(self.config.marker))


class Half(w.WeightSetWrapper):
    def __init__(self, inner, marker):
        super().__init__(inner)
        self.marker = marker
        self.left = len(inner) // 2

    def read(self, name, slices=None):
        self.left -= 1
        if self.left < 0:
            self.marker.touch()
            time.sleep(600)
        return super().read(name, slices)


class Finals:
    weights_api = 1

    @w.hookimpl
    def resolve_format(self, request):
        if "finals" not in request.format:
            return w.FormatClaim.refuse("only when named")
        return w.FormatClaim(
            roles={w.Role.PUBLISHER}, publish_at=w.Layout.FINAL, required=True, reason="offers FINAL weights"
        )

    @w.hookimpl
    def publish(self):
        raise AssertionError("never asked")


def without_amx():
    """Keep vLLM off AMX: where we tried it, attention by AMX is killed by the kernel or answers nonsense."""
    import torch

    torch.cpu._is_amx_tile_supported = lambda: False
