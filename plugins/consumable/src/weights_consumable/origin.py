# SPDX-License-Identifier: Apache-2.0
"""Who consumed a tensor: the call, and the line of the engine that made it."""

from __future__ import annotations

import sys
from types import FrameType
from typing import NamedTuple

_BETWEEN = frozenset(
    {__name__, "weights_consumable.weights", "weights_core.guard", "weights_core.weightset", "contextlib"}
)


class Origin(NamedTuple):
    """A call that consumed, and where it was made."""

    call: str
    file: str
    line: int

    @classmethod
    def of(cls, call: str) -> Origin:
        """Return the origin of `call` in the nearest frame that is neither ours nor the core's guard."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
            frame = frame.f_back
        if frame is None:
            return cls(call, "?", 0)
        return cls(call, frame.f_code.co_filename, frame.f_lineno)

    def __str__(self) -> str:
        return f"{self.call} at {self.file}:{self.line}"
