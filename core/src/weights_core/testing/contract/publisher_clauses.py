# SPDX-License-Identifier: Apache-2.0
"""Clauses on publishers: the right bytes, at the right time, for as long as the lease."""

from __future__ import annotations

import contextlib
import gc

from weights_core.errors import PublishError
from weights_core.testing.contract.material import many
from weights_core.testing.contract.model import Case, Prepared, clause
from weights_core.testing.engines import FakeEngine
from weights_core.testing.recorder import HookRecorder
from weights_core.types import Layout, PublishReceipt, Role


@clause(Role.PUBLISHER, suffers="others attach to weights of another layout than they believe")
def publishes_once_where_it_claimed(case: Case) -> None:
    """One receipt per load, of the layout that the claim names and of all bytes of the engine."""
    prepared = case.checkpoint(many())
    recorder = HookRecorder()
    report = case.load(prepared, FakeEngine(prepared.truth), observer=recorder)
    layout, receipt = _published(case, recorder)
    size = sum(tensor.nbytes for tensor in prepared.truth.values())
    case.require(receipt.layout is layout, f"it published {receipt.layout.value}, and claimed {layout.value}")
    case.require(receipt.nbytes == size, f"it says {receipt.nbytes:,} bytes, the engine has {size:,}")
    report.lease.close()


@clause(Role.PUBLISHER, suffers="engines that attach compute with other numbers")
def offers_what_the_engine_holds(case: Case) -> None:
    """The offer has every tensor of the engine, bit for bit, and keeps them after the load."""
    prepared = case.checkpoint(many())
    engine, recorder = FakeEngine(prepared.truth), HookRecorder()
    report = case.load(prepared, engine, observer=recorder)
    gc.collect()
    _, receipt = _published(case, recorder)
    offered = case.subject.seen_in_the_offer(receipt)
    case.require(
        offered.keys() == engine.params.keys(),
        f"it offers {len(offered)} tensors, the engine has {len(engine.params)}",
    )
    for name, due in engine.params.items():
        case.same(name, offered[name], due, "the offer")
    report.lease.close()


@clause(Role.PUBLISHER, suffers="others attach to memory that is gone, or the machine fills with offers")
def an_offer_ends_with_the_lease(case: Case) -> None:
    """Once the lease is closed nothing is offered any more."""
    prepared, recorder = case.checkpoint(many()), HookRecorder()
    report = case.load(prepared, FakeEngine(prepared.truth), observer=recorder)
    _, receipt = _published(case, recorder)
    report.lease.close()
    try:
        offered = case.subject.seen_in_the_offer(receipt)
    except (OSError, KeyError, ValueError, LookupError):
        return
    case.require(not offered, f"{len(offered)} tensors are still offered")


@clause(Role.PUBLISHER, suffers="the model computes other numbers once it is shared")
def publishing_leaves_the_model_as_it_is(case: Case) -> None:
    """The engine's tensors have the same bytes after publishing, and after the offer has ended."""
    prepared = case.checkpoint(many())
    engine = FakeEngine(prepared.truth)
    report = case.load(prepared, engine)
    for name, due in prepared.truth.items():
        case.same(name, engine.params[name], due, "a model that was published")
    report.lease.close()
    for name, due in prepared.truth.items():
        case.same(name, engine.params[name], due, "a model whose offer has ended")


@clause(Role.PUBLISHER, suffers="bytes are published that post-load has transformed, or is just transforming")
def reads_the_engine_only_while_it_publishes(case: Case) -> None:
    """It asks for the engine's tensors in `publish` alone, and in no other layout than it claimed."""
    prepared, recorder = case.checkpoint(many()), HookRecorder()
    engine = FakeEngine(prepared.truth)
    case.load(prepared, engine, observer=recorder).lease.close()
    layout, _ = _published(case, recorder)
    order = [event for event in engine.events if event.startswith(("tensors", "post_load"))]
    reads = [event for event in order if event.startswith("tensors")]
    case.require(
        set(reads) <= {f"tensors {layout.value}"},
        f"it asked for {sorted(set(reads))}, claimed {layout.value}",
    )
    post_load = next(i for i, event in enumerate(order) if event.startswith("post_load"))
    before = layout is Layout.SHARDED
    wrong = order[post_load + 1 :] if before else order[:post_load]
    case.require(
        not wrong, f"it read {layout.value} tensors {'after' if before else 'before'} the engine's post-load"
    )


@clause(Role.PUBLISHER, suffers="others attach to weights that post-load has already transformed")
def never_publishes_late(case: Case) -> None:
    """If its layout was never published, nothing of the engine is read or offered later."""
    prepared, recorder = case.checkpoint(many()), HookRecorder()
    engine = FakeEngine(prepared.truth)
    with contextlib.suppress(PublishError):  # which says that publishing is required
        _load_without_publishing(case, prepared, engine, recorder)
    read = [event for event in engine.events if event.startswith("tensors")]
    case.require(not read, f"with no publish() it asked for {read}")
    case.require(not recorder.of(case.name, "publish"), "its publish() was called")


def _load_without_publishing(
    case: Case, prepared: Prepared, engine: FakeEngine, recorder: HookRecorder
) -> None:
    with case.session(prepared.path, engine, observer=recorder) as session:
        session.resolve()
        session.load()
        session.apply()
        session.post_load()
        session.finish().lease.close()


def _published(case: Case, recorder: HookRecorder) -> tuple[Layout, PublishReceipt]:
    """Return where the plugin claimed to publish, and its receipt."""
    claim = recorder.of(case.name, "resolve_format")[-1].result
    layout = getattr(claim, "publish_at", None)
    calls = recorder.of(case.name, "publish")
    case.require(isinstance(layout, Layout), "it did not claim to publish")
    case.require(len(calls) == 1, f"its publish() was called {len(calls)} times")
    receipt = calls[0].result
    case.require(isinstance(receipt, PublishReceipt), f"its publish() gave {calls[0].error or receipt!r}")
    assert isinstance(layout, Layout)
    assert isinstance(receipt, PublishReceipt)
    return layout, receipt
