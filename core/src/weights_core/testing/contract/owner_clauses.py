# SPDX-License-Identifier: Apache-2.0
"""Clauses on owners: many engines may hold one copy, and never a wrong or half one."""

from __future__ import annotations

import gc

from weights_core.errors import WeightsError
from weights_core.testing.contract.material import few, many
from weights_core.testing.contract.model import Case, clause
from weights_core.testing.engines import FakeEngine
from weights_core.types import Role


@clause(Role.OWNER, suffers="an engine serves another model than it was started with")
def another_content_is_never_served(case: Case) -> None:
    """Weights of the same names and shapes but other bytes are loaded or refused, never mixed up."""
    first, second = case.checkpoint(few(1)), case.checkpoint(few(2))
    lease = case.load(first, FakeEngine(first.truth)).lease
    engine = FakeEngine(second.truth)
    try:
        with case.session(second.path, engine) as session:
            session.resolve()
            session.load()
            session.apply()
            other = session.finish().lease
    except WeightsError:
        lease.close()
        return
    for name, due in second.truth.items():
        case.same(name, engine.params[name], due, "a load of another checkpoint while the first is held")
    other.close()
    lease.close()


@clause(Role.OWNER, suffers="the second engine on a machine computes with other numbers than the first")
def a_second_engine_gets_the_same(case: Case) -> None:
    """While one engine holds the weights, another that loads the same checkpoint gets the same bytes."""
    prepared = case.checkpoint(many())
    engines = [FakeEngine(prepared.truth) for _ in range(3)]
    leases = [case.load(prepared, engine).lease for engine in engines]
    for engine in engines:
        for name, due in prepared.truth.items():
            case.same(name, engine.params[name], due, "looking at one of three engines")
    for lease in leases:
        lease.close()


@clause(Role.OWNER, suffers="one engine that ends takes the weights of all the others with it")
def one_engine_does_not_free_anothers_weights(case: Case) -> None:
    """Releasing, closing and ending the lease of one engine leaves the other's weights as they are."""
    prepared = case.checkpoint(many())
    first, second = FakeEngine(prepared.truth), FakeEngine(prepared.truth)
    ending = case.load(prepared, first).lease
    with case.session(prepared.path, second) as session:
        session.resolve()
        weights = session.load()
        session.apply()
        staying = session.finish().lease
    before = second.contents()
    weights.release(list(weights.metas))
    ending.close()
    del first, ending
    gc.collect()
    changed = [name for name, now in second.contents().items() if now != before[name]]
    case.require(not changed, f"with its neighbour {len(changed)} of the tensors of an engine went")
    staying.close()


@clause(Role.OWNER, suffers="every later engine attaches to a model with holes in it")
def an_incomplete_load_is_never_shared(case: Case) -> None:
    """A load that fails, half written or not covering the engine, leaves nothing for others to attach."""
    prepared = case.checkpoint(many())
    missing_one = FakeEngine({**prepared.truth, "one.more": prepared.truth["many.0.w"]})
    failing = FakeEngine(prepared.truth, fail_at=("apply", "bind", "post_load"))
    for engine in (missing_one, failing):
        try:
            case.load(prepared, engine).lease.close()
        except WeightsError:
            continue
    engine = FakeEngine(prepared.truth)
    lease = case.load(prepared, engine).lease
    for name, due in prepared.truth.items():
        case.same(name, engine.params[name], due, "a load after one that failed")
    lease.close()
