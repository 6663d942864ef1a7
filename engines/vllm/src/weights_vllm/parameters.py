# SPDX-License-Identifier: Apache-2.0
"""The memory of a model's parameters: leave it out until it is known where they live, and move it.

The parameters stay the objects they are, with the loaders and marks that an engine has put on them;
only `data` changes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Container, Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from weights_core import TensorMeta
from weights_core.tensors import meta_of, nbytes

SMALL = 1 << 20
"""Bytes up to which a parameter is made with its memory: it may hold a default that no file has."""


@contextlib.contextmanager
def without_memory(spared: Container[str] = ("cpu",)) -> Iterator[None]:
    """Let large parameters that are made in this thread meanwhile have a shape, but no memory.

    Each is made and gives its memory back as it is registered, so that the next takes the same. The
    kinds of devices that are `spared` are left alone: memory of the host that nobody has written to
    is none.
    """
    thread = threading.get_ident()

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        del module, name
        ours = threading.get_ident() == thread
        if ours and parameter is not None and parameter.device.type not in spared:
            leave_out(parameter)

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def leave_out(parameter: torch.Tensor) -> None:
    """Give up the memory of a plain parameter of more than `SMALL` bytes."""
    if parameter.is_meta or nn.parameter.is_lazy(parameter) or nbytes(parameter) <= SMALL:
        return
    storage = parameter.untyped_storage()
    if storage.nbytes() == nbytes(parameter):  # else others share it
        storage.resize_(0)


def has_memory(parameter: torch.Tensor) -> bool:
    """Whether there is memory for a parameter's elements, or none is needed."""
    return not parameter.numel() or parameter.untyped_storage().nbytes() > 0


def give_memory(parameters: Mapping[str, torch.Tensor]) -> None:
    """Give memory to those that were made without."""
    for parameter in parameters.values():
        if not has_memory(parameter):
            parameter.untyped_storage().resize_(nbytes(parameter))


def move(parameters: Mapping[str, torch.Tensor], alloc: Callable[[TensorMeta], torch.Tensor]) -> int:
    """Move parameters that nothing was loaded into yet to memory from `alloc`; return the bytes.

    Small ones take with them what they hold. Those that lie in memory otherwise than element after
    element stay where they are.
    """
    moved = 0
    for name, parameter in parameters.items():
        if not parameter.is_contiguous() or not parameter.numel():
            continue
        meta = meta_of(name, parameter)
        data = alloc(meta)
        if nbytes(parameter) <= SMALL:
            data.copy_(parameter.detach())
        parameter.data = data
        moved += meta.nbytes
    return moved
