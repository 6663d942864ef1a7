# SPDX-License-Identifier: Apache-2.0
"""Whether a rank's part of a tensor and its part of the scales belong together.

Transformers cuts both into as many parts as there are ranks. Where a part is no whole number of blocks, the
scales are those of other elements, which Transformers does not always notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from weights_core import TensorMeta
from weights_core.errors import EngineError

Ranges = tuple[range, ...]


class Blocks:
    """What was read of the tensors that have a scale for each block."""

    def __init__(self, size: Sequence[int] | None, metas: Mapping[str, TensorMeta]) -> None:
        """Find the scales; `size` is that of a block, None if there are no blocks."""
        self._pairs = dict(_pairs(size, metas)) if size else {}
        self._size = tuple(size or ())
        self._metas = metas
        self._read: dict[str, set[Ranges]] = {}

    def note(self, name: str, ranges: Sequence[range]) -> None:
        """Note what is to be read of a tensor.

        Raises:
            EngineError: that is no whole number of blocks.
        """
        part = tuple(ranges)
        self._read.setdefault(name, set()).add(part)
        if name in self._pairs and not self._is_whole(name, part) and self._needs(name, part) is None:
            raise self._error(name, part, f"is no whole number of blocks of {self._blocks}, which")

    def fault(self) -> EngineError | None:
        """Return what is wrong with a tensor whose scales are those of other elements, if there is one."""
        for name, scales in self._pairs.items():
            have = {_bounds(one) for one in self._read.get(scales, ())}
            for part in sorted(self._read.get(name, ()), key=_bounds):
                if not self._is_whole(name, part) and self._needs(name, part) not in have:
                    return self._error(name, part, f"is not what was read of {scales!r}: its blocks")
        return None

    def _error(self, name: str, part: Ranges, why: str) -> EngineError:
        read = ", ".join(f"{one.start}:{one.stop}" for one in part)
        return EngineError(
            f"tensor {name!r}: this rank's part [{read}] {why} have a scale each, so the model cannot be "
            "spread over so many ranks: use fewer"
        )

    @property
    def _blocks(self) -> str:
        return "×".join(map(str, self._size))

    def _is_whole(self, name: str, part: Ranges) -> bool:
        return tuple(map(len, part)) == self._metas[name].torch_shape

    def _needs(self, name: str, part: Ranges) -> tuple[tuple[int, int], ...] | None:
        """Return the bounds of the scales that a part needs, or None if it cuts a block in two."""
        shape = self._metas[name].torch_shape
        sizes = _sizes(self._size, len(shape))
        for one, size, whole in zip(part, sizes, shape, strict=True):
            if one.start % size or (one.stop % size and one.stop != whole):
                return None
        return tuple((one.start // size, -(-one.stop // size)) for one, size in zip(part, sizes, strict=True))


def _pairs(size: Sequence[int], metas: Mapping[str, TensorMeta]) -> Iterator[tuple[str, str]]:
    for name, meta in metas.items():
        stem = name.removesuffix("weight")
        shape = meta.torch_shape
        if len(shape) < len(size):
            continue
        due = tuple(-(-one // block) for one, block in zip(shape, _sizes(size, len(shape)), strict=True))
        for scales in (f"{name}_scale_inv", f"{stem}scale", f"{stem}qscale_weight"):
            if scales != name and scales in metas and metas[scales].torch_shape == due:
                yield name, scales
                break


def _sizes(size: Sequence[int], dimensions: int) -> tuple[int, ...]:
    return (1,) * (dimensions - len(size)) + tuple(size)


def _bounds(ranges: Ranges) -> tuple[tuple[int, int], ...]:
    return tuple((one.start, one.stop) for one in ranges)
