# SPDX-License-Identifier: Apache-2.0
"""The adapter to NVIDIA Dynamo's GPU Memory Service, on a stand-in with the signatures it has.

The stand-in pins what the adapter relies on; where the library's names have drifted, both are tried.
"""

import ctypes
import enum
import sys
import types
from unittest.mock import create_autospec

import pytest
import torch
from torch import nn

import weights_core as w
from weights_core.errors import ExtraNotInstalledError, IdentityMismatchError, NoProviderError
from weights_core.memory import HostSegment
from weights_core.testing import host_of, write_checkpoint
from weights_gms import dynamo
from weights_gms.client import VaultError
from weights_gms.plugin import GmsPlugin


class Granted(enum.Enum):
    RW = 1
    RO = 2


class Server:
    """What outlives the clients: segments by id, metadata, whether it is committed."""

    def __init__(self):
        self.segments, self.metadata, self.committed = {}, {}, False


class Manager:
    """The library's memory manager, as far as the adapter uses it, on host memory."""

    server = None

    def __init__(self, socket_path: str, *, device: int = 0) -> None:
        self.socket_path, self.device = socket_path, device
        self.granted_lock_type = None
        self.mappings = {}
        self.closed = False

    def connect(self, lock_type, timeout_ms=None) -> None:
        if lock_type.name == "RO" and not self.server.committed:
            raise TimeoutError("no commit")
        reads = lock_type.name == "RO" or (lock_type.name != "RW" and self.server.committed)
        self.granted_lock_type = Granted.RO if reads else Granted.RW

    def create_mapping(self, allocation_id=None, size=0, tag="default") -> int:
        if allocation_id is None:
            allocation_id = f"a{len(self.server.segments)}"
            self.server.segments[allocation_id] = HostSegment.create(size)
        segment = self.server.segments[allocation_id]
        self.mappings[segment.address] = types.SimpleNamespace(allocation_id=allocation_id)
        return segment.address

    def metadata_put(self, key, allocation_id, offset_bytes, value) -> bool:
        assert isinstance(value, bytes)
        self.server.metadata[key] = (allocation_id, offset_bytes, value)
        return True

    def metadata_get(self, key):
        return self.server.metadata.get(key)

    def commit(self) -> bool:
        self.server.committed, self.granted_lock_type = True, None
        return True

    def remap_all_vas(self) -> None:
        assert self.granted_lock_type is Granted.RO

    def close(self) -> None:
        self.closed = True


@pytest.fixture(params=["new names", "old names"])
def library(request, monkeypatch):
    """Put the stand-in where the library would be; return the managers that were made."""
    made = []
    server = Server()
    new = request.param == "new names"

    def manager(socket_path, *, device=0):
        real = Manager(socket_path, device=device)
        real.server = server
        spec = create_autospec(real, spec_set=False)
        for name in (
            "connect",
            "create_mapping",
            "metadata_put",
            "metadata_get",
            "commit",
            "remap_all_vas",
            "close",
        ):
            getattr(spec, name).side_effect = getattr(real, name)
        type(spec).granted_lock_type = property(lambda _: real.granted_lock_type)
        spec.mappings, spec.device = real.mappings, device
        made.append(spec)
        return spec

    locks = enum.Enum("RequestedLockType", ["RW", "RO", "RW_OR_RO" if new else "AUTO"])
    names = {
        "gpu_memory_service": {},
        "gpu_memory_service.client": {},
        "gpu_memory_service.client.memory_manager": {"GMSClientMemoryManager": manager},
        "gpu_memory_service.common": {},
        "gpu_memory_service.common.utils": {
            "get_socket_path": lambda device, tag="weights": f"/gms_{device}_{tag}"
        },
        f"gpu_memory_service.common.{'locks' if new else 'types'}": {"RequestedLockType": locks},
    }
    for name, values in names.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)

    def as_tensor(segment, offset, nbytes):
        memory = (ctypes.c_ubyte * nbytes).from_address(segment.address + offset)
        memory.segment = segment
        return torch.frombuffer(memory, dtype=torch.uint8)

    monkeypatch.setattr(dynamo, "as_tensor", as_tensor)
    return types.SimpleNamespace(made=made, server=server, locks=locks)


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    return write_checkpoint(tmp_path / "ckpt", nn.Linear(5, 3).state_dict())


def load(path, **config):
    host = host_of(config={"gms": {"backend": "dynamo", **config}}, gms=GmsPlugin)
    with torch.device("meta"):
        made = nn.Linear(5, 3)
    return made, w.load(w.TorchEngine(made), path, "gms", host=host)


def test_the_first_writes_and_the_second_reads(library, path):
    (first, wrote), (second, read) = load(path), load(path)
    assert torch.equal(first.weight, second.weight)
    assert first.weight.data_ptr() == second.weight.data_ptr()
    assert wrote.receipts[0].detail == "/gms_0_weights"
    assert "gms: read from the GPU Memory Service at /gms_0_weights" in read.notes
    writer, reader = library.made
    names = [call[0] for call in writer.method_calls]
    assert names[0] == "connect"
    assert names[-3:] == ["commit", "connect", "remap_all_vas"]
    assert names.index("create_mapping") < names.index("metadata_put") < names.index("commit")
    assert writer.connect.call_args_list[0].kwargs == {"timeout_ms": 600_000}
    assert "commit" not in [call[0] for call in reader.method_calls]
    assert not writer.close.called


def test_the_connection_ends_with_the_last_tensor(library, path):
    made, report = load(path)
    report.lease.close()
    (manager,) = library.made
    assert not manager.close.called
    del made, report
    assert manager.close.called


def test_closing_never_raises(library, path, caplog):
    made, report = load(path)
    library.made[0].close.side_effect = RuntimeError("CUDA is gone")
    report.lease.close()
    del made, report
    assert "closing the GPU Memory Service's client: RuntimeError: CUDA is gone" in caplog.text


def test_the_same_shapes_with_other_content_are_refused(library, path, tmp_path):
    kept = load(path)
    other = write_checkpoint(tmp_path / "other", nn.Linear(5, 3).state_dict())
    with pytest.raises(IdentityMismatchError, match="the GPU Memory Service has other weights: digest"):
        load(other)
    assert library.made[-1].close.called
    assert kept


def test_what_others_wrote_is_refused(library, path):
    library.server.committed = True
    with pytest.raises(VaultError, match="was not written by weights-gms"):
        load(path)
    assert library.made[0].close.called


def test_an_unexpected_grant_and_no_server_are_errors(library, path):
    with pytest.raises(VaultError, match="TimeoutError: no commit"):
        load(path, mode="ro")
    library.server.committed = True
    library.locks.RW._name_ = "RW_OR_RO"
    with pytest.raises(VaultError, match="asked the GPU Memory Service for mode 'rw', it granted 'RO'"):
        load(path, mode="rw")
    assert all(manager.close.called for manager in library.made)


def test_a_load_that_fails_commits_nothing(library, path):
    (path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(w.WeightsError):
        load(path)
    assert all(manager.close.called for manager in library.made)
    assert not library.server.committed


def test_without_the_library_the_error_says_how_to_get_it(path):
    with pytest.raises((ExtraNotInstalledError, NoProviderError), match=r"github.com/ai-dynamo/dynamo"):
        load(path)
