# SPDX-License-Identifier: Apache-2.0
"""Digests of tensors: xxh3_128 of each on the host, sums over blocks where the bytes are on a device.

Both guard against faults, not against whoever wants to forge them: who may offer weights is trusted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import xxhash

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

ALGORITHM = "xxh3_128"
BLOCK = 32 << 20
"""Bytes of a device's segment that one sum is over; fits a device's cache."""
_AT_ONCE = 8
"""Blocks whose products are in memory at a time."""
_PIECE = 1 << 20
_BATCH = 4 << 20
_GOLDEN, _MIX = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9


class Hasher:
    """The digest of one range of memory, fed piece by piece by whoever has it in cache."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, address: int, nbytes: int) -> None:
        """Add bytes."""
        if nbytes:
            self._state.update((ctypes.c_ubyte * nbytes).from_address(address))

    @property
    def value(self) -> str:
        """`algorithm:hex`."""
        return f"{ALGORITHM}:{self._state.hexdigest()}"


def digest(address: int, nbytes: int) -> str:
    """Return the digest of a range of this process's memory, `algorithm:hex`."""
    hasher = Hasher()
    for start in range(0, nbytes, _PIECE):
        hasher.update(address + start, min(_PIECE, nbytes - start))
    return hasher.value


def digests(ranges: Sequence[tuple[int, int]], threads: int) -> list[str]:
    """Return the digest of each (address, bytes)."""
    order = sorted(range(len(ranges)), key=lambda i: ranges[i][1], reverse=True)  # the largest first
    found: dict[int, str] = {}

    def hash_all(batch: Sequence[int]) -> None:
        for index in batch:
            found[index] = digest(*ranges[index])

    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="weights-hash") as pool:
        for _ in pool.map(hash_all, batched(order, lambda index: ranges[index][1])):
            pass
    return [found[index] for index in range(len(ranges))]


def batched(items: Iterable[T], nbytes: Callable[[T], int]) -> list[list[T]]:
    """Put small ones that follow one another together, so that a thread is not asked for every kilobyte."""
    batches: list[list[T]] = []
    room = 0
    for item in items:
        if not batches or nbytes(item) > room:
            batches.append([])
            room = _BATCH
        batches[-1].append(item)
        room -= nbytes(item)
    return batches


def multipliers(device: torch.device | str) -> torch.Tensor:
    """Return an odd number for each of a block's words, the same in every process."""
    import torch

    words = torch.arange(1, BLOCK // 8 + 1, dtype=torch.int64, device=device) * _GOLDEN
    for shift in (30, 27):
        words = (words ^ (words >> shift)) * _MIX
    return words | 1


def block_sums(flat: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return one number for each block of a segment: its words, each times its factor, modulo 2**64.

    A word that differs changes the sum, for the factors are odd; so do words that changed places. All
    of it is on the bytes' own device, and is only begun there.

    Args:
        flat: bytes, a multiple of eight of them.
        factors: `multipliers` on the same device.
    """
    import torch

    words = flat.view(torch.int64)
    step = factors.numel()
    whole = words[: words.numel() // step * step].view(-1, step)
    sums = [torch.sum(some * factors, dim=1) for some in torch.split(whole, _AT_ONCE)]
    rest = words[whole.numel() :]
    if rest.numel():
        sums.append(torch.sum(rest * factors[: rest.numel()], dim=0, keepdim=True))
    return torch.cat(sums) if sums else words[:0]
