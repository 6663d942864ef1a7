# SPDX-License-Identifier: Apache-2.0
"""What a registry says of a source."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import attrs

from weights_core import Identity

SCHEMA = "weights.source/1"
MAX_BYTES = 64 << 10
"""An entry is smaller than this."""
_ID = re.compile(r"[0-9a-f]{32}")
STALE_BEATS = 3.0
"""A source that has missed so many beats is taken to be gone."""


@attrs.frozen(kw_only=True)
class Entry:
    """One rank of an engine that serves its weights.

    `socket` is where processes of the same host reach it, `address` (host:port) where others do, if
    they can. `memory` is `host` or `cuda`. `active` peers are being served, at most `limit` at a time.
    It says that it lives every `beat` seconds; `age` counts those since it last did.
    """

    id: str = attrs.field(validator=attrs.validators.matches_re(_ID))
    identity: Identity
    nbytes: int
    tensors: int
    memory: str
    device: str
    host: str
    pid: int
    uid: int
    socket: str
    address: str | None = None
    started: float
    beat: float
    active: int = 0
    limit: int = 1
    served: int = 0
    age: float = attrs.field(default=0.0, eq=False)

    @property
    def is_stale(self) -> bool:
        """Whether it has not said that it lives for too long."""
        return self.age > STALE_BEATS * self.beat + 1.0

    @property
    def is_here(self) -> bool:
        """Whether it is on this host."""
        return self.host == this_host()

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return f"{self.address or self.host} (pid {self.pid})" if not self.is_here else f"pid {self.pid}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        fields = attrs.asdict(self, recurse=False)
        return fields | {"identity": self.identity.as_dict()}

    def dumps(self) -> bytes:
        """Return the entry as it is kept."""
        fields = self.as_dict()
        del fields["age"]
        return json.dumps({"schema": SCHEMA, **fields}, separators=(",", ":")).encode()

    @classmethod
    def loads(cls, raw: bytes, age: float) -> Self:
        """Read an entry, and believe nothing in it.

        Raises:
            ValueError: it is none.
        """
        try:
            fields = json.loads(raw)
            if fields.pop("schema") != SCHEMA:
                raise ValueError("is of another schema")
            identity = Identity.from_dict(fields.pop("identity"))
            for name, kinds in _TYPES.items():
                if not isinstance(fields[name], kinds) or isinstance(fields[name], bool):
                    raise ValueError(f"{name} is {fields[name]!r}")
                if isinstance(fields[name], int | float) and not 0 <= fields[name] < 1 << 62:
                    raise ValueError(f"{name} is {fields[name]!r}")
            return cls(identity=identity, age=max(0.0, age), **fields)
        except (KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise ValueError(f"is no entry of a source: {type(exc).__name__}: {exc}") from exc


_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("id", "memory", "device", "host", "socket"), str),
    **dict.fromkeys(("nbytes", "tensors", "pid", "uid", "active", "limit", "served"), int),
    **dict.fromkeys(("started", "beat"), (int, float)),
    "address": (str, type(None)),
}


@functools.cache
def this_host() -> str:
    """Return what tells this host from others, and this start of it from the last."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
