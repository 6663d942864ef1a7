# SPDX-License-Identifier: Apache-2.0
"""The contract of a plugin, clause by clause, without pytest: what `weights check` runs."""

from __future__ import annotations

from collections.abc import Mapping

from weights_core.testing.contract import (  # noqa: F401 - each module adds its clauses
    owner_clauses,
    plugin_clauses,
    publisher_clauses,
    set_clauses,
    wrapper_clauses,
)
from weights_core.testing.contract.model import (
    Clause,
    Subject,
    UnfitSubjectError,
    Violation,
    all_clauses,
)
from weights_core.types import Role

__all__ = ["Clause", "Subject", "UnfitSubjectError", "Violation", "clauses", "excluded"]


def clauses(role: Role) -> list[Clause]:
    """Return the clauses that a plugin in `role` must honour."""
    return [clause for clause in all_clauses() if role in clause.roles]


def excluded(exclusions: Mapping[str, str], role: Role, whose: str) -> Mapping[str, str]:
    """Return `exclusions`, clause → reason, if each is a clause of the role and has a reason.

    Raises:
        UnfitSubjectError: one has no reason that says anything, or there is no such clause.
    """
    known = {clause.name for clause in clauses(role)}
    for name, reason in exclusions.items():
        if name not in known:
            raise UnfitSubjectError(
                f"{whose} excludes {name!r}, which is no clause of a {role.value}'s contract"
            )
        if len(str(reason or "").split()) < 3:
            raise UnfitSubjectError(
                f"{whose} excludes {name!r} without a reason: say in a sentence why an engine won't suffer"
            )
    return exclusions
