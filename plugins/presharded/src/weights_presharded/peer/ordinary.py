# SPDX-License-Identifier: Apache-2.0
"""Memory of a device's ordinary allocator, for a source that only NIXL serves.

Memory that descriptors can be had of is mapped by hand, and UCX stages that through the host unless a
network card can read it; ordinary memory goes straight from device to device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from weights_core.arena import Segment
from weights_core.backing import Backing
from weights_core.errors import ArenaError
from weights_presharded.peer.landing import plain

if TYPE_CHECKING:
    import torch


class OrdinarySegment:
    """A tensor's memory, which no descriptor can be had of."""

    descriptor = -1

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory

    @property
    def address(self) -> int:
        """Where it lies."""
        return self._memory.data_ptr()

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes as a flat uint8 tensor."""
        return self._memory[offset : offset + nbytes]

    def fitted(self, used: int) -> int:
        """All of it."""
        del used
        return self._memory.numel()

    def seal(self, nbytes: int) -> None:
        """Nothing: such memory cannot be protected."""

    def sleep(self) -> NoReturn:
        """Refuse.

        Raises:
            ArenaError: always.
        """
        raise ArenaError("ordinary memory of a device cannot be given up under its addresses")

    def wake(self, descriptor: int, nbytes: int) -> NoReturn:
        """Refuse, as `sleep` does."""
        self.sleep()

    def close(self) -> None:
        """Nothing: there is no descriptor."""


class OrdinaryBacking(Backing):
    """Ordinary memory of a device."""

    def __init__(self, shared: Backing, take: Callable[[int], torch.Tensor]) -> None:
        """Take memory by `take`, of the device that `shared` makes other memory of."""
        self.kind, self.device = shared.kind, shared.device
        self._shared = shared
        self._take = take

    def create(self, nbytes: int, *, private: bool) -> Segment:
        """Take memory, once torch has given back what it only caches.

        Raises:
            ArenaError: the device is full.
        """
        import torch

        torch.cuda.empty_cache()
        try:
            return OrdinarySegment(self._take(nbytes))
        except torch.OutOfMemoryError as exc:
            raise ArenaError(f"the device is full: {nbytes:,} bytes cannot be had") from exc

    def attach(self, descriptor: int, nbytes: int, *, private: bool) -> NoReturn:
        """Refuse.

        Raises:
            ArenaError: always.
        """
        raise ArenaError("ordinary memory of a device cannot be mapped by another process")

    def written(self) -> None:
        """Wait for the device."""
        self._shared.written()

    def check_room(self, nbytes: int) -> None:
        """Nothing: it is seen when memory is taken."""

    def private_bytes(self, segments: Sequence[Segment]) -> int:
        """None."""
        return 0


def memory_to_serve(backing: Backing, transport: str, device: str) -> Backing:
    """Return the memory that a source on `device` serves from: ordinary if only NIXL reads it."""
    if transport == "nixl" and backing.kind == "cuda":
        return OrdinaryBacking(backing, plain(device))
    return backing
