# SPDX-License-Identifier: Apache-2.0
"""Broken sources. All read what the built-in disk source reads, and do one thing wrong."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.errors import CheckpointError, Declined
from weights_core.hookspecs import hookimpl
from weights_core.plugin import ProviderPlugin
from weights_core.shards import open_shards
from weights_core.types import FormatClaim, Layout, LoadRequest, Outcome, Role, TensorMeta
from weights_core.weightset import Parts, Slices, Target

if TYPE_CHECKING:
    import torch

    from weights_core.engine import Engine
    from weights_core.source import Source
    from weights_core.weightset import WeightSet


class SoundSource(ProviderPlugin[Any]):
    """Reads a checkpoint's files one tensor after the other."""

    makes: ClassVar[type[ShardSet]] = ShardSet

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        return FormatClaim(roles={Role.SOURCE}, reason="reads files")

    @hookimpl
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        return self.read(request, engine)

    def read(self, request: LoadRequest, engine: Engine) -> WeightSet:
        found = find(request.checkpoint, request.engine.component, request.is_pipeline)
        return self.makes(open_shards(found), provider="sound", notes=found.notes)


SOUND = SoundSource


class ImportsTorchToAnswer(SoundSource):
    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        import torch

        return FormatClaim(roles={Role.SOURCE}, reason=f"has torch {torch.__version__}")


class OpensAFileToAnswer(SoundSource):
    opened: int | None = None

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        self.opened = os.open(os.devnull, os.O_RDONLY)
        return FormatClaim(roles={Role.SOURCE}, reason="will close it when it cleans up")

    @hookimpl
    def cleanup(self) -> None:
        if self.opened is not None:
            os.close(self.opened)


class AnswersAsTheMoodTakesIt(SoundSource):
    asked: ClassVar[int] = 0

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        type(self).asked += 1
        return FormatClaim(roles={Role.SOURCE}, reason=f"asked {self.asked} times")


class FailsToAnswer(SoundSource):
    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        files = list(request.checkpoint.iterdir())
        return FormatClaim(roles={Role.SOURCE}, reason=f"reads {len(files)} files")


class _TakesAnything:
    """Settings that are no attrs class, so nothing checks them."""

    def __init__(self, **settings: object) -> None:
        vars(self).update(settings)


class HasSettingsNobodyChecks(SoundSource):
    Config = _TakesAnything


class WritesAndDeclines(SoundSource):
    def read(self, request: LoadRequest, engine: Engine) -> WeightSet:
        try:
            return super().read(request, engine)
        except CheckpointError as exc:
            for tensor in engine.tensors(Layout.SHARDED).values():
                tensor.fill_(0)
            raise Declined(str(exc)) from exc


class LeavesAFileOpenWhenItFails(SoundSource):
    def read(self, request: LoadRequest, engine: Engine) -> WeightSet:
        opened = os.open(os.devnull, os.O_RDONLY)
        weights = super().read(request, engine)
        os.close(opened)
        return weights


class LeavesAFileOpenForGood(SoundSource):
    @hookimpl
    def cleanup(self, outcome: Outcome) -> None:
        if outcome.status == "ready":
            os.open(os.devnull, os.O_RDONLY)


class FailsToCleanUp(SoundSource):
    @hookimpl
    def cleanup(self, outcome: Outcome) -> None:
        if outcome.status == "failed":
            raise OSError("nothing to clean up")


class TakesBackWhatItGave(SoundSource):
    """Provides the tensors that become the parameters, and reuses their memory after the load."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.given: list[weakref.ref[torch.Tensor]] = []

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        return FormatClaim(roles={Role.SOURCE}, reason="reads files", layouts={Layout.SHARDED})

    def read(self, request: LoadRequest, engine: Engine) -> WeightSet:
        weights = super().read(request, engine)
        assert isinstance(weights, ShardSet)
        held = _Held(weights.shards, provider="sound")
        held.given = self.given
        return held

    @hookimpl
    def cleanup(self, outcome: Outcome) -> None:
        for given in self.given if outcome.status == "ready" else ():
            tensor = given()
            if tensor is not None:
                tensor.fill_(0)


class _Held(ShardSet):
    layout = Layout.SHARDED
    given: list[weakref.ref[torch.Tensor]]

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        tensor = super().read(name, slices)
        self.given.append(weakref.ref(tensor))
        return tensor


class BlamesAnother(SoundSource):
    def read(self, request: LoadRequest, engine: Engine) -> WeightSet:
        try:
            return super().read(request, engine)
        except CheckpointError as exc:
            raise exc.stamp(plugin="innocent", distribution="other", hook="load_weights", rank=0) from None


class RemembersTheLastRequest(SoundSource):
    last: ClassVar[Any] = threading.local()

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        self.last.request = request
        return FormatClaim(roles={Role.SOURCE}, reason="reads files")

    def read(self, request: LoadRequest, engine: Engine) -> WeightSet:
        return super().read(self.last.request, engine)


class KeepsItsRequestInTheClass(SoundSource):
    current: ClassVar[Any] = None

    def read(self, request: LoadRequest, engine: Engine) -> WeightSet:
        type(self).current = request
        time.sleep(0.1)  # long enough for another thread
        return super().read(self.current, engine)


class ClaimsAnotherLayout(SoundSource):
    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        return FormatClaim(roles={Role.SOURCE}, reason="says it is cut", layouts={Layout.SHARDED})


class MakesUpErrors(SoundSource):
    def read(self, request: LoadRequest, engine: Engine) -> WeightSet:
        try:
            return super().read(request, engine)
        except CheckpointError as exc:
            raise ValueError(str(exc)) from exc


def _source(made: type[ShardSet]) -> type[SoundSource]:
    """Return a source that is sound but for the sets it makes."""
    name = f"Source{made.__name__}"
    made_here = type(name, (SoundSource,), {"makes": made, "__module__": __name__})
    globals()[name] = made_here  # a contract imports plugins by name
    return made_here


class HangsInAChild(ShardSet):
    """Would wait for a thread that a forked child does not have; raises, so that nobody must wait."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._process = os.getpid()

    def close(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("its threads are gone")
        super().close()


class Miscounts(ShardSet):
    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        return {name: attrs.evolve(meta, nbytes=meta.nbytes + 1) for name, meta in super().metas.items()}


class StreamsOneTwice(ShardSet):
    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        first = None
        for name, tensor in super().stream(names):
            first = first or (name, tensor)
            yield name, tensor
        if names is None and first is not None:
            yield first


class TakesNoneForAll(ShardSet):
    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        return super().stream(names or None)


class ReadsOnce(ShardSet):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read: set[str] = set()

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        tensor = super().read(name, slices)
        if slices is None and name in self._read:
            tensor.zero_()
        self._read.add(name)
        return tensor

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.in_order(names):
            yield name, super().read(name)


class KnowsNoNegativeIndex(ShardSet):
    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        if slices and slices[0].start == -1:
            slices = (slice(0, 1), *slices[1:])
        return super().read(name, slices)


class IgnoresStrides(ShardSet):
    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        if out.is_contiguous():
            super().read_into(name, out, slices)

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        for target in self.sorted(targets):
            super().read_into(target.name, target.out, target.slices)
            yield target


class FillsEachNameOnce(ShardSet):
    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        return super().fill({target.name: target for target in targets}.values())


class MapsTheWholeForAPart(ShardSet):
    def mapped(self, names: Parts | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        return super().mapped(None if names is None else list(names))


class MapsWhatItReads(ShardSet):
    """Keeps what it has mapped, and gives it to whoever reads or maps the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[str, torch.Tensor] = {}

    def mapped(self, names: Parts | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().mapped(names):
            if tensor.shape == self.metas[name].torch_shape:
                yield name, self._kept.setdefault(name, tensor)


class Casts(ShardSet):
    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        out.copy_(self.read(name, slices))


class PassesOverStrangers(ShardSet):
    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        return super().stream(None if names is None else [name for name in names if name in self.metas])


class Recycles(ShardSet):
    """Streams every tensor of a kind through one buffer."""

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        buffers: dict[tuple[torch.dtype, torch.Size], torch.Tensor] = {}
        for name, tensor in super().stream(names):
            buffer = buffers.setdefault((tensor.dtype, tensor.shape), tensor)
            if buffer is not tensor:
                buffer.copy_(tensor)
            yield name, buffer


class KeepsAll(ShardSet):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: list[torch.Tensor] = []

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().stream(names):
            self._kept.append(tensor)
            yield name, tensor


class CountsTwice(ShardSet):
    @property
    def bytes_read(self) -> int:
        return 2 * super().bytes_read


class LeavesAThread(ShardSet):
    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        stop = threading.Event()
        threading.Thread(target=stop.wait, args=(20,), daemon=True).start()
        yield from super().stream(names)
        stop.set()


class GivesZerosWhenClosed(ShardSet):
    closed = False

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        if not self.closed:
            return super().read(name, slices)
        import torch

        from weights_core import dtypes

        meta = self.meta(name)
        return torch.zeros(meta.torch_shape, dtype=dtypes.to_torch(meta.dtype))

    def close(self) -> None:
        self.closed = True
        super().close()


BROKEN: Mapping[str, type] = {
    "resolving_needs_no_torch": ImportsTorchToAnswer,
    "resolving_has_no_side_effect": OpensAFileToAnswer,
    "resolving_twice_answers_the_same": AnswersAsTheMoodTakesIt,
    "resolving_refuses_what_it_cannot_serve": FailsToAnswer,
    "unknown_settings_are_refused": HasSettingsNobodyChecks,
    "a_failure_tells_whether_it_wrote": WritesAndDeclines,
    "nothing_is_left_after_a_failed_load": LeavesAFileOpenWhenItFails,
    "nothing_is_left_after_the_lease": LeavesAFileOpenForGood,
    "cleanup_does_not_fail": FailsToCleanUp,
    "weights_outlive_the_load": TakesBackWhatItGave,
    "errors_say_who_failed": BlamesAnother,
    "two_hosts_do_not_interfere": RemembersTheLastRequest,
    "loads_in_threads_do_not_interfere": KeepsItsRequestInTheClass,
    "a_fork_does_no_harm": _source(HangsInAChild),
    "delivers_the_layout_it_claimed": ClaimsAnotherLayout,
    "describes_every_tensor_as_it_is": _source(Miscounts),
    "a_stream_yields_every_tensor_once": _source(StreamsOneTwice),
    "a_stream_of_some_yields_just_those": _source(TakesNoneForAll),
    "reading_on_demand_agrees": _source(ReadsOnce),
    "slices_agree": _source(KnowsNoNegativeIndex),
    "reading_into_memory_agrees": _source(IgnoresStrides),
    "filling_targets_agrees": _source(FillsEachNameOnce),
    "what_is_mapped_is_what_is_stored": _source(MapsTheWholeForAPart),
    "what_is_mapped_is_the_engines_own": _source(MapsWhatItReads),
    "a_destination_that_does_not_fit_is_refused": _source(Casts),
    "an_unknown_name_is_a_key_error": _source(PassesOverStrangers),
    "a_kept_tensor_never_changes": _source(Recycles),
    "what_was_released_is_freed": _source(KeepsAll),
    "bytes_read_are_those_delivered": _source(CountsTwice),
    "an_abandoned_stream_stops": _source(LeavesAThread),
    "a_closed_set_gives_no_garbage": _source(GivesZerosWhenClosed),
    "a_damaged_checkpoint_is_an_error": MakesUpErrors,
}
"""Clause → the source that breaks it; `importing_it_loads_no_torch` is broken in `eager`."""
