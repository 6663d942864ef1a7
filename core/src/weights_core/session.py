# SPDX-License-Identifier: Apache-2.0
"""The lifecycle of one load: one state machine, and the only place that dispatches hooks."""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

import attrs

from weights_core import coverage
from weights_core.chain import Chain, Provided
from weights_core.engine import Engine
from weights_core.errors import (
    CheckpointError,
    CleanupError,
    CoverageError,
    EngineDirtyError,
    EngineError,
    LifecycleError,
    LoadError,
    LoadFailed,
    PluginFailedError,
    PublishError,
    WeightsError,
)
from weights_core.guard import Guarded
from weights_core.hooks import Hooks
from weights_core.lease import Lease
from weights_core.meter import Meter
from weights_core.planning import make_plan
from weights_core.progress import Progress, Show
from weights_core.ranks import Ranks
from weights_core.report import LoadReport
from weights_core.types import Applied, Layout, LoadRequest, Outcome, Plan, PublishReceipt
from weights_core.weightset import WeightSet

log = logging.getLogger("weights")

T = TypeVar("T")
OpenHooks = Callable[[LoadRequest], Hooks]


class State(enum.Enum):
    """Where a load stands; it only moves forward, and nothing follows FAILED but the clean-up."""

    NEW = "new"
    RESOLVED = "resolved"
    LOADED = "loaded"
    APPLIED = "applied"
    POST_LOADED = "post-loaded"
    FAILED = "failed"
    CLOSED = "closed"


class Session:
    """One load, step by step: `resolve`, `load`, `apply`, `publish`, `post_load`, `finish`.

    Use it in a `with` block. Leaving the block before `finish`, by an error or not, cleans up,
    withdraws what was published and brings the engine back if it can. A session serves one load
    on one thread; a step out of order, or after one that failed, raises `LifecycleError`. With
    several ranks every step is agreed on.
    """

    def __init__(
        self, open_hooks: OpenHooks, request: LoadRequest, engine: Engine, *, progress: Show = "rank 0"
    ) -> None:
        """Prepare; nothing happens until `resolve`.

        Args:
            open_hooks: returns the registered plugins for the request.
            request: what to load; the engine's own `checkpoint`, if it has one, overrides it.
            engine: what to load it into.
            progress: which ranks show a bar on standard error, if that is a terminal.

        Raises:
            EngineError: `engine.anchor` cannot be weakly referenced, so nothing would end the lease.
        """
        _check_anchor(engine)
        self.request = _asked_of(request, engine)
        self.state = State.NEW
        self._engine: Engine | None = engine
        self._open_hooks = open_hooks
        self._progress = Progress(progress, request.rank, request.engine.topology.world.size)
        self._meter = Meter(self._bytes_read, self._progress.show)
        self._lease = Lease()
        self._ranks: Ranks | None = Ranks(engine, request)
        self._hooks: Hooks | None = None
        self._plan: Plan | None = None
        self._chain: Chain | None = None
        self._provided: Provided | None = None
        self._applied: Applied | None = None
        self._receipts: list[PublishReceipt] = []
        self._published: set[str] = set()
        self._notes: list[str] = []
        self._phase = "new"

    # Steps, in their order --------------------------------------------------------------------

    def resolve(self) -> Plan:
        """Import the plugins, ask each what it would do, and decide.

        Raises:
            PluginError: a plugin that was asked for is missing or broken.
            FormatError: the format cannot be served.
        """
        self._expect("resolve()", State.NEW)
        self._meter.start()
        with self._measure("resolve"):
            with self._together("resolve") as agreed:
                self._hooks = self._open_hooks(self.request)
                self._plan = make_plan(self._hooks, self.request)
                self._settle(self.engine.planned(self._plan))
                agreed.subject = ", ".join(self._plan.providers)
            self._chain = Chain(self._hooks, self._plan, self.request, self.engine, _known(self._ranks))
        self.state = State.RESOLVED
        return self.plan

    def load(self) -> WeightSet:
        """Ask the planned providers in order and return the first set.

        Raises:
            NoProviderError: every provider declined or failed.
            WeightsError: a provider failed in a way that ends the load.
        """
        self._expect("load()", State.RESOLVED)
        with self._measure("load"):
            self._provided = _known(self._chain).open(self.plan.providers)
        self.state = State.LOADED
        return self.weights

    def apply(self) -> Applied:
        """Bring the weights into the engine, check coverage, and call `before_post_load`.

        If a lazily read set fails half-way and the engine is untouched, or could be
        re-initialised, the next provider is asked.

        Raises:
            CoverageError: the engine does not hold all it expects.
            WeightsError: the weights could not be applied.
        """
        self._expect("apply()", State.LOADED)
        with contextlib.closing(self._progress), self._measure("apply"):
            self._applied = self._apply_or_fall_back()
        with self._measure("before_post_load"), self._together("before_post_load"):
            for name in self.plan.active:
                _known(self._hooks).before_post_load(name, self.request, self.weights, self.engine)
        self.state = State.APPLIED
        return self._applied

    def publish(self, layout: Layout) -> tuple[PublishReceipt, ...]:
        """Let the publishers that claimed `layout` offer the weights, each once.

        SHARDED is published after `apply` and before the engine's post-load. Publishing FINAL
        says that the engine's post-load is done; it may come late, while the session is open.

        Raises:
            PublishError: SHARDED is published too late, or a required publisher failed.
        """
        self._expect("publish()", State.APPLIED, State.POST_LOADED)
        if layout is Layout.CHECKPOINT:
            raise LifecycleError("weights are published at SHARDED or FINAL, never at CHECKPOINT")
        if layout is Layout.SHARDED and self.state is State.POST_LOADED:
            raise PublishError(
                "refusing late publish: after the engine's post-load the SHARDED bytes no longer exist"
            )
        due = [
            name
            for name, claim in self.plan.publishers.items()
            if claim.publish_at is layout and name not in self._published
        ]
        with self._measure(f"publish {layout.value}"), self._together(f"publish {layout.value}"):
            receipts = [self._publish_once(name, layout) for name in due]
        if layout is Layout.FINAL:
            self.state = State.POST_LOADED
        return tuple(receipt for receipt in receipts if receipt is not None)

    def post_load(self) -> None:
        """Run `engine.post_load`. An engine that transforms its weights by itself skips this."""
        self._expect("post_load()", State.APPLIED)
        with self._measure("post_load"), self._together("post_load"):
            self.engine.post_load(self.weights.layout)
        self.state = State.POST_LOADED

    def finish(self) -> LoadReport:
        """Clean up what only the load needed, and return the report with the lease.

        Raises:
            PublishError: a required publisher was never given its layout.
            CleanupError: plugins failed to clean up; the model is usable, the error has the report.
        """
        self._expect("finish()", State.APPLIED, State.POST_LOADED)
        self._check_published()
        self._notes.extend(self.weights.notes)
        with self._measure("cleanup"):
            errors = self._close(Outcome(status="ready", phase="ready"))
        self._meter.close()
        self.engine.loaded()
        self._lease.anchor(self.engine.anchor)
        report = self._report()
        self._let_go()
        _raise_interrupt(errors)
        if errors:
            failed = CleanupError("the model is loaded, but cleanup failed", _failures(errors))
            failed.report = report
            raise failed
        return report

    # What the steps found ---------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine, until the load has ended: a session kept in a variable keeps no model."""
        return _known(self._engine)

    @property
    def plan(self) -> Plan:
        """The plan, once `resolve` has made it."""
        return _known(self._plan)

    @property
    def weights(self) -> WeightSet:
        """The set that is, or was, applied, once `load` has opened it."""
        return _known(self._provided).weights

    def __repr__(self) -> str:
        return f"<Session {self.state.value}, {self.request.checkpoint}, for {self.request.engine.name}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.state is State.CLOSED:
            return
        engine = self.engine
        errors = self._close(
            Outcome(status="abandoned" if error is None else "failed", phase=self._phase, error=error)
        )
        errors += _run_all([self._progress.close, self._meter.close, self._lease.close])
        engine_state = self._restore(engine, error)
        self._let_go()
        if error is not None:
            error.add_note(engine_state)
            for failure in errors:  # the error that ended the load is the one that is raised
                error.add_note(f"cleanup failed too: {failure}")
            return
        log.warning("a session was left before finish(), so the load is undone: %s", engine_state)
        _raise_interrupt(errors)
        if errors:
            raise CleanupError(
                f"the load was abandoned ({engine_state}), and cleanup failed", _failures(errors)
            )

    # ------------------------------------------------------------------------------------------

    def _settle(self, engine: Engine) -> None:
        """Go on with the engine that was chosen for the plan."""
        if engine is self._engine:
            return
        _check_anchor(engine)
        request = attrs.evolve(_asked_of(self.request, engine), engine=engine.info)
        self._engine, self._ranks = engine, Ranks(engine, request)
        if request != self.request:
            self.request, self._plan = request, make_plan(_known(self._hooks), request)

    def _apply_or_fall_back(self) -> Applied:
        chain = _known(self._chain)
        while True:
            provided = _known(self._provided)
            if self._progress.wanted:
                self._progress.start(_due_bytes(provided.weights, self.engine))
            applied, error = self._try_apply(provided)
            try:
                if _known(self._ranks).served("apply", provided.provider, error) and applied is not None:
                    return applied
                chain.wrote = chain.wrote or (isinstance(error, LoadFailed) and error.mutated)
                wrote = chain.wrote or not self.engine.untouched()
                chain.give_up(provided.provider, provided.weights, error, wrote=wrote)
            finally:
                del error  # its traceback holds the memory of the attempt
            self._provided = chain.open(provided.rest)

    def _try_apply(self, provided: Provided) -> tuple[Applied | None, Exception | None]:
        weights, info = provided.weights, self.request.engine
        guarded = Guarded(weights, provided.provider, self.plan.wrappers)
        try:
            if weights.in_place:
                done: object = self._written_in_place(weights)
            elif weights.layout is Layout.CHECKPOINT:
                extra = self.engine.unused(weights) if self.request.unused == "refuse" else ()
                if extra:
                    raise CoverageError(f"unexpected {coverage.listed(extra)}", unexpected=extra)
                done = self.engine.apply(guarded)
            else:
                done = self.engine.bind(guarded)
            expected = self.engine.expected(weights.layout)
            return coverage.check(info.name, expected, done, self.request.unused), None
        except (LoadFailed, CheckpointError, PluginFailedError) as exc:  # by the set, as it was read
            origin = _known(self._hooks).plugins[provided.provider].origin
            return None, exc.stamp(
                plugin=provided.provider, distribution=origin, hook="load_weights", rank=self.request.rank
            )
        except WeightsError as exc:
            return None, exc
        except Exception as exc:  # noqa: BLE001 - `Ranks.served` raises it once the other ranks know
            failed = LoadError(
                f"engine {info.name} failed to take the weights of {provided.provider!r}: "
                f"{type(exc).__name__}: {exc}"
            )
            failed.__cause__ = exc
            return None, failed

    def _written_in_place(self, weights: WeightSet) -> Applied:
        """Believe a provider that says it has written the parameters only as far as can be seen."""
        expected, tensors = self.engine.expected(weights.layout), self.engine.tensors(weights.layout)
        for name, meta in weights.metas.items():
            due = expected.get(name)
            if due is not None and (due.shape, due.dtype) != (meta.shape, meta.dtype):
                raise CoverageError(
                    f"tensor {name!r} was written in place as {meta.dtype} {list(meta.shape)}, "
                    f"the engine has {due.dtype} {list(due.shape)}"
                )
        empty = [name for name in weights if name in tensors and tensors[name].is_meta]
        if empty:
            raise CoverageError(f"said to be written in place, but without memory: {coverage.listed(empty)}")
        return Applied(written=weights.keys(), unused=())

    def _publish_once(self, name: str, layout: Layout) -> PublishReceipt | None:
        self._published.add(name)
        try:
            if layout is Layout.SHARDED and self.weights.layout is Layout.FINAL:
                raise PublishError("the engine was given FINAL weights, it has no SHARDED ones")
            receipt = _known(self._hooks).publish(name, self.request, self.engine, layout)
        except WeightsError as exc:
            if self.plan.publishers[name].required:
                raise PublishError(f"plugin {name!r} must publish, and failed: {exc}") from exc
            log.warning("%s did not publish: %s", name, exc.brief)
            self._notes.append(f"{name} did not publish: {exc.brief}")
            return None
        if receipt is not None:
            self._receipts.append(receipt)
            if receipt.close is not None:
                self._lease.add(receipt.close)
        return receipt

    def _check_published(self) -> None:
        for name, claim in self.plan.publishers.items():
            if name in self._published or claim.publish_at is None:
                continue
            why = f"{name} did not publish: the engine never published {claim.publish_at.value}"
            if claim.required:
                raise PublishError(f"{why}, and the plugin says it must")
            self._notes.append(why)

    def _close(self, outcome: Outcome) -> list[BaseException]:
        """Call every cleanup in reverse order; keep an owner's memory for the lease if all is well."""
        self.state = State.CLOSED
        opened = list(self._chain.opened) if self._chain else []
        if outcome.status == "ready" and _known(self._provided).provider == self.plan.owner:
            opened.remove(self.weights)
            self._lease.add(self.weights.close)
            self._lease.owned = self.weights
        active = self._plan.active if self._plan else ()
        return _run_all(
            [
                *(functools.partial(self._cleanup, name, outcome) for name in reversed(active)),
                *(weights.close for weights in reversed(opened)),
            ]
        )

    def _cleanup(self, name: str, outcome: Outcome) -> None:
        _known(self._hooks).cleanup(name, self.request, outcome)

    def _let_go(self) -> None:
        """Drop what would keep the model alive."""
        self._engine = self._chain = self._hooks = self._ranks = None

    def _restore(self, engine: Engine, error: BaseException | None) -> str:
        wrote = self._chain is not None and self._chain.wrote
        if isinstance(error, EngineDirtyError):
            return "do not use the engine"
        if not wrote and (self._provided is None or engine.untouched()):
            return "the engine is untouched"
        try:
            engine.reinit()
        except Exception as exc:  # noqa: BLE001 - told with the error that ended the load
            state = f"the engine may be partly written, do not use it: {exc}"
            log.error("%s", state)
            return state
        return "the engine was re-initialised"

    def _report(self) -> LoadReport:
        return LoadReport(
            checkpoint=self.request.checkpoint,
            component=self.request.engine.component,
            provider=_known(self._provided).provider,
            plan=self.plan,
            attempts=tuple(_known(self._chain).attempts),
            phases=tuple(self._meter.phases),
            samples=tuple(self._meter.samples),
            applied=_known(self._applied),
            receipts=tuple(self._receipts),
            notes=tuple(self._notes),
            start_rss=self._meter.start_rss,
            rank=self.request.rank,
            lease=self._lease,
        )

    @contextlib.contextmanager
    def _measure(self, phase: str) -> Iterator[None]:
        self._phase = phase
        try:
            with self._meter.phase(phase):
                yield
        except BaseException:
            self.state = State.FAILED
            raise
        self._progress.close()  # a line of log begins below the bar
        done = self._meter.phases[-1]
        log.info("%s: %.3f s, %.1f MB", done.name, done.seconds, done.nbytes / 1e6)

    @contextlib.contextmanager
    def _together(self, stage: str) -> Iterator[_Agreed]:
        """Run a step that every rank must come through before any goes on."""
        agreed = _Agreed(", ".join(self._plan.providers) if self._plan else "")
        error: Exception | None = None
        try:
            yield agreed
        except Exception as exc:  # noqa: BLE001 - raised by `together`, once the other ranks know
            error = exc
        try:
            _known(self._ranks).together(stage, agreed.subject, error)
        finally:
            del error

    def _bytes_read(self) -> int:
        return self._provided.weights.bytes_read if self._provided is not None else 0

    def _expect(self, step: str, *states: State) -> None:
        if self.state not in states:
            due = " or ".join(state.value for state in states)
            raise LifecycleError(f"{step} needs a session that is {due}; this one is {self.state.value}")


@attrs.define
class _Agreed:
    """What a step is about, for the other ranks."""

    subject: str


def _check_anchor(engine: Engine) -> None:
    try:
        weakref.ref(engine.anchor)
    except TypeError as exc:
        raise EngineError(f"the anchor of engine {engine.info.name}: {exc}") from exc


def _asked_of(request: LoadRequest, engine: Engine) -> LoadRequest:
    own = engine.checkpoint
    return request if own is None else attrs.evolve(request, checkpoint=own)


def _run_all(steps: Iterable[Callable[[], object]]) -> list[BaseException]:
    """Call every step, whatever the others raise; return what was raised."""
    raised: list[BaseException] = []
    for step in steps:
        try:
            step()
        except BaseException as exc:  # noqa: BLE001 - an interrupt too must not skip the rest
            raised.append(exc)
    return raised


def _raise_interrupt(errors: Sequence[BaseException]) -> None:
    for error in errors:
        if not isinstance(error, Exception):
            raise error


def _failures(errors: Sequence[BaseException]) -> list[Exception]:
    return [error for error in errors if isinstance(error, Exception)]


def _due_bytes(weights: WeightSet, engine: Engine) -> int:
    """The bytes that will be fetched: all, or those of the names that set and engine share."""
    due = engine.expected(weights.layout).keys() & weights.metas.keys() or weights.metas.keys()
    return sum(weights.meta(name).nbytes for name in due)


def _known(value: T | None) -> T:
    if value is None:
        raise LifecycleError("not known yet, or let go: the session's steps come first, and end it")
    return value
