# SPDX-License-Identifier: Apache-2.0
"""The element types of tensors, by their names in the safetensors format.

The names and widths are those of the safetensors specification. Nothing here imports torch;
`to_torch` and `from_torch` do so when called.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of every dtype that safetensors knows."""

_TORCH = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor of `dtype` and `shape` takes.

    Raises:
        KeyError: `dtype` is not a safetensors dtype.
        ValueError: the elements do not fill whole bytes (4- and 6-bit types; F4 is packed by rows),
            or overflow 64 bits.
    """
    bits = BITS[dtype]
    for dimension in shape:
        bits *= dimension
        if bits >= 2**66:
            raise ValueError(f"{dtype} of shape {list(shape[:8])} is too large")
    if bits % 8 or (dtype == "F4" and (not shape or shape[-1] % 2)):
        raise ValueError(f"{dtype} of shape {list(shape)} does not fill whole bytes")
    return bits // 8


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape torch gives such a tensor: it packs two F4 elements into one."""
    if dtype != "F4" or not shape:
        return shape
    return (*shape[:-1], shape[-1] // 2)


def stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in the safetensors format of a tensor of torch shape `shape`."""
    if dtype != "F4" or not shape:
        return shape
    return (*shape[:-1], shape[-1] * 2)


@functools.cache
def to_torch(dtype: str) -> torch.dtype:
    """Return the torch dtype for a safetensors name.

    Raises:
        KeyError: this torch has no such dtype; safetensors has 6-bit floats that no torch has.
    """
    import torch

    found = getattr(torch, _TORCH.get(dtype, ""), None)
    if not isinstance(found, torch.dtype):
        raise KeyError(dtype)
    return found


@functools.cache
def from_torch(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype.

    Raises:
        KeyError: safetensors has no such dtype, e.g. complex128 or the quantised ones.
    """
    name = str(dtype).removeprefix("torch.")
    for ours, theirs in _TORCH.items():
        if theirs == name:
            return ours
    raise KeyError(name)
