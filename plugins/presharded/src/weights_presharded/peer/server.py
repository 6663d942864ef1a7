# SPDX-License-Identifier: Apache-2.0
"""Serve an offer: one thread that tells peers where the bytes are, and the registry that it lives.

The bytes themselves never pass through here. Nobody can make the thread wait: sockets don't block,
messages are small, and who does not prove the token in time is hung up on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from weights_core import Identity, place, wire
from weights_core.errors import PublishError, WeightsError
from weights_presharded.peer import token as tokens
from weights_presharded.peer.entry import Entry
from weights_presharded.peer.registry import Registry, RegistryError

log = logging.getLogger("weights.presharded")

HELLO_SECONDS = 5.0
"""To prove the token in."""
SILENT_SECONDS = 60.0
"""After which a peer that is being served and says nothing has lost its place."""
MAX_PEERS = 512
_MAX_WAIT = 86400.0
MAX_REQUEST = 64 << 10

Granted = tuple[dict[str, Any], list[int]]
Grant = Callable[[str], Granted | None]
"""Returns what a peer is told of the bytes for a transport's name, and descriptors; None if it has none."""


@attrs.define(eq=False)
class _Peer:
    """One connection."""

    sock: socket.socket
    who: str
    local: bool
    heard: float
    inbox: wire.Inbox = attrs.field(factory=lambda: wire.Inbox(MAX_REQUEST))
    unsent: bytes = b""
    due: str | None = None
    """The proof that is due from it, once it has said hello."""
    wants: str | None = None
    """The transport it waits to be served by."""
    waits_until: float = 0.0
    active: bool = False


class Server:
    """Serves one offer until it is closed."""

    def __init__(
        self,
        entry: Entry,
        folder: str,
        registry: Registry,
        token: bytes,
        grant: Grant,
        *,
        owners: frozenset[int],
        listen: tuple[str, int] | None = None,
        on_close: Callable[[], None],
    ) -> None:
        """Listen, enter the registry, and serve from a thread.

        Args:
            entry: what the registry is to say; its socket is made in `folder`.
            folder: of the socket.
            registry: where peers look.
            token: what peers must prove.
            grant: gives what peers need to get the bytes.
            owners: the users who may connect on this host.
            listen: host and port (0 for any) for peers on other hosts.
            on_close: is called once, when nobody is served any more.

        Raises:
            PublishError: it cannot listen, or the registry cannot be written.
        """
        self._folder = folder
        self._registry = registry
        self._token = token
        self._grant = grant
        self._owners = owners
        self._on_close = on_close
        self._peers: dict[int, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._local: socket.socket | None = None
        self._remote: socket.socket | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._failing = False
        self._process = os.getpid()
        self.taken = threading.Condition()
        """Notified whenever a peer has taken all of it."""
        self._wake, self._woken = socket.socketpair()
        self.entry = entry
        try:
            self._listen_here()
            _sweep(folder)
            if listen is not None:
                self._remote = socket.create_server(listen, backlog=MAX_PEERS)
                self._watch(self._remote)
                self.entry = attrs.evolve(entry, address=_address(self._remote, listen[0]))
            registry.put(self.entry)
        except (OSError, place.PlaceError, RegistryError) as exc:
            self._let_go()
            raise PublishError(f"peers cannot be served: {exc}") from exc
        except BaseException:
            self._let_go()
            raise
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="weights-presharded-source", daemon=True)
        _servers.add(self)
        self._thread.start()

    def close(self) -> None:
        """Leave the registry, hang up and end the thread; idempotent."""
        with self._lock:
            if self._closed or os.getpid() != self._process:
                return
            self._closed = True
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        self._thread.join()
        self._on_close()
        del self._grant, self._on_close  # whoever keeps this, as a report does, keeps no weights by it

    # The thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        beat = time.monotonic() + self.entry.beat
        try:
            while not self._closed:
                wait = max(0.0, min(beat, self._next_deadline()) - time.monotonic())
                for key, _ in self._selector.select(wait):
                    self._attend(key.fileobj)  # type: ignore[arg-type]
                now = time.monotonic()
                self._expire(now)
                self._serve_waiting()
                if now >= beat:
                    self._beat()
                    beat = now + self.entry.beat
        finally:
            with contextlib.suppress(WeightsError):
                self._registry.remove(self.entry)
            self._registry.close()
            self._let_go()

    def _attend(self, sock: socket.socket) -> None:
        if sock is self._woken:
            return
        if sock is self._local or sock is self._remote:
            self._accept(sock)
            return
        peer = self._peers.get(sock.fileno())
        if peer is None:
            return
        try:
            self._flush(peer)
            if peer.inbox.receive(sock):
                peer.heard = time.monotonic()
                while (taken := peer.inbox.take()) is not None:
                    self._answer(peer, *taken)
            else:
                self._drop(peer)
        except BlockingIOError:
            pass
        except (OSError, wire.WireError) as exc:
            log.debug("%s: %s", peer.who, exc)
            self._drop(peer)

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, address = listening.accept()
        except OSError:
            return  # it has hung up already, or there are no descriptors left
        sock.setblocking(False)
        local = listening is self._local
        who = f"{address}"
        if local:
            pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            who = f"pid {pid} of user {uid}"
            if uid not in self._owners:
                log.warning("refused %s", who)
                sock.close()
                return
        if len(self._peers) >= MAX_PEERS:
            sock.close()
            return
        self._peers[sock.fileno()] = _Peer(sock, who, local, time.monotonic())
        self._selector.register(sock, selectors.EVENT_READ)

    def _answer(self, peer: _Peer, message: Mapping[str, Any], fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        kind = message.get("op")
        if kind == "alive" and peer.active:
            return
        if kind == "hello" and peer.due is None and tokens.is_nonce(message.get("nonce")):
            theirs, ours = str(message["nonce"]), tokens.nonce()
            proof = tokens.prove(self._token, "source", theirs, ours, self.entry.id)
            peer.due = tokens.prove(self._token, "target", theirs, ours, self.entry.id)
            self._tell(peer, {"ok": "hello", "nonce": ours, "proof": proof})
        elif kind == "pull" and peer.due is not None and peer.wants is None and not peer.active:
            self._ask(peer, message)
        elif kind == "done" and peer.active:
            self._drop(peer, served=True)
        else:
            raise wire.WireError(f"{kind!r} is nothing to say now")

    def _ask(self, peer: _Peer, message: Mapping[str, Any]) -> None:
        if peer.due is None or not tokens.proves(message.get("proof"), peer.due):
            log.warning("%s has not the token: refused", peer.who)
            raise wire.WireError("a wrong proof")
        try:
            wanted = Identity.from_dict(message.get("identity"))  # type: ignore[arg-type]
        except ValueError as exc:
            raise wire.WireError(str(exc)) from exc
        fields = wanted.differences(self.entry.identity)
        if fields:
            told = Identity.as_dict(wanted), self.entry.identity.as_dict()
            self._tell(peer, {"error": "mismatch", "fields": {n: [t[n] for t in told] for n in fields}})
            return
        wait = message.get("wait")
        patient = isinstance(wait, int | float) and 0 <= wait <= _MAX_WAIT
        peer.wants = str(message.get("transport"))
        peer.waits_until = time.monotonic() + (float(wait) if patient else 0.0)  # type: ignore[arg-type]
        if not self._has_room() and peer.waits_until <= time.monotonic():
            peer.wants = None
            self._tell(peer, {"busy": self.entry.active})

    def _serve_waiting(self) -> None:
        for peer in list(self._peers.values()):
            if peer.wants is not None and self._has_room():
                wants, peer.wants = peer.wants, None
                try:
                    granted = self._grant(wants) if wants != "local" or peer.local else None
                except (WeightsError, OSError) as exc:
                    log.warning("%s cannot be served: %s", peer.who, exc)
                    self._tell(peer, {"error": "refused", "why": str(exc)})
                    continue
                if granted is None:
                    self._tell(peer, {"error": "refused", "why": f"it does not serve by {wants!r}"})
                    continue
                peer.active = True
                peer.heard = time.monotonic()
                self.entry = attrs.evolve(self.entry, active=self.entry.active + 1)
                self._tell(peer, {"ok": "pull", **granted[0]}, granted[1])

    def _has_room(self) -> bool:
        return self.entry.active < self.entry.limit

    def _tell(self, peer: _Peer, message: dict[str, Any], fds: list[int] | None = None) -> None:
        """Send a message; what the socket doesn't take at once follows when it does."""
        data = wire.pack(message)
        try:
            sent = 0 if peer.unsent else wire.send(peer.sock, data, fds or [])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(peer)
            return
        if fds and not sent:
            self._drop(peer)  # descriptors go with the first byte or not at all
            return
        peer.unsent += data[sent:]
        self._flush(peer)

    def _flush(self, peer: _Peer) -> None:
        if peer.unsent:
            with contextlib.suppress(BlockingIOError):
                peer.unsent = peer.unsent[peer.sock.send(peer.unsent) :]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
        if peer.sock.fileno() in self._peers:
            self._selector.modify(peer.sock, events)

    def _drop(self, peer: _Peer, *, served: bool = False) -> None:
        if self._peers.pop(peer.sock.fileno(), None) is None:
            return
        self._selector.unregister(peer.sock)
        peer.inbox.close()
        peer.sock.close()
        if peer.active:
            self.entry = attrs.evolve(
                self.entry, active=self.entry.active - 1, served=self.entry.served + served
            )
            with self.taken:
                self.taken.notify_all()

    def _next_deadline(self) -> float:
        return min((self._deadline(peer) for peer in self._peers.values()), default=float("inf"))

    def _deadline(self, peer: _Peer) -> float:
        if peer.wants is not None:
            return peer.waits_until
        return peer.heard + (SILENT_SECONDS if peer.active else HELLO_SECONDS)

    def _expire(self, now: float) -> None:
        for peer in list(self._peers.values()):
            if now < self._deadline(peer):
                continue
            if peer.wants is not None and not self._has_room():
                peer.wants = None
                peer.heard = now
                self._tell(peer, {"busy": self.entry.active})
            elif peer.wants is None:
                log.debug("%s said nothing for too long", peer.who)
                self._drop(peer)

    def _beat(self) -> None:
        """Say that it lives; mend what somebody has wiped."""
        try:
            if not os.path.exists(self.entry.socket):
                self._listen_here()
            self._registry.put(self.entry)
        except (OSError, place.PlaceError, RegistryError) as exc:
            if not self._failing:
                log.warning("source %s cannot say that it lives, and goes on trying: %s", self.entry.id, exc)
            self._failing = True
            return
        if self._failing:
            log.info("source %s is in the registry again", self.entry.id)
        self._failing = False

    def _listen_here(self) -> None:
        folder = place.open_folder(self._folder, owners={os.geteuid()}, create=True)
        try:
            name = os.path.basename(self.entry.socket)
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                part = (
                    f".{name}.part"  # whoever sweeps up takes a socket where nobody listens for a dead one's
                )
                listening.bind(place.through(folder, part))
                os.chmod(place.through(folder, part), 0o600 if len(self._owners) == 1 else 0o666)
                listening.listen(MAX_PEERS)
                os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
                listening.setblocking(False)
            except BaseException:
                listening.close()
                raise
        finally:
            os.close(folder)
        before, self._local = self._local, listening
        if before is not None:
            self._selector.unregister(before)
            before.close()
        self._watch(listening)

    def _watch(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ)

    def _let_go(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer)
        for sock in (self._local, self._remote, self._wake, self._woken):
            if sock is not None:
                sock.close()
        self._selector.close()
        with contextlib.suppress(OSError):
            os.unlink(self.entry.socket)

    def leave_to_parent(self) -> None:
        """In a forked child: close what it inherited, so that it keeps nobody waiting."""
        for sock in (self._local, self._remote, *(peer.sock for peer in self._peers.values())):
            if sock is not None:
                sock.close()


def _sweep(path: str) -> None:
    """Remove the sockets of sources that were killed: nobody listens there."""
    folder = place.open_folder(path, owners={os.geteuid()})
    try:
        for name in os.listdir(folder):
            if not name.endswith(".sock"):
                continue
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                try:
                    sock.connect(place.through(folder, name))
                except ConnectionRefusedError:
                    os.unlink(name, dir_fd=folder)
    finally:
        os.close(folder)


def _address(sock: socket.socket, host: str) -> str:
    """Return where others reach a listening socket: the host as it was given, not what it means here."""
    port = sock.getsockname()[1]
    return f"{host or socket.gethostname()}:{port}"


_servers: weakref.WeakSet[Server] = weakref.WeakSet()
"""Known only to the hook below: the operating system forks processes, not objects."""


def _after_fork() -> None:
    for server in list(_servers):
        server.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)
