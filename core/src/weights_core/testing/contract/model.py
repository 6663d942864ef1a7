# SPDX-License-Identifier: Apache-2.0
"""What a contract is made of: clauses, the plugin they are tried on, and the verdicts."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import attrs
import torch

from weights_core.errors import WeightsError
from weights_core.host import PluginHost
from weights_core.report import LoadReport
from weights_core.session import Session
from weights_core.tensors import as_bytes
from weights_core.testing.engines import FakeEngine
from weights_core.testing.hosts import host_of
from weights_core.testing.leftovers import Held
from weights_core.testing.recorder import HookRecorder
from weights_core.types import FormatClaim, Layout, LoadRequest, Role
from weights_core.weightset import WeightSet

Tensors = Mapping[str, torch.Tensor]


class Violation(AssertionError):  # noqa: N818 - a verdict
    """A plugin does not do what a clause says."""


class UnfitSubjectError(WeightsError):
    """What the contract was given cannot prove anything: the message says what to change."""


@attrs.frozen(eq=False, kw_only=True)
class Subject:
    """A plugin under contract, and what an author must give so that it can be tried.

    `config(folder)` returns its settings; a socket or cache belongs in that folder, which is empty.
    `prepare(folder, tensors)` writes what the plugin reads and returns the checkpoint's path.
    `oracle(path)` reads the same back and must not use the plugin. `offered(receipt)` reads what a
    publisher offers, again without the plugin. `dtypes` are those that the plugin's format can
    hold, F32 and U8 among them; `settle` is how many seconds it may take to give back what it held.
    `what` tells one subject from others of the same role, for headings.
    """

    name: str
    plugin: type
    role: Role
    config: Callable[[Path], Mapping[str, object]]
    prepare: Callable[[Path, Tensors], Path]
    oracle: Callable[[Path], Tensors]
    offered: Callable[[Any], Tensors] | None = None
    dtypes: Collection[str]
    settle: float = 2.0
    what: str = ""

    def __attrs_post_init__(self) -> None:
        if not {"F32", "U8"} <= set(self.dtypes):
            raise UnfitSubjectError(f"the contract of {self.name!r} needs F32 and U8 among its `dtypes`")

    def seen_by_the_oracle(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        """Return what the oracle reads.

        Raises:
            UnfitSubjectError: it calls the plugin, which would then be compared with itself.
        """
        with _not_calling(self.plugin, f"the oracle of {self.name!r}", self.oracle):
            return dict(self.oracle(checkpoint))

    def seen_in_the_offer(self, receipt: object) -> dict[str, torch.Tensor]:
        """Return what a publisher's offer holds, read without the plugin."""
        if self.offered is None:
            raise UnfitSubjectError(f"the contract of {self.name!r} has no `offered`, which reads the offer")
        with _not_calling(self.plugin, f"`offered` of {self.name!r}", self.offered):
            return dict(self.offered(receipt))


@attrs.frozen(eq=False)
class Clause:
    """One sentence of a contract, and how to try a plugin on it.

    `suffers` says what an engine would suffer from a plugin that breaks it.
    """

    name: str
    says: str
    suffers: str
    roles: frozenset[Role]
    attempt: Callable[[Case], None]

    def check(self, subject: Subject, folder: Path) -> None:
        """Try `subject`; `folder` is empty and the clause's own.

        Raises:
            Violation: it does not hold; says what was seen and what an engine would suffer.
            UnfitSubjectError: the oracle proves nothing.
        """
        with _temporary_files_in(folder / "tmp"), _quiet():
            try:
                self.attempt(Case(subject, folder))
            except UnfitSubjectError:
                raise
            except Exception as exc:
                what = str(exc) if isinstance(exc, Violation) else f"{type(exc).__name__}: {exc}"
                raise Violation(f"{self.says}: {what}. Else {self.suffers}.") from exc


_CLAUSES: dict[str, Clause] = {}
_KIT = "weights_core.testing."


def clause(*roles: Role, suffers: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Make a clause of a function: its name names the clause, its docstring says what must hold."""

    def add(attempt: Callable[[Case], None]) -> Callable[[Case], None]:
        says = (inspect.getdoc(attempt) or "").split("\n")[0].rstrip(".")
        _CLAUSES[attempt.__name__] = Clause(attempt.__name__, says, suffers, frozenset(roles), attempt)
        return attempt

    return add


def all_clauses() -> list[Clause]:
    """Return every clause that was imported, in the order they were written."""
    return list(_CLAUSES.values())


@attrs.frozen(eq=False)
class Prepared:
    """A checkpoint in the plugin's format, and what it holds as the oracle reads it."""

    path: Path
    truth: Mapping[str, torch.Tensor]


class Case:
    """One clause being tried on one plugin: makes what is loaded, and loads it."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.folder = folder
        self.config = dict(subject.config(folder))
        self._made = 0

    @property
    def name(self) -> str:
        """The plugin's name."""
        return self.subject.name

    @property
    def formats(self) -> tuple[str, ...]:
        """The format that has the plugin take part: sources and owners are named, others need not be."""
        return (self.name,) if self.subject.role in (Role.SOURCE, Role.OWNER) else ("auto",)

    def checkpoint(self, tensors: Tensors) -> Prepared:
        """Write `tensors` in the plugin's format, to a folder of their own."""
        self._made += 1
        folder = self.folder / f"checkpoint-{self._made}"
        folder.mkdir()
        try:
            path = self.subject.prepare(folder, tensors)
            truth = self.subject.seen_by_the_oracle(path)
        except UnfitSubjectError:
            raise
        except Exception as exc:
            raise UnfitSubjectError(
                f"`prepare` or the oracle of {self.name!r} failed: {type(exc).__name__}: {exc}"
            ) from exc
        if truth.keys() != tensors.keys():
            raise UnfitSubjectError(
                f"`prepare` of {self.name!r} was given {len(tensors)} tensors, its oracle reads {len(truth)}"
            )
        return Prepared(path, truth)

    def request(self, checkpoint: Path, engine: FakeEngine | None = None) -> LoadRequest:
        """Return a request that has the plugin take part."""
        info = (engine or FakeEngine({})).info
        return LoadRequest(checkpoint=checkpoint, engine=info, format=self.formats, timeout=30)

    def answer(self, checkpoint: Path) -> FormatClaim | None:
        """Ask the plugin alone what it would do, with an instance of its own."""
        request = self.request(checkpoint)
        return self.host().hooks(request).resolve_format(self.name, request)

    def host(
        self, *, observer: HookRecorder | None = None, block: tuple[str, ...] = (), **others: Any
    ) -> PluginHost:
        """Return a host of this plugin, `others` and the disk, sealed from the machine."""
        plugins: dict[str, Any] = {self.name: self.subject.plugin, **others}
        config = {self.name: self.config} if self.config else {}
        return host_of(config=config, observer=observer, block=block, **plugins)

    def session(
        self,
        checkpoint: Path,
        engine: FakeEngine,
        *,
        observer: HookRecorder | None = None,
        block: tuple[str, ...] = (),
        **others: Any,
    ) -> Session:
        """Return a session of a load of `checkpoint` in which the plugin takes part."""
        host = self.host(observer=observer, block=block, **others)
        return host.session(self.request(checkpoint, engine), engine, progress="never")

    @contextlib.contextmanager
    def opened(
        self, prepared: Prepared, *, observer: HookRecorder | None = None, **others: Any
    ) -> Iterator[WeightSet]:
        """Load up to the set, as an engine gets it, and abandon the load at the end."""
        engine = FakeEngine(prepared.truth)
        recorder = observer or HookRecorder()
        with self.session(prepared.path, engine, observer=recorder, **others) as session:
            session.resolve()
            weights = session.load()
            self.must_have_taken_part(session, recorder)
            yield weights

    def load(
        self,
        prepared: Prepared,
        engine: FakeEngine,
        *,
        observer: HookRecorder | None = None,
        **others: Any,
    ) -> LoadReport:
        """Run a whole load and return its report; the plugin must have taken part."""
        recorder = observer or HookRecorder()
        with self.session(prepared.path, engine, observer=recorder, **others) as session:
            run_all_steps(session)
            self.must_have_taken_part(session, recorder)
            return session.finish()

    def must_have_taken_part(self, session: Session, recorder: HookRecorder) -> None:
        """Fail if another plugin did this one's work: the clause would prove nothing."""
        if self.name not in session.plan.active:
            why = [d.reason for d in session.plan.decisions if d.plugin == self.name]
            self.fail(f"the plugin took no part in a load that names it ({'; '.join(why)})")
        if self.formats == ("auto",):
            return
        calls = recorder.of(self.name, "load_weights")
        if not calls or calls[-1].error is not None:
            error = calls[-1].error if calls else "it was never asked"
            self.fail(f"the plugin did not provide weights of a checkpoint that `prepare` made: {error}")

    @contextlib.contextmanager
    def nothing_left(self, when: str) -> Iterator[None]:
        """Fail if what the block did leaves a descriptor, thread, process, segment or file behind."""
        before = Held.now()
        yield
        left = before.left_over(settle=self.subject.settle)
        self.require(not left, f"{when}, there is still {'; '.join(left)}")

    def require(self, holds: bool, otherwise: str) -> None:
        """Fail with what was seen unless `holds`."""
        if not holds:
            self.fail(otherwise)

    def fail(self, what: str) -> NoReturn:
        """Say what was seen that must not be."""
        raise Violation(what)

    def same(self, name: str, got: torch.Tensor, due: torch.Tensor, how: str) -> None:
        """Fail unless `got` has the shape, dtype and bits of `due`."""
        if tuple(got.shape) != tuple(due.shape) or got.dtype != due.dtype:
            self.fail(
                f"{how} of {name!r} gave {got.dtype} {list(got.shape)}, due is {due.dtype} {list(due.shape)}"
            )
        if not torch.equal(as_bytes(got), as_bytes(due)):
            self.fail(f"{how} of {name!r} ({due.dtype} {list(due.shape)}) gave other bytes than are stored")

    def holds(self, engine: FakeEngine, prepared: Prepared, how: str) -> None:
        """Fail unless `engine` had the bytes of `prepared` when its post-load ran."""
        for name, due in prepared.truth.items():
            if engine.at_post_load.get(name) != as_bytes(due).numpy().tobytes():
                self.fail(f"{how} gave {name!r} other bytes than are stored")


def run_all_steps(session: Session) -> None:
    """Drive a session up to, and not including, `finish`."""
    session.resolve()
    session.load()
    session.apply()
    session.publish(Layout.SHARDED)
    session.post_load()
    session.publish(Layout.FINAL)


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Have whatever makes temporary files make them where they are seen to be left over."""
    folder.mkdir()
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir, os.environ["TMPDIR"] = str(folder), str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before[0]
        if before[1] is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before[1]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the log: clauses abandon loads and make them fail on purpose."""
    logger = logging.getLogger("weights")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _not_calling(plugin: type, what: str, function: Callable[..., object]) -> Iterator[None]:
    """Refuse a function that calls into the plugin's package, or into its class if both share a module."""
    package = plugin.__module__.partition(".")[0]
    own = getattr(function, "__module__", None)
    shared = own is not None and own.partition(".")[0] == package
    methods = {
        f.__code__
        for cls in plugin.__mro__
        if cls.__module__.partition(".")[0] == package
        for f in vars(cls).values()
        if inspect.isfunction(f)
    }
    caught: list[str] = []

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        module = str(frame.f_globals.get("__name__", ""))
        if event != "call" or caught or module.startswith(_KIT):
            return
        if frame.f_code in methods or (not shared and module.partition(".")[0] == package):
            caught.append(f"{module}.{frame.f_code.co_name}")

    before = sys.getprofile()
    collects = gc.isenabled()
    gc.disable()  # a finaliser of an earlier load is not the function's doing
    sys.setprofile(watch)
    threading.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
        if collects:
            gc.enable()
    if caught:
        raise UnfitSubjectError(
            f"{what} calls {caught[0]}, which is the plugin's: what it reads would be compared with "
            "itself, so read the checkpoint by other means, e.g. the library that wrote it"
        )
