# SPDX-License-Identifier: Apache-2.0
"""Ranks that load one model together agree on every provider's outcome before they go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from weights_core.errors import Declined, LoadFailed, RanksDisagreeError

if TYPE_CHECKING:
    from weights_core.engine import Engine

Verdict = Literal["ok", "next", "abort"]


class Ranks:
    """This rank's view of the group, through `engine.gather`."""

    def __init__(self, engine: Engine, rank: int, timeout: float) -> None:
        self._engine = engine
        self._rank = rank
        self._timeout = timeout

    def agree(self, stage: str, provider: str, error: Exception | None) -> bool:
        """Tell the others how `provider` fared here; return whether it served every rank.

        False means that all ranks turn to the next provider, those it served included, so that
        no two layouts or sources are mixed in one model.

        Raises:
            Exception: `error` itself, if it ends the load.
            RanksDisagreeError: another rank's error ends the load, the ranks are not at the same
                step, or one of them did not answer in time.
        """
        mine = (stage, provider, _verdict(error), str(error or ""))
        try:
            steps = self._engine.gather(mine, self._timeout)
        except TimeoutError as exc:
            raise RanksDisagreeError(
                f"rank {self._rank} waited {self._timeout:g} s at {stage} of {provider!r} for the other ranks"
            ) from (error or exc)
        if error is not None and mine[2] == "abort":
            raise error
        served = True
        for rank, step in enumerate(steps):
            theirs = _unpack(rank, step)
            if theirs[2] == "abort":
                raise RanksDisagreeError(f"rank {rank} failed at {theirs[0]} of {theirs[1]!r}: {theirs[3]}")
            if theirs[:2] != mine[:2]:
                raise RanksDisagreeError(
                    f"rank {self._rank} is at {stage} of {provider!r}, "
                    f"rank {rank} at {theirs[0]} of {theirs[1]!r}"
                )
            served = served and theirs[2] == "ok"
        return served


def _verdict(error: Exception | None) -> Verdict:
    if error is None:
        return "ok"
    return "next" if isinstance(error, Declined | LoadFailed) else "abort"


def _unpack(rank: int, step: object) -> tuple[str, str, str, str]:
    if isinstance(step, tuple | list) and len(step) == 4:
        stage, provider, verdict, reason = map(str, step)
        return stage, provider, verdict, reason
    raise RanksDisagreeError(f"rank {rank} gathered {step!r}: the ranks are not in the same load")
