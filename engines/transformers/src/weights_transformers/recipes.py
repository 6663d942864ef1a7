# SPDX-License-Identifier: Apache-2.0
"""How each tensor of a model comes about from those of a checkpoint.

Most tensors are pieces of the checkpoint side by side: one whole tensor, a rank's slice of it, or a
stack of experts. Those can be read straight to where they belong. What else an engine does, a
transposition say, is kept as the call that it made, and made again with the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch

from weights_core import TensorMeta, dtypes
from weights_core.weightset import Slices, normalise

Region: TypeAlias = tuple[slice | int, ...]


@attrs.frozen(eq=False)
class Block:
    """A part of a checkpoint's tensor, and the region of a tensor of the model that it fills."""

    meta: TensorMeta
    slices: Slices | None
    region: Region

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored as."""
        return dtypes.to_torch(self.meta.dtype)


@attrs.frozen(eq=False)
class Pieces:
    """Blocks that fill a tensor of `shape`, converted to `dtype` where they are stored as another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]


@attrs.frozen(eq=False)
class Call:
    """What `function` returns where some arguments are recipes; item `index`, if it returns several."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int | None = None


@attrs.frozen(eq=False)
class Held:
    """A tensor that no checkpoint holds, and that has its value already."""

    tensor: torch.Tensor


Recipe: TypeAlias = Pieces | Call | Held


def part(meta: TensorMeta, slices: Slices | None = None) -> Pieces:
    """Return the recipe of a checkpoint's tensor, or of a part of it."""
    ranges = normalise(slices, meta.torch_shape)
    shape = tuple(len(chosen) for chosen in ranges)
    cut = None if shape == meta.torch_shape else tuple(slice(r.start, r.start + len(r)) for r in ranges)
    return Pieces(shape, dtypes.to_torch(meta.dtype), (Block(meta, cut, _whole(shape)),))


def stack(parts: Sequence[Pieces], dim: int) -> Pieces | None:
    """Return the recipe of `torch.stack`, or None if it is none of pieces."""
    first = parts[0]
    if any((one.shape, one.dtype) != (first.shape, first.dtype) for one in parts):
        return None
    dim %= len(first.shape) + 1
    return Pieces(
        (*first.shape[:dim], len(parts), *first.shape[dim:]),
        first.dtype,
        tuple(
            attrs.evolve(block, region=(*block.region[:dim], index, *block.region[dim:]))
            for index, one in enumerate(parts)
            for block in one.blocks
        ),
    )


def concatenate(parts: Sequence[Pieces], dim: int) -> Pieces | None:
    """Return the recipe of `torch.cat`, or None if it is none of pieces."""
    first = parts[0]
    if any(len(one.shape) != len(first.shape) or one.dtype != first.dtype for one in parts):
        return None
    dim %= len(first.shape)
    blocks: list[Block] = []
    begin = 0
    for one in parts:
        blocks += (attrs.evolve(block, region=_shifted(block.region, dim, begin)) for block in one.blocks)
        begin += one.shape[dim]
    return Pieces((*first.shape[:dim], begin, *first.shape[dim + 1 :]), first.dtype, tuple(blocks))


def narrow(recipe: Pieces, index: Slices) -> Pieces | None:
    """Return the recipe of a part of one checkpoint's tensor, or None if it is put together of several."""
    if len(recipe.blocks) != 1:
        return None
    block = recipe.blocks[0]
    before = normalise(block.slices, block.meta.torch_shape)
    if tuple(len(r) for r in before) != recipe.shape:
        return None
    chosen = [r[s] for r, s in zip(before, _padded(index, len(before)), strict=True)]
    cut = part(block.meta, tuple(slice(r.start, r.start + len(r)) for r in chosen))
    return attrs.evolve(cut, dtype=recipe.dtype)


def cast(recipe: Pieces, dtype: torch.dtype) -> Pieces | None:
    """Return the recipe of a conversion, or None if it would be the second."""
    if any(block.dtype != recipe.dtype for block in recipe.blocks):
        return None
    return attrs.evolve(recipe, dtype=dtype)


def leaves(recipe: Recipe) -> Iterator[Pieces]:
    """Yield the pieces that a recipe needs, each once."""
    seen: set[int] = set()
    due: list[Any] = [recipe]
    while due:
        one = due.pop()
        if isinstance(one, Pieces) and id(one) not in seen:
            seen.add(id(one))
            yield one
        elif isinstance(one, Call):
            due += (*one.args, *one.kwargs.values())
        elif isinstance(one, tuple | list):
            due += one
        elif isinstance(one, Mapping):
            due += one.values()


def evaluated(recipe: Recipe, have: Callable[[Pieces], torch.Tensor]) -> torch.Tensor:
    """Make the calls of a recipe with the tensors that `have` returns for its pieces."""
    made: dict[tuple[object, ...], Any] = {}

    def value(one: Any) -> Any:
        if isinstance(one, Pieces):
            return have(one)
        if isinstance(one, Held):
            return one.tensor
        if isinstance(one, Call):
            key = (one.function, id(one.args))  # items of one result share the arguments
            if key not in made:
                made[key] = one.function(*value(one.args), **value(one.kwargs))
            return made[key] if one.index is None else made[key][one.index]
        return mapped(one, value) if _is_collection(one) else one

    with torch.no_grad():
        result: torch.Tensor = value(recipe)
    return result


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return `function` of a value, or a collection of what it gives for each value in one."""
    if isinstance(value, Mapping):
        return {key: mapped(item, function) for key, item in value.items()}
    if _is_collection(value):
        return type(value)(mapped(item, function) for item in value)
    return function(value)


def _is_collection(value: object) -> bool:
    """Whether a value may hold recipes; a `torch.Size`, say, is a tuple that does not."""
    return isinstance(value, Mapping) or type(value) in (tuple, list)


def fingerprint(recipes: Mapping[str, Recipe]) -> str:
    """Return a short digest of what is made of a checkpoint, the same in every process.

    Engines of one class may make different weights of one checkpoint, by a mapping of names, say.
    """
    digest = hashlib.blake2b(digest_size=6)
    for name in sorted(recipes):
        digest.update(repr((name, _plain(recipes[name]))).encode())
    return digest.hexdigest()


def _plain(value: Any) -> object:
    if isinstance(value, Pieces):
        blocks = [(block.meta.name, block.slices, block.region) for block in value.blocks]
        return value.shape, str(value.dtype), blocks
    if isinstance(value, Held):
        return tuple(value.tensor.shape), str(value.tensor.dtype)
    if isinstance(value, Call):
        return getattr(value.function, "__name__", ""), _plain(value.args), _plain(value.kwargs), value.index
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return [(key, _plain(one)) for key, one in sorted(value.items())]
    known = isinstance(value, str | int | float | bool | slice | torch.dtype | None)
    return repr(value) if known else type(value).__name__  # what others print may differ by process


def _whole(shape: tuple[int, ...]) -> Region:
    return tuple(slice(0, size) for size in shape)


def _shifted(region: Region, dim: int, by: int) -> Region:
    at = region[dim]
    moved = at + by if isinstance(at, int) else slice(at.start + by, at.stop + by)
    return (*region[:dim], moved, *region[dim + 1 :])


def _padded(index: Slices, dims: int) -> Slices:
    return (*index, *(slice(None),) * (dims - len(index)))
