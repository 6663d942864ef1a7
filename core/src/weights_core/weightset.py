# SPDX-License-Identifier: Apache-2.0
"""`WeightSet`: what `load_weights` returns, and the views that engines take of it."""

from __future__ import annotations

import abc
import operator
from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING, Any

import attrs

from weights_core.errors import ConsumedError
from weights_core.types import Layout, TensorMeta

if TYPE_CHECKING:
    import torch

Slices = tuple[slice, ...]
"""One slice per leading dimension, each with step 1; dimensions left out are taken whole."""

Parts = Collection[str] | Mapping[str, Slices | None]
"""Names of tensors, or the slices wanted of each."""

Allocate = Callable[[int, int], "torch.Tensor"]
"""Returns uninitialised host memory of so many bytes, as a flat tensor of uint8. Thread-safe.

The second argument is the place in a file, in bytes, that is to be read there: an address congruent to
it modulo a page lets a direct read go straight to it.
"""


@attrs.frozen(eq=False)
class Target:
    """A destination for a tensor of a set: all of it, or the part that `slices` selects.

    `out` has the selected shape and the tensor's dtype; it may lie on any device.
    """

    name: str
    out: torch.Tensor
    slices: Slices | None = None


class WeightSet(Mapping[str, "torch.Tensor"], abc.ABC):
    """Named tensors that may be read lazily: a mapping, a stream, and a filler of destinations.

    As a mapping, `weights[name]` reads one tensor on demand. `stream()` yields all, or those
    asked for, in the order that reads fastest. `fill()` and `read_into()` bring bytes straight
    into the caller's memory; a set that can do so without a copy in between overrides them.

    Lending: a tensor that was handed out stays valid and unchanged until its names are released
    or the set is closed, whichever is first, and also afterwards unless the set documents that
    it recycles memory. A set that recycles does so only after an explicit release or the death of
    the *storage* (a view may outlive the tensor), and on CUDA after the recorded event.

    A subclass gives `metas`, `read`, and where it holds memory `release` and `close`.
    """

    layout: Layout = Layout.CHECKPOINT
    provider: str = ""
    in_place: bool = False
    """True if the provider has already written the weights into the engine's parameters."""
    fills: bool = False
    """True if `Engine.bind` is to have `fill` bring the tensors into memory of the engine's own.

    Else they lie in memory that is there to stay, which becomes the parameters without a copy. Says
    nothing at CHECKPOINT, where engines always read into memory of their own.
    """

    @property
    @abc.abstractmethod
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor of the set by name, in storage order, known without reading.

        Asked often, so it must not be computed anew each time.
        """

    @abc.abstractmethod
    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Return a tensor, or the part that `slices` selects, in host memory unless documented.

        Raises:
            KeyError: the set has no such tensor.
            CheckpointError: the bytes cannot be had.
            LoadFailed: the provider failed; another may serve.
        """

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data fetched from the backing so far; 0 if the set does not count."""
        return 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the operator should know of this set, e.g. files that were passed over."""
        return ()

    def meta(self, name: str) -> TensorMeta:
        """Return shape, dtype, bytes and file of a tensor without reading it.

        Raises:
            KeyError: the set has no such tensor.
        """
        return self.metas[name]

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` for all tensors, or for `names`, in the fastest order.

        Raises:
            KeyError: the set has no tensor of one of the names.
        """
        metas = self.metas
        wanted = None if names is None else frozenset(names)
        for name in (wanted or frozenset()) - metas.keys():
            raise KeyError(name)
        for name in metas:
            if wanted is None or name in wanted:
                yield name, self.read(name)

    def mapped(self, names: Parts | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` for those that can be used where they lie, without a copy.

        Of all tensors, or of `names`; if these map each name to slices, of those parts. What is not
        yielded must be read in another way; by default that is everything.

        The tensors lie in pages of the checkpoint's files, in host memory, and no two share a byte. They
        are the caller's: what is written becomes a copy of its own, which neither the file nor a later
        read sees. They stay valid after `release` and `close`, and their pages go back when they die.
        All bytes have been read by then, so a file that is damaged is an error here; a file that is
        overwritten in place or cut short *later* changes them, or ends the process.

        Raises:
            KeyError: the set has no tensor of one of the names.
            CheckpointError: the bytes cannot be had.
        """
        for name in self.metas if names is None else names:
            if name not in self.metas:
                raise KeyError(name)
        yield from ()

    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Bring a tensor, or the part that `slices` selects, into `out`.

        Raises:
            ValueError: `out` has another shape or dtype than what is read.
        """
        source = self.read(name, slices)
        check_destination(name, out, tuple(source.shape), source.dtype)
        out.detach().copy_(source)

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill every target and yield each as it is done, in the fastest order.

        A generator: nothing is read before it is iterated, and abandoning it stops the reading.
        """
        for target in targets:
            self.read_into(target.name, target.out, target.slices)
            yield target

    def release(self, names: Iterable[str]) -> int:
        """Give back what the set holds for `names`; return the bytes freed.

        A set that holds nothing between reads returns 0. Releasing twice frees nothing more.
        """
        del names
        return 0

    def allocate_from(self, allocate: Allocate) -> None:
        """Ask that tensors the set makes in host memory be made in what `allocate` returns.

        A set whose tensors lie in memory that it has anyway does nothing.
        """
        del allocate

    def close(self) -> None:
        """Free all that the set holds; idempotent. Whoever opened the set, and the load's end, call it."""

    def lazy(self) -> Mapping[str, LazyTensor]:
        """Return a view whose values read when indexed, as `safe_open().get_slice` does."""
        return _LazyView(self)

    def items(self) -> ItemsView[str, torch.Tensor]:
        """Return a view that reads each tensor as it comes to it, less those consumed meanwhile."""
        return Items(self)

    def values(self) -> ValuesView[torch.Tensor]:
        """Return a view that reads as that of `items` does."""
        return Values(self)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.metas)

    def __len__(self) -> int:
        return len(self.metas)

    def __contains__(self, name: object) -> bool:
        return name in self.metas

    def __eq__(self, other: object) -> bool:
        return self is other  # a mapping's would read every tensor

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} tensors, {self.layout.value}, by {self.provider!r}>"


class WeightSetWrapper(WeightSet):
    """A set that forwards everything to `inner`; wrappers override what they change.

    A wrapper that overrides `read` is read through it on every path: unless it overrides them too,
    `stream`, `read_into` and `fill` are then the generic ones, which build on `read`. Likewise the
    names it iterates over are those of `metas` if it overrides that. One that overrides any of these
    maps nothing, unless it overrides `mapped` too: bytes would get past it.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for changed, built_on_it in (
            ("read", ("stream", "read_into", "fill", "mapped")),
            ("read_into", ("fill", "mapped")),
            ("stream", ("mapped",)),
            ("fill", ("mapped",)),
            ("metas", ("__iter__", "__len__", "__contains__", "mapped")),
        ):
            for name in built_on_it:
                if changed in vars(cls) and name not in vars(cls):
                    setattr(cls, name, getattr(WeightSet, name))

    def __init__(self, inner: WeightSet) -> None:
        self.inner = inner
        self.layout = inner.layout
        self.provider = inner.provider
        self.in_place = inner.in_place
        self.fills = inner.fills

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Those of the inner set."""
        return self.inner.metas

    @property
    def bytes_read(self) -> int:
        """Those of the inner set."""
        return self.inner.bytes_read

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the inner set."""
        return self.inner.notes

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Read from the inner set."""
        return self.inner.read(name, slices)

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the inner set."""
        return self.inner.stream(names)

    def mapped(self, names: Parts | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Map in the inner set."""
        return self.inner.mapped(names)

    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Read into `out` from the inner set."""
        self.inner.read_into(name, out, slices)

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill from the inner set."""
        return self.inner.fill(targets)

    def release(self, names: Iterable[str]) -> int:
        """Release in the inner set."""
        return self.inner.release(names)

    def allocate_from(self, allocate: Allocate) -> None:
        """Ask the inner set."""
        self.inner.allocate_from(allocate)

    def close(self) -> None:
        """Close the inner set."""
        self.inner.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def __contains__(self, name: object) -> bool:
        return name in self.inner


class Items(ItemsView[str, "torch.Tensor"]):
    """The items of a mapping that may shrink while they are iterated."""

    _mapping: Mapping[str, torch.Tensor]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._mapping:
            try:
                item = [(name, self._mapping[name])]
            except ConsumedError:
                continue
            yield item.pop()  # kept here, it would outlive what the consumer does with it


class Values(ValuesView["torch.Tensor"]):
    """The values of a mapping that may shrink while they are iterated."""

    _mapping: Mapping[str, torch.Tensor]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(operator.itemgetter(1), Items(self._mapping))


class LazyTensor:
    """A tensor that is read when it is indexed: `value[...]`, `value[0:4]`, `value[:, 2:3]`.

    Has the surface of a safetensors slice (`get_shape`, `get_dtype`), which Transformers and
    others accept as a checkpoint value.
    """

    def __init__(self, weights: WeightSet, meta: TensorMeta) -> None:
        self._weights = weights
        self._meta = meta

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape torch gives the tensor."""
        return self._meta.torch_shape

    def get_shape(self) -> list[int]:
        """Return the shape as a list."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the safetensors name of the dtype."""
        return self._meta.dtype

    def __getitem__(self, index: object) -> torch.Tensor:
        """Read the selected part. Steps other than 1, and integers, read the dimension whole first."""
        items = index if isinstance(index, tuple) else (index,)
        if len(items) > len(self.shape) or not all(_plain(i) for i in items):
            return self._weights.read(self._meta.name)[index]  # type: ignore[index]
        return self._weights.read(self._meta.name, tuple(i for i in items if isinstance(i, slice)))

    def __repr__(self) -> str:
        return f"<LazyTensor {self._meta.name!r} {self._meta.dtype} {list(self.shape)}>"


class _LazyView(Mapping[str, LazyTensor]):
    def __init__(self, weights: WeightSet) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> LazyTensor:
        return LazyTensor(self._weights, self._weights.meta(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _plain(item: object) -> bool:
    return isinstance(item, slice) and item.step in (None, 1)


def normalise(slices: Slices | None, shape: tuple[int, ...]) -> tuple[range, ...]:
    """Return one range of indices per dimension of `shape` for `slices`.

    Raises:
        ValueError: more slices than dimensions, or a step other than 1.
    """
    if not slices:
        return tuple(map(range, shape))
    given = slices
    if len(given) > len(shape):
        raise ValueError(f"{len(given)} slices for {len(shape)} dimensions")
    if any(s.step not in (None, 1) for s in given):
        raise ValueError("only slices of step 1 can be read")
    padded = given + (slice(None),) * (len(shape) - len(given))
    return tuple(range(*s.indices(size)) for s, size in zip(padded, shape, strict=True))


def check_destination(name: str, out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a destination without memory, or of another `shape` or `dtype`: copying would cast.

    Raises:
        ValueError: naming the tensor, and what it and the destination are.
    """
    if out.is_meta:
        raise ValueError(f"the destination for tensor {name!r} is on the meta device: it has no memory")
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(
            f"tensor {name!r} is {dtype} {list(shape)}, the destination is {out.dtype} {list(out.shape)}"
        )
