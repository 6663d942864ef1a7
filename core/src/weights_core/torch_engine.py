# SPDX-License-Identifier: Apache-2.0
"""`TorchEngine`: load a checkpoint into a plain `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from weights_core import coverage, dtypes
from weights_core.engine import Alloc, Engine
from weights_core.errors import CoverageError, EngineError
from weights_core.tensors import as_bytes, empty, meta_of, named_tensors, nbytes
from weights_core.types import Applied, EngineInfo, Layout, TensorMeta, Topology
from weights_core.weightset import Target, WeightSet

Gather = Callable[[object, float], Sequence[object]]


class TorchEngine(Engine):
    """Brings weights into the parameters and persistent buffers of a module, by state-dict name.

    Parameters on the meta device get memory, and the model receives them only when the last byte
    has arrived: a load that fails leaves the model as it was. Parameters that have memory already
    are written in place. Subclasses, attributes and ties of parameters are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str = "cpu",
        cast: bool = False,
        map_files: bool = False,
        role: str = "main",
        component: str | None = None,
        checkpoint: Path | str | None = None,
        topology: Topology | None = None,
        quantization: str | None = None,
        mutates_after_load: str | None = None,
        reinit: Callable[[nn.Module], None] | None = None,
        gather: Gather | None = None,
    ) -> None:
        """Describe the model to load into.

        Args:
            model: on meta, or with memory, or mixed.
            device: where parameters that are on meta are to live.
            cast: convert weights whose dtype is not the parameter's; else that is an error.
            map_files: on the CPU, let parameters that are on meta lie in private pages of the
                checkpoint's files where they can, without a copy; see `WeightSet.mapped`. The files
                must then not be overwritten in place while the model lives.
            role: `main`, `draft`, …: a draft model is a load of its own.
            component: the folder of a pipeline, e.g. `transformer_2` or `vae`.
            checkpoint: this engine's own checkpoint, over the one `load` is given.
            topology: the ranks that load together.
            quantization: the scheme, if any; part of the weights' identity.
            mutates_after_load: what will change the weights after the load, if anything.
            reinit: brings a model that was written in place back, so that another provider may
                be tried after one that failed half-way.
            gather: returns every rank's value, by rank; see `Engine.gather`.

        Raises:
            EngineError: a buffer that no checkpoint holds is on the meta device, a parameter is not
                a plain tensor (a DTensor, say), or there are several ranks and no `gather`.
        """
        if not isinstance(model, nn.Module):
            raise EngineError(f"TorchEngine takes a torch.nn.Module, not {model!r}")
        self.model = model
        self._device = torch.device(device)
        self._cast = cast
        self._map_files = map_files
        self._checkpoint = Path(checkpoint) if checkpoint is not None else None
        self._reinit = reinit
        self._gather = gather
        self._originals: dict[_Place, torch.Tensor] | None = None
        self._written_in_place = False
        tensors = named_tensors(model)
        self._had_memory = any(not t.is_meta for t in tensors.values())
        self._allocated = 0
        _refuse_what_cannot_be_written(model, tensors)
        if gather is None and topology is not None and topology.world.size > 1:
            raise EngineError("the topology has several ranks: they need gather= to agree on the load")
        self._info = EngineInfo(
            name="torch",
            version=torch.__version__,
            model=type(model).__qualname__,
            dtype=_common_dtype(tensors),
            quantization=quantization,
            device=str(self._device),
            topology=topology or Topology(),
            role=role,
            component=component,
            accepts={Layout.CHECKPOINT, Layout.SHARDED},
            shareable={Layout.SHARDED: "names, shapes and bytes are the state dict's"},
            mutates_after_load=mutates_after_load,
        )

    @property
    def info(self) -> EngineInfo:
        """Name `torch`, the class of the model, its dtype if it has only one."""
        return self._info

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint given to the constructor."""
        return self._checkpoint

    @property
    def anchor(self) -> object:
        """The model: the lease ends with it, not with this adapter."""
        return self.model

    def expected(self, layout: Layout) -> Mapping[str, TensorMeta]:
        """Return the state dict's entries; every layout has the same names and shapes here."""
        del layout
        return {name: meta_of(name, tensor) for name, tensor in named_tensors(self.model).items()}

    def apply(self, weights: WeightSet) -> Applied:
        """Write every tensor of the model from `weights`, and give meta parameters memory.

        Raises:
            CoverageError: before anything is read: tensors are missing, or shapes or dtypes
                differ. After reading: two names of one tied parameter hold different bytes.
        """
        return self._take(weights, may_cast=True)

    def _take(self, weights: WeightSet, *, may_cast: bool) -> Applied:
        tensors, metas = named_tensors(self.model), weights.metas
        ties = _ties(tensors)
        self._check_fit(tensors, ties, metas, may_cast=may_cast)
        staged = self._mapped(tensors, ties, weights)
        targets, twins = [], []
        for group in ties:
            given = [name for name in group if name in metas]
            tensor = tensors[group[0]]
            out = staged.get(id(tensor))
            if out is None:
                out = self._staged(tensor, staged, metas[given[0]].offset)
                targets.append(Target(given[0], out))
            twins += [(name, out) for name in given[1:]]
        ours = {id(p.get()) for p, t in (self._originals or {}).items() if t.is_meta}
        self._written_in_place = self._written_in_place or any(
            not tensors[group[0]].is_meta and id(tensors[group[0]]) not in ours for group in ties
        )
        for name in self._fill(weights, targets):
            weights.release([name])
        for name, out in twins:
            self._check_twin(name, out, weights)
        self._commit({place: staged[id(t)] for place, t in _places(self.model) if id(t) in staged})
        unused = tuple(name for name in metas if name not in tensors)
        host_bytes = sum(nbytes(t) for t in staged.values() if t.device.type == "cpu") + self._allocated
        return Applied(written=tensors.keys(), unused=unused, host_bytes=host_bytes)

    def unused(self, weights: WeightSet) -> Sequence[str]:
        """Return the names that are no tensor of the model."""
        tensors = named_tensors(self.model)
        return [name for name in weights if name not in tensors]

    def bind(self, weights: WeightSet) -> Applied:
        """Make the set's own tensors the parameters, without a copy; or fill the parameters, if it says so.

        Raises:
            CoverageError: a tensor is missing, is not expected, or differs in shape, dtype or device,
                or two names of one tied parameter hold different bytes.
        """
        tensors, metas = named_tensors(self.model), weights.metas
        ties = _ties(tensors)
        unexpected = [name for name in metas if name not in tensors]
        if unexpected:
            raise CoverageError(f"unexpected {coverage.listed(unexpected)}", unexpected=unexpected)
        if weights.fills:
            return self._take(weights, may_cast=False)
        self._check_fit(tensors, ties, metas, may_cast=False)
        firsts = {next(name for name in group if name in metas): group for group in ties}
        given = {
            id(tensors[name]): tensor for first, tensor in weights.stream(firsts) for name in firsts[first]
        }
        for group in ties:
            first, *others = [name for name in group if name in metas]
            self._check_device(first, tensors[first], given[id(tensors[first])])
            for name in others:
                self._check_twin(name, given[id(tensors[first])], weights)
        self._commit({place: given[id(t)] for place, t in _places(self.model) if id(t) in given})
        return Applied(written=tensors.keys(), unused=())

    def materialize(self, alloc: Alloc) -> int:
        """Give each meta parameter memory from `alloc`, ties once; return the bytes."""
        tensors = named_tensors(self.model)
        given = {
            id(tensors[group[0]]): alloc(meta_of(group[0], tensors[group[0]]))
            for group in _ties(tensors)
            if tensors[group[0]].is_meta
        }
        self._commit({place: given[id(t)] for place, t in _places(self.model) if id(t) in given})
        size = sum(nbytes(tensor) for tensor in given.values())
        self._allocated += sum(nbytes(t) for t in given.values() if t.device.type == "cpu")
        return size

    def loaded(self) -> None:
        """Let go of what the load replaced: from now on the model is one that has memory."""
        self._originals = None
        self._allocated = 0
        self._written_in_place = False
        self._had_memory = True

    def tensors(self, layout: Layout) -> Mapping[str, torch.Tensor]:
        """Return parameters and persistent buffers by state-dict name, ties included."""
        del layout
        return named_tensors(self.model)

    def untouched(self) -> bool:
        """Whether nothing was written in place and no parameter was replaced."""
        return not self._written_in_place and self._originals is None

    def reinit(self) -> None:
        """Put replaced parameters back; what was written in place takes the `reinit` callable.

        Raises:
            EngineError: the model had memory, which may have been written to, and no `reinit` was given.
        """
        only_replaced = self._originals is not None and not self._written_in_place
        if self._had_memory and self._reinit is None and not only_replaced:
            raise EngineError("the model may be written in place, and TorchEngine was given no reinit=")
        for place, tensor in (self._originals or {}).items():
            place.put(tensor)
        self._originals = None
        self._allocated = 0
        if self._had_memory and self._reinit is not None:
            try:
                self._reinit(self.model)
            except Exception as exc:  # the caller's function may raise anything
                raise EngineError(f"reinit= failed: {type(exc).__name__}: {exc}") from exc
        self._written_in_place = False

    def gather(self, value: object, timeout: float) -> Sequence[object]:
        """Call the `gather` given to the constructor; alone, return this rank's value."""
        return [value] if self._gather is None else self._gather(value, timeout)

    def _check_fit(
        self,
        tensors: Mapping[str, torch.Tensor],
        ties: Iterable[Sequence[str]],
        metas: Mapping[str, TensorMeta],
        *,
        may_cast: bool = True,
    ) -> None:
        missing = [group[0] for group in ties if not any(name in metas for name in group)]
        mismatched: dict[str, str] = {}
        for name in (n for n in tensors if n in metas):
            have, need = metas[name], meta_of(name, tensors[name])
            if have.shape != need.shape:
                mismatched[name] = f"checkpoint has shape {list(have.shape)}, model {list(need.shape)}"
            elif have.dtype != need.dtype and not (self._cast and may_cast and _castable(have, need)):
                mismatched[name] = f"checkpoint has dtype {have.dtype}, model {need.dtype}" + (
                    "; cast=True converts" if may_cast and _castable(have, need) else ""
                )
        if not missing and not mismatched:
            return
        others = [name for name in metas if name not in tensors]
        parts = [f"missing {coverage.listed(missing)}"] if missing else []
        parts += [f"the checkpoint has {coverage.listed(others)}"] if missing and others else []
        parts += _grouped(mismatched)
        raise CoverageError(
            "the checkpoint does not fit the model: " + "; ".join(parts),
            missing=missing,
            mismatched=mismatched,
        )

    def _mapped(
        self, tensors: Mapping[str, torch.Tensor], ties: Iterable[Sequence[str]], weights: WeightSet
    ) -> dict[int, torch.Tensor]:
        """Return what parameters become without a copy, by the parameter's id."""
        if not self._map_files or self._device.type != "cpu":
            return {}
        metas = weights.metas
        wanted: dict[str, int] = {}
        for group in ties:
            first, tensor = next(name for name in group if name in metas), tensors[group[0]]
            stored = dtypes.to_torch(metas[first].dtype)
            if tensor.is_meta and tensor.is_contiguous() and tensor.dtype == stored:
                wanted[first] = id(tensor)
        found = dict(weights.mapped(wanted.keys()))
        weights.release(found)
        return {wanted[name]: tensor for name, tensor in found.items()}

    def _staged(
        self, tensor: torch.Tensor, staged: dict[int, torch.Tensor], offset: int | None
    ) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor.detach()
        if self._device.type == "cpu" and tensor.is_contiguous():
            staged[id(tensor)] = empty(tuple(tensor.shape), tensor.dtype, offset=offset)
        else:
            staged[id(tensor)] = torch.empty_like(tensor, device=self._device, requires_grad=False)
        return staged[id(tensor)]

    def _fill(self, weights: WeightSet, targets: Iterable[Target]) -> Iterator[str]:
        straight, cast, metas = [], {}, weights.metas
        for target in targets:
            if dtypes.to_torch(metas[target.name].dtype) == target.out.dtype:
                straight.append(target)
            else:
                cast[target.name] = target.out
        for target in weights.fill(straight):
            yield target.name
        for name, tensor in weights.stream(cast) if cast else ():
            cast[name].copy_(tensor)
            yield name

    def _check_device(self, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
        due = self._device if old.is_meta else old.device
        if new.device.type != due.type:
            raise CoverageError(
                f"tensor {name!r} lies on {new.device}, the model on {due}",
                mismatched={name: f"on {new.device}, need {due}"},
            )

    def _check_twin(self, name: str, out: torch.Tensor, weights: WeightSet) -> None:
        twin = weights[name].to(device=out.device, dtype=out.dtype)
        same = _place_of(twin) == _place_of(out) or torch.equal(as_bytes(twin), as_bytes(out))
        weights.release([name])
        if not same:
            raise CoverageError(
                f"tensor {name!r} is tied to another in the model, but differs from it in the checkpoint",
                mismatched={name: "differs from the tensor it is tied to"},
            )

    def _commit(self, replacements: Mapping[_Place, torch.Tensor]) -> None:
        made: dict[int, torch.Tensor] = {}
        originals: dict[_Place, torch.Tensor] = {}
        for place, data in replacements.items():
            old = place.get()
            originals[place] = old
            place.put(made.setdefault(id(old), _like(old, data)))
        if originals:
            self._originals = originals | (self._originals or {})


class _Place:
    """Where a tensor hangs in the model: a module and a name in its parameters or buffers."""

    def __init__(self, module: nn.Module, name: str, *, is_buffer: bool) -> None:
        self._slots: dict[str, torch.Tensor] = module._buffers if is_buffer else module._parameters  # type: ignore[assignment]
        self._name = name

    def get(self) -> torch.Tensor:
        return self._slots[self._name]

    def put(self, tensor: torch.Tensor) -> None:
        self._slots[self._name] = tensor


def _places(model: nn.Module) -> Iterator[tuple[_Place, torch.Tensor]]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield _Place(module, name, is_buffer=False), parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield _Place(module, name, is_buffer=True), buffer


def _like(old: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Return `data` as a tensor of the same class, flags and attributes as `old`."""
    if type(old) is torch.Tensor:
        new = data.view_as(data) if vars(old) else data  # attributes go on a tensor of our own
    else:
        new = torch.Tensor._make_subclass(type(old), data, old.requires_grad)
    vars(new).update(vars(old))
    return new


def _grouped(mismatched: Mapping[str, str]) -> list[str]:
    """Say once what several tensors have in common."""
    by_reason: dict[str, list[str]] = {}
    for name, why in mismatched.items():
        by_reason.setdefault(why, []).append(name)
    parts = [
        f"{names[0]}: {why}" if len(names) == 1 else f"{coverage.listed(names)}: {why}"
        for why, names in by_reason.items()
    ]
    more = len(parts) - coverage.SHOWN
    return [*parts[: coverage.SHOWN], f"and {more} other kinds of mismatch"] if more > 0 else parts


def _castable(have: TensorMeta, need: TensorMeta) -> bool:
    """Whether converting keeps what the numbers mean: not between kinds, nor for what is quantised."""
    if min(dtypes.BITS[have.dtype], dtypes.BITS[need.dtype]) < 8 or "F8" in have.dtype + need.dtype:
        return False
    kinds = [dtypes.to_torch(meta.dtype) for meta in (have, need)]
    return kinds[0].is_floating_point == kinds[1].is_floating_point and not any(k.is_complex for k in kinds)


def _ties(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Group the names that stand for the same memory."""
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        key: object = id(tensor)
        if not tensor.is_meta and tensor.numel():
            key = _place_of(tensor)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _place_of(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _common_dtype(tensors: Mapping[str, torch.Tensor]) -> str | None:
    one_of_each = {t.dtype: (name, t) for name, t in tensors.items() if isinstance(t, nn.Parameter)}
    found = {meta_of(*named).dtype for named in one_of_each.values()}
    return found.pop() if len(found) == 1 else None


def _refuse_what_cannot_be_written(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    lost = [name for name, b in model.named_buffers() if b.is_meta and name not in tensors]
    if lost:
        raise EngineError(
            f"non-persistent buffers are on the meta device, and no checkpoint holds them "
            f"({coverage.listed(lost)}): build the modules that compute them on a real device"
        )
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of tensors made of other tensors
            raise EngineError(f"{name!r} is a {type(tensor).__name__}: TorchEngine writes plain tensors only")
