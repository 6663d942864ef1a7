# SPDX-License-Identifier: Apache-2.0
"""What each hook call was: who was called, with what, what came of it, and how long it took."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from weights_core.errors import PluginConfigError, WeightsError
from weights_core.types import EngineInfo, FormatClaim, Layout, LoadRequest, Outcome, PublishReceipt
from weights_core.weightset import WeightSet

VARIABLE = "WEIGHTS_TRACE"


@attrs.frozen(eq=False, kw_only=True)
class HookCall:
    """One call of one plugin's hook.

    `around` are the wrappers that surrounded it, `depth` is 1 for a call that was made while an
    owner's was running, `seconds` is wall time, wrappers included. Exactly one of `result` and
    `error` means something.
    """

    plugin: str
    hook: str
    arguments: Mapping[str, object]
    around: tuple[str, ...] = ()
    result: object = None
    error: BaseException | None = None
    seconds: float = 0.0
    depth: int = 0
    rank: int = 0

    def __str__(self) -> str:
        """Return one line: plugin, hook, a summary of what went in and came out, and the time."""
        given = ", ".join(f"{name}={summary(value)}" for name, value in self.arguments.items())
        inside = f" inside {', '.join(self.around)}" if self.around else ""
        came = f"raised {summary(self.error)}" if self.error is not None else f"→ {summary(self.result)}"
        indent = "  " * self.depth
        line = f"{self.plugin}.{self.hook}({given}){inside} {came} [{self.seconds * 1e3:.2f} ms]"
        return f"rank {self.rank}: {indent}{' '.join(line.split())}"


Observer = Callable[[HookCall], None]
"""Told of each call when it has ended; calls made inside it are told first."""


def summary(value: object) -> str:
    """Say what a hook's argument or result is, briefly and without reading any tensor."""
    if isinstance(value, LoadRequest):
        return f"{value.checkpoint} as {','.join(value.format)}"
    if isinstance(value, WeightSet):
        return f"{type(value).__name__} of {_contents(value)}"
    if isinstance(value, FormatClaim):
        roles = "+".join(sorted(role.value for role in value.roles)) or "no part"
        return f"{roles}: {value.reason}"
    if isinstance(value, PublishReceipt):
        return f"{value.layout.value}, {value.nbytes / 1e6:,.1f} MB: {value.detail}"
    if isinstance(value, Outcome):
        return f"{value.status} in {value.phase}"
    if isinstance(value, WeightsError):
        return f"{type(value).__name__}: {value.brief}"
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    if value is None or isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, Layout):
        return value.value
    info = getattr(value, "info", None)
    if isinstance(info, EngineInfo):
        return f"<{' '.join(part for part in (info.name, info.model, info.component) if part)}>"
    return f"<{type(value).__name__}>"


def _contents(weights: WeightSet) -> str:
    try:
        sizes = [meta.nbytes for meta in weights.metas.values()]
        return f"{len(sizes)} tensors, {sum(sizes) / 1e6:,.1f} MB, {weights.layout.value}"
    except Exception as exc:  # noqa: BLE001 - to watch a plugin must not change what becomes of it
        return f"unknown contents ({type(exc).__name__})"


def from_environment(environ: Mapping[str, str] = os.environ) -> Observer | None:
    """Return what `WEIGHTS_TRACE` asks for: `1` writes to standard error, a path is appended to.

    Raises:
        PluginConfigError: the file it names cannot be written.
    """
    where = environ.get(VARIABLE, "")
    if where in ("", "0"):
        return None
    if where == "1":
        return _writer(lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201 - asked for
    path = Path(where)

    def append(line: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as exc:
            raise PluginConfigError(f"{VARIABLE} names {path}: {exc.strerror}") from exc

    append(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}")
    return _writer(append)


def _writer(write: Callable[[str], None]) -> Observer:
    begin = time.perf_counter()
    lock = threading.Lock()  # loads may run side by side

    def observe(call: HookCall) -> None:
        with lock:
            write(f"weights: trace: +{time.perf_counter() - begin:.3f} s {call}")

    return observe
