# SPDX-License-Identifier: Apache-2.0
"""Ask a source for its weights: reach it, prove the token to one another, be told where the bytes are."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Any, Self

import attrs

from weights_core import Identity, place, wire
from weights_core.errors import WeightsError
from weights_presharded.peer import token as tokens
from weights_presharded.peer.entry import Entry

MAX_REPLY = 256 << 20
"""An offer to another host carries its manifest: 1 MB for some ten thousand tensors."""


class PeerError(WeightsError):
    """A source cannot serve; the next one may."""


class BusyError(PeerError):
    """A source serves as many as it may."""


class GoneError(PeerError):
    """Nobody listens where a source was: what the registry says of it is stale."""


@attrs.define(eq=False)
class Connection:
    """A source that serves: what it told, and the descriptors that came with it."""

    sock: socket.socket
    told: Mapping[str, Any]
    fds: list[int]

    def alive(self) -> None:
        """Tell the source that this target lives, so that it keeps its place.

        Raises:
            PeerError: the source has gone.
        """
        try:
            self.sock.send(wire.pack({"op": "alive"}))
        except BlockingIOError:
            pass  # it has not read the last ones
        except OSError as exc:
            raise PeerError(f"hung up: {exc.strerror or exc}") from exc

    def done(self) -> None:
        """Tell the source that all of it has come; it may have gone, which no longer matters."""
        with contextlib.suppress(OSError):
            self.sock.send(wire.pack({"op": "done"}))

    def close(self) -> None:
        """Hang up, and close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(
    entry: Entry,
    identity: Identity,
    transport: str,
    *,
    token: bytes,
    owners: frozenset[int],
    stall: float,
    wait: float = 0.0,
) -> Connection:
    """Return a connection on which the source has said where the bytes are.

    Args:
        entry: of the source.
        identity: of the weights that are needed.
        transport: how they are to come.
        token: what both must know.
        owners: the users whose sources are believed, on this host.
        stall: seconds that the source may say nothing.
        wait: seconds to wait for a place if it has none.

    Raises:
        BusyError: it has no place.
        GoneError: it is not there.
        PeerError: it refuses, does not answer, or is not who it says.
    """
    inbox = wire.Inbox(MAX_REPLY)
    sock = _connected(entry, transport, owners, stall)
    try:
        ours = tokens.nonce()
        hello, _ = _exchange(sock, inbox, {"op": "hello", "nonce": ours}, stall)
        theirs = hello.get("nonce")
        if not tokens.is_nonce(theirs) or not tokens.proves(
            hello.get("proof"), tokens.prove(token, "source", ours, str(theirs), entry.id)
        ):
            raise PeerError("has not the token, or another one")
        message = {
            "op": "pull",
            "proof": tokens.prove(token, "target", ours, str(theirs), entry.id),
            "identity": identity.as_dict(),
            "transport": transport,
            "wait": wait,
        }
        told, fds = _exchange(sock, inbox, message, stall + wait)
        if told.get("ok") != "pull":
            for fd in fds:
                os.close(fd)
            raise _refusal(told)
        sock.setblocking(False)
        return Connection(sock, told, fds)
    except BaseException:
        sock.close()
        raise
    finally:
        inbox.close()


def _connected(entry: Entry, transport: str, owners: frozenset[int], stall: float) -> socket.socket:
    try:
        if transport == "local" or (entry.address is None and entry.is_here):
            return place.connect(entry.socket, owners=owners, timeout=stall)
        if entry.address is None:
            raise PeerError("does not listen for other hosts")
        host, _, port = entry.address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=stall)
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        raise GoneError(f"is not there any more: {exc.strerror}") from exc
    except (OSError, ValueError) as exc:
        raise PeerError(f"cannot be reached: {exc}") from exc
    except place.PlaceError as exc:
        raise PeerError(str(exc)) from exc


def _exchange(
    sock: socket.socket, inbox: wire.Inbox, message: dict[str, Any], seconds: float
) -> tuple[dict[str, Any], list[int]]:
    end = time.monotonic() + seconds
    try:
        sock.settimeout(max(0.001, seconds))
        sock.sendall(wire.pack(message))
        while (taken := inbox.take()) is None:
            sock.settimeout(max(0.001, end - time.monotonic()))
            if not inbox.receive(sock):
                raise PeerError("hung up before it answered: is the token the same there?")
        return taken
    except TimeoutError:
        raise PeerError(f"did not answer within {seconds:g} s") from None
    except wire.WireError as exc:
        raise PeerError(str(exc)) from exc
    except OSError as exc:
        raise PeerError(f"hung up: {exc.strerror or exc}") from exc


def _refusal(told: Mapping[str, Any]) -> PeerError:
    if "busy" in told:
        return BusyError(f"serves {told['busy']} already")
    if told.get("error") == "mismatch" and isinstance(told.get("fields"), dict):
        fields = "; ".join(
            f"{name}: need {mine!r}, has {theirs!r}" for name, (mine, theirs) in told["fields"].items()
        )
        return PeerError(f"has other weights: {fields}")
    return PeerError(f"refused: {told.get('why')}")
