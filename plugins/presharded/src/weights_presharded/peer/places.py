# SPDX-License-Identifier: Apache-2.0
"""What the settings stand for: the registry, the folder of sockets, the secret, who is believed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from weights_core import place
from weights_presharded.peer import token
from weights_presharded.peer.registry import DirectoryRegistry, Registry, RegistryError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weights_presharded.plugin import PreshardedConfig

FOLDER = "weights-presharded"
_THREADS = 16


def local_folder(config: PreshardedConfig, environ: Mapping[str, str]) -> str:
    """Return the folder of sockets, which is also the registry where that is a directory."""
    if config.registry is not None and "://" not in config.registry:
        return os.path.abspath(config.registry)
    return place.default_folder(environ, os.geteuid(), FOLDER)


def owners(config: PreshardedConfig) -> frozenset[int]:
    """Return the users whose sources are believed."""
    return frozenset({os.geteuid(), *config.trusted_uids})


def open_registry(config: PreshardedConfig, environ: Mapping[str, str]) -> Registry:
    """Return the registry that the settings name, or the user's own directory.

    Raises:
        RegistryError: there is no such kind, or it cannot be reached.
        ExtraNotInstalledError: it needs a package that is not installed.
    """
    given = config.registry or ""
    if "://" not in given:
        return DirectoryRegistry(local_folder(config, environ), owners(config))
    if given.startswith(("redis://", "rediss://", "unix://")):
        from weights_presharded.peer.redis import RedisRegistry

        return RedisRegistry(given)
    kind = given.split("://")[0]
    raise RegistryError(f"registry {kind}://… is of no kind that is known: redis, rediss, unix")


def token_of(config: PreshardedConfig, folder: str) -> bytes:
    """Return the secret: of the file that the settings name, else the user's own on this host.

    Raises:
        TokenError: there is none that can be used.
    """
    if config.token_file is not None:
        return token.read_token(config.token_file, owners(config))
    if config.registry is not None and "://" in config.registry:
        raise token.TokenError(
            "a registry of many hosts needs a token that is the same on all: token_file=PATH "
            "(openssl rand -hex 32 > PATH; chmod 600 PATH)"
        )
    return token.own_token(folder, owners(config))


def threads_of(config: PreshardedConfig) -> int:
    """Return how many threads copy and hash."""
    return config.threads or min(_THREADS, len(os.sched_getaffinity(0)))
