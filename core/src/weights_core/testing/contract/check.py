# SPDX-License-Identifier: Apache-2.0
"""Try an installed plugin on its contract, outside of pytest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import attrs

from weights_core.discovery import Installed
from weights_core.errors import PluginError
from weights_core.host import PluginHost
from weights_core.testing.checkpoints import (
    every_dtype,
    random_tensor,
    read_with_safetensors,
    write_three_files,
)
from weights_core.testing.contract import UnfitSubjectError, Violation, clauses
from weights_core.testing.contract.model import Subject
from weights_core.testing.engines import FakeEngine
from weights_core.types import LoadRequest, Role


@attrs.frozen
class Verdict:
    """What came of one clause: it holds, is broken, was excluded with a reason, or could not be tried."""

    clause: str
    result: Literal["holds", "broken", "excluded", "not tried"]
    detail: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return plain values for JSON."""
        return {"clause": self.clause, "result": self.result, "detail": self.detail}

    def __str__(self) -> str:
        """Return a line, and the detail on the next."""
        detail = f"\n            {self.detail}" if self.detail else ""
        return f"{self.result:<12}{self.clause}{detail}"


def verdicts(subject: Subject, exclusions: Mapping[str, str]) -> Iterator[Verdict]:
    """Try `subject` on every clause of its role, and yield what came of each."""
    for clause in clauses(subject.role):
        if clause.name in exclusions:
            yield Verdict(clause.name, "excluded", exclusions[clause.name])
            continue
        with tempfile.TemporaryDirectory(prefix="weights-check-") as folder:
            try:
                clause.check(subject, Path(folder))
            except Violation as exc:
                yield Verdict(clause.name, "broken", " ".join(str(exc).split()))
            except UnfitSubjectError as exc:
                yield Verdict(clause.name, "not tried", str(exc))
            else:
                yield Verdict(clause.name, "holds")


def subjects(plugin: Installed, settings: Mapping[str, object]) -> list[Subject]:
    """Return a subject for each role that an installed plugin takes in loading a safetensors checkpoint.

    Raises:
        PluginError: it is broken, or takes no part.
    """
    with tempfile.TemporaryDirectory(prefix="weights-check-") as folder:
        tensors = {f"w{i}": random_tensor(512, 512, dtype="F32", seed=i) for i in range(3)}
        path = write_three_files(Path(folder), tensors)
        engine = FakeEngine(tensors)
        request = LoadRequest(checkpoint=path, engine=engine.info, format=(plugin.name,))
        host = PluginHost([plugin], config={plugin.name: settings} if settings else {})
        hooks = host.hooks(request)
        claim = hooks.resolve_format(plugin.name, request)
    roles = sorted(claim.roles, key=list(Role).index) if claim is not None else []
    if not roles:
        why = claim.reason if claim is not None else "it says nothing"
        raise PluginError(
            f"plugin {plugin.name!r} takes no part in loading a safetensors checkpoint ({why}): "
            "give the contract that its author tests it with, --contract module:Class"
        )
    return [
        Subject(
            name=plugin.name,
            plugin=plugin.load(),
            role=role,
            config=lambda _folder: settings,
            prepare=write_three_files,
            oracle=read_with_safetensors,
            dtypes=every_dtype(),
        )
        for role in roles
    ]
