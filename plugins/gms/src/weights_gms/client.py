# SPDX-License-Identifier: Apache-2.0
"""An engine's side of the protocol: reach the broker, ask for a slot, keep the lease."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import attrs

import weights_core
from weights_core import place, wire
from weights_core.errors import IdentityMismatchError, LoadError, PluginConfigError
from weights_core.memory import sealed
from weights_gms.broker import IDLE_SECONDS

log = logging.getLogger("weights.gms")

SOCKET, START_LOCK = "broker.sock", "start.lock"

_SLACK = 10.0
"""Seconds beyond the broker's own deadline after which the broker is taken to hang."""
_START_SECONDS = 30.0
_AGAIN = 0.05, 5.0
"""Seconds between attempts to come back to a broker: at first, and at most."""


class VaultError(LoadError):
    """The broker cannot be reached, or refuses; says what to do."""


class _HungUp(Exception):  # noqa: N818 - handled here
    """The broker went away before it answered."""


class Piece(Protocol):
    """What a lease keeps open: a piece of memory."""

    descriptor: int

    def close(self) -> None:
        """Close the descriptor."""
        ...


@attrs.frozen
class Endpoint:
    """Where the broker is, whether to start one there, and whose broker is trusted."""

    socket: str
    start: bool = True
    owners: frozenset[int] = attrs.field(factory=lambda: frozenset({os.geteuid()}))

    @classmethod
    def default(cls, environ: Mapping[str, str] = os.environ) -> Endpoint:
        """Return the user's own broker."""
        return cls(default_socket(environ, os.geteuid()))


@attrs.frozen(kw_only=True)
class Ask:
    """What an engine asks for: the slots of all its ranks, of which this is one."""

    members: Sequence[tuple[str, Mapping[str, object]]]
    rank: int
    group: str
    mode: Literal["auto", "ro", "rw"]
    replace: Literal["keep", "evict-first"] = "keep"
    keep: float = 0.0
    timeout: float = 600.0


@attrs.define(kw_only=True, eq=False)
class Grant:
    """What the broker granted: `read`, with descriptors that are the receiver's to close, or `write`."""

    kind: Literal["read", "write"]
    endpoint: Endpoint
    sock: socket.socket
    reply: Mapping[str, Any]
    fds: list[int]

    @property
    def broker(self) -> str:
        """Who granted it, for reports."""
        return f"the broker at {self.endpoint.socket} (pid {self.reply['broker']['pid']})"

    def close(self) -> None:
        """Give it up, closing what was not taken over."""
        while self.fds:
            os.close(self.fds.pop())
        _hang_up(self.sock)
        self.sock.close()


def default_socket(environ: Mapping[str, str], uid: int) -> str:
    """Return the path of the user's own broker."""
    return os.path.join(place.default_folder(environ, uid, "weights-gms"), SOCKET)


def open_slot(endpoint: Endpoint, ask: Ask) -> Grant:
    """Ask for a slot and wait until it is granted, starting a broker if there is none.

    Raises:
        IdentityMismatchError: the slot has other weights; names the fields.
        VaultError: the broker cannot be reached, refuses, or the time is up.
    """
    end = time.monotonic() + ask.timeout
    while True:
        sock = connect(endpoint, end)
        try:
            message = {
                "op": "open",
                "members": [[slot, dict(identity)] for slot, identity in ask.members],
                "timeout": max(0.0, end - time.monotonic()),
                **{name: getattr(ask, name) for name in ("rank", "group", "mode", "replace", "keep")},
            }
            reply, fds = exchange(sock, message, until=end + _SLACK)
        except _HungUp:
            sock.close()  # killed, or gone idle in this very moment: ask its successor
            if time.monotonic() >= end:
                raise VaultError(f"the broker at {endpoint.socket} hung up, again and again") from None
            continue
        except BaseException:
            sock.close()
            raise
        grant = Grant(kind=reply["ok"], endpoint=endpoint, sock=sock, reply=reply, fds=fds)
        if (ask.mode, grant.kind) in (("ro", "write"), ("rw", "read")):
            grant.close()
            raise VaultError(f"asked for mode {ask.mode!r}, the broker granted {grant.kind!r}")
        return grant


def ask_once(endpoint: Endpoint, message: Mapping[str, Any], seconds: float = 10.0) -> dict[str, Any] | None:
    """Return the broker's answer to a message, or None if there is no broker; starts none.

    Raises:
        VaultError: it refuses, or does not answer.
    """
    try:
        sock = _connected(endpoint)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (place.PlaceError, OSError) as exc:
        raise VaultError(f"the broker at {endpoint.socket} cannot be reached: {exc}") from exc
    with contextlib.closing(sock):
        try:
            return exchange(sock, message, until=time.monotonic() + seconds)[0]
        except _HungUp:
            return None


class Lease:
    """A lease on a generation: the connection, what a new broker needs if this one dies, a watcher.

    The lease ends by `close` or with the process; a forked child has no part in it. Tensors in the
    memory stay valid when it ends.
    """

    def __init__(self, grant: Grant, held: Mapping[str, Any], manifest: int, pieces: Sequence[Piece]) -> None:
        """Keep what `grant` gave.

        Args:
            grant: whose connection is taken over.
            held: slot, generation, number, identity, keep, nbytes and detail, as they are reseeded.
            manifest: a descriptor, taken over.
            pieces: the memory, taken over.
        """
        self._endpoint = grant.endpoint
        self._sock = grant.sock
        self._held = dict(held)
        self._manifest = manifest
        self._pieces = pieces
        self._lock = threading.RLock()
        self._closing = threading.Event()
        _leases.add(self)
        self._watcher = threading.Thread(target=self._watch, name="weights-gms-lease", daemon=True)
        self._watcher.start()

    @property
    def held(self) -> Mapping[str, Any]:
        """What the lease is on: slot, generation, number, identity, bytes."""
        return self._held

    @property
    def closed(self) -> bool:
        """Whether the lease has ended."""
        return self._closing.is_set()

    def close(self) -> None:
        """End the lease; idempotent."""
        with self._lock:
            if self.closed:
                return
            self._closing.set()
            _hang_up(self._sock)
        if threading.current_thread() is not self._watcher:
            self._watcher.join()
        self._sock.close()
        os.close(self._manifest)
        for piece in self._pieces:
            piece.close()
        self._pieces = ()

    def _watch(self) -> None:
        """Wait for the broker to die, and bring back to its successor what it held."""
        wait = _AGAIN[0]
        while not self.closed:
            with contextlib.suppress(OSError):
                while self._sock.recv(1):
                    pass
            while not self.closed:
                try:
                    sock, serving = _reseed(self._endpoint, self._held, self._manifest, self._pieces)
                except VaultError as exc:
                    log.debug("cannot come back to a broker yet: %s", exc)
                    self._closing.wait(wait)
                    wait = min(2 * wait, _AGAIN[1])
                    continue
                with self._lock:
                    if self.closed:
                        sock.close()
                        return
                    self._sock.close()
                    self._sock = sock
                log.warning(
                    "the broker at %s went away; its successor %s the weights of slot %s",
                    self._endpoint.socket,
                    "serves" if serving else "has newer ones than",
                    self._held["slot"],
                )
                wait = _AGAIN[0]
                break

    def _leave_to_parent(self) -> None:
        """In a forked child: close what the child inherited, telling nobody."""
        self._closing.set()
        self._lock = threading.RLock()  # whoever held it is not in this process
        self._sock.close()


def commit(grant: Grant, manifest: bytes, pieces: Sequence[Piece], held: Mapping[str, Any]) -> Lease:
    """Offer what was written to everyone; takes over the grant and the pieces.

    If the broker died meanwhile, its successor is told.

    Args:
        grant: to write.
        manifest: what lies where.
        pieces: the memory, sealed.
        held: identity, keep, nbytes and detail.

    Raises:
        VaultError: the broker refuses.
    """
    grant_is = {"slot": grant.reply["slot"], "number": grant.reply["number"]}
    what = {**held, **grant_is, "generation": uuid.uuid4().hex}
    descriptor = sealed(manifest, "weights-manifest")
    try:
        fds = [descriptor, *(piece.descriptor for piece in pieces)]
        if len(fds) > wire.MAX_FDS:
            raise VaultError(f"{len(pieces)} pieces of memory; at most {wire.MAX_FDS - 1} can be handed over")
        try:
            exchange(grant.sock, {"op": "commit", **what}, fds, until=time.monotonic() + _SLACK)
        except _HungUp:
            grant.sock.close()
            grant.sock, _ = _reseed(grant.endpoint, what, descriptor, pieces)
        return Lease(grant, what, descriptor, pieces)
    except BaseException:
        os.close(descriptor)
        raise


def keep(grant: Grant, pieces: Sequence[Piece]) -> Lease:
    """Turn a grant to read into a lease; takes over its connection, its manifest and the pieces."""
    held = {
        name: grant.reply[name]
        for name in ("slot", "number", "generation", "identity", "keep", "nbytes", "detail")
    }
    return Lease(grant, held, grant.fds.pop(0), pieces)


def read_manifest(grant: Grant) -> bytes:
    """Return the manifest that came with a grant to read; its descriptor stays the grant's first."""
    return os.pread(grant.fds[0], os.fstat(grant.fds[0]).st_size, 0)


# ----------------------------------------------------------------------------------------------


def connect(endpoint: Endpoint, until: float) -> socket.socket:
    """Return a connection to the broker, starting one if there is none and the endpoint says so.

    Raises:
        VaultError: it cannot be reached or is not to be trusted.
    """
    try:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return _connected(endpoint)
        if not endpoint.start:
            raise VaultError(f"no broker at {endpoint.socket}: start one with `weights gms serve`")
        with _starting(endpoint, max(until, time.monotonic() + _START_SECONDS)):
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return _connected(endpoint)
            _start(endpoint)
            return _connected(endpoint)
    except place.PlaceError as exc:
        raise VaultError(str(exc)) from exc
    except OSError as exc:
        raise VaultError(f"the broker at {endpoint.socket} cannot be reached: {exc.strerror or exc}") from exc


def exchange(
    sock: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = (), *, until: float
) -> tuple[dict[str, Any], list[int]]:
    """Send a message and return the answer with its descriptors.

    Raises:
        IdentityMismatchError, VaultError: the broker refused, or did not answer in time.
    """
    inbox = wire.Inbox(wire.MAX_REPLY)
    data = wire.pack(dict(message))
    if len(data) > wire.MAX_REQUEST:
        raise VaultError(f"a request of {len(data)} bytes; the broker takes {wire.MAX_REQUEST}")
    try:
        while data:
            sock.settimeout(max(0.001, until - time.monotonic()))
            data = data[wire.send(sock, data, fds) :]
            fds = ()
        while (taken := inbox.take()) is None:
            sock.settimeout(max(0.001, until - time.monotonic()))
            if not inbox.receive(sock):
                raise _HungUp
        sock.settimeout(None)
    except (ConnectionError, BrokenPipeError):
        taken = _last_words(sock, inbox)
        if taken is None:
            raise _HungUp from None
    except TimeoutError:
        raise VaultError("the broker does not answer") from None
    except wire.WireError as exc:
        raise VaultError(str(exc)) from exc
    finally:
        inbox.close()
    reply, came = taken
    if "error" in reply:
        raise _refusal(reply)
    return reply, came


def _last_words(sock: socket.socket, inbox: wire.Inbox) -> tuple[dict[str, Any], list[int]] | None:
    """Return why the broker hung up while it was still being sent to, if it said."""
    with contextlib.suppress(OSError, wire.WireError):
        while inbox.receive(sock):
            pass
        return inbox.take()
    return None


def _refusal(reply: Mapping[str, Any]) -> IdentityMismatchError | VaultError:
    why = str(reply.get("why"))
    if reply["error"] != "mismatch":
        return VaultError(why)
    fields = {name: (mine, theirs) for name, (mine, theirs) in reply["fields"].items()}
    listed = "; ".join(f"{name}: need {mine!r}, has {theirs!r}" for name, (mine, theirs) in fields.items())
    return IdentityMismatchError(
        f"{why}: {listed}. Use another tag, or mode='rw' to replace them", fields=fields
    )


def _connected(endpoint: Endpoint) -> socket.socket:
    return place.connect(endpoint.socket, owners=endpoint.owners, create=endpoint.start)


@contextlib.contextmanager
def _starting(endpoint: Endpoint, until: float) -> Iterator[None]:
    """Be the only one who starts a broker here."""
    folder = place.open_folder(os.path.dirname(endpoint.socket), owners=endpoint.owners, create=True)
    try:
        lock = os.open(
            START_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder
        )
    finally:
        os.close(folder)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise TimeoutError("somebody has been starting it for too long") from None
                time.sleep(0.002)
        yield
    finally:
        os.close(lock)


def command(endpoint: Endpoint, *, foreground: bool, allow: Sequence[int] = ()) -> list[str]:
    """Return how a broker is run: a bare interpreter, so that it starts fast and stays small.

    Raises:
        PluginConfigError: this Python does not know its own executable.
    """
    if not sys.executable:
        raise PluginConfigError(
            "this Python has no executable to start a broker with: run `weights gms serve`"
        )
    settings = {
        "socket": endpoint.socket,
        "allow": list(allow),
        "idle": None if foreground else IDLE_SECONDS,
        "foreground": foreground,
    }
    code = "import sys; sys.path += sys.argv[2:]; from weights_gms.broker import main; main(sys.argv[1])"
    packages = {str(Path(module).parent.parent) for module in (__file__, weights_core.__file__)}
    return [sys.executable, "-I", "-S", "-c", code, json.dumps(settings), *sorted(packages)]


def _start(endpoint: Endpoint) -> None:
    try:
        done = subprocess.run(
            command(endpoint, foreground=False),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
        )
    except subprocess.TimeoutExpired as exc:
        raise VaultError(f"a broker did not start within {_START_SECONDS:g} s") from exc
    if done.returncode:
        raise VaultError(f"a broker cannot be started: {' '.join(done.stderr.split())}")


def _reseed(
    endpoint: Endpoint, held: Mapping[str, Any], manifest: int, pieces: Sequence[Piece]
) -> tuple[socket.socket, bool]:
    """Bring back to a new broker what is held; return the connection, and whether it serves that.

    Raises:
        VaultError: there is no new broker, or it refuses.
    """
    end = time.monotonic() + _SLACK
    fds = [manifest, *(piece.descriptor for piece in pieces)]
    while True:
        sock = connect(endpoint, end)
        try:
            reply, came = exchange(sock, {"op": "reseed", **held}, fds, until=end)
        except _HungUp:
            sock.close()  # the old one, which took connections to its last moment
            if time.monotonic() >= end:
                raise VaultError(f"the broker at {endpoint.socket} hung up, again and again") from None
            continue
        except BaseException:
            sock.close()
            raise
        for fd in came:
            os.close(fd)
        return sock, bool(reply["serving"])


def _hang_up(sock: socket.socket) -> None:
    """End a connection also where a forked child has inherited it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


_leases: weakref.WeakSet[Lease] = weakref.WeakSet()
"""Known only to the hook below: the operating system forks processes, not objects."""


def _after_fork() -> None:
    for lease in list(_leases):
        lease._leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)
