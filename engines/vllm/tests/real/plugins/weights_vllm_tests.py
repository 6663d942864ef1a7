# SPDX-License-Identifier: Apache-2.0
"""Plugins that the tests give to the engines: to stop half-way, to want what is refused, to save."""

import os
import time
from pathlib import Path

import attrs

import weights_core as w


@attrs.frozen
class StallsConfig:
    marker: str = ""
    rank: int = 0


class Stalls(w.ProviderPlugin[StallsConfig]):
    """On one rank gives half of the tensors, says in a file who it is, and waits until it is killed."""

    Config = StallsConfig

    @w.hookimpl
    def resolve_format(self, request):
        if "stalls" not in request.format:
            return w.FormatClaim.refuse("only when named")
        return w.FormatClaim(roles={w.Role.SOURCE}, reason="stops half-way")

    @w.hookimpl
    def load_weights(self, request, source):
        weights = source.open()
        if request.engine.topology.rank != self.config.rank:
            return weights
        return Half(weights, Path(self.config.marker))


class Half(w.WeightSetWrapper):
    def __init__(self, inner, marker):
        super().__init__(inner)
        self.marker = marker
        self.left = len(inner) // 2

    def read(self, name, slices=None):
        self.left -= 1
        if self.left < 0:
            made = self.marker.with_suffix(".part")
            made.write_text(str(os.getpid()))
            made.rename(self.marker)
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


@attrs.frozen
class SavesConfig:
    to: str = ""
    vllm: str = ""


class Saves(w.PublisherPlugin[SavesConfig]):
    """Saves the parameters before post-load: as presharded does, and by vLLM's own writer."""

    Config = SavesConfig

    @w.hookimpl
    def resolve_format(self):
        if not self.config.to:
            return w.FormatClaim.refuse("not told where to")
        return w.FormatClaim(
            roles={w.Role.PUBLISHER}, publish_at=w.Layout.SHARDED, required=True, reason="saves"
        )

    @w.hookimpl
    def publish(self, engine, layout):
        from vllm.model_executor.model_loader import ShardedStateLoader

        from weights_presharded import save

        folder = save(engine, self.config.to)
        ShardedStateLoader.save_model(engine.model, self.config.vllm)
        return w.PublishReceipt(layout=layout, nbytes=0, detail=str(folder))


def without_amx():
    """Keep vLLM off AMX: where we tried it, attention by AMX is killed by the kernel or answers nonsense."""
    import torch

    torch.cpu._is_amx_tile_supported = lambda: False


def models():
    """Make known a model that does not say what it loads."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("SilentForCausalLM", "weights_vllm_models:SilentForCausalLM")
