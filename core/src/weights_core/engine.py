# SPDX-License-Identifier: Apache-2.0
"""What an engine provides so that weights can be brought into it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from weights_core.errors import EngineError
from weights_core.types import Applied, EngineInfo, Layout, Plan, TensorMeta
from weights_core.weightset import WeightSet

if TYPE_CHECKING:
    import torch

Alloc = Callable[[TensorMeta], "torch.Tensor"]
"""Returns uninitialised memory for one tensor, on the engine's device."""


class Engine(Protocol):
    """The engine's side of a load. Subclass it: what is not abstract has a safe default.

    One engine object is one load: a draft model, or a component of a pipeline, is an engine of
    its own, told apart by `info.role` and `info.component`.
    """

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """What the engine says of itself; constant during a load."""

    @property
    def checkpoint(self) -> Path | None:
        """The engine's own checkpoint, which overrides the request's; None for no opinion."""
        return None

    @property
    def anchor(self) -> object:
        """The object whose life bounds the lease on the weights: the model, where there is one."""
        return self

    def planned(self, plan: Plan) -> Engine:
        """Return the engine to go on with, now that it is known who takes part; by default this one.

        For engines that take long to open, and need not always be opened whole. If what the other says
        of itself differs from this one's `info`, plugins are asked once more, and it is to serve the plan
        that they make then, whatever that is.
        """
        del plan
        return self

    @abstractmethod
    def expected(self, layout: Layout) -> Mapping[str, TensorMeta]:
        """Return the tensors that must be filled for a load in `layout` to be complete."""

    @abstractmethod
    def apply(self, weights: WeightSet) -> Applied:
        """Take weights in the CHECKPOINT layout: map, slice and write them into the model.

        Implementations release each name as they consume it, and read lazily.

        Raises:
            CoverageError: tensors are missing or do not fit; before anything is written, if that
                can be known.
        """

    def unused(self, weights: WeightSet) -> Sequence[str]:
        """Return the names `apply` will not take, where that is known before reading; else ()."""
        del weights
        return ()

    def bind(self, weights: WeightSet) -> Applied:
        """Take weights in the SHARDED or FINAL layout: this engine's names and shapes, as they are.

        They are never cut, fused or mapped again. If `weights.fills`, they are brought into memory of
        the engine's own by `weights.fill`, and released as `apply` does; else the tensors themselves
        become the parameters, without a copy.

        Raises:
            CoverageError: tensors are missing or do not fit; before anything is written, if that
                can be known.
            EngineError: the engine cannot; such an engine does not accept these layouts.
        """
        raise EngineError(f"engine {self.info.name} cannot bind {weights.layout.value} weights")

    def materialize(self, alloc: Alloc) -> int:
        """Give every parameter that has no memory yet memory from `alloc`; return the bytes.

        Raises:
            EngineError: the engine cannot; owners then move weights after the load.
        """
        raise EngineError(f"engine {self.info.name} cannot place its parameters in given memory")

    def post_load(self, layout: Layout) -> None:
        """Run the engine's own transforms; at FINAL only derived state, never the transforms again."""
        return

    def tensors(self, layout: Layout) -> Mapping[str, torch.Tensor]:
        """Return the engine's tensors by name, for publishers.

        Raises:
            EngineError: the engine cannot name its tensors in `layout`.
        """
        raise EngineError(f"engine {self.info.name} cannot list its tensors in the {layout.value} layout")

    def untouched(self) -> bool:
        """Whether the model is as it was before `apply` or `bind`. False unless that is certain."""
        return False

    def reinit(self) -> None:
        """Bring the model back to what it was before the load.

        Raises:
            EngineError: the engine cannot; a load that failed half-way then aborts.
        """
        raise EngineError(f"engine {self.info.name} cannot be re-initialised")

    def loaded(self) -> None:
        """Note that the load is complete: there is no way back from here but another load."""
        return

    def gather(self, value: object, timeout: float) -> Sequence[object]:
        """Return every rank's `value`, by rank; called by all ranks in the same order.

        `value` is a plain, picklable object. Raises TimeoutError if a rank stays away for
        `timeout` seconds.
        """
        del timeout
        return [value]
