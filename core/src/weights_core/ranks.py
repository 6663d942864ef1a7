# SPDX-License-Identifier: Apache-2.0
"""Ranks that load one model together agree on every step's outcome before they go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weights_core.errors import Declined, LoadFailed, RanksDisagreeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weights_core.engine import Engine
    from weights_core.types import Axis, LoadRequest


def gather(engine: Engine, request: LoadRequest, value: object, what: str) -> Sequence[object]:
    """Return every rank's `value`, by rank; for plugins whose ranks must agree on something of their own.

    Args:
        engine: through which the ranks reach each other.
        request: the load.
        value: a plain, picklable object.
        what: where in the load this is, for the error.

    Raises:
        RanksDisagreeError: a rank stayed away until the deadline, or cannot be reached.
    """
    return gathered(engine.gather, request.engine.topology.world, value, request.timeout, what)


def gathered(
    ask: Callable[[object, float], Sequence[object]], world: Axis, value: object, timeout: float, what: str
) -> Sequence[object]:
    """Do as `gather`, by `ask`: for engines whose ranks must agree before there is a load.

    Raises:
        RanksDisagreeError: as `gather`.
    """
    place = f"rank {world.rank}, {what}"
    try:
        values = ask(value, timeout)
    except TimeoutError as exc:
        why = f"{place}, waited {timeout:g} s for the other ranks"
        raise RanksDisagreeError(why, lost=True) from exc
    except Exception as exc:  # an engine's transport may raise anything
        why = f"{place}, cannot reach the other ranks: {type(exc).__name__}: {exc}"
        raise RanksDisagreeError(why, lost=True) from exc
    if len(values) != world.size:
        raise RanksDisagreeError(
            f"{place}, gathered {len(values)} answers; the topology says {world.size} ranks", lost=True
        )
    return values


class Ranks:
    """This rank's view of the group, through `engine.gather`."""

    def __init__(self, engine: Engine, request: LoadRequest) -> None:
        self._engine = engine
        self._request = request
        self._rank = request.rank

    def served(self, stage: str, provider: str, error: Exception | None) -> bool:
        """Tell the others how `provider` fared here; return whether it served every rank.

        False means that all ranks turn to the next provider, those it served included, so that
        no two layouts or sources are mixed in one model.

        Raises:
            Exception: `error` itself, if it ends the load.
            RanksDisagreeError: another rank's error ends the load, the ranks are not at the same
                step, or one of them did not answer in time.
        """
        may_go_on = isinstance(error, Declined | LoadFailed)
        try:
            return self._exchange(stage, provider, error, "next" if may_go_on else "abort")
        finally:
            del error  # an error whose traceback leads to itself keeps its frames' memory

    def together(self, stage: str, subject: str, error: Exception | None) -> None:
        """Go on only if every rank came through a step without an error.

        Raises:
            Exception: `error` itself.
            RanksDisagreeError: as `served`.
        """
        try:
            self._exchange(stage, subject, error, "abort")
        finally:
            del error

    def _exchange(self, stage: str, subject: str, error: Exception | None, if_error: str) -> bool:
        mine = (stage, subject, if_error if error is not None else "ok", str(error or ""))
        try:
            everyone = [self._unpacked(rank, step) for rank, step in enumerate(self._gather(mine, error))]
            if error is not None and if_error == "abort":
                raise error
        finally:
            del error
        for rank, theirs in enumerate(everyone):
            if theirs[2] == "abort":
                raise RanksDisagreeError(f"rank {rank} failed at {theirs[0]} of {theirs[1]!r}: {theirs[3]}")
            if theirs[:2] != mine[:2]:
                raise RanksDisagreeError(
                    f"rank {self._rank} is at {stage} of {subject!r}, "
                    f"rank {rank} at {theirs[0]} of {theirs[1]!r}"
                )
        return all(theirs[2] == "ok" for theirs in everyone)

    def _gather(self, mine: tuple[str, ...], error: Exception | None) -> Sequence[object]:
        try:
            if isinstance(error, RanksDisagreeError) and error.lost:
                raise error  # a provider has waited already: nobody would answer here either
            return gather(self._engine, self._request, mine, f"at {mine[0]} of {mine[1]!r}")
        except RanksDisagreeError as exc:
            if error is not None and exc is not error:
                exc.__cause__ = error
            raise
        finally:
            del error

    @staticmethod
    def _unpacked(rank: int, step: object) -> tuple[str, str, str, str]:
        if isinstance(step, tuple | list) and len(step) == 4:
            stage, subject, verdict, reason = map(str, step)
            return stage, subject, verdict, reason
        raise RanksDisagreeError(f"rank {rank} gathered {step!r}: the ranks are not in the same load")
