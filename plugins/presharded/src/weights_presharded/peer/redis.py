# SPDX-License-Identifier: Apache-2.0
"""Sources of many hosts, found in Redis: one key each, which goes by itself when its source falls silent."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from weights_core.errors import ExtraNotInstalledError
from weights_presharded.peer.entry import MAX_BYTES, STALE_BEATS, Entry
from weights_presharded.peer.registry import Registry, RegistryError

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "weights:presharded:1:"
_SECONDS = 5.0
_BATCH = 500
_PASSWORD = re.compile(r"(?<=://)[^@/]*@")


class RedisRegistry(Registry):
    """Keys with a time to live of some beats; Redis's own access rules and TLS protect them."""

    def __init__(self, url: str) -> None:
        """Prepare; nothing is connected yet.

        Args:
            url: `redis://user:password@host:port/db`, `rediss://…` with TLS, `unix://path`.

        Raises:
            ExtraNotInstalledError: the client is not installed.
            RegistryError: the address can't be understood.
        """
        try:
            import redis
        except ImportError as exc:
            raise ExtraNotInstalledError(
                "a registry in Redis needs its client: pip install 'weights-presharded[redis]'"
            ) from exc
        self.name = f"Redis at {_PASSWORD.sub('', url)}"
        self._failures = redis.RedisError
        try:
            self._client: Any = redis.Redis.from_url(
                url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS
            )
        except (ValueError, TypeError) as exc:
            raise RegistryError(f"{self.name}: {exc}") from exc

    def put(self, entry: Entry) -> None:
        """Set the key, to live for some beats more."""
        alive_for = int(1000 * (STALE_BEATS * entry.beat + 1.0))
        with self._asking():
            self._client.set(PREFIX + entry.id, entry.dumps(), px=alive_for)

    def remove(self, entry: Entry) -> None:
        """Delete the key."""
        with self._asking():
            self._client.delete(PREFIX + entry.id)

    def entries(self) -> list[Entry]:
        """Read every key; who has one is alive, or was some beats ago."""
        found = []
        with self._asking():
            names = list(self._client.scan_iter(match=f"{PREFIX}*", count=_BATCH))
            for start in range(0, len(names), _BATCH):
                part = names[start : start + _BATCH]
                with self._client.pipeline(transaction=False) as pipeline:
                    for name in part:
                        pipeline.get(name)
                        pipeline.pttl(name)
                    answers = iter(pipeline.execute(raise_on_error=False))
                for name, raw, left in zip(part, answers, answers, strict=False):
                    entry = _read(raw, left)
                    if entry is not None and name == (PREFIX + entry.id).encode():
                        found.append(entry)
        return found

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except self._failures as exc:
            raise RegistryError(f"{self.name}: {exc}") from exc


def _read(raw: object, left: object) -> Entry | None:
    if not isinstance(raw, bytes) or len(raw) > MAX_BYTES or not isinstance(left, int) or left < 0:
        return None  # gone in this moment, or of a kind that would never go
    try:
        entry = Entry.loads(raw, 0.0)
        return Entry.loads(raw, STALE_BEATS * entry.beat + 1.0 - left / 1000)
    except ValueError:
        return None
