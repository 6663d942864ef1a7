# SPDX-License-Identifier: Apache-2.0
"""Tensors without bytes that remember how they come about, and the values of a checkpoint that make them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from weights_core import TensorMeta, dtypes
from weights_core.errors import EngineError
from weights_transformers import recipes
from weights_transformers.recipes import Call, Pieces, Recipe, mapped

SAME = frozenset(
    {"alias", "clone", "contiguous", "cpu", "cuda", "detach", "pin_memory", "requires_grad_", "view_as"}
)
"""What changes neither the elements nor their order, where it does not change the shape or strides."""
ASKS = frozenset(
    {
        "device.__get__",
        "dim",
        "dtype.__get__",
        "element_size",
        "grad_fn.__get__",
        "is_floating_point",
        "is_meta.__get__",
        "ndim.__get__",
        "numel",
        "requires_grad.__get__",
        "shape.__get__",
        "size",
        "stride",
    }
)
"""What tells of a tensor and makes none."""
WRITES = re.compile(r"__setitem__|__i(?!nvert)\w+__|.*[^_]_")
"""The names of what writes in place: item assignment, `+=` and its like, and what ends in one underscore."""


class Tracer:
    """What one trace has seen: the names that were asked for, and the first thing it cannot follow."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.lost: EngineError | None = None
        self._recipes: dict[torch.UntypedStorage, Recipe] = {}

    def note(self, tensor: torch.Tensor, recipe: Recipe) -> None:
        """Note how a tensor comes about, for where torch makes a plain tensor of it."""
        self._recipes[tensor.untyped_storage()] = recipe

    def recipe_of(self, tensor: torch.Tensor) -> Recipe | None:
        """Return the recipe of a tensor on meta, or None if it was not traced."""
        if isinstance(tensor, Traced):
            return tensor.recipe
        return self._recipes.get(tensor.untyped_storage()) if tensor.is_meta else None

    def lose(self, why: str) -> EngineError:
        """Note that the trace is of no use, and return the error to raise."""
        self.lost = self.lost or EngineError(why)
        return self.lost


class Traced(torch.Tensor):
    """A tensor on meta with the recipe of its bytes. What torch makes of it is traced in turn.

    It stays on meta wherever it is moved to: the bytes will be read to where they belong.
    """

    recipe: Recipe
    tracer: Tracer

    @staticmethod
    def of(recipe: Recipe, own: torch.Tensor, tracer: Tracer) -> Traced:
        """Return `own` as a traced tensor; what else lies in its storage must have the same recipe."""
        made: Traced = torch.Tensor._make_subclass(Traced, own)
        made.recipe, made.tracer = recipe, tracer
        tracer.note(own, recipe)
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let torch compute shapes, and note what it did."""
        del types
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if _name(func) in ASKS:
                return func(*args, **kwargs)
            tracer = _tracer_of((*args, *kwargs.values()))
            try:
                return _traced(func, args, kwargs, tracer)
            except (NotImplementedError, RuntimeError, TypeError) as exc:  # needs the elements, or a device
                raise tracer.lose(f"{_name(func)} cannot be traced: {exc}") from exc


class Value:
    """A checkpoint's tensor as Transformers takes it in a state dict: shape and dtype, bytes when indexed.

    `take` is called with the index.
    """

    def __init__(self, meta: TensorMeta, take: Callable[[TensorMeta, Any], torch.Tensor]) -> None:
        self._meta = meta
        self._take = take

    @property
    def shape(self) -> torch.Size:
        """The shape torch gives the tensor."""
        return torch.Size(self._meta.torch_shape)

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored as."""
        return dtypes.to_torch(self._meta.dtype)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        """As of a safetensors slice."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As of a safetensors slice."""
        return self._meta.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return the selected part."""
        return self._take(self._meta, index)


def slices_of(index: Any) -> tuple[slice, ...] | None:
    """Return an index as slices of step 1; None if it is another kind of index."""
    if index is Ellipsis:
        return ()
    items = index if isinstance(index, tuple) else (index,)
    if all(isinstance(item, slice) and item.step in (None, 1) for item in items):
        return items
    return None


def values(metas: Mapping[str, TensorMeta], tracer: Tracer) -> dict[str, Any]:
    """Return a state dict to trace with.

    The traced tensors are made before they are asked for: Transformers asks in threads, and what these
    do in Python they wait for each other to do.
    """
    made = {name: _read_part(meta, (), tracer) for name, meta in metas.items()}

    def take(meta: TensorMeta, index: Any) -> torch.Tensor:
        tracer.asked.add(meta.name)
        slices = slices_of(index)
        first = None if slices else made.pop(meta.name, None)  # who asks again gets another
        tensor = first if first is not None else _read_part(meta, slices or (), tracer)
        return tensor if slices is not None else tensor[index]

    return {name: Value(meta, take) for name, meta in metas.items()}


def _read_part(meta: TensorMeta, slices: tuple[slice, ...], tracer: Tracer) -> Traced:
    pieces = recipes.part(meta, slices or None)
    return Traced.of(pieces, torch.empty(pieces.shape, dtype=pieces.dtype, device="meta"), tracer)


def _fresh(like: torch.Tensor) -> torch.Tensor:
    """Return a tensor on meta with the shape, dtype and strides of `like`, and storage of its own."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")


def _traced(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tracer: Tracer) -> Any:
    name = _name(func)
    first = args[0] if args else None
    if name == "to" and isinstance(first, Traced):
        return _to(func, first, args[1:], kwargs)
    if name in ("cpu", "cuda"):
        return first
    if name == "data.__set__" and isinstance(first, Traced):
        return _replace(first, args[1], tracer)
    if name != "requires_grad_" and (_writes(name) or kwargs.get("out") is not None):
        raise tracer.lose(f"{name} writes in place what is not read yet")
    result = func(*args, **kwargs)
    if name == "requires_grad_" or name.endswith(".__set__"):
        return result
    if isinstance(result, torch.Tensor):
        recipe = _recipe(name, func, args, kwargs, result)
        is_same = isinstance(first, Traced) and recipe is first.recipe
        return Traced.of(recipe, result if is_same else _fresh(result), tracer)
    if isinstance(result, tuple | list) and any(isinstance(item, torch.Tensor) for item in result):
        plain_args, plain_kwargs = _plain(args), _plain(kwargs)
        return type(result)(
            Traced.of(
                _item(name, args, kwargs, result, index) or Call(func, plain_args, plain_kwargs, index),
                _fresh(item),
                tracer,
            )
            for index, item in enumerate(result)
        )
    return result


def _recipe(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor
) -> Recipe:
    first = args[0] if args else None
    if isinstance(first, Traced):
        unchanged = first.shape == result.shape and first.stride() == result.stride()
        if unchanged and first.dtype == result.dtype and _keeps_elements(name, args, kwargs):
            return first.recipe
        if name == "__getitem__" and isinstance(first.recipe, Pieces):
            slices = slices_of(args[1])
            found = None if slices is None else recipes.narrow(first.recipe, slices)
            if found is not None:
                return found
    elif name in ("stack", "cat", "concat") and isinstance(first, tuple | list):
        parts = [one.recipe for one in first if isinstance(one, Traced)]
        pieces = [one for one in parts if isinstance(one, Pieces)]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if pieces and len(pieces) == len(first):
            found = recipes.stack(pieces, dim) if name == "stack" else recipes.concatenate(pieces, dim)
            if found is not None:
                return found
    return Call(func, _plain(args), _plain(kwargs))


def _keeps_elements(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call that changes no shape changes nothing."""
    if name == "pad":
        return not any(args[1] if len(args) > 1 else kwargs["pad"])
    return name in SAME or name == "data.__get__"


def _item(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Sequence[torch.Tensor], index: int
) -> Pieces | None:
    """Return one part of a tensor that was split, as pieces."""
    first = args[0] if args else None
    if (
        name not in ("chunk", "split")
        or not isinstance(first, Traced)
        or not isinstance(first.recipe, Pieces)
    ):
        return None
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % first.dim()
    begin = sum(one.shape[dim] for one in result[:index])
    cut = slice(begin, begin + result[index].shape[dim])
    return recipes.narrow(first.recipe, (*(slice(None),) * dim, cut))


def _to(func: Callable[..., Any], tensor: Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """Convert, and stay where it is: bytes are read to where they belong."""
    given = (*args, kwargs.get("dtype"), kwargs.get("other"))
    dtype = next((one for one in given if isinstance(one, torch.dtype)), None)
    dtype = dtype or next((one.dtype for one in given if isinstance(one, torch.Tensor)), tensor.dtype)
    if dtype == tensor.dtype:
        return tensor
    result = tensor.detach().to(dtype)
    found = recipes.cast(tensor.recipe, dtype) if isinstance(tensor.recipe, Pieces) else None
    return Traced.of(found or Call(func, (tensor.recipe, dtype), {}), result, tensor.tracer)


def _replace(tensor: Traced, data: object, tracer: Tracer) -> None:
    if not isinstance(data, Traced) or data.shape != tensor.shape or data.dtype != tensor.dtype:
        raise tracer.lose("a tensor's data is replaced by what is not traced")
    tensor.data, tensor.recipe = _fresh(data), data.recipe  # what it was a view of stays as it was
    tracer.note(tensor, data.recipe)


def _plain(value: Any) -> Any:
    return mapped(value, lambda one: one.recipe if isinstance(one, Traced) else one)


def _tracer_of(value: Any) -> Tracer:
    due = list(value)
    while due:
        one = due.pop()
        if isinstance(one, Traced):
            return one.tracer
        if isinstance(one, tuple | list):
            due += one
        elif isinstance(one, Mapping):
            due += one.values()
    raise EngineError("torch traced a call without a traced tensor")


@functools.lru_cache(1024)
def _writes(name: str) -> bool:
    return WRITES.fullmatch(name) is not None


@functools.lru_cache(1024)
def _name(func: Callable[..., Any]) -> str:
    """Return a function's name; a property's with `__get__` or `__set__` behind it."""
    name = getattr(func, "__name__", str(func))
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return f"{owner}.{name}" if name in ("__get__", "__set__") else name
