# SPDX-License-Identifier: Apache-2.0
"""Apply a plan to a checkpoint: which bytes of which tensors make up each rank's tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from weights_core import TensorMeta, dtypes
from weights_core.coverage import listed
from weights_presharded.plan import Number, Plan, PlanError, Rule, Take

Span = tuple[int, int]
"""From and to, in bytes."""


@attrs.frozen
class Part:
    """What one source gives to a tensor: of each of its `rows`, the spans that each rank gets.

    A row is `row_bytes` long; a source that is not cut, or in its first dimension, is one row.
    """

    source: str
    rows: int
    row_bytes: int
    spans: tuple[tuple[Span, ...], ...]

    def nbytes(self, rank: int) -> int:
        """Return the bytes that a rank gets."""
        return self.rows * sum(end - begin for begin, end in self.spans[rank])


@attrs.frozen
class Output:
    """One tensor of every rank, of equal shapes, and the parts that it consists of, in order."""

    name: str
    ties: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of it on one rank."""
        return dtypes.nbytes(self.dtype, self.shape)


class Config:
    """The checkpoint's `config.json`, for numbers that a plan names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[str, Any] | None = None

    def number(self, given: Number, where: str) -> int:
        """Return a count, looked up if it is a name; dots lead into tables.

        Raises:
            PlanError: there is no such number.
        """
        if isinstance(given, int):
            return given
        found: Any = self.values
        for part in given.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if type(found) is not int or found < 1:
            raise PlanError(f"{where}: {self.path} has no number {given!r} (it says {found!r})")
        return found

    @property
    def values(self) -> Mapping[str, Any]:
        """What the file says; nothing if there is none.

        Raises:
            PlanError: it is not JSON.
        """
        if self._read is None:
            try:
                read = json.loads(self.path.read_bytes())
            except FileNotFoundError:
                read = {}
            except (OSError, ValueError, RecursionError) as exc:
                raise PlanError(f"{self.path} cannot be read: {exc}") from exc
            self._read = read if isinstance(read, dict) else {}
        return self._read


def outputs(
    plan: Plan,
    metas: Mapping[str, TensorMeta],
    size: int,
    config: Config,
    tied: Sequence[tuple[str, ...]] = (),
) -> list[Output]:
    """Return the tensors of each of `size` ranks, in the order in which their sources are stored.

    Args:
        plan: what is to become of them.
        metas: the tensors of the checkpoint, in storage order.
        size: how many ranks.
        config: for numbers that the plan names.
        tied: groups of names that the checkpoint itself says are one tensor.

    Raises:
        PlanError: the plan does not fit the checkpoint or the number of ranks; names the tensor.
    """
    if size < 1:
        raise PlanError(f"a checkpoint is cut for one rank or more, not for {size}")
    groups, left = _assign(plan, metas)
    if left:
        raise PlanError(
            f"{plan.origin} says nothing of {listed(left)}; a last rule with match = '**' keeps what is "
            "left whole on every rank"
        )
    cutting = _Cutting(size, config)
    made = [_output(group, metas, cutting) for group in groups.values() if not group.rule.drop]
    if not made:
        raise PlanError(f"{plan.origin} leaves nothing of the checkpoint")
    order = {name: index for index, name in enumerate(metas)}
    made.sort(key=lambda output: min(order[part.source] for part in output.parts))
    made = _with_ties(made, tied)
    _check_names(made, plan)
    return made


@attrs.define
class _Group:
    """The sources that one rule makes one tensor of, by take and number."""

    rule: Rule
    wilds: tuple[str, ...]
    sources: dict[tuple[int, int], str] = attrs.field(factory=dict)


def _assign(plan: Plan, metas: Mapping[str, TensorMeta]) -> tuple[dict[object, _Group], list[str]]:
    groups: dict[object, _Group] = {}
    left = []
    for name in metas:
        for number, rule in enumerate(plan.rules):
            take, wilds = _taken(rule, name)
            if wilds is None:
                continue
            index = 0
            if rule.stack:
                *kept, last = wilds
                if not (last.isascii() and last.isdigit()):
                    raise PlanError(f"{rule.label} stacks by number, and {last!r} of {name!r} is none")
                wilds, index = tuple(kept), int(last)
            group = groups.setdefault((number, wilds), _Group(rule, wilds))
            if (index, take) in group.sources:
                raise PlanError(
                    f"{rule.label} takes both {group.sources[index, take]!r} and {name!r} for one place"
                )
            group.sources[index, take] = name
            break
        else:
            left.append(name)
    return groups, left


def _taken(rule: Rule, name: str) -> tuple[int, tuple[str, ...] | None]:
    for index, take in enumerate(rule.takes):
        wilds = take.match.match(name)
        if wilds is not None:
            return index, wilds
    return 0, None


def _output(group: _Group, metas: Mapping[str, TensorMeta], cutting: _Cutting) -> Output:
    rule = group.rule
    count = 1 + max(index for index, _ in group.sources)
    if count * len(rule.takes) > 2 * len(metas):
        raise PlanError(f"{rule.label} would stack {count} tensors, the checkpoint has {len(metas)} in all")
    due = [(index, take) for index in range(count) for take in range(len(rule.takes))]
    absent = [place for place in due if place not in group.sources]
    if absent:
        index, take = absent[0]
        wilds = (*group.wilds, str(index)) if rule.stack else group.wilds
        raise PlanError(f"{rule.label} needs {rule.takes[take].match.filled(wilds)!r}, which is not there")
    parts, shapes = [], []
    first = metas[group.sources[due[0]]]
    for index, take in due:
        meta = metas[group.sources[index, take]]
        if meta.dtype != first.dtype:
            raise PlanError(
                f"{rule.label} would join {first.dtype} {first.name!r}, {meta.dtype} {meta.name!r}"
            )
        part, shape = cutting.part(meta, rule, rule.takes[take])
        parts.append(part)
        shapes.append(shape)
    joined = [_joined(rule, shapes[n : n + len(rule.takes)]) for n in range(0, len(shapes), len(rule.takes))]
    if len(set(joined)) != 1:
        raise PlanError(f"{rule.label} would stack tensors of other shapes, {joined[0]} and others")
    shape = (count, *joined[0]) if rule.stack else joined[0]
    own, *ties = [name.filled(group.wilds) for name in rule.names] or [first.name]
    return Output(own, tuple(ties), first.dtype, shape, tuple(parts))


def _joined(rule: Rule, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if len(shapes) == 1:
        return shapes[0]
    if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
        raise PlanError(f"{rule.label} would join tensors of the shapes {', '.join(map(str, shapes))}")
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


class _Cutting:
    """Cuts tensors for a number of ranks; those of one shape and rule share what was found."""

    def __init__(self, size: int, config: Config) -> None:
        self._size = size
        self._config = config
        self._found: dict[object, tuple[Part, tuple[int, ...]]] = {}

    def part(self, meta: TensorMeta, rule: Rule, take: Take) -> tuple[Part, tuple[int, ...]]:
        """Return what a source gives to each rank, and the shape of that."""
        key = (meta.shape, meta.dtype, rule.cut, take)
        if key not in self._found:
            self._found[key] = self._cut(meta, rule, take)
        part, shape = self._found[key]
        return attrs.evolve(part, source=meta.name), shape

    def _cut(self, meta: TensorMeta, rule: Rule, take: Take) -> tuple[Part, tuple[int, ...]]:
        if rule.cut is None:
            whole = ((0, meta.nbytes),)
            return Part(meta.name, 1, meta.nbytes, (whole,) * self._size), meta.shape
        dim = rule.cut
        if dim >= len(meta.shape):
            raise PlanError(
                f"{rule.label} cuts dimension {dim} of {meta.name!r}, which is {list(meta.shape)}"
            )
        spans, length = self._spans(meta, dim, take, f"tensor {meta.name!r}")
        bits = dtypes.BITS[meta.dtype] * math.prod(meta.shape[dim + 1 :])
        if any(edge * bits % 8 for rank in spans for span in rank for edge in span):
            raise PlanError(f"{rule.label} cuts {meta.name!r} ({meta.dtype}) within a byte")
        in_bytes = tuple(tuple((begin * bits // 8, end * bits // 8) for begin, end in rank) for rank in spans)
        part = Part(meta.name, math.prod(meta.shape[:dim]), meta.shape[dim] * bits // 8, in_bytes)
        return part, (*meta.shape[:dim], length, *meta.shape[dim + 1 :])

    def _spans(self, meta: TensorMeta, dim: int, take: Take, where: str) -> tuple[list[list[Span]], int]:
        """Return the parts of a dimension that each rank gets, and their length, which is equal."""
        sections = [self._config.number(section, where) for section in take.sections] or [1]
        total = meta.shape[dim]
        if total % sum(sections):
            raise PlanError(f"{where}: {total} in dimension {dim} are not {sum(sections)} equal parts")
        unit = total // sum(sections)
        heads = [self._config.number(number, where) for number in take.heads] or [0] * len(sections)
        spans: list[list[Span]] = [[] for _ in range(self._size)]
        start = 0
        for section, count in zip(sections, heads, strict=True):
            length = section * unit
            for rank in range(self._size):
                begin, end = _share(length, count, self._size, rank, f"{where}, dimension {dim}")
                spans[rank].append((start + begin, start + end))
            start += length
        return spans, sum(end - begin for begin, end in spans[0])


def _share(length: int, heads: int, size: int, rank: int, where: str) -> Span:
    if not heads:
        if length % size:
            raise PlanError(f"{where}: {length} can't be cut into {size} equal parts")
        return rank * length // size, (rank + 1) * length // size
    if length % heads:
        raise PlanError(f"{where}: {length} are not {heads} heads")
    if max(heads, size) % min(heads, size):
        raise PlanError(f"{where}: {heads} heads are neither shared out nor repeated evenly by {size} ranks")
    head = length // heads
    if heads >= size:
        return rank * heads // size * head, (rank + 1) * heads // size * head
    own = rank * heads // size
    return own * head, (own + 1) * head


def _with_ties(made: Sequence[Output], tied: Sequence[tuple[str, ...]]) -> list[Output]:
    """Store once what the checkpoint says is one tensor, where it is treated alike."""
    first: dict[object, int] = {}
    alike = {name: group for group in tied for name in group}
    found: list[Output] = []
    for output in made:
        (part, *more) = output.parts
        group = alike.get(part.source)
        key = (group, part.rows, part.row_bytes, part.spans, output.shape)
        if group is None or more:
            found.append(output)
        elif key in first:
            index = first[key]
            found[index] = attrs.evolve(found[index], ties=(*found[index].ties, output.name, *output.ties))
        else:
            first[key] = len(found)
            found.append(output)
    return found


def _check_names(made: Sequence[Output], plan: Plan) -> None:
    seen: set[str] = set()
    for output in made:
        for name in (output.name, *output.ties):
            if name in seen:
                raise PlanError(f"{plan.origin} gives two tensors the name {name!r}")
            seen.add(name)
