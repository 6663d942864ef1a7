# SPDX-License-Identifier: Apache-2.0
"""Broken wrappers. All pass on what they wrap, and do one thing wrong."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from weights_core.errors import CheckpointError, Declined, LoadFailed
from weights_core.hookspecs import hookimpl
from weights_core.plugin import WrapperPlugin
from weights_core.types import FormatClaim, LoadRequest, Role
from weights_core.weightset import Slices, WeightSet, WeightSetWrapper

if TYPE_CHECKING:
    import torch


class SoundWrapper(WrapperPlugin[None]):
    """Passes on everything."""

    makes: ClassVar[type[WeightSetWrapper]] = WeightSetWrapper

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        return FormatClaim(roles={Role.WRAPPER}, reason="wraps")

    @hookimpl(wrapper=True)
    def load_weights(self, request: LoadRequest) -> Generator[None, WeightSet, WeightSet]:
        weights = yield
        return self.makes(weights)


SOUND = SoundWrapper


class TurnsRefusalsIntoFailures(SoundWrapper):
    @hookimpl(wrapper=True)
    def load_weights(self, request: LoadRequest) -> Generator[None, WeightSet, WeightSet]:
        try:
            weights = yield
        except Declined as exc:
            raise LoadFailed(exc.message, mutated=False) from exc
        return self.makes(weights)


def _wrapper(made: type[WeightSetWrapper]) -> type[SoundWrapper]:
    """Return a wrapper that is sound but for the sets it makes."""
    name = f"Wrapper{made.__name__}"
    made_here = type(name, (SoundWrapper,), {"makes": made, "__module__": __name__})
    globals()[name] = made_here  # a contract imports plugins by name
    return made_here


class LosesNotes(WeightSetWrapper):
    @property
    def notes(self) -> tuple[str, ...]:
        return ()


class RewritesErrors(WeightSetWrapper):
    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        try:
            self.inner.read_into(name, out, slices)
        except CheckpointError as exc:
            raise RuntimeError("something went wrong") from exc


class DoesNotClose(WeightSetWrapper):
    def close(self) -> None:
        return


class DoesNotRelease(WeightSetWrapper):
    def release(self, names: Iterable[str]) -> int:
        return 0


class KeepsTheStream(WeightSetWrapper):
    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        self.running = self.inner.stream(names)
        for item in self.running:  # noqa: UP028 - `yield from` would close it, as it should
            yield item


class SkipsWhatAnotherHandled(WeightSetWrapper):
    handled: str | None = None

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.inner.stream(names):
            if getattr(self.inner, "handled", None) != name:
                self.handled = name
                yield name, tensor


class Wipes(WeightSetWrapper):
    def release(self, names: Iterable[str]) -> int:
        known = [name for name in names if name in self.inner]
        for name in known:
            self.inner.read(name).fill_(0)
        return self.inner.release(known)


BROKEN: Mapping[str, type] = {
    "passes_on_what_the_set_says_of_itself": _wrapper(LosesNotes),
    "passes_on_the_errors_of_a_provider": TurnsRefusalsIntoFailures,
    "passes_on_the_errors_of_a_set": _wrapper(RewritesErrors),
    "closing_reaches_below": _wrapper(DoesNotClose),
    "releasing_reaches_below": _wrapper(DoesNotRelease),
    "dropping_a_stream_drops_the_one_below": _wrapper(KeepsTheStream),
    "wrapping_twice_changes_nothing": _wrapper(SkipsWhatAnotherHandled),
    "never_frees_pages_it_does_not_own": _wrapper(Wipes),
}
"""Clause → the wrapper that breaks it."""
