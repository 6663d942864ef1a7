# SPDX-License-Identifier: Apache-2.0
"""The set that an engine consumes: what is released is gone, from the mapping and from memory."""

from __future__ import annotations

import threading
from collections.abc import (
    Callable,
    Collection,
    ItemsView,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
    ValuesView,
)
from typing import TYPE_CHECKING

import attrs

from weights_consumable.derived import DerivedSet
from weights_consumable.index import NameIndex
from weights_consumable.loans import Loans
from weights_consumable.memory import Lender
from weights_consumable.origin import Origin
from weights_core import coverage
from weights_core.errors import ConsumedError
from weights_core.weightset import (
    Items,
    Parts,
    Slices,
    Target,
    Values,
    WeightSet,
    WeightSetWrapper,
)

if TYPE_CHECKING:
    import torch


@attrs.frozen(kw_only=True)
class Consumption:
    """What an observer is told: `names` of `nbytes` in the checkpoint were consumed by `by`.

    `freed` bytes of memory went back; see `ConsumableWeights.release`.
    """

    names: tuple[str, ...]
    nbytes: int
    freed: int
    by: str


class ConsumableWeights(WeightSetWrapper):
    """A set of which each tensor is consumed once. Thread-safe.

    To consume is to release: the name leaves the mapping, and to read it again is a `ConsumedError`
    that says who consumed it. `metas` stays whole, for it tells what the checkpoint holds.

    As a mapping it shrinks. `keys`, `values` and `items` are views as a dict's, except that an
    iteration goes over the names there were when it began, less those consumed before it came to
    them; so does `stream`.

    Nothing is kept: a tensor that was handed out, by name or from the stream, is in memory of its own
    that is back with the system the moment the last view of it dies, and is never taken from one that
    lives. Tensors of up to 1 MiB share mappings of at most 8 MiB, which go back together, and of which
    up to 2 MiB are kept for the next until the set is closed. This holds for sets that let others
    allocate, as those over a checkpoint's files do; the memory of other sets is theirs. `stream`,
    `fill`, `read_into` and `mapped` are the inner set's, with its read-ahead.
    """

    def __init__(self, inner: WeightSet) -> None:
        super().__init__(inner)
        self._index = NameIndex(inner)
        self._by: dict[str, Origin] = {}
        self._ahead: set[str] = set()  # what a stream has yet to come to, so that the inner set has it still
        self._loans = Loans()
        self._lender = Lender()
        self._derived: ConsumableWeights | None = None
        self._observer: Callable[[Consumption], object] | None = None
        self._marked = False
        self._consumed_bytes = 0
        self._lock = threading.Lock()
        inner.allocate_from(self._lender.lend)

    # To consume -------------------------------------------------------------------------------

    def mark_consumed(self, prefix: str) -> int:
        """Consume the tensor `prefix` and all below it: `a.1` and `a.1.b`, never `a.10`.

        The empty prefix stands for all. What two modules share is marked by the last to read it.

        Returns:
            The number of tensors consumed by this call; a repeat returns 0.
        """
        self._marked = True
        return self._consume(lambda: self._index.under(prefix), f"mark_consumed({prefix!r})")[0]

    def mark_consumed_keys(self, keys: Iterable[str]) -> int:
        """Consume the tensors named; names that are not there, or no longer, count for nothing.

        Returns:
            The number of tensors consumed by this call; a repeat returns 0.
        """
        self._marked = True
        names = list(keys)
        return self._consume(lambda: names, "mark_consumed_keys()")[0]

    def release(self, names: Iterable[str]) -> int:
        """Consume the tensors named.

        Returns:
            The bytes freed: what the inner set says it gave back, or else those of the tensors handed
            out for these names that nothing refers to any more, each storage once. Memory that is
            still referred to goes back later, and is not counted.
        """
        wanted = list(names)
        return self._consume(lambda: wanted, "release()")[1]

    def take_ownership(self, derived: MutableMapping[str, torch.Tensor]) -> ConsumableWeights:
        """Consume this set as a whole for `derived`, which the engine made of its tensors.

        For an engine that renames, splits or fuses all weights before it takes them module by module.
        `derived` is adopted, not copied: what is consumed of the set returned is taken out of that
        very dict, so that no second dict pins it, and memory goes back when the last of the tensors
        on it is taken out. Tensors that share memory with this set's keep it alive; accounting and
        left-overs go on in the set returned, observed as this one is. What the inner set lent stays
        lent until it is closed. Of this set nothing can be read any more, nor of a dict that was handed
        over before: drop it.

        Raises:
            TypeError: a value is no tensor.
        """
        by = Origin.of("take_ownership()")
        heir = ConsumableWeights(DerivedSet(derived, layout=self.layout, provider=self.provider))
        for item in derived.items():
            heir._handed_out(*item)
        with self._lock:
            names = self._index.remove(list(self._index.names))
            self._by.update(dict.fromkeys(names, by))
            self._loans = Loans()
            self._marked, self._derived = True, heir
            heir._marked, heir._observer = True, self._observer
        if isinstance(self.inner, DerivedSet):
            self.inner.close()
        return heir

    def observe(self, observer: Callable[[Consumption], object] | None) -> None:
        """Call `observer` after each consumption, in the thread that consumed; None stops it."""
        self._observer = observer

    # What is left -----------------------------------------------------------------------------

    def filter_prefix(self, prefix: str) -> PrefixView:
        """Return a live mapping of what is below `prefix`, by the names less `prefix.`.

        A tensor with exactly that name has the empty name there.
        """
        return PrefixView(self, prefix)

    def names_under(self, prefix: str) -> list[str]:
        """Return the names left at or below `prefix`, sorted."""
        with self._lock:
            return self._index.under(prefix)

    @property
    def consumed_bytes(self) -> int:
        """Bytes in the checkpoint of the tensors consumed so far."""
        return self._consumed_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes of the tensors handed out that are still referred to, consumed or not."""
        with self._lock:
            return sum(loan.nbytes for loan in self._loans.live())

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the inner set; where the engine marked, also what it never did or still holds."""
        notes = self.inner.notes
        if not self._marked:
            return notes
        with self._lock:
            left = list(self._index.names)
            held = [loan for loan in self._loans.live() if not loan.names]
        if left:
            size = sum(self.metas[name].nbytes for name in left)
            notes += (f"never consumed, {size / 1e6:.1f} MB: {coverage.listed(left)}",)
        if held:
            size = sum(loan.nbytes for loan in held)
            listed = coverage.listed([loan.name for loan in held])
            notes += (f"consumed, but still referred to, {size / 1e6:.1f} MB: {listed}",)
        return notes + (self._derived.notes if self._derived is not None else ())

    # To read ----------------------------------------------------------------------------------

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Read from the inner set.

        Raises:
            ConsumedError: it was consumed.
        """
        self._refuse_consumed([name])
        tensor = self.inner.read(name, slices)
        self._handed_out(name, tensor)
        return tensor

    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Read into `out` from the inner set.

        Raises:
            ConsumedError: it was consumed.
        """
        self._refuse_consumed([name])
        self.inner.read_into(name, out, slices)

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the inner set, less what is consumed before its turn.

        Raises:
            ConsumedError: one of `names` was consumed before.
        """
        wanted = list(self if names is None else names)
        self._refuse_consumed(wanted)
        with self._lock:
            self._ahead.update(wanted)
        try:
            # `filter` keeps nothing it has yielded, as a loop's variable would
            yield from filter(self._is_due, self.inner.stream(wanted if self._by else names))
        finally:
            with self._lock:
                passed = [name for name in wanted if name in self._ahead and name in self._by]
                self._ahead.difference_update(wanted)
            self._release_inner(passed)

    def mapped(self, names: Parts | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Map in the inner set, less what is consumed before its turn.

        What is mapped is no memory of this process's that could be freed, and is not accounted for.

        Raises:
            ConsumedError: one of `names` was consumed before.
        """
        wanted = list(self) if names is None else names
        self._refuse_consumed(wanted)
        yield from filter(lambda item: item[0] not in self._by, self.inner.mapped(wanted))

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill from the inner set, straight.

        Raises:
            ConsumedError: a target's tensor was consumed before.
        """
        wanted = list(targets)
        self._refuse_consumed(target.name for target in wanted)
        yield from self.inner.fill(wanted)

    def close(self) -> None:
        """Close the inner set. Tensors that were read by name stay as they are."""
        self.inner.close()
        self._lender.close()
        if self._derived is not None:
            self._derived.close()

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._index.names))

    def __len__(self) -> int:
        return len(self._index.names)

    def __contains__(self, name: object) -> bool:
        return name in self._index.names

    # ------------------------------------------------------------------------------------------

    def _consume(self, find: Callable[[], Iterable[str]], call: str) -> tuple[int, int]:
        """Consume what `find`, called under the lock, returns; return how many, and the bytes freed."""
        by, metas, nbytes = Origin.of(call), self.metas, 0
        with self._lock:
            names = self._index.remove(find())
            for name in names:
                self._by[name] = by
                nbytes += metas[name].nbytes
            loans = self._loans.remove(names)
            self._consumed_bytes += nbytes
            due = [name for name in names if name not in self._ahead] if self._ahead else names
        if not names:
            return 0, 0
        freed = self._release_inner(due)
        if loans:
            freed = freed or sum(loan.nbytes for loan in loans if not loan.is_live)
            self._lender.trim()
        if self._observer is not None:
            self._observer(Consumption(names=tuple(names), nbytes=nbytes, freed=freed, by=str(by)))
        return len(names), freed

    def _is_due(self, item: tuple[str, torch.Tensor]) -> bool:
        self._ahead.discard(item[0])
        if item[0] in self._by:
            self._release_inner(item[:1])
            return False
        self._handed_out(*item)
        return True

    def _release_inner(self, names: Sequence[str]) -> int:
        return self.inner.release(names) if names else 0

    def _handed_out(self, name: str, tensor: torch.Tensor) -> None:
        with self._lock:
            self._loans.add(name, tensor)

    def _refuse_consumed(self, names: Iterable[str]) -> None:
        for name in names:
            by = self._by.get(name)
            if by is not None:
                raise ConsumedError(name, str(by))


class PrefixView(Mapping[str, "torch.Tensor"]):
    """What is left below a prefix, by shorter names; reads when indexed."""

    def __init__(self, weights: ConsumableWeights, prefix: str) -> None:
        self._weights = weights
        self._prefix = prefix.removesuffix(".")

    def items(self) -> ItemsView[str, torch.Tensor]:
        """See `WeightSet.items`."""
        return Items(self)

    def values(self) -> ValuesView[torch.Tensor]:
        """See `WeightSet.values`."""
        return Values(self)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[self._full(name)]

    def __iter__(self) -> Iterator[str]:
        skip = len(self._prefix) + 1 if self._prefix else 0
        return iter([name[skip:] for name in self._weights.names_under(self._prefix)])

    def __len__(self) -> int:
        return len(self._weights.names_under(self._prefix))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._full(name) in self._weights

    def __eq__(self, other: object) -> bool:
        return self is other  # a mapping's would read every tensor

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors below {self._prefix!r} of {self._weights!r}>"

    def _full(self, name: str) -> str:
        return ".".join(part for part in (self._prefix, name) if part)
