# SPDX-License-Identifier: Apache-2.0
"""No rank waits in a collective call of Transformers for one that has failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from weights_core.errors import Declined, LoadFailed, RanksDisagreeError, WeightsError

if TYPE_CHECKING:
    from weights_transformers.ranks import Ranks

_AT, _DONE, _FAILED, _PASSED = "at", "done", "failed", "passed"


class Collectives(TorchDispatchMode):
    """Has the ranks ask one another before each collective call of this thread, while they load alone.

    A rank that has failed answers too, so those that come to a collective call fail with it; without,
    they would wait in there as long as the process group does, two hours by Transformers' choice.
    """

    def __init__(self, ranks: Ranks) -> None:
        """Take the ranks, whose calls of their own are not watched."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._ranks = ranks
        self._over = False
        self.error: WeightsError | None = None
        """Why this rank had to end, if that was for another."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let torch go on, once all ranks are here if this is a collective call."""
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it comes again, as what it does to its parts
        if "c10d" in func.namespace:
            self._meet(str(func))
        return func(*args, **(kwargs or {}))

    def end(self, error: Exception | None) -> None:
        """Tell the others how this rank ended, unless they know.

        Raises:
            RanksDisagreeError: they cannot be reached.
        """
        if self._over:
            return
        if error is None:
            self._ask((_DONE, ""))
            return
        kind = _PASSED if isinstance(error, Declined | LoadFailed) else _FAILED
        try:
            self._ask((kind, str(error)))
        except RanksDisagreeError as exc:
            raise exc from error

    def _meet(self, call: str) -> None:
        if self.error is not None:  # Transformers has caught it, and gone on
            raise self.error
        mine = (_AT, call)
        try:
            everyone = self._ask(mine)
        except RanksDisagreeError as exc:
            self.error = exc
            raise
        if any(theirs != mine for theirs in everyone):
            self._over = True
            self.error = _reason(mine, everyone)
            raise self.error

    def _ask(self, mine: tuple[str, str]) -> Sequence[object]:
        try:
            return self._ranks.ask(mine, f"while Transformers loads, {' '.join(mine).strip()}")
        except RanksDisagreeError:
            self._over = True
            raise


def _reason(mine: tuple[str, str], everyone: Sequence[object]) -> WeightsError:
    """Return what a rank that did otherwise makes of this one: if it failed, its own kind of failure."""
    others = [
        (rank, *(theirs if isinstance(theirs, tuple) and len(theirs) == 2 else ("", repr(theirs))))
        for rank, theirs in enumerate(everyone)
        if theirs != mine
    ]
    rank, kind, text = min(others, key=lambda one: one[1] not in (_FAILED, _PASSED))
    if kind == _PASSED:
        return LoadFailed(f"rank {rank} failed: {text}", mutated=False)
    if kind == _FAILED:
        return RanksDisagreeError(f"rank {rank} failed while Transformers loads: {text}")
    return RanksDisagreeError(f"rank {rank} is {kind} {text}".rstrip() + f", this one {' '.join(mine)}")
