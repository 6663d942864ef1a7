# SPDX-License-Identifier: Apache-2.0
"""Clauses on wrappers: what they do not change they pass on, up and down."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch

from weights_core.errors import CheckpointError, Declined, LoadFailed
from weights_core.tensors import as_bytes
from weights_core.testing.contract.material import Spy, few, many, source_of
from weights_core.testing.contract.model import Case, clause, run_all_steps
from weights_core.testing.engines import FakeEngine
from weights_core.testing.recorder import HookRecorder
from weights_core.types import Role
from weights_core.weightset import Target, WeightSet


@clause(Role.WRAPPER, suffers="weights are taken for another layout, or the report names the wrong provider")
def passes_on_what_the_set_says_of_itself(case: Case) -> None:
    """Layout, provider, `in_place`, the bytes read and the notes of the set below come through."""
    spy = Spy(few())
    with _wrapped(case, spy) as weights:
        for what in ("layout", "provider", "in_place", "bytes_read"):
            got, due = getattr(weights, what), getattr(spy, what)
            case.require(got == due, f"`{what}` is {got}, below it is {due}")
        lost = set(spy.notes) - set(weights.notes)
        case.require(not lost, f"the note {sorted(lost)} is lost")


@clause(Role.WRAPPER, suffers="a provider that declined ends the load, or one that wrote is passed over")
def passes_on_the_errors_of_a_provider(case: Case) -> None:
    """`Declined`, `LoadFailed` and what else a provider raises leave the wrapper as they came."""
    prepared = case.checkpoint(few())
    for error in (Declined("no tape"), LoadFailed("torn", mutated=True), RuntimeError("a bug")):
        recorder = HookRecorder()
        try:
            with case.session(
                prepared.path, FakeEngine(prepared.truth), observer=recorder, tape=source_of(error)
            ) as session:
                run_all_steps(session)
                session.finish().lease.close()
        except Exception as exc:  # noqa: BLE001 - what left the wrapper is looked at
            del exc
        calls = recorder.of("tape", "load_weights")
        case.require(bool(calls), "the provider was not asked")
        got = calls[0].error
        case.require(got is error, f"the provider raised {error!r}, and {got!r} left the wrapper")


@clause(Role.WRAPPER, suffers="the cause of a failure is lost, or a failure passes for success")
def passes_on_the_errors_of_a_set(case: Case) -> None:
    """What reading raises below is raised above, by every way to read."""
    spy = Spy(few())
    out = {name: torch.empty_like(tensor) for name, tensor in spy.tensors.items()}
    spy.error = CheckpointError("the disk is on fire")
    with _wrapped(case, spy) as weights:
        ways: dict[str, Callable[[], object]] = {
            "read": lambda: weights.read("a"),
            "stream": lambda: list(weights.stream()),
            "read_into": lambda: weights.read_into("a", out["a"]),
            "fill": lambda: list(weights.fill([Target(name, tensor) for name, tensor in out.items()])),
        }
        for way, call in ways.items():
            try:
                call()
            except Exception as exc:  # noqa: BLE001 - what it raised is what is looked at
                case.require(exc is spy.error, f"below it raised {spy.error!r}, {way}() raised {exc!r}")
            else:
                case.fail(f"below it raised {spy.error!r}, {way}() raised nothing")


@clause(Role.WRAPPER, suffers="files and memory below stay open for as long as the process lives")
def closing_reaches_below(case: Case) -> None:
    """`close` closes the set below."""
    spy = Spy(few())
    with _wrapped(case, spy) as weights:
        weights.close()
        case.require(spy.closed > 0, "the set below was not closed")


@clause(Role.WRAPPER, suffers="what is below keeps what the engine has long consumed")
def releasing_reaches_below(case: Case) -> None:
    """`release` releases each of the names below, and no other."""
    spy = Spy(many())
    names = sorted(spy.tensors)[:5]
    with _wrapped(case, spy) as weights:
        for name in names:
            weights.read(name)
        weights.release(names[:4])
        weights.release([names[4]])
    released = set(spy.released)
    case.require(released == set(names), f"{names} were released, below {sorted(released)} were")


@clause(Role.WRAPPER, suffers="readers below go on and hold memory for an engine that has stopped")
def dropping_a_stream_drops_the_one_below(case: Case) -> None:
    """A stream or fill that is dropped half-way ends the one below."""
    spy = Spy(many())
    with _wrapped(case, spy) as weights:
        stream = iter(weights.stream())
        next(stream)
        fill = iter(weights.fill([Target(n, torch.empty_like(t)) for n, t in spy.tensors.items()]))
        next(fill)
        del stream, fill
        gc.collect()
        case.require(spy.streams == 0, f"{spy.streams} of the streams below still run")


@clause(Role.WRAPPER, suffers="a wrapper that two distributions bring counts, frees or copies twice")
def wrapping_twice_changes_nothing(case: Case) -> None:
    """Around a set it has wrapped already it gives the same tensors, and frees no more."""
    prepared = case.checkpoint(many())
    with case.opened(prepared, again=case.subject.plugin) as weights:
        seen = []
        for name, tensor in weights.stream():
            case.same(name, tensor, prepared.truth[name], "stream() of a set wrapped twice")
            weights.release([name])
            seen.append(name)
        case.require(sorted(seen) == sorted(prepared.truth), f"it gave {len(seen)} of {len(prepared.truth)}")
        freed = weights.release(list(prepared.truth))
        case.require(freed == 0, f"what was released once freed {freed:,} bytes more")


@clause(Role.WRAPPER, suffers="every engine on the machine that shares the weights loses them")
def never_frees_pages_it_does_not_own(case: Case) -> None:
    """Reading, releasing and closing leave memory that the set below owns and shares as it is."""
    spy = Spy(many())
    before = {name: tensor.clone() for name, tensor in spy.tensors.items()}
    with _wrapped(case, spy) as weights:
        for name in spy.tensors:
            as_bytes(weights.read(name)).sum()
            weights.release([name])
        weights.close()
    del weights
    gc.collect()
    for name, due in before.items():
        case.same(name, spy.tensors[name], due, "looking at the memory below")


@contextlib.contextmanager
def _wrapped(case: Case, spy: Spy) -> Iterator[WeightSet]:
    """Yield the set that the plugin makes of `spy`."""
    prepared = case.checkpoint(few())
    with case.session(prepared.path, FakeEngine(spy.tensors), spy=source_of(spy)) as session:
        session.resolve()
        yield session.load()
