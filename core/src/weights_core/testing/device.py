# SPDX-License-Identifier: Apache-2.0
"""A CUDA device whose memory is the host's: the logic above the driver runs where there is no GPU."""

from __future__ import annotations

import ctypes
import mmap
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from weights_core.cuda import CudaMapping, Device
from weights_core.memory import libc

if TYPE_CHECKING:
    import torch

_OK, _FULL = "success", "out of memory"
_MAP_FIXED = 0x10


class HostDriver:
    """The calls of the driver that `Device` makes: handles are memfds, addresses are the host's.

    Every call checks what the driver would: sizes, that nothing is mapped twice, or freed while mapped.
    """

    CUresult = SimpleNamespace(CUDA_SUCCESS=_OK, CUDA_ERROR_OUT_OF_MEMORY=_FULL)
    CUmemAccess_flags = SimpleNamespace(
        CU_MEM_ACCESS_FLAGS_PROT_READ=mmap.PROT_READ,
        CU_MEM_ACCESS_FLAGS_PROT_READWRITE=mmap.PROT_READ | mmap.PROT_WRITE,
    )

    def __init__(self) -> None:
        self.room = 1 << 40
        """Bytes above which an allocation finds the device full."""
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self._libc = libc()
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    @staticmethod
    def CUmemAccessDesc() -> SimpleNamespace:  # noqa: N802 - the driver's name
        """Return what access is asked for with."""
        return SimpleNamespace(location=SimpleNamespace(), flags=None)

    def _fixed(self, address: int, length: int, fd: int) -> None:
        flags = 0x10 | (mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        assert self._libc.mmap(address, length, 0, flags, fd, 0) == address

    def cuMemCreate(self, length: int, properties: Any, flags: int) -> tuple[str, int | None]:  # noqa: N802
        """Return a memfd."""
        if length > self.room:
            return _FULL, None
        handle = os.memfd_create("fake-device")
        os.ftruncate(handle, length)
        return _OK, handle

    def cuMemExportToShareableHandle(self, handle: int, kind: Any, flags: int) -> tuple[str, int]:  # noqa: N802
        """Return a descriptor."""
        return _OK, os.dup(handle)

    def cuMemImportFromShareableHandle(self, descriptor: int, kind: Any) -> tuple[str, int]:  # noqa: N802
        """Return a handle."""
        return _OK, os.dup(descriptor)

    def cuMemRelease(self, handle: int) -> tuple[str]:  # noqa: N802
        """Give a handle up."""
        os.close(handle)
        return (_OK,)

    def cuMemAddressReserve(self, length: int, *_: Any) -> tuple[str, int]:  # noqa: N802
        """Return addresses that nothing is mapped at."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = self._libc.mmap(None, length, 0, flags, -1, 0)
        assert address is not None
        self.reserved[address] = length
        return _OK, address

    def cuMemMap(self, address: int, length: int, offset: int, handle: int, flags: int) -> tuple[str]:  # noqa: N802
        """Map."""
        assert address not in self.mapped
        assert os.fstat(handle).st_size == length
        self._fixed(address, length, handle)
        self.mapped[address] = length
        return (_OK,)

    def cuMemSetAccess(self, address: int, length: int, access: Any, count: int) -> tuple[str]:  # noqa: N802
        """Protect."""
        assert self._libc.mprotect(address, length, access[0].flags) == 0
        return (_OK,)

    def cuMemUnmap(self, address: int, length: int) -> tuple[str]:  # noqa: N802
        """Unmap, and keep the addresses."""
        assert self.mapped.pop(address) == length
        self._fixed(address, length, -1)
        return (_OK,)

    def cuMemAddressFree(self, address: int, length: int) -> tuple[str]:  # noqa: N802
        """Give addresses back."""
        assert address not in self.mapped
        assert self.reserved.pop(address) == length
        self._libc.munmap(address, length)
        return (_OK,)


class HostDevice(Device):
    """A device on a `HostDriver`; counts how often it was waited for."""

    def __init__(self, driver: HostDriver, uuid: str = "GPU-host", granularity: int = 1 << 16) -> None:
        self.driver, self.index, self.uuid, self.granularity = driver, 0, uuid, granularity
        self._handle_type = self._location = "host"
        self.waits = 0

    def create(self, length: int) -> Any:
        """Return a handle of new memory."""
        return self.call("cuMemCreate", length, None, 0)

    def view(self, mapping: CudaMapping, offset: int, nbytes: int) -> torch.Tensor:
        """Return mapped bytes as a flat uint8 tensor of the host that keeps `mapping`."""
        import torch

        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        raw: Any = (ctypes.c_ubyte * nbytes).from_address(mapping.address + offset)
        raw.mapping = mapping
        return torch.frombuffer(raw, dtype=torch.uint8)

    def synchronize(self) -> None:
        """Count."""
        self.waits += 1

    def trim(self) -> None:
        """Nothing is cached."""
