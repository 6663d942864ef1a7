# SPDX-License-Identifier: Apache-2.0
"""Clauses on the sets that sources, owners and wrappers return: every way to read gives the truth."""

from __future__ import annotations

import ctypes
import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from weights_core import dtypes
from weights_core.errors import WeightsError
from weights_core.tensors import as_bytes
from weights_core.testing.checkpoints import random_tensor, zoo
from weights_core.testing.contract.material import contents, few, many
from weights_core.testing.contract.model import Case, clause
from weights_core.testing.engines import FakeEngine
from weights_core.testing.faults import cut_short, removed
from weights_core.testing.recorder import HookRecorder
from weights_core.types import FormatClaim, Role
from weights_core.weightset import Slices, Target

_SETS = (Role.SOURCE, Role.OWNER, Role.WRAPPER)
_WRONG = "the model computes with other numbers than were trained"
_MIB = 1 << 20


@clause(*_SETS, suffers="the engine maps, fuses or transforms weights for another layout than they have")
def delivers_the_layout_it_claimed(case: Case) -> None:
    """The set has one of the layouts that the plugin's claim names."""
    prepared, recorder = case.checkpoint(few()), HookRecorder()
    with case.opened(prepared, observer=recorder) as weights:
        provider = recorder.of(hook="load_weights")[-1].plugin
        claim = recorder.of(provider, "resolve_format")[-1].result
        claimed = claim.layouts if isinstance(claim, FormatClaim) else frozenset()
        case.require(
            weights.layout in claimed,
            f"{provider} claimed {', '.join(sorted(one.value for one in claimed))} and delivered "
            f"{weights.layout.value}",
        )


@clause(*_SETS, suffers="the engine allocates, slices or refuses by a description that is wrong")
def describes_every_tensor_as_it_is(case: Case) -> None:
    """`metas` has every tensor's name, shape, dtype and bytes, and nothing else."""
    prepared = case.checkpoint(_zoo(case))
    with case.opened(prepared) as weights:
        _same_names(case, weights.metas, prepared.truth, "`metas`")
        _same_names(case, list(weights), prepared.truth, "iterating")
        case.require(len(weights) == len(prepared.truth), f"its length is {len(weights)}")
        for name, tensor in prepared.truth.items():
            meta = weights.meta(name)
            due = (tuple(tensor.shape), dtypes.from_torch(tensor.dtype), tensor.nbytes)
            got = (meta.torch_shape, meta.dtype, meta.nbytes)
            case.require(got == due, f"{name!r} is described as {got}, it is {due}")
            case.require(meta.name == name, f"the description of {name!r} is named {meta.name!r}")


@clause(*_SETS, suffers=_WRONG)
def a_stream_yields_every_tensor_once(case: Case) -> None:
    """`stream()` yields every tensor once, bit for bit."""
    prepared = case.checkpoint(_zoo(case))
    with case.opened(prepared) as weights:
        seen: list[str] = []
        for name, tensor in weights.stream():
            seen.append(name)
            case.same(name, tensor, prepared.truth[name], "stream()")
        _same_names(case, seen, prepared.truth, "stream()")


@clause(*_SETS, suffers="a rank that asks for its part waits for all of it, or never gets what it asked for")
def a_stream_of_some_yields_just_those(case: Case) -> None:
    """`stream(names)` yields each of the names once and no others."""
    prepared = case.checkpoint(_zoo(case))
    wanted = sorted(prepared.truth)[::3]
    with case.opened(prepared) as weights:
        for names in (wanted, []):
            seen = []
            for name, tensor in weights.stream(names):
                seen.append(name)
                case.same(name, tensor, prepared.truth[name], "stream(names)")
            _same_names(case, seen, names, "stream(names)")


@clause(*_SETS, suffers=_WRONG)
def reading_on_demand_agrees(case: Case) -> None:
    """`read(name)` and `set[name]` give the tensor, bit for bit, in any order and again."""
    prepared = case.checkpoint(_zoo(case))
    names = list(prepared.truth)
    random.Random(0).shuffle(names)
    with case.opened(prepared) as weights:
        for name in names:
            case.same(name, weights.read(name), prepared.truth[name], "read()")
            case.same(name, weights[name], prepared.truth[name], "reading it again")


@clause(*_SETS, suffers="a tensor-parallel rank holds another rank's part")
def slices_agree(case: Case) -> None:
    """`read(name, slices)` gives the selected part, also of inner dimensions, open, negative or empty."""
    prepared = case.checkpoint(_zoo(case))
    with case.opened(prepared) as weights:
        for name, tensor in prepared.truth.items():
            for slices in _slices(tuple(tensor.shape)):
                case.same(name, weights.read(name, slices), tensor[slices], f"read() with {slices}")


@clause(*_SETS, suffers="a parameter holds other numbers, or its neighbours in memory are overwritten")
def reading_into_memory_agrees(case: Case) -> None:
    """`read_into` fills a destination, contiguous or not, whole or a part, and not a byte around it."""
    prepared = case.checkpoint(_zoo(case))
    with case.opened(prepared) as weights:
        for name, tensor in prepared.truth.items():
            for slices in (None, *_slices(tuple(tensor.shape))):
                due = tensor if slices is None else tensor[slices]
                for kind, out, around in _destinations(due):
                    before = as_bytes(around).clone()
                    weights.read_into(name, out, slices)
                    case.same(name, out, due, f"read_into() a {kind} destination with {slices}")
                    out.copy_(_pattern_like(out))
                    case.require(
                        torch.equal(as_bytes(around), before),
                        f"read_into() a {kind} destination of {name!r} wrote outside of it",
                    )


@clause(*_SETS, suffers="a parameter is used before it has its bytes, or never gets them")
def filling_targets_agrees(case: Case) -> None:
    """`fill` yields every target once, when its bytes are there: whole, sliced, strided, a name twice."""
    prepared = case.checkpoint(_zoo(case))
    targets, due = [], {}
    for name, tensor in prepared.truth.items():
        for slices in (None, None, *_slices(tuple(tensor.shape))[-1:]):
            part = tensor if slices is None else tensor[slices]
            for _, out, _ in _destinations(part):
                target = Target(name, out, slices)
                targets.append(target)
                due[id(target)] = part
    with case.opened(prepared) as weights:
        for target in weights.fill(targets):
            case.require(id(target) in due, f"fill() yielded {target.name!r} twice, or a target not given")
            case.same(target.name, target.out, due.pop(id(target)), f"fill() with {target.slices}")
        case.require(not due, f"fill() left out {len(due)} of {len(targets)} targets")


@clause(*_SETS, suffers=_WRONG)
def what_is_mapped_is_what_is_stored(case: Case) -> None:
    """`mapped` yields some of the names asked for, each once, bit for bit; or the slices asked for."""
    prepared = case.checkpoint(_zoo(case))
    wanted = sorted(prepared.truth)[::2]
    with case.opened(prepared) as weights:
        for names in (None, wanted, []):
            asked = prepared.truth if names is None else names
            seen: list[str] = []
            for name, tensor in weights.mapped(names):
                seen.append(name)
                case.require(name in asked, f"mapped() gave {name!r}, which was not asked for")
                case.same(name, tensor, prepared.truth[name], "mapped()")
            case.require(len(seen) == len(set(seen)), "mapped() gave a tensor more than once")
        for name, whole in prepared.truth.items():
            for slices in _slices(tuple(whole.shape)):
                for _, part in weights.mapped({name: slices}):
                    case.same(name, part, whole[slices], f"mapped() with {slices}")


@clause(*_SETS, suffers="training or patching a model changes the checkpoint, or another model")
def what_is_mapped_is_the_engines_own(case: Case) -> None:
    """What `mapped` yields can be written: no file, later read or other tensor sees it, nor does `close`."""
    prepared = case.checkpoint(_zoo(case) | many())
    files = contents(prepared.path)
    kept: list[tuple[str, torch.Tensor]] = []
    with case.opened(prepared) as weights:
        for _ in range(2):
            for name, tensor in weights.mapped():
                case.same(name, tensor, prepared.truth[name], "mapped(), after others were written to,")
                tensor.copy_(_pattern_like(tensor))
                kept.append((name, tensor))
        for name, due in prepared.truth.items():
            case.same(name, weights.read(name), due, "read(), after what was mapped was written to,")
        weights.release(prepared.truth)
        weights.close()
    for name, tensor in kept:
        case.same(name, tensor, _pattern_like(tensor), "looking, after close(), at what was written to")
    case.require(contents(prepared.path) == files, "writing to what was mapped changed a file")


@clause(*_SETS, suffers="weights are cast or cut without anyone noticing")
def a_destination_that_does_not_fit_is_refused(case: Case) -> None:
    """`read_into` and `fill` raise ValueError for a destination of another shape or dtype, or on meta."""
    prepared = case.checkpoint({"w": random_tensor(4, 6, dtype="F32")})
    wrong = {
        "another dtype": torch.zeros(4, 6, dtype=torch.float64),
        "another shape": torch.zeros(6, 4),
        "a shape that would broadcast": torch.zeros(2, 4, 6),
        "the meta device": torch.zeros(4, 6, device="meta"),
    }
    with case.opened(prepared) as weights:
        for what, out in wrong.items():
            for way in ("read_into", "fill"):
                try:
                    if way == "read_into":
                        weights.read_into("w", out)
                    else:
                        list(weights.fill([Target("w", out)]))
                except ValueError:
                    continue
                case.fail(f"{way}() took a destination of {what}")


@clause(
    *_SETS, suffers="a misspelt name ends in a tensor of something else, or in an error nobody understands"
)
def an_unknown_name_is_a_key_error(case: Case) -> None:
    """`meta` and every way to read or map raise KeyError for a name that is not there."""
    prepared = case.checkpoint(few())
    out = torch.zeros(1)
    with case.opened(prepared) as weights:
        ways: dict[str, Callable[[], object]] = {
            "meta": lambda: weights.meta("nowhere"),
            "read": lambda: weights.read("nowhere"),
            "stream": lambda: list(weights.stream(["nowhere"])),
            "mapped": lambda: list(weights.mapped(["nowhere"])),
            "read_into": lambda: weights.read_into("nowhere", out),
            "fill": lambda: list(weights.fill([Target("nowhere", out)])),
        }
        for way, call in ways.items():
            try:
                call()
            except KeyError:
                continue
            case.fail(f"{way}() of a name that is not there raised no KeyError")
        case.require("nowhere" not in weights, "a name that is not there is `in` the set")


@clause(*_SETS, suffers="a tensor that the engine kept, a tied one say, turns into another one under it")
def a_kept_tensor_never_changes(case: Case) -> None:
    """A tensor that was handed out stays as it is while others are read, and after the set is closed."""
    prepared = case.checkpoint(_zoo(case) | many())
    kept: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def keep(name: str, tensor: torch.Tensor) -> None:
        view = tensor[1:] if tensor.ndim and len(tensor) > 1 else tensor  # a view outlives its tensor
        kept.append((name, view, view.clone()))

    with case.opened(prepared) as weights:
        for name, tensor in weights.stream():
            keep(name, tensor)
        for name in prepared.truth:
            keep(name, weights.read(name))
        for _ in weights.stream():
            pass
        weights.close()
    for name, view, before in kept:
        case.same(name, view, before, "looking again at a kept view")


@clause(
    Role.SOURCE, Role.WRAPPER, suffers="the host holds the whole checkpoint, however the engine consumes it"
)
def what_was_released_is_freed(case: Case) -> None:
    """What was streamed and released takes no memory any more, and is not freed twice."""
    size, count = 8 * _MIB, 10
    prepared = case.checkpoint({f"w{i}": torch.full((size,), i, dtype=torch.uint8) for i in range(count)})
    with case.opened(prepared) as weights:
        if weights.in_place:
            return  # its memory is the model's
        before = _private_memory()
        for name, tensor in weights.stream():
            int(tensor[-1])
            del tensor
            weights.release([name])
        held = _private_memory() - before
        case.require(
            held <= size * count // 4,
            f"{held / _MIB:.0f} MiB are held of {count * size / _MIB:.0f}, all of which were released",
        )
        for name in prepared.truth:
            again = weights.release([name])
            case.require(again == 0, f"releasing {name!r} twice freed {again:,} bytes the second time")


@clause(*_SETS, suffers="progress, tensor-parallel shares and the report's GB/s are made up")
def bytes_read_are_those_delivered(case: Case) -> None:
    """`bytes_read` stays 0, or grows by what was delivered, within 2 %."""
    whole = {f"w{i}": random_tensor(256, 256, dtype="F32", seed=i) for i in range(8)}
    prepared = case.checkpoint(whole)
    with case.opened(prepared) as weights:
        before = weights.bytes_read
        for name, tensor in whole.items():
            weights.read_into(name, torch.empty_like(tensor[:64]), (slice(0, 64),))
        got, due = weights.bytes_read - before, sum(t.nbytes for t in whole.values()) // 4
        case.require(
            got == 0 or abs(got - due) <= due * 0.02 or weights.in_place,
            f"a quarter of each tensor is {due:,} bytes, it counted {got:,}",
        )


@clause(*_SETS, suffers="a thread and a file stay behind for each engine that stops half-way")
def an_abandoned_stream_stops(case: Case) -> None:
    """A stream or fill that is dropped half-way stops, and another can begin."""
    prepared = case.checkpoint(many())
    with case.opened(prepared) as weights:
        with case.nothing_left("after a stream and a fill were dropped half-way"):
            stream = weights.stream()
            next(iter(stream))
            del stream
            out = {name: torch.empty_like(tensor) for name, tensor in prepared.truth.items()}
            fill = weights.fill([Target(name, tensor) for name, tensor in out.items()])
            next(iter(fill))
            del fill
            gc.collect()
        for name, tensor in weights.stream():
            case.same(name, tensor, prepared.truth[name], "a stream after one that was dropped")


@clause(*_SETS, suffers="a tensor read too late holds garbage, or ends the process")
def a_closed_set_gives_no_garbage(case: Case) -> None:
    """Closing twice is fine; a closed set gives right bytes still, or an error, never other bytes."""
    prepared = case.checkpoint(few())
    with case.opened(prepared) as weights:
        weights.close()
        weights.close()
        for name, due in prepared.truth.items():
            try:
                got = weights.read(name)
            except (WeightsError, KeyError):
                continue
            case.same(name, got, due, "reading after close()")


@clause(Role.SOURCE, suffers="a truncated download is served as a model")
def a_damaged_checkpoint_is_an_error(case: Case) -> None:
    """A file that is cut short or missing is an error of ours that names it, at once or when it is read."""
    for damage in (cut_short, removed):
        prepared = case.checkpoint(many())
        file = damage(prepared.path)
        recorder, delivered = HookRecorder(), 0
        error: BaseException | None = None
        engine = FakeEngine(prepared.truth)
        try:
            with case.session(prepared.path, engine, observer=recorder) as session:
                session.resolve()
                weights = session.load()
                if recorder.of(hook="load_weights")[-1].plugin == case.name:
                    delivered = len(dict(weights.stream()))
        except Exception as exc:  # noqa: BLE001 - what was raised is what is looked at
            error = exc
        own = recorder.of(case.name, "load_weights")
        if not own:
            continue  # it had refused
        error = own[-1].error or error
        what = f"with {file.name} {damage.__name__.replace('_', ' ')} it"
        case.require(error is not None, f"{what} delivered {delivered} tensors")
        case.require(isinstance(error, WeightsError), f"{what} raised {type(error).__name__}: {error}")
        case.require(file.name in str(error), f"{what} raised {error}, which does not name the file")


def _zoo(case: Case) -> dict[str, torch.Tensor]:
    return zoo(case.subject.dtypes)


def _same_names(case: Case, got: object, due: object, how: str) -> None:
    names, wanted = list(got), list(due)  # type: ignore[call-overload]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(names) > len(set(names)) else []
    missing, extra = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
    case.require(not twice, f"{how} gave {twice[:3]} more than once")
    case.require(not missing, f"{how} left out {len(missing)} of {len(wanted)}: {missing[:3]}")
    case.require(not extra, f"{how} gave {extra[:3]}, which are not there")


def _slices(shape: tuple[int, ...]) -> list[Slices]:
    if not shape:
        return []
    first = shape[0]
    found: list[Slices] = [(slice(0, first // 2),), (slice(first // 2, None),), (slice(-1, None),)]
    found += [(slice(1, 1),), ()]
    if len(shape) > 1:
        inner = shape[1]
        found += [
            (slice(None), slice(inner // 2, None)),
            (slice(first // 3, first - first // 3), slice(1, inner)),
            (slice(None), slice(0, 0)),
        ]
    if len(shape) > 2:
        found.append((slice(None), slice(None), slice(0, 1)))
    return found


def _pattern_like(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype is torch.bool:
        return torch.zeros(tensor.shape, dtype=torch.bool)
    return torch.full((tensor.nbytes,), 0x3C, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


def _destinations(due: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield a kind, a destination for `due` full of a pattern, and the memory it lies in."""
    whole = _pattern_like(due.contiguous())
    yield "contiguous", whole, whole
    if due.ndim >= 1 and due.numel():
        around = _pattern_like(torch.empty((*due.shape[:-1], due.shape[-1] * 2 + 1), dtype=due.dtype))
        yield "strided", around[..., 1::2], around
        guarded = _pattern_like(torch.empty((due.shape[0] + 2, *due.shape[1:]), dtype=due.dtype))
        yield "guarded", guarded[1:-1], guarded


def _private_memory() -> int:
    """Return the anonymous resident memory of this process, once freed memory has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Anonymous:")).split()[1]) << 10
