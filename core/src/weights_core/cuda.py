# SPDX-License-Identifier: Apache-2.0
"""Device memory that processes share by file descriptors, through CUDA's virtual memory management.

A descriptor keeps the memory alive, also in a process that knows no CUDA, so the broker can hold it.
Mappings for reading are read-only, and a write through one is an illegal-address error; but whoever
has a descriptor could map it for writing, so this is for processes that trust one another.
"""

from __future__ import annotations

import importlib
import os
import weakref
from typing import TYPE_CHECKING, Any

from weights_core import live
from weights_core.errors import ArenaError, ExtraNotInstalledError

if TYPE_CHECKING:
    import torch


class Device:
    """One CUDA device and the driver's calls for its memory; every error names the call."""

    def __init__(self, name: str) -> None:
        """Open `cuda` or `cuda:N`, making the device's context if there is none.

        Raises:
            ExtraNotInstalledError: the driver's bindings are not installed.
            ArenaError: there is no such device.
        """
        try:
            driver: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as exc:
            raise ExtraNotInstalledError(
                f"sharing memory of {name} needs the driver's bindings: pip install 'weights-core[cuda]'"
            ) from exc
        import torch

        self.driver = driver
        if not torch.cuda.is_available():
            raise ArenaError(f"there is no CUDA device here to share memory of ({name})")
        self.index = int(name.partition(":")[2] or torch.cuda.current_device())
        torch.zeros(1, device=f"cuda:{self.index}")  # the context must be there before memory is mapped
        self.uuid = f"GPU-{torch.cuda.get_device_properties(self.index).uuid}"
        self._handle_type = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._location = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        recommended = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self.granularity = int(self.call("cuMemGetAllocationGranularity", self._properties(), recommended))

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver; return what it returns besides the status.

        Raises:
            ArenaError: it failed.
        """
        status, *rest = getattr(self.driver, name)(*arguments)
        if status != self.driver.CUresult.CUDA_SUCCESS:
            if status == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise ArenaError(f"the device cuda:{self.index} is full ({name})")
            raise ArenaError(f"{name} failed on cuda:{self.index}: {getattr(status, 'name', status)}")
        return rest[0] if rest else None

    def rounded(self, nbytes: int) -> int:
        """Return the size of an allocation that holds `nbytes`."""
        return max(1, -(-nbytes // self.granularity)) * self.granularity

    def create(self, length: int) -> Any:
        """Return a handle of new memory; RDMA-capable, which it can only be made, where that works."""
        rdma = self.driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
        properties = self._properties()
        if self.call("cuDeviceGetAttribute", rdma, self.call("cuDeviceGet", self.index)):
            properties.allocFlags.gpuDirectRDMACapable = 1
        return self.call("cuMemCreate", length, properties, 0)

    def export(self, handle: Any) -> int:
        """Return a descriptor of memory."""
        return int(self.call("cuMemExportToShareableHandle", handle, self._handle_type, 0))

    def import_(self, descriptor: int) -> Any:
        """Return a handle of the memory of a descriptor, which stays the caller's."""
        return self.call("cuMemImportFromShareableHandle", descriptor, self._handle_type)

    def map(self, address: int, length: int, handle: Any, *, write: bool) -> None:
        """Map memory at reserved addresses; the mapping keeps it, the handle is given up."""
        try:
            self.call("cuMemMap", address, length, 0, handle, 0)
        finally:
            self.call("cuMemRelease", handle)
        try:
            self.allow(address, length, write=write)
        except BaseException:
            self.call("cuMemUnmap", address, length)
            raise

    def allow(self, address: int, length: int, *, write: bool) -> None:
        """Set what this process may do with a mapping."""
        flags = self.driver.CUmemAccess_flags
        access = self.driver.CUmemAccessDesc()
        access.location.type = self._location
        access.location.id = self.index
        access.flags = (
            flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if write else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        )
        self.call("cuMemSetAccess", address, length, [access], 1)

    def view(self, mapping: CudaMapping, offset: int, nbytes: int) -> torch.Tensor:
        """Return mapped bytes as a flat uint8 tensor whose storage keeps `mapping`."""
        import torch

        where = f"cuda:{self.index}"
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=where)
        return torch.as_tensor(_Bytes(mapping, offset, nbytes), device=where)

    def synchronize(self) -> None:
        """Wait for all that was begun on the device."""
        import torch

        torch.cuda.synchronize(self.index)

    def trim(self) -> None:
        """Have torch give back what it only caches."""
        import torch

        torch.cuda.empty_cache()

    def _properties(self) -> Any:
        properties = self.driver.CUmemAllocationProp()
        properties.type = self.driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = self._location
        properties.location.id = self.index
        properties.requestedHandleTypes = self._handle_type
        return properties


class CudaMapping:
    """Reserved device addresses and what is mapped there; given back when no tensor lives in them."""

    def __init__(self, device: Device, length: int) -> None:
        self.device = device
        self.length = length
        self.address = int(device.call("cuMemAddressReserve", length, 0, 0, 0))
        self._state = [False]
        weakref.finalize(self, _give_back, device, self.address, length, self._state).atexit = False

    def map(self, handle: Any, *, write: bool) -> None:
        """Map memory; the handle is given up."""
        self.device.map(self.address, self.length, handle, write=write)
        self._state[0] = True

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes as a flat uint8 tensor that keeps the memory mapped."""
        return self.device.view(self, offset, nbytes)

    def unmap(self) -> None:
        """Take the memory away once nothing that was begun can use it, and keep the addresses."""
        if self._state[0]:
            self.device.synchronize()
            self.device.call("cuMemUnmap", self.address, self.length)
            self._state[0] = False


class _Bytes:
    """A range of device memory, as torch takes it; torch keeps this object as long as the storage."""

    def __init__(self, mapping: CudaMapping, offset: int, nbytes: int) -> None:
        self.mapping = mapping
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (mapping.address + offset, False),
            "version": 3,
            "strides": None,
        }


class CudaSegment:
    """A piece of shared device memory: a descriptor and one mapping of it."""

    def __init__(self, descriptor: int, mapping: CudaMapping, *, private: bool) -> None:
        self.descriptor = descriptor
        self.mapping = mapping
        self.private = private
        self._close = weakref.finalize(self, os.close, descriptor)
        live.add(self)

    @classmethod
    def create(cls, device: Device, nbytes: int, *, private: bool) -> CudaSegment:
        """Make memory to be filled.

        Raises:
            ArenaError: the device is full.
        """
        length = device.rounded(nbytes)
        mapping = CudaMapping(device, length)
        handle = device.create(length)
        descriptor = device.export(handle)
        try:
            mapping.map(handle, write=True)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, mapping, private=private)

    @classmethod
    def attach(cls, device: Device, descriptor: int, nbytes: int, *, private: bool) -> CudaSegment:
        """Map what another process filled; takes over the descriptor, also if it fails."""
        try:
            mapping = CudaMapping(device, device.rounded(nbytes))
            mapping.map(device.import_(descriptor), write=False)
            made = cls(descriptor, mapping, private=private)
        except BaseException:
            os.close(descriptor)
            raise
        if private:
            made._copy()
        return made

    @property
    def address(self) -> int:
        """Where it is mapped in this process."""
        return self.mapping.address

    @property
    def nbytes(self) -> int:
        """Bytes that are mapped."""
        return self.mapping.length

    @property
    def is_open(self) -> bool:
        """Whether its descriptor is not closed, and is of what is mapped here."""
        return self._close.alive and not self.private

    @property
    def is_settled(self) -> bool:
        """Whether it is no copy of its own; on a device nothing is sealed."""
        return not self.private

    def again(self) -> CudaSegment:
        """Return the same mapping with a descriptor of its own."""
        return CudaSegment(os.dup(self.descriptor), self.mapping, private=self.private)

    def fitted(self, used: int) -> int:
        """All of it: device memory cannot be cut."""
        return self.mapping.length

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes as a flat uint8 tensor that keeps the memory mapped."""
        return self.mapping.tensor(offset, nbytes)

    def seal(self, nbytes: int) -> None:
        """Make it read-only for this process, under the tensors that live there."""
        if self.private:
            self._copy()
        else:
            self.mapping.device.allow(self.address, self.mapping.length, write=False)

    def sleep(self) -> None:
        """Give the memory up, and keep its addresses: graphs that were captured stay valid."""
        self.mapping.unmap()
        self.close()

    def wake(self, descriptor: int, nbytes: int) -> None:
        """Map the same memory at the same addresses; takes over the descriptor."""
        self.descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self.mapping.map(self.mapping.device.import_(descriptor), write=False)
        if self.private:
            self._copy()

    def close(self) -> None:
        """Close the descriptor; the tensors keep their memory."""
        self._close()

    def _copy(self) -> None:
        """Put a copy of one's own under the same addresses, for an engine that writes into it."""
        device, length = self.mapping.device, self.mapping.length
        fresh = CudaMapping(device, length)
        handle = device.create(length)
        kept = device.export(handle)
        try:
            fresh.map(handle, write=True)
            fresh.tensor(0, length).copy_(self.tensor(0, length))
            device.synchronize()
            self.mapping.unmap()
            self.mapping.map(device.import_(kept), write=True)
        finally:
            os.close(kept)


def _give_back(device: Device, address: int, length: int, state: list[bool]) -> None:
    if state[0]:
        device.synchronize()  # the last tensor may have died before the kernels that read it ran
        device.call("cuMemUnmap", address, length)
    device.call("cuMemAddressFree", address, length)
