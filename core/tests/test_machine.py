# SPDX-License-Identifier: Apache-2.0
"""What the machine offers, on this one and in made-up /proc and /sys trees."""

import ctypes
from pathlib import Path

import pytest

from weights_core import machine
from weights_core.machine import (
    Fact,
    cuda_devices,
    direct_io,
    facts,
    file_system,
    memory_limit,
    nvlink_ports,
)

GIB = 1 << 30


@pytest.fixture
def trees(tmp_path, monkeypatch):
    """Put made-up /proc and /sys trees in place; return a function that writes files into them."""
    root = tmp_path / "machine"
    (root / "proc/self").mkdir(parents=True)
    (root / "sys").mkdir()
    monkeypatch.setattr(machine, "_PROC", root / "proc")
    monkeypatch.setattr(machine, "_SYS", root / "sys")

    def put(files):
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    return put


def no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


# This machine ---------------------------------------------------------------------------------


def test_this_machine_has_every_fact(tmp_path):
    found = facts(tmp_path)
    assert [fact.topic for fact in found] == [
        "cores",
        "memory",
        "memory limit",
        "open files",
        "file system",
        "direct I/O",
        "CUDA",
        "NVLink",
        "RDMA",
    ]
    assert all(isinstance(fact, Fact) and fact.value and fact.meaning for fact in found)


def test_facts_leave_nothing_behind(tmp_path):
    facts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_facts_of_a_path_that_does_not_exist_are_still_told(tmp_path):
    found = {fact.topic: fact.value for fact in facts(tmp_path / "missing")}
    assert found["direct I/O"] == "not known"


def test_this_machines_limit_is_bytes_or_none():
    limit, used = memory_limit()
    assert limit is None or limit > 0
    assert used >= 0


# Memory ---------------------------------------------------------------------------------------


def test_memory_is_read_from_meminfo(trees):
    trees({"proc/meminfo": f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {3 << 20} kB\n"})
    assert machine._memory().value == "3.0 GiB available of 8.0 GiB"


def test_without_control_groups_there_is_no_limit(trees):
    assert memory_limit() == (None, 0)
    assert machine._cgroup().value == "none"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        pytest.param(
            "0::/job\n",
            {"job/memory.max": f"{4 * GIB}\n", "job/memory.current": f"{GIB}\n"},
            (4 * GIB, GIB),
            id="version 2",
        ),
        pytest.param(
            "0::/\n",
            {"memory.max": f"{4 * GIB}\n", "memory.current": "7\n"},
            (4 * GIB, 7),
            id="version 2, in a container of its own namespace",
        ),
        pytest.param(
            "0::/a/b\n",
            {
                "a/b/memory.max": f"{8 * GIB}\n",
                "a/b/memory.current": "1\n",
                "a/memory.max": f"{2 * GIB}\n",
                "a/memory.current": "5\n",
            },
            (2 * GIB, 5),
            id="version 2, the parent is tighter",
        ),
        pytest.param(
            "0::/a/b\n",
            {"a/b/memory.max": f"{GIB}\n", "a/b/memory.current": "1\n", "a/memory.max": f"{2 * GIB}\n"},
            (GIB, 1),
            id="version 2, the child is tighter",
        ),
        pytest.param(
            "0::/a/b\n",
            {"a/b/memory.max": "max\n", "a/memory.max": f"{GIB}\n", "a/memory.current": "3\n"},
            (GIB, 3),
            id="version 2, only the parent has a limit",
        ),
        pytest.param("0::/job\n", {"job/memory.max": "max\n"}, (None, 0), id="version 2, max"),
        pytest.param("0::/job\n", {"job/memory.max": f"{GIB}\n"}, (GIB, 0), id="use is not told"),
        pytest.param("0::/job\n", {}, (None, 0), id="version 2, not mounted"),
        pytest.param(
            "5:cpu,cpuacct:/x\n4:memory:/docker/1\n",
            {
                "memory/docker/1/memory.limit_in_bytes": f"{3 * GIB}\n",
                "memory/docker/1/memory.usage_in_bytes": "9\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            (3 * GIB, 9),
            id="version 1",
        ),
        pytest.param(
            "4:hugetlb,memory:/docker/1\n",
            {"memory/memory.limit_in_bytes": f"{GIB}\n", "memory/memory.usage_in_bytes": "9\n"},
            (GIB, 9),
            id="version 1, the container sees only its own group",
        ),
        pytest.param(
            "4:memory:/x\n",
            {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"},
            (None, 0),
            id="version 1, unlimited",
        ),
        pytest.param(
            "4:memory:/x\n0::/x\n",
            {"memory/x/memory.limit_in_bytes": f"{GIB}\n", "x/memory.max": "max\n"},
            (GIB, 0),
            id="both versions",
        ),
        pytest.param("5:cpu:/x\n", {"memory/x/memory.limit_in_bytes": "1\n"}, (None, 0), id="not memory"),
    ],
)
def test_the_tightest_limit_counts(trees, group, files, expected):
    trees({"proc/self/cgroup": group} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert memory_limit() == expected


def test_a_limit_is_told_in_gib(trees):
    files = {"memory.max": f"{4 * GIB}", "memory.current": f"{GIB}"}
    trees({"proc/self/cgroup": "0::/\n"} | {f"sys/fs/cgroup/{k}": v for k, v in files.items()})
    assert machine._cgroup().value == "1.0 GiB used of 4.0 GiB"


# File system ----------------------------------------------------------------------------------


def mount(point, kind):
    return f"36 35 98:0 / {point} rw,noatime master:1 - {kind} /dev/root rw\n"


def test_the_longest_mount_point_decides(trees):
    mounts = [mount("/", "ext4"), mount("/mnt", "xfs"), mount("/mnt/models", "nfs4"), mount("/mnt/m", "ceph")]
    trees({"proc/self/mountinfo": "".join(mounts)})
    assert file_system(Path("/mnt/models/llama")) == "nfs4"
    assert file_system(Path("/mnt/models")) == "nfs4"
    assert file_system(Path("/mnt/models2")) == "xfs"
    assert file_system(Path("/elsewhere")) == "ext4"


def test_the_order_of_mount_points_does_not_matter(trees):
    trees({"proc/self/mountinfo": mount("/mnt/models", "nfs4") + mount("/", "ext4") + mount("/mnt", "xfs")})
    assert file_system(Path("/mnt/models/llama")) == "nfs4"


def test_of_two_mounts_on_one_point_the_later_covers_the_earlier(trees):
    mounts = mount("/", "ext4") + mount("/models", "autofs") + mount("/models", "nfs4")
    trees({"proc/self/mountinfo": mounts})
    assert file_system(Path("/models/llama")) == "nfs4"


@pytest.mark.parametrize(
    ("escaped", "point"), [(r"/my\040models", "/my models"), (r"/a\134b", "/a\\b"), ("/модели", "/модели")]
)
def test_mount_points_are_unescaped(trees, escaped, point):
    trees({"proc/self/mountinfo": mount("/", "ext4") + mount(escaped, "xfs")})
    assert file_system(Path(point, "llama")) == "xfs"


def test_a_link_is_followed_to_its_file_system(trees, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    trees({"proc/self/mountinfo": mount("/", "ext4") + mount(tmp_path.resolve() / "real", "lustre")})
    assert file_system(tmp_path / "link") == "lustre"


def test_without_mountinfo_the_file_system_is_unknown(trees):
    assert file_system(Path("/")) == "unknown"


@pytest.mark.parametrize(
    ("kind", "meaning"), [("nfs4", "network"), ("lustre", "network"), ("tmpfs", "memory"), ("ext4", "local")]
)
def test_the_meaning_of_a_file_system(trees, kind, meaning):
    trees({"proc/self/mountinfo": mount("/", kind)})
    fact = machine._file_system(Path("/"))
    assert fact.value == kind
    assert meaning in fact.meaning


# Direct I/O -----------------------------------------------------------------------------------


def test_direct_io_is_tried_and_leaves_nothing(tmp_path):
    assert direct_io(tmp_path) in (True, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")
def test_direct_io_is_tried_in_memory(tmp_path_factory):
    shm = Path("/dev/shm")
    assert direct_io(shm) in (True, False)  # Linux 6.6 has it on tmpfs too
    assert not list(shm.glob(".weights-doctor-*"))


def test_direct_io_reads_a_file_that_is_there(tmp_path):
    for size in (0, 1, 4096, 10_000):
        file = tmp_path / f"{size}"
        file.write_bytes(bytes(size))
        assert direct_io(file) in (True, False)
        assert file.stat().st_size == size


def test_direct_io_of_a_missing_folder_is_not_known(tmp_path):
    assert direct_io(tmp_path / "missing") is None
    assert machine._direct_io(tmp_path / "missing").value == "not known"


def test_direct_io_that_the_file_system_refuses_is_false(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("weights_core.machine.os.preadv", refuse)
    assert direct_io(tmp_path) is False
    assert machine._direct_io(tmp_path).value == "not on this path"
    assert list(tmp_path.iterdir()) == []


def test_direct_io_that_works_is_true(tmp_path, monkeypatch):
    monkeypatch.setattr("weights_core.machine.os.O_DIRECT", 0)
    assert direct_io(tmp_path) is True
    assert machine._direct_io(tmp_path).value == "works on this path"


# Devices --------------------------------------------------------------------------------------


def test_without_a_driver_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert cuda_devices() == "no driver"
    assert nvlink_ports() == []
    assert machine._cuda() == Fact("CUDA", "no driver", "weights load into host memory")
    assert machine._nvlink().value == "none"


class Driver:
    """As much of libcuda as is asked; its calls fill what they are given by reference."""

    def __init__(self, names, status=0):
        self.names, self.status = names, status

    def cuInit(self, flags):  # noqa: N802 - NVIDIA's name
        return self.status

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = len(self.names)
        return 0

    def cuDeviceGetName(self, name, size, index):  # noqa: N802
        name.value = self.names[index].encode()
        return 0


def test_devices_are_told_by_name(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(["NVIDIA H100", "NVIDIA H100", "NVIDIA T4"]))
    assert cuda_devices() == ["NVIDIA H100", "NVIDIA H100", "NVIDIA T4"]
    assert machine._cuda().value == "2 × NVIDIA H100, 1 × NVIDIA T4"


def test_a_driver_without_devices(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver([]))
    assert cuda_devices() == []
    assert machine._cuda().value == "no device"


def test_a_driver_that_does_not_start_says_so(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver([], status=999))
    assert cuda_devices() == "the driver does not start (error 999)"


class Management:
    """As much of NVML as is asked: `ports` has for each GPU the state of its ports."""

    def __init__(self, ports, status=0):
        self.ports, self.status, self.shut = ports, status, 0

    def nvmlInit_v2(self):  # noqa: N802
        return self.status

    def nvmlShutdown(self):  # noqa: N802
        self.shut += 1

    def nvmlDeviceGetCount_v2(self, count):  # noqa: N802
        count._obj.value = len(self.ports)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):  # noqa: N802
        device._obj.value = index + 1
        return 0

    def nvmlDeviceGetNvLinkState(self, device, port, state):  # noqa: N802
        ports = self.ports[device.value - 1]
        if port >= len(ports):
            return 2  # NVML_ERROR_INVALID_ARGUMENT: there is no such port
        state._obj.value = ports[port]
        return 0


def test_nvlink_ports_that_are_up_are_counted(monkeypatch):
    library = Management([[1, 1, 0, 1], [], [0, 0]])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert nvlink_ports() == [3, 0, 0]
    assert library.shut == 1
    assert machine._nvlink().value == "GPU 0: 3 links, GPU 1: 0 links, GPU 2: 0 links"


def test_a_management_library_that_does_not_start_knows_no_ports(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Management([[1]], status=9))
    assert nvlink_ports() == []


def test_gpus_without_links_have_no_nvlink(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Management([[], [0]]))
    assert nvlink_ports() == [0, 0]
    assert machine._nvlink().value == "none"


# RDMA -----------------------------------------------------------------------------------------


def test_rdma_devices_with_an_active_port_are_told(trees):
    trees(
        {
            "sys/class/infiniband/mlx5_1/ports/1/state": "4: ACTIVE\n",
            "sys/class/infiniband/mlx5_0/ports/1/state": "1: DOWN\n",
            "sys/class/infiniband/mlx5_0/ports/2/state": "4: ACTIVE\n",
            "sys/class/infiniband/mlx5_2/ports/1/state": "2: INIT\n",
            "sys/class/infiniband/mlx5_3/ports/1/state": "4: ACTIVE\n",
            "sys/class/infiniband/mlx5_3/ports/2/state": "4: ACTIVE\n",
        }
    )
    assert machine._rdma().value == "mlx5_0, mlx5_1, mlx5_3"


def test_without_an_active_port_there_is_no_rdma(trees):
    assert machine._rdma().value == "none"
    trees({"sys/class/infiniband/mlx5_0/ports/1/state": "1: DOWN\n"})
    assert machine._rdma().value == "none"
