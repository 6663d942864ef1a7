# SPDX-License-Identifier: Apache-2.0
"""Small helpers on torch tensors. Imports torch: only for modules that are imported when needed."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from weights_core import dtypes
from weights_core.errors import EngineError
from weights_core.types import TensorMeta

LARGE = 256 << 10
"""Bytes from which on `empty` maps memory for the tensor alone."""

HUGE = 4 << 20
"""Bytes from which on that memory is asked for in huge pages."""

STAGE = 16 << 20
"""Bytes of host memory that `stage_for` returns at most."""


def nbytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def meta_of(name: str, tensor: torch.Tensor) -> TensorMeta:
    """Return what is known of a tensor without its elements.

    Raises:
        EngineError: it has a dtype that no checkpoint can hold.
    """
    try:
        dtype = dtypes.from_torch(tensor.dtype)
    except KeyError:
        raise EngineError(f"tensor {name!r} has dtype {tensor.dtype}, which no checkpoint can hold") from None
    return TensorMeta(name, dtypes.stored_shape(dtype, tuple(tensor.shape)), dtype, nbytes(tensor))


def slots(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield where each parameter and persistent buffer hangs: a module's dict, the full name, the key there.

    In the order of `named_modules`; what is tied, or in a module that is shared, comes under each name.
    """
    due = [("", model)]
    while due:
        prefix, module = due.pop()
        for place in (module._parameters, module._buffers):
            for key, tensor in list(place.items()):
                if tensor is not None and key not in module._non_persistent_buffers_set:
                    yield place, prefix + key, key
        children = [
            (f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None
        ]
        due += reversed(children)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what can be written: parameters and persistent buffers, ties under each of their names.

    Not the state dict: a module's hooks may hand out copies or other names there.
    """
    return {name: place[key] for place, name, key in slots(model)}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements as a flat uint8 tensor: a view if contiguous, else a copy."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # a single element may have any stride


def empty(shape: tuple[int, ...], dtype: torch.dtype, *, offset: int | None = None) -> torch.Tensor:
    """Return uninitialised contiguous host memory of `shape` and `dtype`, good to read a file into.

    A tensor of `LARGE` bytes or more has a mapping of its own: its address is congruent to `offset`,
    the place in the file in bytes, modulo the page, which is what a direct read needs; it is touched
    for the first time in huge pages where the system has them, at half the cost; and it goes back
    to the system with the tensor. The storage begins and ends with the tensor, as `torch.empty`'s.

    Raises:
        MemoryError: the system has not that much.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    shift = (offset or 0) % mmap.PAGESIZE
    if shift % dtype.itemsize:
        shift = 0  # an odd place in the file; the elements must be aligned all the same
    try:
        memory = mmap.mmap(-1, shift + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise MemoryError(f"no memory for a tensor of {size} bytes: {exc.strerror}") from exc
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=shift)
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    return tensor.set_(flat.untyped_storage(), 0, shape, _strides(shape))


def allocate(nbytes: int, offset: int = 0) -> torch.Tensor:
    """Return bytes made by `empty`, as sets allocate; see `weights_core.weightset.Allocate`."""
    return empty((nbytes,), torch.uint8, offset=offset)


def stage_for(out: torch.Tensor) -> torch.Tensor:
    """Return host memory, as flat uint8, to bring bytes to a device through; pinned if that is CUDA's.

    Torch keeps pinned memory for the next call.
    """
    is_cuda = out.device.type == "cuda"
    return torch.empty(min(nbytes(out), STAGE), dtype=torch.uint8, device="cpu", pin_memory=is_cuda)


def fill_through(stage: torch.Tensor, out: torch.Tensor, read: Callable[[torch.Tensor, int], None]) -> None:
    """Fill contiguous `out`, on any device, through `stage`, as often as it takes.

    `read(memory, begin)` is to fill `memory` with the bytes from `begin` on.
    """
    flat = as_bytes(out)
    for begin in range(0, flat.numel(), max(1, stage.numel())):
        part = flat[begin : begin + stage.numel()]
        memory = stage[: part.numel()]
        read(memory, begin)
        part.copy_(memory)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
