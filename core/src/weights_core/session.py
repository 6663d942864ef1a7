# SPDX-License-Identifier: Apache-2.0
"""The lifecycle of one load: one state machine, and the only place that dispatches hooks."""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Callable, Iterator
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
    EngineError,
    LifecycleError,
    LoadError,
    LoadFailed,
    PluginFailedError,
    PublishError,
    WeightsError,
)
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
    """Where a load stands; it only moves forward."""

    NEW = "new"
    RESOLVED = "resolved"
    LOADED = "loaded"
    APPLIED = "applied"
    POST_LOADED = "post-loaded"
    READY = "ready"
    CLOSED = "closed"


class Session:
    """One load, step by step: `resolve`, `load`, `apply`, `publish`, `post_load`, `finish`.

    Use it in a `with` block. Leaving the block before `finish`, by an error or not, cleans up,
    withdraws what was published and brings the engine back if it can. A session serves one load
    on one thread; a step out of order raises `LifecycleError`.
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
        """
        own = engine.checkpoint
        self.request = request if own is None else attrs.evolve(request, checkpoint=own)
        self.engine = engine
        self.state = State.NEW
        self._open_hooks = open_hooks
        self._progress = Progress(progress, request.rank, request.engine.topology.world.size)
        self._meter = Meter(self._bytes_read, self._progress.show)
        self._lease = Lease()
        self._ranks = Ranks(engine, request.rank, request.timeout)
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
        self._expect(State.NEW)
        self._meter.start()
        with self._measure("resolve"):
            self._hooks = self._open_hooks(self.request)
            self._plan = make_plan(self._hooks, self.request)
        self._chain = Chain(self._hooks, self._plan, self.request, self.engine, self._ranks)
        self.state = State.RESOLVED
        return self._plan

    def load(self) -> WeightSet:
        """Ask the planned providers in order and return the first set.

        Raises:
            NoProviderError: every provider declined or failed.
            WeightsError: a provider failed in a way that ends the load.
        """
        self._expect(State.RESOLVED)
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
        self._expect(State.LOADED)
        with contextlib.closing(self._progress), self._measure("apply"):
            self._applied = self._apply_or_fall_back()
        self.state = State.APPLIED
        with self._measure("before_post_load"):
            for name in self.plan.active:
                _known(self._hooks).before_post_load(name, self.request, self.weights, self.engine)
        return self._applied

    def publish(self, layout: Layout) -> tuple[PublishReceipt, ...]:
        """Let the publishers that claimed `layout` offer the weights, each once.

        SHARDED is published after `apply` and before the engine's post-load. Publishing FINAL
        says that the engine's post-load is done; it may come late, while the session is open.

        Raises:
            PublishError: SHARDED is published too late, or a required publisher failed.
        """
        self._expect(State.APPLIED, State.POST_LOADED)
        if layout is Layout.CHECKPOINT:
            raise LifecycleError("weights are published at SHARDED or FINAL, never at CHECKPOINT")
        if layout is Layout.SHARDED and self.state is State.POST_LOADED:
            raise PublishError(
                "refusing late publish: after the engine's post-load the SHARDED bytes no longer exist"
            )
        if layout is Layout.FINAL:
            self.state = State.POST_LOADED
        with self._measure(f"publish {layout.value}"):
            due = [n for n, c in self.plan.publishers.items() if c.publish_at is layout]
            receipts = [self._publish_once(name, layout) for name in due if name not in self._published]
        return tuple(receipt for receipt in receipts if receipt is not None)

    def post_load(self) -> None:
        """Run `engine.post_load`. An engine that transforms its weights by itself skips this."""
        self._expect(State.APPLIED)
        self.state = State.POST_LOADED
        with self._measure("post_load"):
            self.engine.post_load(self.weights.layout)

    def finish(self) -> LoadReport:
        """Clean up what only the load needed, and return the report with the lease.

        Raises:
            PublishError: a required publisher was never given its layout.
            CleanupError: plugins failed to clean up; the model is usable, the error has the report.
        """
        self._expect(State.APPLIED, State.POST_LOADED)
        self._check_published()
        self.state = State.READY
        self._notes.extend(self.weights.notes)
        with self._measure("cleanup"):
            errors = self._close(Outcome(status="ready", phase="ready"))
        self._meter.close()
        self._lease.anchor(self.engine.anchor)
        report = self._report()
        if errors:
            failed = CleanupError("the model is loaded, but cleanup failed", errors)
            failed.report = report
            raise failed
        return report

    # What the steps found ---------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan, once `resolve` has made it."""
        return _known(self._plan)

    @property
    def weights(self) -> WeightSet:
        """The set that is, or was, applied, once `load` has opened it."""
        return _known(self._provided).weights

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.state is State.CLOSED:
            return
        begun = self.state
        errors = self._close(
            Outcome(status="abandoned" if error is None else "failed", phase=self._phase, error=error)
        )
        self._meter.close()
        try:
            self._lease.close()
        except CleanupError as exc:
            errors.extend(exc.exceptions)
        engine_state = self._restore_engine(begun, error)
        if error is not None:
            error.add_note(engine_state)
            for failure in errors:  # the error that ended the load is the one that is raised
                error.add_note(f"cleanup failed too: {failure}")
        elif errors:
            raise CleanupError(f"the load was abandoned ({engine_state}), and cleanup failed", errors)

    # ------------------------------------------------------------------------------------------

    def _apply_or_fall_back(self) -> Applied:
        chain = _known(self._chain)
        while True:
            provided = _known(self._provided)
            self._progress.start(_due_bytes(provided.weights, self.engine))
            applied, error = self._try_apply(provided)
            if self._ranks.agree("apply", provided.provider, error) and applied is not None:
                return applied
            wrote = isinstance(error, LoadFailed) and error.mutated
            chain.give_up(
                provided.provider,
                provided.weights,
                error,
                mutated=wrote or provided.weights.in_place or not self.engine.untouched(),
            )
            self._provided = chain.open(provided.rest)

    def _try_apply(self, provided: Provided) -> tuple[Applied | None, Exception | None]:
        weights, info = provided.weights, self.request.engine
        try:
            if weights.in_place:
                done: object = Applied(written=weights.keys())
            elif weights.layout is Layout.CHECKPOINT:
                extra = self.engine.unused(weights) if self.request.unused == "refuse" else ()
                if extra:
                    raise CoverageError(f"unexpected {coverage.listed(extra)}", unexpected=extra)
                done = self.engine.apply(weights)
            else:
                done = self.engine.bind(weights)
            expected = self.engine.expected(weights.layout)
            return coverage.check(info.name, expected, done, self.request.unused), None
        except (LoadFailed, CheckpointError) as exc:  # raised by the set, as it was read
            origin = _known(self._hooks).plugins[provided.provider].origin
            return None, exc.stamp(
                plugin=provided.provider, distribution=origin, hook="load_weights", rank=self.request.rank
            )
        except WeightsError as exc:
            return None, exc
        except Exception as exc:  # noqa: BLE001 - `Ranks.agree` raises it once the other ranks know
            failed = LoadError(
                f"engine {info.name} failed to take the weights of {provided.provider!r}: "
                f"{type(exc).__name__}: {exc}"
            )
            failed.__cause__ = exc
            return None, failed

    def _publish_once(self, name: str, layout: Layout) -> PublishReceipt | None:
        self._published.add(name)
        try:
            receipt = _known(self._hooks).publish(name, self.request, self.engine, layout)
        except WeightsError as exc:
            if self.plan.publishers[name].required:
                raise PublishError(f"plugin {name!r} must publish, and failed: {exc}") from exc
            log.warning("%s did not publish: %s", name, exc)
            self._notes.append(f"{name} did not publish: {exc}")
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

    def _close(self, outcome: Outcome) -> list[Exception]:
        """Call every cleanup in reverse order; keep an owner's memory for the lease if all is well."""
        kept = outcome.status == "ready" and _known(self._chain).is_owner(_known(self._provided).provider)
        self.state = State.CLOSED
        errors: list[Exception] = []
        for name in reversed(self._plan.active if self._plan else ()):
            try:
                _known(self._hooks).cleanup(name, self.request, outcome)
            except WeightsError as exc:
                errors.append(exc)
        for weights in reversed(self._chain.opened if self._chain else ()):
            if kept and weights is self.weights:
                self._lease.add(weights.close)
                continue
            try:
                weights.close()
            except Exception as exc:  # noqa: BLE001 - raised with the others
                errors.append(exc)
        return errors

    def _restore_engine(self, begun: State, error: BaseException | None) -> str:
        crashed = isinstance(error, PluginFailedError)  # a plugin that crashes may have written anything
        if begun is State.NEW or (begun is State.RESOLVED and not crashed) or self.engine.untouched():
            return "the engine is untouched"
        try:
            self.engine.reinit()
        except EngineError as exc:
            state = f"the engine may be partly written, do not use it: {exc}"
            log.error("%s", state)
            return state
        return "the engine was re-initialised"

    def _report(self) -> LoadReport:
        return LoadReport(
            checkpoint=self.request.checkpoint,
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
        with self._meter.phase(phase):
            yield
        done = self._meter.phases[-1]
        log.info("%s: %.3f s, %.1f MB", done.name, done.seconds, done.nbytes / 1e6)

    def _bytes_read(self) -> int:
        return self._provided.weights.bytes_read if self._provided is not None else 0

    def _expect(self, *states: State) -> None:
        if self.state not in states:
            raise LifecycleError(
                f"the session is {self.state.value}, "
                f"this step needs it to be {' or '.join(state.value for state in states)}"
            )


def _due_bytes(weights: WeightSet, engine: Engine) -> int:
    """The bytes that will be fetched: all, or those of the names that set and engine share."""
    due = engine.expected(weights.layout).keys() & weights.metas.keys() or weights.metas.keys()
    return sum(weights.meta(name).nbytes for name in due)


def _known(value: T | None) -> T:
    if value is None:
        raise LifecycleError("not known yet: call the session's steps in their order")
    return value
