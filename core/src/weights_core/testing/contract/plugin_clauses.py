# SPDX-License-Identifier: Apache-2.0
"""Clauses on every plugin, whatever its role: what it costs to have, and what it leaves behind."""

from __future__ import annotations

import concurrent.futures
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from weights_core.errors import (
    CheckpointError,
    CleanupError,
    Declined,
    FormatError,
    NoProviderError,
    PluginConfigError,
    WeightsError,
)
from weights_core.testing.contract.material import contents, few, many, saboteur
from weights_core.testing.contract.model import Case, Prepared, clause, run_all_steps
from weights_core.testing.engines import FakeEngine
from weights_core.testing.faults import cut_short, removed
from weights_core.testing.hosts import host_of
from weights_core.testing.recorder import HookRecorder
from weights_core.types import FormatClaim, Role

_ALL = tuple(Role)
_PATIENCE = 30.0
"""Seconds after which a process or thread is held to hang."""


@clause(*_ALL, suffers="every command and every engine start pays seconds for a plugin it may not use")
def importing_it_loads_no_torch(case: Case) -> None:
    """The plugin's module can be imported by name in a fresh interpreter, and does not import torch."""
    module = case.subject.plugin.__module__
    found = _in_a_fresh_interpreter(case, f"import importlib; importlib.import_module({module!r})")
    case.require("torch" not in found, f"importing {module} imports torch")


@clause(*_ALL, suffers="`weights explain` and every load of another format pay seconds for it")
def resolving_needs_no_torch(case: Case) -> None:
    """`resolve_format` answers without importing torch."""
    prepared = case.checkpoint(few())
    plugin, config = case.subject.plugin, case.config
    found = _in_a_fresh_interpreter(
        case,
        f"""
import importlib
from weights_core.discovery import Installed
from weights_core.host import PluginHost
from weights_core.planning import make_plan
from weights_core.types import EngineInfo, Layout, LoadRequest
plugin = getattr(importlib.import_module({plugin.__module__!r}), {plugin.__name__!r})
one = Installed(name={case.name!r}, distribution="under-contract", version="1", load=lambda: plugin)
sys.modules.pop("torch", None)  # its import is another clause's
engine = EngineInfo(name="fake", version="1", accepts=frozenset(Layout), shareable=dict.fromkeys(Layout, ""))
request = LoadRequest(checkpoint={str(prepared.path)!r}, engine=engine, format={case.formats!r})
config = json.loads({json.dumps(config, default=str)!r})
make_plan(PluginHost([one], config={{{case.name!r}: config}} if config else {{}}).hooks(request), request)
""",
    )
    case.require("torch" not in found, "asking it imports torch")


@clause(*_ALL, suffers="`weights explain`, which only asks, changes files or starts processes")
def resolving_has_no_side_effect(case: Case) -> None:
    """`resolve_format` leaves files, descriptors, threads and processes as they are."""
    prepared = case.checkpoint(few())
    case.answer(prepared.path)  # what is made once per process, a cache say, is no side effect of asking
    before = contents(prepared.path)
    with case.nothing_left("after asking it"):
        case.answer(prepared.path)
    case.require(contents(prepared.path) == before, "asking it changed the checkpoint")


@clause(*_ALL, suffers="what an operator is shown is not what the engine does")
def resolving_twice_answers_the_same(case: Case) -> None:
    """The same question gets the same claim."""
    prepared = case.checkpoint(few())
    first, second = case.answer(prepared.path), case.answer(prepared.path)
    case.require(first == second, f"it answered {first}, then {second}")


@clause(*_ALL, suffers="every load on the machine fails, also those that do not concern the plugin")
def resolving_refuses_what_it_cannot_serve(case: Case) -> None:
    """For a path that is not there, an empty folder or a strange file it answers, and does not raise."""
    empty, strange = case.folder / "empty", case.folder / "strange.bin"
    empty.mkdir()
    strange.write_bytes(b"no checkpoint")
    for path in (case.folder / "nowhere", empty, strange):
        answer = case.answer(path)
        case.require(answer is None or isinstance(answer, FormatClaim), f"it answered {answer!r}")


@clause(*_ALL, suffers="a misspelt setting has no effect, and nobody is told")
def unknown_settings_are_refused(case: Case) -> None:
    """A setting that it does not have is a PluginConfigError that names it."""
    config = {**case.config, "no_such_setting": 1}
    try:
        plugins: dict[str, Any] = {case.name: case.subject.plugin}
        host_of(config={case.name: config}, **plugins).hooks(case.request(case.folder))
    except PluginConfigError as exc:
        case.require("no_such_setting" in str(exc), f"the error does not name it: {exc}")
    except WeightsError as exc:
        case.fail(f"it raised {type(exc).__name__}: {exc}")
    else:
        case.fail("it was taken")


@clause(Role.SOURCE, Role.OWNER, suffers="the next provider completes a model that is half another one")
def a_failure_tells_whether_it_wrote(case: Case) -> None:
    """Unless it raises LoadFailed(mutated=True), the engine and the files are as before, byte for byte."""
    for broken in _broken_checkpoints(case):
        engine, recorder = FakeEngine(broken.truth), HookRecorder()
        before, files = engine.contents(), contents(broken.path)
        _try_to_load(case, broken, engine, observer=recorder)
        own = [call.error for call in recorder.of(case.name, "load_weights") if call.error is not None]
        promises = [
            e for e in own if isinstance(e, Declined | CheckpointError) or not getattr(e, "mutated", True)
        ]
        case.require(contents(broken.path) == files, "the checkpoint was changed")
        if promises:
            case.require(
                engine.contents() == before, f"it raised {promises[-1]!r} and had written to the engine"
            )


@clause(*_ALL, suffers="memory, files and processes pile up with each load that fails")
def nothing_is_left_after_a_failed_load(case: Case) -> None:
    """Whichever phase fails, and if the load is abandoned, no descriptor, thread, process or file stays."""
    prepared = case.checkpoint(many())
    case.load(prepared, FakeEngine(prepared.truth)).lease.close()  # what is made once per process
    for phase, attempt in _failures(case, prepared).items():
        with case.nothing_left(f"after a load that failed in {phase}"):
            try:
                attempt()
            except Exception as exc:  # noqa: BLE001 - to fail is what it was told
                del exc


@clause(*_ALL, suffers="memory, files and processes pile up with each model that is replaced")
def nothing_is_left_after_the_lease(case: Case) -> None:
    """When the lease is closed, as a context or by itself as the model dies, all is given back."""
    prepared = case.checkpoint(many())
    case.load(prepared, FakeEngine(prepared.truth)).lease.close()

    def close() -> None:
        case.load(prepared, FakeEngine(prepared.truth)).lease.close()

    def leave_context() -> None:
        with case.load(prepared, FakeEngine(prepared.truth)).lease:
            pass

    def drop_the_engine() -> None:
        case.load(prepared, FakeEngine(prepared.truth))

    for end in (close, leave_context, drop_the_engine):
        with case.nothing_left(f"after the lease ended by {end.__name__.replace('_', ' ')}"):
            end()
            gc.collect()


@clause(*_ALL, suffers="a model that was loaded is thrown away, or the cause of a failure is buried")
def cleanup_does_not_fail(case: Case) -> None:
    """`cleanup` runs once per load and raises nothing, after a load and after a failure in any phase."""
    prepared = case.checkpoint(few())
    failures = _failures(case, prepared)
    try:
        case.load(prepared, FakeEngine(prepared.truth)).lease.close()
    except CleanupError as exc:
        case.fail(f"after a load that succeeded it raised {exc}")
    for phase, attempt in failures.items():
        try:
            attempt()
        except Exception as exc:  # noqa: BLE001 - to fail is what it was told
            noted = [note for note in getattr(exc, "__notes__", ()) if "cleanup failed" in note]
            case.require(not noted, f"after a failure in {phase}: {'; '.join(noted)}")


@clause(*_ALL, suffers="the model's memory goes away under it")
def weights_outlive_the_load(case: Case) -> None:
    """After `finish` the engine holds the right bytes, as long as the lease is open."""
    prepared = case.checkpoint(many())
    engine = FakeEngine(prepared.truth)
    report = case.load(prepared, engine)
    gc.collect()
    for name, due in prepared.truth.items():
        case.same(name, engine.params[name], due, "looking at the engine's tensor after the load")
    report.lease.close()


@clause(Role.SOURCE, suffers="a log line of one rank of many does not say who failed")
def errors_say_who_failed(case: Case) -> None:
    """What ends a load carries plugin, distribution, hook and rank."""
    for broken in _broken_checkpoints(case):
        error = _try_to_load(case, broken, FakeEngine(broken.truth), block=("disk",))
        if error is None or isinstance(error, FormatError):
            continue  # it had refused; that a damaged checkpoint is an error is another clause
        if isinstance(error, NoProviderError):
            case.require(case.name in error.reasons, f"{error!r} does not give its reason")
            continue
        carried = (error.plugin, error.distribution, error.hook, error.rank)
        due = (case.name, f"weights-{case.name.replace('_', '-')} 1.0", "load_weights", 0)
        case.require(carried == due, f"{error!r} carries {carried}, due is {due}")


@clause(*_ALL, suffers="two engines in one process get each other's weights or settings")
def two_hosts_do_not_interfere(case: Case) -> None:
    """Two loads in one process, each step of one between those of the other, get each its own."""
    pair = [case.checkpoint(many(seed, prefix=f"host.{seed}.")) for seed in (10, 20)]
    engines = [FakeEngine(prepared.truth) for prepared in pair]
    sessions = [case.session(prepared.path, engine) for prepared, engine in zip(pair, engines, strict=True)]
    with sessions[0], sessions[1]:
        for step in ("resolve", "load", "apply", "post_load"):
            for session in sessions:
                getattr(session, step)()
        leases = [session.finish().lease for session in sessions]
    for prepared, engine in zip(pair, engines, strict=True):
        case.holds(engine, prepared, "a load between another's steps")
    for lease in leases:
        lease.close()


@clause(*_ALL, suffers="a server that loads several models at once mixes them up or hangs")
def loads_in_threads_do_not_interfere(case: Case) -> None:
    """Four loads side by side in threads get each its own weights."""
    prepared = [case.checkpoint(many(seed * 100, prefix=f"thread.{seed}.")) for seed in range(4)]
    engines = [FakeEngine(one.truth) for one in prepared]
    recorders = [HookRecorder() for _ in prepared]
    pool = concurrent.futures.ThreadPoolExecutor(len(prepared))
    futures = [
        pool.submit(case.load, one, engine, observer=recorder)
        for one, engine, recorder in zip(prepared, engines, recorders, strict=True)
    ]
    _, late = concurrent.futures.wait(futures, _PATIENCE)
    pool.shutdown(wait=not late, cancel_futures=True)
    case.require(not late, f"{len(late)} of {len(futures)} loads had not ended after {_PATIENCE:.0f} s")
    reports = [future.result() for future in futures]
    for one, engine in zip(prepared, engines, strict=True):
        case.holds(engine, one, "a load beside others in threads")
    for report in reports:
        report.lease.close()


@clause(*_ALL, suffers="a process that forks, as data loaders and servers do, hangs or destroys the model")
def a_fork_does_no_harm(case: Case) -> None:
    """A child forked during a load can close what it inherited and exit; the parent's load goes on."""
    prepared = case.checkpoint(many())
    engine = FakeEngine(prepared.truth)
    with case.session(prepared.path, engine) as session:
        session.resolve()
        weights = session.load()
        stream = None if weights.in_place else iter(weights.stream())
        if stream is not None:
            next(stream)
        ended = _in_a_fork(weights.close)
        case.require(ended == 0, "a child that closed the set it inherited " + _how_it_ended(ended))
        del stream
        session.apply()
        session.post_load()
        report = session.finish()
    case.holds(engine, prepared, "a load whose process forked")
    before = engine.contents()
    ended = _in_a_fork(report.lease.close)
    case.require(ended == 0, "a child that closed the lease it inherited " + _how_it_ended(ended))
    case.require(engine.contents() == before, "a child that closed the lease it inherited changed the model")
    report.lease.close()


def _failures(case: Case, prepared: Prepared) -> dict[str, Callable[[], object]]:
    """Return how to make a load fail in each phase."""

    def engine(*fail_at: str) -> FakeEngine:
        return FakeEngine(prepared.truth, fail_at=fail_at)

    def load() -> None:
        for broken in _broken_checkpoints(case):
            _try_to_load(case, broken, FakeEngine(broken.truth))

    def abandon() -> None:
        with case.session(prepared.path, engine()) as session:
            session.resolve()
            session.load()

    def late_abandon() -> None:
        with case.session(prepared.path, engine()) as session:
            session.resolve()
            session.load()
            session.apply()

    def whole(engine: FakeEngine, **others: Any) -> Callable[[], None]:
        return lambda: case.load(prepared, engine, **others).lease.close()

    return {
        "load": load,
        "apply": whole(engine("apply", "bind")),
        "before_post_load": whole(engine(), saboteur=saboteur("before_post_load")),
        "publish": whole(engine(), saboteur=saboteur("publish")),
        "post_load": whole(engine("post_load")),
        "no phase, but was abandoned": abandon,
        "no phase, but was abandoned late": late_abandon,
    }


def _broken_checkpoints(case: Case) -> list[Prepared]:
    broken = [case.checkpoint(many()) for _ in range(2)]
    cut_short(broken[0].path)
    removed(broken[1].path)
    return broken


def _try_to_load(
    case: Case,
    prepared: Prepared,
    engine: FakeEngine,
    *,
    observer: HookRecorder | None = None,
    block: tuple[str, ...] = (),
) -> WeightsError | None:
    """Load what may be broken, and return the error."""
    try:
        with case.session(prepared.path, engine, observer=observer, block=block) as session:
            run_all_steps(session)
            session.finish().lease.close()
    except WeightsError as exc:
        return exc
    return None


def _in_a_fresh_interpreter(case: Case, code: str) -> list[str]:
    """Run `code`, in which `json` and `sys` are imported; return the modules that it imported."""
    ending = "\nprint(json.dumps([name for name in sys.modules if name == 'torch']))"
    path = "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
    done = subprocess.run(
        [sys.executable, "-c", path + code + ending, json.dumps(sys.path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    case.require(done.returncode == 0, f"in a fresh interpreter: {done.stderr.strip().splitlines()[-1:]}")
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _in_a_fork(action: Callable[[], object]) -> int | None:
    """Run `action` in a forked child; return its exit status, or None if it had to be ended."""
    import warnings

    with warnings.catch_warnings():  # Python 3.12 warns that a child with threads may hang: that is tried
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + _PATIENCE / 3
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _how_it_ended(status: int | None) -> str:
    return "hung, and had to be ended" if status is None else f"ended with {status}"
