# SPDX-License-Identifier: Apache-2.0
"""The broker: a small process that holds descriptors of weights, and never the weights themselves.

It maps nothing, knows no CUDA and imports the standard library alone. One thread serves everyone
from one loop, so the vault's rules need no locks, and nobody can make it wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

from weights_core import place, wire
from weights_gms.vault import Freed, Generation, Group, MayRead, MayWrite, Misuse, Refused, Vault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from weights_gms.vault import Event

LIFE_LOCK = "broker.lock"
IDLE_SECONDS = 1.0
GRACE_SECONDS = 1.0
HELLO_SECONDS = 5.0
MAX_CLIENTS = 4096
MAX_MANIFEST = 256 << 20
_MAX_UNSENT = 4 << 20
_F_GET_SEALS, _SEALED = 1034, 15
_SO_PEERPIDFD = 77


class Contents:
    """What a generation consists of: descriptors of its manifest and of its memory."""

    def __init__(self, fds: list[int], nbytes: int, detail: dict[str, Any]) -> None:
        self.fds = fds
        self.nbytes = nbytes
        self.detail = detail

    def close(self) -> None:
        """Close the descriptors."""
        while self.fds:
            os.close(self.fds.pop())


class Client:
    """One connection, and the process behind it."""

    def __init__(self, number: int, sock: socket.socket, pid: int, uid: int, now: float) -> None:
        self.number = number
        self.sock = sock
        self.pid = pid
        self.uid = uid
        self.since = now
        self.inbox = wire.Inbox(wire.MAX_REQUEST)
        self.outbox: list[tuple[bytes, list[int]]] = []
        self.process: int | None = None
        self.greeted = False
        self.holds = False
        """Whether it brought the descriptors itself, so that it needs none back."""


class Broker:
    """Serves one socket until it is told to stop, or until it has had nothing to hold for a while."""

    def __init__(
        self, listening: socket.socket, where: str, *, allow: Iterable[int], idle: float | None, grace: float
    ) -> None:
        now = time.monotonic()
        self._listening = listening
        self._where = where
        self._allow = frozenset(allow)
        self._idle = idle
        self._idle_since = now
        self._vault = Vault(no_writers_before=now + grace)
        self._clients: dict[int, Client] = {}
        self._by_fd: dict[int, Callable[[int], None]] = {}
        self._last = 0
        self._started = now
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.epoll()
        self._watch(listening.fileno(), self._accept)
        self._stuck: list[Client] = []
        self.stopping = False

    def run(self) -> None:
        """Serve."""
        while not self.stopping:
            for fd, events in self._poll.poll(self._patience()):
                serve = self._by_fd.get(fd)
                if serve is not None:  # not closed by an earlier event of this round
                    serve(events)
            now = time.monotonic()
            self._carry_out(self._vault.tick(now))
            for client in [*self._stuck, *(c for c in self._clients.values() if self._is_late(c, now))]:
                self._drop(client)
            self._stuck.clear()
            if self._clients or not self._vault.empty:
                self._idle_since = now
            elif self._idle is not None and now - self._idle_since >= self._idle:
                return

    def close(self) -> None:
        """Hang up on everyone and let go of all that is held."""
        for client in list(self._clients.values()):
            self._drop(client)
        self._poll.close()
        os.close(self._spare)

    def stop(self) -> None:
        """End `run` after what it does now."""
        self.stopping = True

    # Connections ------------------------------------------------------------------------------

    def _patience(self) -> float:
        now = time.monotonic()
        times = [self._vault.next_tick(now)]
        times += [c.since + HELLO_SECONDS for c in self._clients.values() if not c.greeted]
        if self._idle is not None and not self._clients and self._vault.empty:
            times.append(self._idle_since + self._idle)
        known = [t for t in times if t is not None]
        return max(0.0, min(known) - now) if known else -1

    def _is_late(self, client: Client, now: float) -> bool:
        return not client.greeted and now - client.since >= HELLO_SECONDS

    def _watch(self, fd: int, serve: Callable[[int], None]) -> None:
        self._by_fd[fd] = serve
        self._poll.register(fd, select.EPOLLIN)

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._by_fd[fd]

    def _accept(self, _events: int) -> None:
        for _ in range(64):
            try:
                sock, _ = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno not in (errno.EMFILE, errno.ENFILE):
                    return  # the peer is gone already
                self._turn_away_one()
                return
            sock.setblocking(False)
            pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in self._allow or len(self._clients) >= MAX_CLIENTS:
                why = "too many clients" if uid in self._allow else f"user {uid} is not allowed here"
                with contextlib.suppress(OSError):
                    sock.send(wire.pack({"error": "refused", "why": why}))
                sock.close()
                continue
            self._last += 1
            client = Client(self._last, sock, pid, uid, time.monotonic())
            self._clients[client.number] = client
            self._watch(sock.fileno(), lambda events, c=client: self._serve(c, events))  # type: ignore[misc]

    def _turn_away_one(self) -> None:
        """With no descriptor left, spend the spare one on telling a peer so, instead of spinning."""
        os.close(self._spare)
        with contextlib.suppress(OSError):
            sock, _ = self._listening.accept()
            sock.close()
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _serve(self, client: Client, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                self._flush(client)
            if events & ~select.EPOLLOUT:
                alive = client.inbox.receive(client.sock)
                while (taken := client.inbox.take()) is not None:
                    self._answer(client, *taken)
                    if client.number not in self._clients:
                        return
                if not alive:
                    self._drop(client)
        except BlockingIOError:
            return
        except (wire.WireError, Misuse) as exc:
            self._reply(client, {"error": "protocol", "why": str(exc)})
            self._drop(client)
        except OSError:
            self._drop(client)

    def _reply(self, client: Client, message: dict[str, Any], fds: list[int] | None = None) -> None:
        client.outbox.append((wire.pack(message), fds or []))
        self._flush(client)

    def _flush(self, client: Client) -> None:
        """Send what the peer takes now; a peer that lets too much pile up is dropped."""
        try:
            while client.outbox:
                data, fds = client.outbox[0]
                sent = wire.send(client.sock, data, fds)
                if sent == len(data):
                    client.outbox.pop(0)
                else:
                    client.outbox[0] = data[sent:], []
        except BlockingIOError:
            pass
        except OSError:
            client.outbox.clear()  # it is gone, which the loop is told by its hang-up
        if sum(len(data) for data, _ in client.outbox) > _MAX_UNSENT:
            self._stuck.append(client)
        self._poll.modify(client.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if client.outbox else 0))

    def _drop(self, client: Client) -> None:
        """Close a connection, and give up whatever it stood for."""
        if self._clients.pop(client.number, None) is None:
            return
        self._forget(client.sock.fileno())
        client.inbox.close()
        client.sock.close()
        if client.process is not None:
            self._forget(client.process)
            os.close(client.process)
        self._carry_out(self._vault.drop(client.number, time.monotonic()))

    def _follow(self, client: Client) -> None:
        """Notice the death of the process itself: a child it forked may keep the socket open."""
        if client.process is not None or client.pid == 0:  # 0: in a namespace we cannot see
            return
        try:
            raw = client.sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
            client.process = struct.unpack("i", raw)[0]
        except OSError:
            client.process = os.pidfd_open(client.pid)  # kernels before 6.5
        self._watch(client.process, lambda _events, c=client: self._drop(c))  # type: ignore[misc]

    # Requests ---------------------------------------------------------------------------------

    def _answer(self, client: Client, message: dict[str, Any], fds: list[int]) -> None:
        kept = False
        try:
            client.greeted = True
            kind = message.get("op")
            if fds and kind not in ("commit", "reseed"):
                raise wire.WireError("descriptors came where none were due")
            if kind == "open":
                self._open(client, message)
            elif kind in ("commit", "reseed"):
                contents = _contents(message, fds)
                kept = True
                self._take(client, message, contents)
            elif kind == "status":
                self._reply(client, self._status())
            elif kind == "evict":
                events = self._vault.evict(_text(message, "slot"), time.monotonic())
                self._reply(client, {"ok": "evicted" if events is not None else "absent"})
                self._carry_out(events or [])
            else:
                raise wire.WireError(f"{kind!r} is nothing to ask for")
        finally:
            if not kept:
                for fd in fds:
                    os.close(fd)

    def _open(self, client: Client, message: dict[str, Any]) -> None:
        members = message.get("members")
        if not isinstance(members, list) or not all(
            isinstance(m, list) and len(m) == 2 and isinstance(m[0], str) and isinstance(m[1], dict)
            for m in members
        ):
            raise wire.WireError("members are pairs of a slot and an identity")
        mode, replace = _text(message, "mode"), _text(message, "replace")
        if mode not in ("auto", "ro", "rw") or replace not in ("keep", "evict-first"):
            raise wire.WireError(f"mode {mode!r} and replace {replace!r} are none")
        now = time.monotonic()
        group = Group(
            _text(message, "group"),
            [(slot, identity) for slot, identity in members],
            mode,  # type: ignore[arg-type]
            replace,  # type: ignore[arg-type]
            _number(message, "keep"),
            now + _number(message, "timeout"),
        )
        self._follow(client)
        self._carry_out(self._vault.open(client.number, int(_number(message, "rank")), group, now))

    def _take(self, client: Client, message: dict[str, Any], contents: Contents) -> None:
        now = time.monotonic()
        client.holds = True
        try:
            if message["op"] == "commit":
                key = _text(message, "generation")
                self._carry_out(self._vault.commit(client.number, key, contents, now))
                return
            identity = message.get("identity")
            if not isinstance(identity, dict):
                raise wire.WireError("an identity is an object")
            held = Generation(
                _text(message, "generation"),
                int(_number(message, "number")),
                identity,
                _text(message, "slot"),
                keep=_number(message, "keep"),
            )
            held.contents = contents
            self._follow(client)
            events = self._vault.reseed(client.number, held, now)
        except (Misuse, wire.WireError):
            contents.close()
            raise
        if not any(generation is held for generation in self._vault.generations()):
            contents.close()
        self._carry_out(events)

    def _carry_out(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Freed):
                event.generation.contents.close()
                continue
            assert isinstance(event, MayRead | MayWrite | Refused)
            client = self._clients.get(event.client)
            if client is None:
                continue
            if isinstance(event, Refused):
                self._reply(client, {"error": event.code, "why": event.why, "fields": event.fields})
            elif isinstance(event, MayWrite):
                self._reply(
                    client, {"ok": "write", "slot": event.slot, "number": event.number, **self._self()}
                )
            else:
                self._hand_out(client, event.generation)

    def _hand_out(self, client: Client, generation: Generation) -> None:
        contents: Contents = generation.contents
        serving = self._vault.slots[generation.slot].current is generation
        message = {
            "ok": "read",
            "slot": generation.slot,
            "number": generation.number,
            "generation": generation.key,
            "identity": generation.identity,
            "keep": generation.keep,
            "nbytes": contents.nbytes,
            "detail": contents.detail,
            "serving": serving,
            **self._self(),
        }
        self._reply(client, message, [] if client.holds else contents.fds)

    def _self(self) -> dict[str, Any]:
        return {"broker": {"pid": os.getpid(), "socket": self._where}}

    def _status(self) -> dict[str, Any]:
        now = time.monotonic()
        described = []
        for name, slot in sorted(self._vault.slots.items()):
            held = [(g, g is slot.current) for g in (slot.current, *slot.retired) if g is not None]
            described.append(
                {
                    "slot": name,
                    "writer": self._person(slot.writer, now) if slot.writer is not None else None,
                    "generations": [
                        {
                            "number": g.number,
                            "serving": serving,
                            "identity": g.identity,
                            "bytes": g.contents.nbytes,
                            "leases": [self._person(c, now) for c in sorted(g.leases)],
                        }
                        for g, serving in held
                    ],
                }
            )
        waiting = [self._person(c, now) | {"for": g.waits_for} for c, g in self._vault.waiting.items()]
        uptime = round(now - self._started, 3)
        return {"ok": "status", "uptime": uptime, "slots": described, "waiting": waiting, **self._self()}

    def _person(self, number: int, now: float) -> dict[str, Any]:
        client = self._clients[number]
        return {"pid": client.pid, "uid": client.uid, "age": round(now - client.since, 3)}


def _contents(message: dict[str, Any], fds: list[int]) -> Contents:
    """Check what a writer hands over: its manifest, and memory that nobody can change any more."""
    detail = message.get("detail")
    if len(fds) < 2 or not isinstance(detail, dict):
        raise wire.WireError("a generation is a manifest and at least one piece of memory")
    if not _sealed(fds[0]) or os.fstat(fds[0]).st_size > MAX_MANIFEST:
        raise wire.WireError("the manifest could still be changed, or is too large")
    if detail.get("memory") == "host" and not all(map(_sealed, fds[1:])):
        raise wire.WireError("the memory could still be changed")
    return Contents(fds, int(_number(message, "nbytes")), detail)


def _sealed(fd: int) -> bool:
    try:
        return fcntl.fcntl(fd, _F_GET_SEALS) & _SEALED == _SEALED
    except OSError:
        return False


def _text(message: dict[str, Any], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 1024:
        raise wire.WireError(f"{name} is a short string")
    return value


def _number(message: dict[str, Any], name: str) -> float:
    value = message.get(name)
    if type(value) not in (int, float) or not 0 <= value < 1e18:  # type: ignore[operator]
        raise wire.WireError(f"{name} is a number")
    return value  # type: ignore[return-value]


def serve(
    where: str,
    *,
    allow: Iterable[int] = (),
    idle: float | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Be the broker of the socket `where`, unless there is one; return when it has nothing to do.

    Args:
        where: the path of the socket; its folder is made for this user alone, unless others are allowed.
        allow: users who may connect besides this one.
        idle: seconds with nothing to hold after which to end; None for never.
        ready: called when the socket takes connections.

    Raises:
        PlaceError: the folder or the socket is not to be trusted.
        TimeoutError: another broker holds the place and does not answer.
    """
    allowed = frozenset(allow)
    path, name = os.path.split(os.path.abspath(where))
    folder = place.open_folder(path, owners={os.geteuid()}, create=True, private=not allowed)
    if allowed:
        os.fchmod(folder, 0o711)
    lock = _life_lock(folder)
    crashed = _clear(folder, name)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    listening.bind(place.through(folder, name))
    if allowed:
        os.chmod(name, 0o666, dir_fd=folder)
    listening.listen(1024)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    broker = Broker(
        listening,
        where,
        allow={os.geteuid(), *allowed},
        idle=idle,
        grace=GRACE_SECONDS if crashed else 0.0,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: broker.stop())
    waker = socket.socketpair()
    for end in waker:
        end.setblocking(False)
    signal.set_wakeup_fd(waker[0].fileno())
    broker._watch(waker[1].fileno(), lambda _events: None)
    ready()
    try:
        broker.run()
    finally:
        broker.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)  # whoever connected meanwhile is hung up on, and comes again
        os.close(lock)


def _life_lock(folder: int, seconds: float = 2.0) -> int:
    """Return the lock that only a living broker of this place holds."""
    lock = os.open(LIFE_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() >= end:
                raise TimeoutError("another broker holds this place, and does not answer") from None
            time.sleep(0.01)


def _clear(folder: int, name: str) -> bool:
    """Remove the socket of a broker that was killed; return whether there was one."""
    try:
        place.check_socket(folder, name, {os.geteuid()})
    except FileNotFoundError:
        return False
    os.unlink(name, dir_fd=folder)
    return True


def main(settings: str) -> None:
    """Run as a process of its own; `settings` is JSON: socket, allow, idle, foreground.

    In the background, the process that was started ends with 0 when its child takes connections.
    """
    given = json.loads(settings)
    os.umask(0o077)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    background = not given["foreground"]

    def ready() -> None:
        if background:
            _into_the_background()
        else:
            print(f"weights-gms: ready at {given['socket']}, pid {os.getpid()}", flush=True)  # noqa: T201

    try:
        serve(given["socket"], allow=given["allow"], idle=given["idle"], ready=ready)
    except (place.PlaceError, OSError) as exc:
        print(f"weights-gms: {exc}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


def _into_the_background() -> None:
    """Go on in a child that no terminal, service or engine waits for."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
