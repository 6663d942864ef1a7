# SPDX-License-Identifier: Apache-2.0
"""Check that an engine holds every tensor it expects, before anyone may use or share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from weights_core.errors import CoverageError, EngineError
from weights_core.types import Applied, TensorMeta

SHOWN = 8


def check(
    engine: str,
    expected: Mapping[str, TensorMeta],
    applied: object,
    unused: Literal["report", "refuse"],
) -> Applied:
    """Return `applied` if it covers `expected` exactly.

    Raises:
        CoverageError: the engine reported nothing; tensors are missing; it wrote what it does not
            expect; or, by the policy `unused`, the checkpoint held tensors it did not take.
        EngineError: `expected` is not of TensorMeta.
    """
    if not isinstance(applied, Applied):
        raise CoverageError(
            f"engine {engine} did not report what it wrote (it returned {applied!r}): "
            "refusing to use or share a model that may be unpopulated"
        )
    for name, meta in expected.items():
        if not isinstance(meta, TensorMeta):
            raise EngineError(f"engine {engine} expects {name!r} as {type(meta).__name__}, need TensorMeta")
    missing = sorted(expected.keys() - applied.written - applied.defaulted.keys())
    invented = sorted(applied.written - expected.keys())
    parts = [f"missing {listed(missing)}"] if missing else []
    parts += [f"wrote tensors it does not expect, {listed(invented)}"] if invented else []
    if parts:
        raise CoverageError(f"engine {engine}: {'; '.join(parts)}", missing=missing, unexpected=invented)
    if applied.unused is None and unused == "refuse":
        raise CoverageError(f"engine {engine} can't say what it left unused, so it cannot be refused")
    if applied.unused and unused == "refuse":
        raise CoverageError(f"unexpected {listed(applied.unused)}", unexpected=applied.unused)
    return applied


def listed(names: Sequence[str]) -> str:
    """Return how many names there are, and the first of them."""
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"{len(names)} tensor{'s' * (len(names) != 1)}: {shown}"


def unlike(stored: Sequence[int], due: Sequence[int]) -> str:
    """Return how the shape of a tensor differs from the one that is due."""
    return f"is {list(stored)}, need {list(due)}"


def described(mismatched: Mapping[str, str]) -> str:
    """Return the first names of tensors that do not fit, each with what differs."""
    shown = [f"{name} {why}" for name, why in list(mismatched.items())[:SHOWN]]
    return ", ".join(shown) + (", …" if len(mismatched) > SHOWN else "")
