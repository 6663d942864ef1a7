# SPDX-License-Identifier: Apache-2.0
"""What the machine offers to a load: cores, memory and its limits, storage, GPUs, RDMA.

Reads /proc and /sys and asks the driver's libraries directly; imports no torch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import resource
import sys
import tempfile
from pathlib import Path

import attrs

NETWORK = frozenset(
    ("nfs", "nfs4", "lustre", "ceph", "beegfs", "gpfs", "cifs", "smb3", "9p", "glusterfs", "wekafs")
)
"""Types of file systems whose files come over a network."""

_NVLINK_PORTS = 18
_NO_DEVICE = 100
_PROC = Path("/proc")
_SYS = Path("/sys")


@attrs.frozen
class Fact:
    """One thing the machine offers or lacks, and what that means for a load."""

    topic: str
    value: str
    meaning: str


def facts(path: Path) -> list[Fact]:
    """Return what this machine offers to a load of `path`."""
    return [
        _cores(),
        _memory(),
        _cgroup(),
        _open_files(),
        _file_system(path),
        _direct_io(path),
        _cuda(),
        _nvlink(),
        _rdma(),
    ]


def _cores() -> Fact:
    usable = len(os.sched_getaffinity(0))
    return Fact("cores", f"{usable} usable of {os.cpu_count()}", "readers beyond these wait for one another")


def _memory() -> Fact:
    fields = dict(
        line.split(":", 1) for line in _PROC.joinpath("meminfo").read_text().splitlines() if ":" in line
    )
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    meaning = "a model on the CPU, and whatever a source reads ahead, must fit into what is available"
    return Fact("memory", f"{_gib(free)} available of {_gib(total)}", meaning)


def _cgroup() -> Fact:
    limit, used = memory_limit()
    if limit is None:
        return Fact("memory limit", "none", "only the machine's memory bounds a load")
    meaning = "a load that needs more is killed; page cache counts, but is given back under pressure"
    return Fact("memory limit", f"{_gib(used)} used of {_gib(limit)}", meaning)


def memory_limit() -> tuple[int | None, int]:
    """Return the tightest memory limit of this process's control groups, and what is used of it.

    Bytes; None where there is no limit.
    """
    tightest: tuple[int | None, int] = (None, 0)
    for folder, limit_file, used_file in _cgroup_files():
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and limit < 1 << 60 and (tightest[0] is None or limit < tightest[0]):
            tightest = limit, used or 0
    return tightest


def memory_available() -> int:
    """Return the bytes that this process can still take, by the machine and by its control groups.

    What a group holds as page cache of files counts as available: it is given back under pressure.
    """
    meminfo = re.search(r"^MemAvailable:\s+(\d+) kB", _text(_PROC / "meminfo"), re.MULTILINE)
    rooms = [int(meminfo[1]) * 1024] if meminfo else []
    for folder, limit_file, used_file in _cgroup_files():
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and limit < 1 << 60:
            rooms.append(max(0, limit - (used or 0) + _file_cache(folder)))
    return min(rooms, default=sys.maxsize)


def _file_cache(folder: Path) -> int:
    """Return the bytes of a control group's page cache that can be dropped: not shared memory."""
    fields = dict(line.split() for line in _text(folder / "memory.stat").splitlines() if line.count(" ") == 1)
    return int(fields.get("active_file", 0)) + int(fields.get("inactive_file", 0))


def _cgroup_files() -> list[tuple[Path, str, str]]:
    """Return the folders of this process's group and its ancestors, of either version."""
    found = []
    for line in _text(_PROC / "self/cgroup").splitlines():
        number, controllers, group = line.split(":", 2)
        below = Path(group.lstrip("/"))
        for part in (below, *below.parents):
            if number == "0":
                found.append((_SYS / "fs/cgroup" / part, "memory.max", "memory.current"))
            elif "memory" in controllers.split(","):
                folder = _SYS / "fs/cgroup/memory" / part
                found.append((folder, "memory.limit_in_bytes", "memory.usage_in_bytes"))
    return found


def _open_files() -> Fact:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Fact("open files", f"at most {soft}", "each shard is held open during a load; see ulimit -n")


def _file_system(path: Path) -> Fact:
    kind = file_system(path)
    if kind in NETWORK:
        return Fact("file system", kind, "a network file system: many reads in flight hide its latency")
    if kind in ("tmpfs", "ramfs"):
        return Fact("file system", kind, "the files are memory already, and count against it")
    return Fact("file system", kind, "local storage")


_OCTAL = re.compile(r"\\([0-7]{3})")
"""How the kernel writes blanks in names."""


def file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`, or `unknown`."""
    place = f"{path.resolve()}/"
    best, kind = "", "unknown"
    for line in _text(_PROC / "self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        point = _OCTAL.sub(lambda code: chr(int(code[1], 8)), left.split()[4]).rstrip("/") + "/"
        if place.startswith(point) and len(point) >= len(best):  # a later mount covers an earlier
            best, kind = point, right.split()[0]
    return kind


def _direct_io(path: Path) -> Fact:
    works = direct_io(path)
    if works is None:
        return Fact("direct I/O", "not known", "there is no file here to try, and none may be made")
    if works:
        return Fact(
            "direct I/O", "works on this path", "a source that reads directly leaves the page cache alone"
        )
    return Fact("direct I/O", "not on this path", "reads go through the page cache")


def direct_io(path: Path) -> bool | None:
    """Try to read past the page cache, from a file of `path` or a new one; None if there can be neither."""
    sample = path if path.is_file() else next((p for p in _entries(path) if p.is_file()), None)
    if sample is not None:
        return _reads_directly(sample)
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".weights-doctor-") as made:
            made.write(bytes(mmap.PAGESIZE))
            made.flush()
            return _reads_directly(Path(made.name))
    except OSError:
        return None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _reads_directly(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:  # direct reads need aligned memory
            os.preadv(descriptor, [page], 0)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _cuda() -> Fact:
    names = cuda_devices()
    if isinstance(names, str):
        return Fact("CUDA", names, "weights load into host memory")
    listed = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return Fact("CUDA", listed or "no device", "engines may load straight to the device")


def cuda_devices() -> list[str] | str:
    """Return the names of the CUDA devices, or why there are none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no driver"
    status = driver.cuInit(0)
    if status == _NO_DEVICE:
        return "a driver, and no device"
    if status:
        return f"the driver does not start (error {status})"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGetName(name, 256, index)
        names.append(name.value.decode(errors="replace"))
    return names


def _nvlink() -> Fact:
    links = nvlink_ports()
    if not links or not any(links):
        return Fact("NVLink", "none", "GPUs of this host exchange weights over PCIe, if at all")
    listed = ", ".join(f"GPU {index}: {count} links" for index, count in enumerate(links))
    return Fact("NVLink", listed, "a peer on this host can hand over weights without the disk")


def nvlink_ports() -> list[int]:
    """Return how many NVLink ports are up, by GPU; empty without NVIDIA's management library."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if library.nvmlInit_v2():
        return []
    try:
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        return [_ports_up(library, index) for index in range(count.value)]
    finally:
        library.nvmlShutdown()


def _ports_up(library: ctypes.CDLL, index: int) -> int:
    device, state, up = ctypes.c_void_p(), ctypes.c_uint(), 0
    library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
    for port in range(_NVLINK_PORTS):
        if not library.nvmlDeviceGetNvLinkState(device, port, ctypes.byref(state)):
            up += state.value
    return up


def _rdma() -> Fact:
    active = [p.parent.parent.parent.name for p in _rdma_states() if "ACTIVE" in _text(p)]
    if not active:
        return Fact("RDMA", "none", "weights from another host come over TCP")
    return Fact("RDMA", ", ".join(sorted(set(active))), "another host can write weights into memory directly")


def _rdma_states() -> list[Path]:
    return sorted((_SYS / "class/infiniband").glob("*/ports/*/state"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):,.1f} GiB"
