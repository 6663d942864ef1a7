# SPDX-License-Identifier: Apache-2.0
"""The secret that sources and targets share, and how each proves to the other that it has it."""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Collection
from typing import Literal

from weights_core import place
from weights_core.errors import WeightsError

NAME = "token"
MIN_BYTES = 32
MAX_BYTES = 4096
_NONCE = re.compile(r"[0-9a-f]{64}")


class TokenError(WeightsError):
    """There is no secret that can be used; says what to do."""


def read_token(path: str, owners: Collection[int]) -> bytes:
    """Return the secret in a file.

    Raises:
        TokenError: the file is not there, too short, or others could read it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise TokenError(f"token_file {path}: {exc.strerror}") from exc
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in {*owners, 0}:
            raise TokenError(f"token_file {path} is no file, or user {found.st_uid}'s: refused")
        if found.st_mode & 0o077:
            raise TokenError(f"token_file {path} can be read by others; chmod 600 it")
        secret = os.read(fd, MAX_BYTES).strip()
    finally:
        os.close(fd)
    if len(secret) < MIN_BYTES:
        raise TokenError(
            f"token_file {path} holds {len(secret)} bytes, need {MIN_BYTES}: openssl rand -hex 32"
        )
    return secret


def own_token(folder: str, owners: Collection[int]) -> bytes:
    """Return the secret in the folder of sockets, making one if there is none.

    Raises:
        TokenError: the folder or the file can't be trusted.
    """
    try:
        opened = place.open_folder(folder, owners=owners, create=True)
    except FileNotFoundError:
        raise TokenError(f"{folder} cannot be made: its parent is not there") from None
    except place.PlaceError as exc:
        raise TokenError(f"{exc}; mend that, or set registry=FOLDER, a folder of yours") from exc
    try:
        if not os.path.exists(place.through(opened, NAME)):
            _make(opened)
    except OSError as exc:
        raise TokenError(f"no token can be made in {folder}: {exc.strerror}") from exc
    finally:
        os.close(opened)
    return read_token(os.path.join(folder, NAME), owners)


def nonce() -> str:
    """Return what a proof is made for, once."""
    return secrets.token_hex(32)


def is_nonce(given: object) -> bool:
    """Say whether `given` is what `nonce` returns."""
    return isinstance(given, str) and _NONCE.fullmatch(given) is not None


def prove(token: bytes, role: Literal["source", "target"], of_target: str, of_source: str, entry: str) -> str:
    """Return the proof of having the token, as `role`, in an exchange of two nonces with source `entry`."""
    said = "\n".join(("weights-presharded", role, of_target, of_source, entry))
    return hmac.new(token, said.encode(), "sha256").hexdigest()


def proves(given: object, due: str) -> bool:
    """Compare in constant time."""
    return isinstance(given, str) and hmac.compare_digest(given.encode(), due.encode())


def _make(folder: int) -> None:
    """Make the token, whole or not at all; the first one's counts."""
    part = f".{NAME}.{secrets.token_hex(8)}"
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        os.write(fd, secrets.token_hex(MIN_BYTES).encode())
        with contextlib.suppress(FileExistsError):
            os.link(part, NAME, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    finally:
        os.close(fd)
        os.unlink(part, dir_fd=folder)
