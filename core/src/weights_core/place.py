# SPDX-License-Identifier: Apache-2.0
"""Where a socket is that processes of one machine meet at, and whether that place can be trusted.

The folder is opened once and looked at through its descriptor, and the socket is reached through
that descriptor: what was checked is what is used, and the length of the path doesn't matter.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class PlaceError(Exception):
    """The socket's folder cannot be made, or somebody else could meddle with it."""


def default_folder(environ: Mapping[str, str], uid: int, name: str) -> str:
    """Return the user's own folder of a name: under `XDG_RUNTIME_DIR` if that is theirs, else in /tmp."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        try:
            if os.stat(runtime).st_uid == uid:
                return os.path.join(runtime, name)
        except OSError:
            pass  # a session that has ended leaves the variable behind
    return f"/tmp/{name}-{uid}"


def open_folder(folder: str, *, owners: Collection[int], create: bool = False, private: bool = False) -> int:
    """Return a descriptor of a socket's folder.

    Args:
        folder: its path.
        owners: the users who may own it.
        create: make it, for this user alone, if it isn't there.
        private: refuse it if others can even look into it.

    Raises:
        FileNotFoundError: it is not there, or cannot be made because its parent isn't.
        PlaceError: it is a link, somebody else's, or open to others; says what to do.
    """
    try:
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except NotADirectoryError:
        raise PlaceError(f"{folder} is a link or no folder: refused") from None
    except OSError as exc:
        raise PlaceError(f"{folder}: {exc.strerror}") from exc
    found = os.fstat(fd)
    why = ""
    if found.st_uid not in owners:
        why = f"belongs to user {found.st_uid}"
    elif found.st_mode & 0o022:
        why = "can be written by others; chmod 700 it"
    elif private and found.st_mode & 0o077:
        why = "can be entered by others; chmod 700 it, or say which other users are allowed"
    if why:
        os.close(fd)
        raise PlaceError(f"{folder} {why}: refused")
    return fd


def check_socket(folder: int, name: str, owners: Collection[int]) -> None:
    """Refuse to connect to what is no socket of a trusted user.

    Raises:
        FileNotFoundError: there is nothing.
        PlaceError: it is a link or anything else.
    """
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISSOCK(found.st_mode):
        raise PlaceError(f"{name} is a link or a file, not a socket: refused")
    if found.st_uid not in owners:
        raise PlaceError(f"{name} belongs to user {found.st_uid}: refused")


def through(folder: int, name: str) -> str:
    """Return a short path that leads through the open folder."""
    return f"/proc/self/fd/{folder}/{name}"


def connect(
    path: str, *, owners: Collection[int], create: bool = False, timeout: float | None = None
) -> socket.socket:
    """Return a connection to a socket that can be trusted, and whose other end can.

    Args:
        path: the socket's.
        owners: the users who may own the folder and the socket, and be at the other end.
        create: make the folder if it isn't there.
        timeout: seconds that the connection's calls wait; None for as long as it takes.

    Raises:
        PlaceError: it cannot be trusted.
        OSError: nobody is there.
    """
    parent, name = os.path.split(path)
    folder = open_folder(parent, owners=owners, create=create)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        check_socket(folder, name, owners)
        sock.settimeout(timeout)
        sock.connect(through(folder, name))
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in owners:
            raise PlaceError(f"the other end of {path} is user {uid}'s: refused")
        return sock
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(folder)
