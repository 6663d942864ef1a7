# SPDX-License-Identifier: Apache-2.0
"""The kit tests itself: each broken plugin that ships with it breaks its clause, and no other."""

import gc

import pytest

from weights_core.testing.broken import eager, owners, publishers, sources, wrappers
from weights_core.testing.contract import Violation, clauses
from weights_core.testing.contracts import OwnerContract, PublisherContract, SourceContract, WrapperContract
from weights_core.types import Role


class _Offers(PublisherContract):
    def offered(self, receipt):
        return publishers.BOARD[receipt.detail]


KINDS = {
    Role.SOURCE: (SourceContract, sources.SOUND, {**eager.BROKEN, **sources.BROKEN}),
    Role.OWNER: (OwnerContract, owners.SOUND, owners.BROKEN),
    Role.WRAPPER: (WrapperContract, wrappers.SOUND, wrappers.BROKEN),
    Role.PUBLISHER: (_Offers, publishers.SOUND, publishers.BROKEN),
}
CASES = [(role, None) for role in KINDS]
CASES += [(role, name) for role, (_, _, broken) in KINDS.items() for name in broken]


@pytest.fixture(autouse=True, scope="module")
def a_small_heap_to_collect():
    """Clauses collect garbage often: what pytest holds is not to be walked each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def subject(role, plugin):
    base = KINDS[role][0]
    members = {"name": "tried", "plugin": plugin, "dtypes": ("F32", "U8", "BOOL"), "settle": 0.3}
    return type("Contract", (base,), members).subject()


@pytest.mark.parametrize(("role", "name"), CASES, ids=lambda v: getattr(v, "value", None) or v or "sound")
def test_exactly_one_clause_fails(role, name, tmp_path):
    _, sound, broken = KINDS[role]
    tried = subject(role, broken[name] if name else sound)
    failed = {}
    for clause in clauses(role):
        folder = tmp_path / clause.name
        folder.mkdir()
        try:
            clause.check(tried, folder)
        except Violation as violation:
            failed[clause.name] = str(violation)
    assert list(failed) == ([name] if name else []), "\n".join(failed.values())
    for text in failed.values():
        assert "Else " in text


def test_every_clause_has_a_plugin_that_breaks_it():
    every = {clause.name for role in Role for clause in clauses(role)}
    broken = {name for _, _, plugins in KINDS.values() for name in plugins}
    assert every == broken
