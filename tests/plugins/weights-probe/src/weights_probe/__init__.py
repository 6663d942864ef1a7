# SPDX-License-Identifier: Apache-2.0
"""A source and publisher that reads `.probe` files, and writes down each hook that runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from weights_core import (
    Engine,
    Fit,
    FormatClaim,
    Layout,
    LoadRequest,
    Outcome,
    ProviderPlugin,
    PublishReceipt,
    Role,
    Source,
    TensorMeta,
    WeightSet,
    hookimpl,
)

if TYPE_CHECKING:
    import torch


@attrs.frozen
class ProbeConfig:
    """`log` names the file to write to."""

    log: str = ""


class ProbePlugin(ProviderPlugin[ProbeConfig]):
    """Implements every hook."""

    Config = ProbeConfig

    def note(self, hook: str) -> None:
        """Add a line to the log."""
        with Path(self.config.log).open("a") as log:
            log.write(f"{hook}\n")

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        """Claim a folder with a `weights.probe` in it."""
        if not (request.checkpoint / "weights.probe").exists():
            return FormatClaim.refuse("no weights.probe here")
        self.note("resolve_format")
        return FormatClaim(
            roles={Role.SOURCE, Role.PUBLISHER},
            fit=Fit.BEST,
            publish_at=Layout.SHARDED,
            required=True,
            reason="a probe",
        )

    @hookimpl
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        """Return the tensors of the file."""
        self.note("load_weights")
        return ProbeSet(request.checkpoint / "weights.probe")

    @hookimpl
    def before_post_load(self, weights: WeightSet) -> None:
        """Write down who provided."""
        self.note(f"before_post_load {weights.provider}")

    @hookimpl
    def publish(self, engine: Engine, layout: Layout) -> PublishReceipt:
        """Offer nothing, but say so."""
        self.note(f"publish {len(engine.tensors(layout))}")
        return PublishReceipt(layout=layout, nbytes=0, detail="probe", close=lambda: self.note("withdrawn"))

    @hookimpl
    def cleanup(self, outcome: Outcome) -> None:
        """Write down how it ended."""
        self.note(f"cleanup {outcome.status}")


class ProbeSet(WeightSet):
    """The tensors of one `.probe` file, which is a file of `torch.save`."""

    provider = "probe"

    def __init__(self, path: Path) -> None:
        import torch

        self._tensors: dict[str, torch.Tensor] = torch.load(path, weights_only=True)

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """All are float32."""
        return {n: TensorMeta(n, tuple(t.shape), "F32", t.nbytes) for n, t in self._tensors.items()}

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> "torch.Tensor":
        """Return a tensor."""
        return self._tensors[name][slices or ...]
