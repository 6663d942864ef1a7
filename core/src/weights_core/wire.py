# SPDX-License-Identifier: Apache-2.0
"""Messages between processes: a length, JSON, and descriptors beside it.

Every message carries the version, each length is capped before a byte is kept, and nothing is
ever unpickled. The kernel passes at most 253 descriptors at a time (SCM_MAX_FD).
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

VERSION = 1
MAX_REQUEST = 256 << 10
MAX_REPLY = 16 << 20
MAX_FDS = 253
_LENGTH = struct.Struct("!I")
_SPACE = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class WireError(Exception):
    """What came is not a message of this protocol."""


def pack(message: dict[str, Any]) -> bytes:
    """Return a message as it goes over the wire."""
    body = json.dumps({"v": VERSION, **message}, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> int:
    """Send what fits of `data`, with all of `fds` beside its first byte; return the bytes sent."""
    if not fds:
        return sock.send(data)
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


class Inbox:
    """What has come from one peer and is not yet a whole message."""

    def __init__(self, limit: int) -> None:
        """Take messages of at most `limit` bytes."""
        self._limit = limit
        self._data = bytearray()
        self._fds: list[int] = []

    @property
    def pending(self) -> bool:
        """Whether a part of a message has come."""
        return bool(self._data or self._fds)

    def receive(self, sock: socket.socket) -> bool:
        """Take what has come; return False if the peer has hung up.

        Raises:
            WireError: more descriptors came than fit.
            BlockingIOError, TimeoutError, ConnectionError: as the socket raises them.
        """
        data, ancillary, flags, _ = sock.recvmsg(1 << 16, _SPACE, socket.MSG_CMSG_CLOEXEC)
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                came = array.array("i")
                came.frombytes(raw[: len(raw) - len(raw) % came.itemsize])
                self._fds += came
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise WireError("more descriptors came than one message may carry")
        self._data += data
        return bool(data)

    def take(self) -> tuple[dict[str, Any], list[int]] | None:
        """Return the next whole message and the descriptors that came with it, or None.

        Raises:
            WireError: it is too long, no JSON object, or of another version.
        """
        if len(self._data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._data)
        if length > self._limit:
            raise WireError(f"a message of {length} bytes; at most {self._limit} are taken")
        if len(self._data) < _LENGTH.size + length:
            return None
        body = bytes(self._data[_LENGTH.size : _LENGTH.size + length])
        del self._data[: _LENGTH.size + length]
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            raise WireError("a message that is no JSON") from None
        if not isinstance(message, dict):
            raise WireError("a message that is no JSON object")
        if message.get("v") != VERSION:
            raise WireError(
                f"the other side speaks version {message.get('v')!r} of the protocol, this one {VERSION}: "
                "install the same versions of weights on both"
            )
        fds, self._fds = self._fds, []
        return message, fds

    def close(self) -> None:
        """Close descriptors that belong to no message."""
        while self._fds:
            os.close(self._fds.pop())
