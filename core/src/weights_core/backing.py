# SPDX-License-Identifier: Apache-2.0
"""The memory that weights are shared in: of the host, or of a CUDA device."""

from __future__ import annotations

import abc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weights_core.arena import Segment
from weights_core.cuda import CudaSegment, Device
from weights_core.errors import EngineError
from weights_core.memory import HostSegment, check_room

if TYPE_CHECKING:
    from weights_core import EngineInfo


class Backing(abc.ABC):
    """Makes and maps memory of one kind."""

    kind: str
    device: str
    """Which device it is of, by a name that is the same in every process."""

    @abc.abstractmethod
    def create(self, nbytes: int, *, private: bool) -> Segment:
        """Make memory to be filled; `private`: what is written after sealing is this process's alone."""

    @abc.abstractmethod
    def attach(self, descriptor: int, nbytes: int, *, private: bool) -> Segment:
        """Map memory that another process filled; takes over the descriptor, also if it fails."""

    def check_room(self, nbytes: int) -> None:
        """Refuse to fill memory that is not there."""
        check_room(nbytes)

    def written(self) -> None:  # noqa: B027 - the host has nothing to wait for
        """Wait until all that was written has arrived."""

    @abc.abstractmethod
    def private_bytes(self, segments: Sequence[Segment]) -> int:
        """Return how much of `segments` this process has replaced by copies of its own."""


class HostBacking(Backing):
    """Host memory, by memfd."""

    kind = "host"
    device = "cpu"

    def create(self, nbytes: int, *, private: bool) -> Segment:
        """Make a memfd; it takes no memory until it is written."""
        return HostSegment.create(nbytes, "private" if private else "read")

    def attach(self, descriptor: int, nbytes: int, *, private: bool) -> Segment:
        """Map a sealed memfd."""
        return HostSegment.attach(descriptor, nbytes, "private" if private else "read")

    def private_bytes(self, segments: Sequence[Segment]) -> int:
        """Add up the dirty pages of the mappings."""
        addresses = {segment.address for segment in segments}
        total, ours = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            start = re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line)
            if start is not None:
                ours = int(start[1], 16) in addresses
            elif ours and line.startswith("Private_Dirty:"):
                total += int(line.split()[1]) * 1024
        return total


class CudaBacking(Backing):
    """Memory of one CUDA device."""

    kind = "cuda"

    def __init__(self, device: Device) -> None:
        self._device = device
        self.device = device.uuid

    def create(self, nbytes: int, *, private: bool) -> Segment:
        """Make a segment, once torch has given back what it only caches."""
        self._device.trim()
        return CudaSegment.create(self._device, nbytes, private=private)

    def attach(self, descriptor: int, nbytes: int, *, private: bool) -> Segment:
        """Map a segment for reading."""
        return CudaSegment.attach(self._device, descriptor, nbytes, private=private)

    def check_room(self, nbytes: int) -> None:
        """Nothing: device memory is taken when a segment is made, and that fails cleanly."""

    def written(self) -> None:
        """Wait for the device."""
        self._device.synchronize()

    def private_bytes(self, segments: Sequence[Segment]) -> int:
        """All of it: on a device a copy is whole."""
        return sum(segment.fitted(0) for segment in segments)


def backing_for(info: EngineInfo) -> Backing:
    """Return the memory that an engine's weights live in.

    Raises:
        EngineError: its device is neither the host's nor CUDA.
        ExtraNotInstalledError: sharing CUDA memory needs a package that is not installed.
    """
    return backing_of(info.device)


def backing_of(device: str) -> Backing:
    """Return the memory of a device, as torch names it; raises as `backing_for`."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        return HostBacking()
    if kind == "cuda":
        return CudaBacking(Device(device))
    raise EngineError(f"weights on {device} cannot be shared: only the host's memory and CUDA's can")
