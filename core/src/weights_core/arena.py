# SPDX-License-Identifier: Apache-2.0
"""`Arena`s: a model's tensors in a few pieces of shared memory, and the manifest that says where.

A writer takes memory from an `ArenaWriter`, either for parameters that have none yet or by moving
those that have, and seals it. A reader maps the same memory and gets the tensors as an `ArenaSet`.
Tensors that share memory, ties and views, do so for the reader too: the manifest says where each
tensor lies, and two names may lie at one place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import attrs

from weights_core import dtypes
from weights_core.errors import ArenaError
from weights_core.types import Layout, TensorMeta
from weights_core.weightset import Slices, WeightSet, normalise

if TYPE_CHECKING:
    import torch

SCHEMA = "weights.arena/1"
ALIGNMENT = 256
"""Every region starts at a multiple of this, which is what CUDA's own allocator gives."""
SEGMENT = 1 << 30
SEGMENTS = 64
"""A segment has at least SEGMENT bytes or the model's, and there are about SEGMENTS at most."""
_LIMIT = 1 << 62


class Segment(Protocol):
    """A piece of memory that can be shared: on the host, or on a device."""

    descriptor: int
    """What another process is handed."""

    @property
    def address(self) -> int:
        """Where it is mapped in this process."""
        ...

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes as a flat uint8 tensor that keeps the memory mapped."""
        ...

    def fitted(self, used: int) -> int:
        """Return the bytes it has when it is sealed with `used` bytes in it."""
        ...

    def seal(self, nbytes: int) -> None:
        """Cut to `nbytes` and make it read-only, under the tensors that live there."""
        ...

    def sleep(self) -> None:
        """Give up the memory and the descriptor; the addresses are kept, and must not be touched."""
        ...

    def wake(self, descriptor: int, nbytes: int) -> None:
        """Map the memory of `descriptor` at the addresses that were kept; takes over the descriptor."""
        ...

    def close(self) -> None:
        """Give up the descriptor; the tensors keep their memory."""
        ...


class Shared(Segment, Protocol):
    """A segment that says of itself whether it can be handed on by others than who made it."""

    @property
    def nbytes(self) -> int:
        """Bytes that are mapped."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether its descriptor can be handed on."""
        ...

    @property
    def is_settled(self) -> bool:
        """Whether what is mapped here is, and stays, what the descriptor is of."""
        ...

    def again(self) -> Shared:
        """Return the same memory with a descriptor of its own, to be closed by itself."""
        ...


class Place(NamedTuple):
    """Where one tensor lies: `shape` and `strides` (elements) are torch's, `offset` counts bytes.

    `span` counts the bytes from the first element to the end of the last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    segment: int
    offset: int
    span: int

    @property
    def meta(self) -> TensorMeta:
        """Shape, dtype and bytes, as a set tells them."""
        shape = dtypes.stored_shape(self.dtype, self.shape)
        return TensorMeta(self.name, shape, self.dtype, dtypes.nbytes(self.dtype, shape))


@attrs.frozen
class Manifest:
    """What lies in an arena: the layout, each segment's bytes, each tensor's place.

    `digests` maps names to digests of their bytes, where somebody computed them.
    """

    layout: Layout
    sizes: tuple[int, ...]
    places: Mapping[str, Place]
    digests: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(self.sizes)

    def aliases(self) -> list[tuple[str, ...]]:
        """Return the groups of names that stand for the same elements."""
        groups: dict[object, list[str]] = {}
        for p in self.places.values():
            if p.span:
                groups.setdefault((p.segment, p.offset, p.dtype, p.shape, p.strides), []).append(p.name)
        return [tuple(names) for names in groups.values() if len(names) > 1]

    def dumps(self) -> bytes:
        """Return the manifest as JSON, to go with the descriptors of its segments."""
        rows = [[p.name, p.dtype, p.shape, p.strides, p.segment, p.offset] for p in self.places.values()]
        return json.dumps(
            {
                "schema": SCHEMA,
                "layout": self.layout.value,
                "sizes": self.sizes,
                "tensors": rows,
                "digests": dict(self.digests),
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def loads(cls, raw: bytes) -> Manifest:
        """Read a manifest, and believe nothing in it.

        Raises:
            ArenaError: it is none, or a tensor does not lie in its segment; names the tensor.
        """
        try:
            given: Any = json.loads(raw)
            if given["schema"] != SCHEMA:
                raise ArenaError(f"the manifest is of the schema {given['schema']!r}, need {SCHEMA}")
            sizes = tuple(_count(size) for size in given["sizes"])
            places = {row[0]: _place(row, sizes) for row in given["tensors"]}
            if len(places) != len(given["tensors"]):
                raise ArenaError("the manifest names a tensor twice")
            digests = {str(name): str(digest) for name, digest in given["digests"].items()}
            return cls(Layout(given["layout"]), sizes, places, digests)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as exc:
            raise ArenaError(f"is no manifest of an arena: {type(exc).__name__}: {exc}") from exc


class ArenaWriter:
    """Memory to share, handed out tensor by tensor, and sealed when all of it has been written."""

    def __init__(
        self, create: Callable[[int], Segment], expected: int, existing: Sequence[Shared] = ()
    ) -> None:
        """Prepare; no memory is made yet.

        Args:
            create: makes a segment of at least so many bytes.
            expected: bytes that will be asked for in all, about; sizes the segments.
            existing: full segments that belong to the arena too; taken over.
        """
        self._create = create
        self._expected = expected
        self._segments: list[Segment] = list(existing)
        self._capacity: list[int] = [segment.nbytes for segment in existing]
        self._used: list[int] = [segment.nbytes for segment in existing]

    @property
    def nbytes(self) -> int:
        """Bytes handed out, with what alignment cost."""
        return sum(self._used)

    @property
    def segments(self) -> Sequence[Segment]:
        """The segments so far."""
        return tuple(self._segments)

    def alloc(self, meta: TensorMeta) -> torch.Tensor:
        """Return memory for one tensor: an `Alloc`, as `Engine.materialize` takes it.

        Raises:
            ArenaError: there is no memory.
        """
        return self._region(meta.nbytes).view(dtypes.to_torch(meta.dtype)).reshape(meta.torch_shape)

    def outside(self, tensors: Mapping[str, torch.Tensor]) -> dict[int, int]:
        """Return the storages that `move` would move, by address, and the bytes of each."""
        return {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors.values()
            if not tensor.is_meta and tensor.numel() and self._find(tensor) is None
        }

    def move(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Move what lies elsewhere into the arena; return the bytes moved.

        The tensors stay the objects they are; their memory is copied and then theirs no more, one
        storage at a time, so the peak is one storage above the model. What shares a storage goes
        on sharing.

        Raises:
            ArenaError: a tensor has no memory or cannot be moved, or there is no room.
        """
        import torch

        empty = [name for name, tensor in tensors.items() if tensor.is_meta]
        if empty:
            raise ArenaError(
                f"refusing to share a model that is not filled: {len(empty)} tensors have no memory, "
                f"e.g. {empty[0]!r}"
            )
        opaque = [name for name, tensor in tensors.items() if tensor.layout is not torch.strided]
        if opaque:
            raise ArenaError(
                f"tensor {opaque[0]!r} is {tensors[opaque[0]].layout}: only strided ones are shared"
            )
        by_storage: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if tensor.numel() and self._find(tensor) is None:
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
        total = 0
        while by_storage:
            base, group = by_storage.popitem()
            total += self._move_storage(base, group)
            del group
        return total

    def manifest(self, tensors: Mapping[str, torch.Tensor], layout: Layout) -> Manifest:
        """Return where each of `tensors` lies.

        Raises:
            ArenaError: one does not lie in the arena.
        """
        if not self._segments:
            self._region(0)  # so that a reader knows on which device empty tensors are
        places = {}
        for name, tensor in tensors.items():
            at = self._find(tensor) if tensor.numel() else (0, 0)
            if at is None:
                raise ArenaError(
                    f"tensor {name!r} is not in the memory to be shared: does the engine hand out copies?"
                )
            try:
                dtype = dtypes.from_torch(tensor.dtype)
            except KeyError:
                raise ArenaError(
                    f"tensor {name!r} has dtype {tensor.dtype}, which cannot be shared"
                ) from None
            shape, strides = tuple(tensor.shape), tuple(tensor.stride())
            span = _span(tensor) if tensor.numel() else 0
            places[name] = Place(name, dtype, shape, strides, *at, span)
        sizes = tuple(s.fitted(used) for s, used in zip(self._segments, self._used, strict=True))
        return Manifest(layout, sizes, places)

    def seal(self) -> None:
        """Make all of it read-only.

        Raises:
            ArenaError: something can still write to it.
        """
        for segment, used in zip(self._segments, self._used, strict=True):
            segment.seal(used)

    def close(self) -> None:
        """Give up the descriptors; tensors in the arena keep their memory."""
        for segment in self._segments:
            segment.close()

    def _region(self, nbytes: int) -> torch.Tensor:
        length = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if not self._segments or self._used[-1] + length > self._capacity[-1]:
            largest = max(SEGMENT, self._expected // SEGMENTS)
            capacity = max(length, min(largest, self._expected - self.nbytes), ALIGNMENT)
            self._segments.append(self._create(capacity))
            self._capacity.append(capacity)
            self._used.append(0)
        start = self._used[-1]
        self._used[-1] += length
        return self._segments[-1].tensor(start, nbytes)

    def _find(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        address = tensor.data_ptr()
        for index, (segment, used) in enumerate(zip(self._segments, self._used, strict=True)):
            if segment.address <= address < segment.address + used:
                return index, address - segment.address
        return None

    def _move_storage(self, base: int, group: Mapping[str, torch.Tensor]) -> int:
        import torch

        starts = {id(tensor): tensor.data_ptr() - base for tensor in group.values()}
        first = min(starts.values())
        first -= first % ALIGNMENT
        last = max(starts[id(tensor)] + _span(tensor) for tensor in group.values())
        one = next(iter(group.values()))
        raw = torch.empty(0, dtype=torch.uint8, device=one.device)
        raw.set_(one.untyped_storage(), first, (last - first,), (1,))
        region = self._region(last - first)
        region.copy_(raw)
        del raw, one
        for name, tensor in group.items():
            skip = starts.pop(id(tensor), None)
            if skip is None:
                continue  # another name of a tensor that was moved
            flat = region[skip - first : skip - first + _span(tensor)].view(tensor.dtype)
            try:
                tensor.data = flat.as_strided(tensor.shape, tensor.stride())
            except RuntimeError as exc:
                raise ArenaError(f"tensor {name!r} cannot be moved into shared memory: {exc}") from exc
        return last - first


def padded(metas: Iterable[TensorMeta]) -> int:
    """Return the bytes that tensors take in an arena, each in a region of its own."""
    return sum(-(-meta.nbytes // ALIGNMENT) * ALIGNMENT for meta in metas)


class ArenaSet(WeightSet):
    """The tensors of an arena as a set: views of the shared memory, without a copy.

    A tensor stays valid as long as it lives, also after `close`, for it owns its mapping. Writing to
    one ends the process, unless the memory was mapped as private.
    """

    def __init__(
        self,
        manifest: Manifest,
        segments: Sequence[Segment],
        *,
        provider: str,
        notes: Callable[[], tuple[str, ...]] = tuple,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Offer what `manifest` says lies in `segments`; `on_close` is called once, by `close`."""
        self.layout = manifest.layout
        self.provider = provider
        self._places = manifest.places
        self._metas: Mapping[str, TensorMeta] | None = None
        self._segments: Sequence[Segment] | None = segments
        self._notes = notes
        self._on_close = on_close

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """In the order of the manifest."""
        if self._metas is None:
            self._metas = MappingProxyType({name: place.meta for name, place in self._places.items()})
        return self._metas

    @property
    def notes(self) -> tuple[str, ...]:
        """What the provider has to say of the arena."""
        return self._notes()

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Return a tensor, or a part of it, as a view of the shared memory."""
        place = self._places[name]
        if self._segments is None:
            raise ArenaError("the set was closed: the load it was opened for has ended")
        flat = self._segments[place.segment].tensor(place.offset, place.span)
        tensor = flat.view(dtypes.to_torch(place.dtype)).as_strided(place.shape, place.strides)
        if slices:
            for dim, r in enumerate(normalise(slices, place.shape)):
                tensor = tensor.narrow(dim, r.start, len(r))
        return tensor

    def close(self) -> None:
        """Let go of the segments; the tensors keep their memory."""
        self._segments = None
        self._notes = tuple  # whoever still has the set is not to keep the memory
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()


def _span(tensor: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise ValueError(f"{value!r} is not a count")
    return value


def _place(row: Sequence[Any], sizes: Sequence[int]) -> Place:
    name, dtype, shape, strides, segment, offset = row
    numbers = (*shape, *strides, segment, offset)
    if type(name) is not str or dtype not in dtypes.BITS or len(shape) != len(strides):
        raise ValueError(f"{row[:2]!r} is no tensor")
    if {*map(type, numbers)} != {int} or min(numbers) < 0 or max(numbers) >= _LIMIT:
        raise ValueError(f"tensor {name!r} has a number that is not a count: {row[2:]!r}")
    span = 0
    if 0 not in shape:
        span = 1
        for size, stride in zip(shape, strides, strict=True):
            span += (size - 1) * stride
    span = span * (8 if dtype == "F4" else dtypes.BITS[dtype]) // 8
    if segment >= len(sizes) or offset + span > sizes[segment]:
        raise ArenaError(f"tensor {name!r} does not lie within the shared memory")
    if offset % max(1, dtypes.BITS[dtype] // 8):
        raise ArenaError(f"tensor {name!r} is not aligned")
    return Place(name, dtype, tuple(shape), tuple(strides), segment, offset, span)
