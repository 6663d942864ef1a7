# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: it takes any weights, and remembers what was done to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

from weights_core import dtypes
from weights_core.engine import Alloc, Engine
from weights_core.errors import EngineError
from weights_core.tensors import as_bytes, meta_of
from weights_core.types import Applied, EngineInfo, Layout, TensorMeta, Topology
from weights_core.weightset import Target, WeightSet

UNTOUCHED = 0xA5
"""What every byte of a fake engine's memory is before anything is written to it."""


class FakeEngine(Engine):
    """Holds named CPU tensors whose bytes are `UNTOUCHED` until weights are written to them.

    `events` lists what was called, in order: `apply`, `bind`, `materialize`, `post_load checkpoint`,
    `tensors sharded`, `reinit`, `loaded`. `fail_at` names methods that raise an `EngineError`, `apply`
    and `bind` after half of their work. Every layout has the same names, shapes and bytes.
    """

    def __init__(
        self,
        like: Mapping[str, torch.Tensor],
        *,
        accepts: Iterable[Layout] = tuple(Layout),
        mutates_after_load: str | None = None,
        topology: Topology | None = None,
        component: str | None = None,
        fail_at: Collection[str] = (),
    ) -> None:
        """Expect tensors of the names, shapes and dtypes of `like`, whose contents are not used."""
        self.events: list[str] = []
        self.at_post_load: dict[str, bytes] = {}
        self._fail_at = fail_at
        self._expected = {name: meta_of(name, tensor) for name, tensor in like.items()}
        self.params = {name: _blank(meta) for name, meta in self._expected.items()}
        self._touched = False
        self._info = EngineInfo(
            name="fake",
            version="1",
            accepts=accepts,
            shareable={Layout.SHARDED: "all layouts are the same", Layout.FINAL: "all layouts are the same"},
            mutates_after_load=mutates_after_load,
            topology=topology or Topology(),
            component=component,
        )

    @property
    def info(self) -> EngineInfo:
        """Name `fake`, version `1`."""
        return self._info

    def expected(self, layout: Layout) -> Mapping[str, TensorMeta]:
        """Return what the constructor was given, for every layout."""
        del layout
        return self._expected

    def apply(self, weights: WeightSet) -> Applied:
        """Write into the memory that is there."""
        return self._fill("apply", weights)

    def bind(self, weights: WeightSet) -> Applied:
        """Take the set's own tensors, or fill the memory that is there, if the set says so."""
        if weights.fills:
            return self._fill("bind", weights)
        self._touched = True
        self.events.append("bind")
        applied = self._taking(weights)
        for done, name in enumerate(applied.written, start=1):
            self.params[name] = weights[name]
            if done * 2 >= len(applied.written):
                self._may_fail("bind")
        return applied

    def materialize(self, alloc: Alloc) -> int:
        """Move every tensor into memory from `alloc`."""
        self._happened("materialize")
        for name, meta in self._expected.items():
            memory = alloc(meta)
            memory.copy_(self.params[name])
            self.params[name] = memory
        return sum(meta.nbytes for meta in self._expected.values())

    def post_load(self, layout: Layout) -> None:
        """Remember, in `at_post_load`, the bytes that were there."""
        self.at_post_load = self.contents()
        self._happened("post_load", layout)

    def tensors(self, layout: Layout) -> Mapping[str, torch.Tensor]:
        """Return the tensors themselves."""
        self._happened("tensors", layout)
        return dict(self.params)

    def untouched(self) -> bool:
        """Whether no weights were taken since the last `reinit`."""
        return not self._touched

    def reinit(self) -> None:
        """Return to memory that is `UNTOUCHED`."""
        self._happened("reinit")
        self.params = {name: _blank(meta) for name, meta in self._expected.items()}
        self._touched = False

    def loaded(self) -> None:
        """Do nothing but remember."""
        self._happened("loaded")

    def contents(self) -> dict[str, bytes]:
        """Return the bytes of every tensor now."""
        return {name: as_bytes(tensor).numpy().tobytes() for name, tensor in self.params.items()}

    def _fill(self, method: str, weights: WeightSet) -> Applied:
        self._touched = True
        self.events.append(method)
        applied = self._taking(weights)
        targets = [Target(name, out) for name, out in self.params.items() if name in applied.written]
        for done, target in enumerate(weights.fill(targets), start=1):
            weights.release([target.name])
            if done * 2 >= len(targets):
                self._may_fail(method)
        return applied

    def _taking(self, weights: WeightSet) -> Applied:
        """Say what will be written, while the set has it all: it may shrink as it is consumed."""
        written = [name for name in self._expected if name in weights]
        return Applied(written=written, unused=[name for name in weights if name not in self._expected])

    def _happened(self, method: str, layout: Layout | None = None) -> None:
        self.events.append(f"{method} {layout.value}" if layout else method)
        self._may_fail(method)

    def _may_fail(self, method: str) -> None:
        if method in self._fail_at:
            raise EngineError(f"the fake engine was told to fail at {method}")


def _blank(meta: TensorMeta) -> torch.Tensor:
    raw = torch.full((meta.nbytes,), UNTOUCHED, dtype=torch.uint8)
    if meta.dtype == "BOOL":
        return torch.zeros(meta.torch_shape, dtype=torch.bool)
    return raw.view(dtypes.to_torch(meta.dtype)).reshape(meta.torch_shape)
