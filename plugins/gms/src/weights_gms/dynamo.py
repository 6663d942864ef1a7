# SPDX-License-Identifier: Apache-2.0
"""Use the server of NVIDIA Dynamo's GPU Memory Service instead of the vault.

Built on the lower half of its client, which allocates, maps and stores small values: that half needs
no extension of torch, and changes least. Its server compares only how memory is laid out, so the
identity of the weights is stored beside them and compared here.
"""

from __future__ import annotations

import importlib
import json
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from weights_core import Identity, Layout, PublishReceipt, WeightSet, WeightSetWrapper
from weights_core.arena import ArenaSet, ArenaWriter, Manifest, padded
from weights_core.errors import ExtraNotInstalledError, IdentityMismatchError, PublishError
from weights_gms.client import VaultError
from weights_gms.owner import Owner, digest_of

if TYPE_CHECKING:
    import torch

    from weights_core import Engine, LoadRequest, Source
    from weights_gms.plugin import GmsConfig

log = logging.getLogger("weights.gms")

MANIFEST, IDENTITY = "weights/manifest", "weights/identity"
_LOCKS = {"auto": ("RW_OR_RO", "AUTO"), "rw": ("RW",), "ro": ("RO",)}
"""Our modes, and the names its lock types have had."""


class Library:
    """What is used of `gpu_memory_service`, under whatever names its version has for it."""

    def __init__(self) -> None:
        """Import it.

        Raises:
            ExtraNotInstalledError: it is not installed; says how to get it.
        """
        try:
            manager = importlib.import_module("gpu_memory_service.client.memory_manager")
            utils = importlib.import_module("gpu_memory_service.common.utils")
            try:
                locks = importlib.import_module("gpu_memory_service.common.locks")
            except ModuleNotFoundError:
                locks = importlib.import_module("gpu_memory_service.common.types")  # its older name
        except ImportError as exc:
            raise ExtraNotInstalledError(
                "backend='dynamo' needs NVIDIA Dynamo's gpu_memory_service, which is on no package index: "
                "install lib/gpu_memory_service of github.com/ai-dynamo/dynamo and start its server, or use "
                f"backend='vault' ({exc})"
            ) from exc
        self.manager: Any = manager.GMSClientMemoryManager
        self.socket_path: Any = utils.get_socket_path
        self._locks: Any = locks.RequestedLockType

    def lock(self, mode: str) -> Any:
        """Return its lock type for one of our modes.

        Raises:
            VaultError: this version has none.
        """
        for name in _LOCKS[mode]:
            if hasattr(self._locks, name):
                return getattr(self._locks, name)
        raise VaultError(f"this gpu_memory_service has no lock type for mode {mode!r}: {_LOCKS[mode]}")


class Connection:
    """One connection to its server, closed when neither a lease nor a tensor needs it any more."""

    def __init__(self, library: Library, socket: str, device: int, mode: str, timeout: float) -> None:
        self.manager = library.manager(socket, device=device)
        self._close = weakref.finalize(self, _close_quietly, self.manager)
        try:
            self.manager.connect(library.lock(mode), timeout_ms=int(timeout * 1000))
        except Exception as exc:
            self._close()
            raise VaultError(f"the GPU Memory Service at {socket}: {type(exc).__name__}: {exc}") from exc
        granted = getattr(self.manager.granted_lock_type, "name", None)
        due = {"auto": ("RW", "RO"), "rw": ("RW",), "ro": ("RO",)}[mode]
        if granted not in due:
            self._close()
            raise VaultError(f"asked the GPU Memory Service for mode {mode!r}, it granted {granted!r}")
        self.writes = granted == "RW"
        self._read_lock = library.lock("ro")

    def commit(self) -> None:
        """Publish what was written, and go on as a reader of it, at the same addresses."""
        if not self.manager.commit():
            raise PublishError("the GPU Memory Service refused the commit")
        self.manager.connect(self._read_lock)
        self.manager.remap_all_vas()
        self.writes = False

    def give_up(self) -> None:
        """Close it now: nothing was published."""
        self._close()


class DynamoSegment:
    """Memory of its server, mapped in this process; its descriptor stays its own."""

    descriptor = -1

    def __init__(self, connection: Connection, address: int, nbytes: int) -> None:
        self.connection = connection
        self._address = address
        self._nbytes = nbytes

    @property
    def address(self) -> int:
        """Where it is mapped in this process."""
        return self._address

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes as a flat uint8 tensor that keeps the connection."""
        return as_tensor(self, offset, nbytes)

    def fitted(self, used: int) -> int:
        """All of it."""
        return self._nbytes

    def seal(self, nbytes: int) -> None:
        """Nothing: the commit does it."""

    def sleep(self) -> None:
        """Not by segments."""
        raise VaultError("backend='dynamo' does not sleep: use its own unmap and remap")

    def wake(self, descriptor: int, nbytes: int) -> None:
        """Not by segments."""
        self.sleep()

    def close(self) -> None:
        """Nothing: the connection is what is closed."""


class DynamoOwner(Owner):
    """Reads what its server has, or writes it."""

    def __init__(self, config: GmsConfig, request: LoadRequest, engine: Engine, layout: Layout) -> None:
        self._config = config
        self._request = request
        self._engine: Engine | None = engine
        self._layout = layout
        self._written: _Written | None = None

    def load(self, source: Source) -> WeightSet:
        """Connect, then read or write."""
        config, engine = self._config, self._engine
        assert engine is not None
        if self._request.engine.post_load_writes is not None and self._layout is Layout.SHARDED:
            raise VaultError("backend='dynamo' cannot serve an engine whose post-load writes in place")
        library = Library()
        digest, found = digest_of(config, self._request)
        identity = Identity.of(self._request.engine, digest, self._layout).as_dict()
        index = int(self._request.engine.device.partition(":")[2] or 0)
        socket = config.socket_path or library.socket_path(index, config.tag)
        connection = Connection(library, socket, index, config.mode, config.timeout)
        try:
            if not connection.writes:
                return self._read(connection, identity, found, socket)
            inner = source.open()
            due = padded(engine.expected(self._layout).values())
            writer = ArenaWriter(lambda nbytes: self._create(connection, nbytes), due)
            self._written = _Written(inner, connection, writer, identity, found, socket)
            return self._written
        except BaseException:
            connection.give_up()
            raise

    def publish(self, engine: Engine) -> PublishReceipt | None:
        """Move the weights into its memory, describe them there, commit, and go on as a reader."""
        written = self._written
        return None if written is None or written.connection is None else written.offer(engine, self._layout)

    def finish(self) -> None:
        """Give up what was not published."""
        self._engine = None
        written, self._written = self._written, None
        if written is not None and written.connection is not None and written.connection.writes:
            written.close()

    def _create(self, connection: Connection, nbytes: int) -> DynamoSegment:
        address = connection.manager.create_mapping(size=nbytes, tag=self._config.tag)
        return DynamoSegment(connection, address, nbytes)

    def _read(self, connection: Connection, identity: Mapping[str, Any], found: str, socket: str) -> ArenaSet:
        manager = connection.manager
        stored = {key: manager.metadata_get(key) for key in (IDENTITY, MANIFEST)}
        if None in stored.values():
            raise VaultError(f"what the GPU Memory Service at {socket} holds was not written by weights-gms")
        theirs = json.loads(stored[IDENTITY][2])
        fields = {k: (v, theirs.get(k)) for k, v in identity.items() if theirs.get(k) != v}
        if fields:
            listed = "; ".join(f"{name}: need {mine!r}, has {its!r}" for name, (mine, its) in fields.items())
            raise IdentityMismatchError(f"the GPU Memory Service has other weights: {listed}", fields=fields)
        described = json.loads(stored[MANIFEST][2])
        manifest = Manifest.loads(described["manifest"].encode())
        segments = [
            DynamoSegment(connection, manager.create_mapping(allocation_id=handle), size)
            for handle, size in zip(described["handles"], manifest.sizes, strict=True)
        ]
        notes = f"gms: read from the GPU Memory Service at {socket}", f"gms: the weights' digest is {found}"
        return ArenaSet(manifest, segments, provider="gms", notes=lambda: notes)


class _Written(WeightSetWrapper):
    """What a writer loads, moved into the server's memory once it is loaded."""

    def __init__(
        self,
        inner: WeightSet,
        connection: Connection,
        writer: ArenaWriter,
        identity: Mapping[str, Any],
        found: str,
        socket: str,
    ) -> None:
        super().__init__(inner)
        self.provider = "gms"
        self.connection: Connection | None = connection
        self._writer: ArenaWriter | None = writer
        self._identity = identity
        self._notes = f"gms: written to the GPU Memory Service at {socket}", f"gms: the digest is {found}"
        self._where = socket

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the set below, and where it was written."""
        return (*self.inner.notes, *self._notes)

    def offer(self, engine: Engine, layout: Layout) -> PublishReceipt:
        """Move, describe and commit."""
        connection, writer = self.connection, self._writer
        assert connection is not None
        assert writer is not None
        try:
            tensors = engine.tensors(layout)
            writer.move(tensors)
            manifest = writer.manifest(engine.tensors(layout), layout)
            mapped = connection.manager.mappings
            handles = [mapped[segment.address].allocation_id for segment in writer.segments]
            described = {"manifest": manifest.dumps().decode(), "handles": handles}
            for key, value in ((MANIFEST, described), (IDENTITY, self._identity)):
                connection.manager.metadata_put(key, handles[0], 0, json.dumps(value).encode())
            connection.commit()
        except BaseException:
            self._writer = None
            self.close()
            raise
        self._writer = None
        return PublishReceipt(layout=layout, nbytes=manifest.nbytes, detail=self._where)

    def close(self) -> None:
        """Let go of the connection: it ends when no tensor lives in its memory."""
        self.inner.close()
        self.connection = self._writer = None


class _Bytes:
    """A range of its memory, as torch takes it; torch keeps this object as long as the storage."""

    def __init__(self, segment: DynamoSegment, offset: int, nbytes: int) -> None:
        self.segment = segment
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (segment.address + offset, False),
            "version": 3,
            "strides": None,
        }


def as_tensor(segment: DynamoSegment, offset: int, nbytes: int) -> torch.Tensor:
    """Return device bytes as a flat uint8 tensor that keeps its segment."""
    import torch

    where = f"cuda:{segment.connection.manager.device}"
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=where)
    return torch.as_tensor(_Bytes(segment, offset, nbytes), device=where)


def _close_quietly(manager: Any) -> None:
    """Close its client; that must never fail a load, or the end of a model."""
    close: Callable[[], object] = manager.close
    try:
        close()
    except Exception as exc:  # noqa: BLE001 - its close may raise anything, and nothing can be done
        log.warning("closing the GPU Memory Service's client: %s: %s", type(exc).__name__, exc)
