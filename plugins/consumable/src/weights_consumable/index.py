# SPDX-License-Identifier: Apache-2.0
"""The names of a set that are left, found by dotted prefix without a scan."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

_SLACK = 64
_NEAR = 8
_AFTER_DOT = chr(ord(".") + 1)


class NameIndex:
    """Names in the order given, which only ever become fewer. Not thread-safe.

    Beside them lies a sorted list in which removed names stay, so that removing costs nothing there;
    a stretch of it that is found to be mostly removed names is rewritten. Sorted keys with bisection
    are those of TensorRT-LLM's `ConsumableWeightsDict`.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = dict.fromkeys(names)
        self._sorted: list[str] | None = None

    def under(self, prefix: str) -> list[str]:
        """Return the names at or below `prefix`: `a.1` and `a.1.b`, never `a.10`.

        A dot at the end of `prefix` is ignored; the empty prefix stands for all names. They come
        sorted, `prefix` itself first.
        """
        prefix = prefix.removesuffix(".")
        if not prefix:
            return list(self.names)
        if self._sorted is None:
            self._sorted = sorted(self.names)
        after = f"{prefix}{_AFTER_DOT}"
        begin = bisect_left(self._sorted, f"{prefix}.")
        near = min(begin + _NEAR, len(self._sorted))  # most modules have few tensors
        end = bisect_left(self._sorted, after, begin, near)
        if end == near:
            end = bisect_left(self._sorted, after, end)
        left = self.names
        found = [name for name in self._sorted[begin:end] if name in left]
        if end - begin > 2 * len(found) + _SLACK:
            self._sorted[begin:end] = found
        return [prefix, *found] if prefix in left else found

    def remove(self, names: Iterable[str]) -> list[str]:
        """Remove `names`; return those that were there, each once."""
        left = self.names
        return [name for name in names if left.pop(name, True) is None]
