# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a set of the model's own tensors."""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType

import attrs
import torch

from weights_core import Target, TensorMeta, WeightSet, WeightSetWrapper, dtypes
from weights_core.tensors import empty, nbytes
from weights_core.weightset import Parts, Slices, normalise
from weights_transformers.recipes import Block, Held, Pieces, Recipe, evaluated, leaves

CONVERTING = 4
"""Threads that convert."""
IN_FLIGHT = 64 << 20
"""Bytes of tensors that may wait to be converted while the next is read."""


class ModelWeights(WeightSetWrapper):
    """A set by the names of a model's tensors, made of the set of a checkpoint as recipes say.

    What is stored as it is needed is read straight to where it belongs. What is converted is streamed,
    and what is computed is made one tensor at a time. Each source is released as soon as `fill` has
    brought the last tensor that needs it.
    """

    def __init__(
        self,
        inner: WeightSet,
        recipes: Mapping[str, Recipe],
        like: Mapping[str, torch.Tensor],
        *,
        map_files: bool = False,
    ) -> None:
        """Map `inner` by `recipes`; `like` has the shape and dtype of each tensor.

        With `map_files` what is converted is taken from where it lies in the files.
        """
        super().__init__(inner)
        self._map_files = map_files
        self._recipes = recipes
        self._metas = MappingProxyType({name: _meta(name, recipes[name], like[name]) for name in recipes})
        self._uses = Counter(name for recipe in recipes.values() for name in _sources(recipe))

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Those of the model's tensors."""
        return self._metas

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Make a tensor of the model; its sources are kept."""
        recipe = self._recipes[name]
        made = evaluated(recipe, functools.partial(self._bring, device=torch.device("cpu")))
        ranges = normalise(slices, tuple(made.shape))
        return made[tuple(slice(r.start, r.start + len(r)) for r in ranges)] if slices else made

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill the model's tensors, and release what they were made of."""
        straight: list[tuple[Target, Pieces]] = []
        rest: list[Target] = []
        for target in targets:
            recipe = self._recipes[target.name]
            if target.slices is None and isinstance(recipe, Pieces):
                straight.append((target, recipe))
            else:
                rest.append(target)
        due = {id(target): len(recipe.blocks) for target, recipe in straight}
        yield from (target for target, recipe in straight if not recipe.blocks)
        jobs = [_Job(target, block) for target, recipe in straight for block in recipe.blocks]
        for job in self._blocks(jobs):
            due[id(job.target)] -= 1
            self._used(job.block.meta.name)
            if not due[id(job.target)]:
                yield job.target
        for target in rest:
            self._compute(target)
            for name in _sources(self._recipes[target.name]):
                self._used(name)
            yield target

    def mapped(self, names: Parts | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Map the tensors that are stored as they are needed, each alone; release what they are of."""
        sources: dict[str, str] = {}
        parts: dict[str, Slices | None] = {}
        for name in self._recipes if names is None else names:
            block = _as_stored(self._recipes[name])
            is_part = isinstance(names, Mapping) and names[name] is not None
            if block is not None and not is_part and self._uses[block.meta.name] == 1:
                sources[block.meta.name], parts[block.meta.name] = name, block.slices
        done: list[str] = []
        for source, tensor in self.inner.mapped(parts):
            done.append(source)
            yield sources[source], tensor
        self.inner.release(done)  # nothing waits for it, as no memory was taken

    def release(self, names: Iterable[str]) -> int:
        """Do nothing: `fill` has released what the tensors were made of."""
        del names
        return 0

    def _compute(self, target: Target) -> None:
        recipe = self._recipes[target.name]
        bring = functools.partial(self._bring, device=target.out.device)
        made = recipe.tensor if isinstance(recipe, Held) else evaluated(recipe, bring)
        if target.slices is not None:
            ranges = normalise(target.slices, tuple(made.shape))
            made = made[tuple(slice(r.start, r.start + len(r)) for r in ranges)]
        if made.shape != target.out.shape:
            raise ValueError(f"tensor {target.name!r} is {list(made.shape)}, need {list(target.out.shape)}")
        target.out.detach().copy_(made)

    def _bring(self, pieces: Pieces, device: torch.device) -> torch.Tensor:
        """Read pieces into memory of their own on `device`."""
        if device.type == "cpu":
            out = empty(pieces.shape, pieces.dtype, offset=_offset(pieces))
        else:
            out = torch.empty(pieces.shape, dtype=pieces.dtype, device=device)
        target = Target("", out)
        for _ in self._blocks([_Job(target, block) for block in pieces.blocks]):
            pass
        return out

    def _blocks(self, jobs: Sequence[_Job]) -> Iterator[_Job]:
        """Bring every block to its region, and yield each as it is done."""
        straight: dict[int, tuple[_Job, Target]] = {}
        converted: dict[str, list[_Job]] = {}
        cut: list[_Job] = []
        for job in jobs:
            if job.block.dtype == job.target.out.dtype:
                target = Target(job.block.meta.name, job.region, job.block.slices)
                straight[id(target)] = job, target
            elif job.block.slices is None:
                converted.setdefault(job.block.meta.name, []).append(job)
            else:
                cut.append(job)
        for target in self.inner.fill([target for _, target in straight.values()]) if straight else ():
            yield straight[id(target)][0]
        if converted:
            yield from self._convert(converted)
        for job in cut:
            job.region.copy_(self.inner.read(job.block.meta.name, job.block.slices))
            yield job

    def _convert(self, jobs: Mapping[str, list[_Job]]) -> Iterator[_Job]:
        """Stream what is stored as another dtype, and convert in threads, a few tensors at a time."""

        def convert(name: str, tensor: torch.Tensor) -> None:
            for job in jobs[name]:
                job.region.copy_(tensor)

        pending: deque[tuple[str, int, Future[None]]] = deque()
        with ThreadPoolExecutor(CONVERTING, "weights-convert") as pool:
            for name, tensor in self._stored(jobs.keys()):
                pending.append((name, tensor.nbytes, pool.submit(convert, name, tensor)))
                del tensor
                while len(pending) > CONVERTING or sum(size for _, size, _ in pending) > IN_FLIGHT:
                    done, _, future = pending.popleft()
                    future.result()
                    yield from jobs[done]
            for done, _, future in pending:
                future.result()
                yield from jobs[done]

    def _stored(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors to convert; the pages of those that are mapped go back with them."""
        left = dict.fromkeys(names)
        if self._map_files:
            for name, tensor in self.inner.mapped(names):
                del left[name]
                item = [(name, tensor)]
                del tensor
                yield item.pop()  # kept here, it would outlive what is made of it
        if left:
            yield from self.inner.stream(left.keys())

    def _used(self, name: str) -> None:
        self._uses[name] -= 1
        if not self._uses[name]:
            self.inner.release([name])


@attrs.frozen(eq=False)
class _Job:
    """A block on its way to a region of a destination."""

    target: Target
    block: Block

    @property
    def region(self) -> torch.Tensor:
        out = self.target.out.detach()
        return out[self.block.region] if self.block.region else out


def _sources(recipe: Recipe) -> Iterator[str]:
    """Yield the source of each block of pieces; of what is computed, each source once."""
    if isinstance(recipe, Pieces):
        yield from (block.meta.name for block in recipe.blocks)
    else:
        yield from {block.meta.name for one in leaves(recipe) for block in one.blocks}


def _as_stored(recipe: Recipe) -> Block | None:
    """Return the block that is the whole tensor, in the dtype that it is stored in, if there is one."""
    if not isinstance(recipe, Pieces) or len(recipe.blocks) != 1:
        return None
    block = recipe.blocks[0]
    fills_all = block.region == tuple(slice(0, size) for size in recipe.shape)
    return block if fills_all and block.dtype == recipe.dtype else None


def _meta(name: str, recipe: Recipe, like: torch.Tensor) -> TensorMeta:
    dtype = dtypes.from_torch(like.dtype)
    shape = dtypes.stored_shape(dtype, tuple(like.shape))
    pieces = recipe if isinstance(recipe, Pieces) and len(recipe.blocks) == 1 else None
    offset = _offset(pieces) if pieces is not None else None
    file = pieces.blocks[0].meta.file if pieces is not None else None
    return TensorMeta(name, shape, dtype, nbytes(like), file, offset)


def _offset(pieces: Pieces) -> int | None:
    """Return where in its file the first byte lies, so that memory can be placed to suit a direct read."""
    block = pieces.blocks[0] if len(pieces.blocks) == 1 else None
    if block is None or block.meta.offset is None or block.dtype != pieces.dtype:
        return None
    if block.slices is None or not pieces.shape:
        return block.meta.offset
    rows = block.meta.torch_shape[0]
    first = block.slices[0].start or 0
    return block.meta.offset + (block.meta.nbytes // rows * first if rows else 0)
