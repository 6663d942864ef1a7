# SPDX-License-Identifier: Apache-2.0
"""A vLLM model as an engine: one rank's parameters, before vLLM's post-load."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weights_core import Applied, Engine, EngineInfo, Layout, TensorMeta, WeightSet, coverage
from weights_core.engine import Alloc
from weights_core.errors import CoverageError, EngineError
from weights_core.tensors import meta_of, nbytes
from weights_core.weightset import Target
from weights_vllm.parameters import give_memory, move
from weights_vllm.state import beside_tensors
from weights_vllm.stream import consumed

Gather = Callable[[object, float], Sequence[object]]

_OF_THE_TARGET = {"has_own_embed_tokens": "embed_tokens", "has_own_lm_head": "lm_head"}
"""What a draft's model says it has no weights of its own for, and the module that it would be."""


class VllmEngine(Engine):
    """Brings weights into the parameters of a model that vLLM has made.

    CHECKPOINT weights go through the model's own `load_weights`, which renames, fuses and slices.
    SHARDED weights are its parameters, and copies of its persistent buffers, before post-load.
    The model is made by vLLM after the load was planned: `model` is set then.
    """

    def __init__(self, info: EngineInfo, checkpoint: Path, gather: Gather, *, map_files: bool = True) -> None:
        """Make an engine; with `map_files` parameters on the host are copied out of the files' pages."""
        self._info = info
        self._map_files = map_files
        self._checkpoint = checkpoint
        self._gather = gather
        self._model: nn.Module | None = None
        self._originals: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._buffers_made: dict[str, torch.Tensor] = {}
        self._before: Mapping[str, object] | None = None
        self._touched = False
        self._transformed = False
        self.unshareable: str | None = None
        """Why the parameters are not all that the last load left in the model, if they are not."""

    @property
    def info(self) -> EngineInfo:
        """What vLLM's configuration says."""
        return self._info

    @property
    def checkpoint(self) -> Path:
        """The folder that vLLM's model configuration names: a draft's own, for a draft."""
        return self._checkpoint

    @property
    def anchor(self) -> object:
        """The model: the lease ends with it."""
        return self if self._model is None else self._model

    @property
    def model(self) -> nn.Module:
        """The model, once vLLM has made it.

        Raises:
            EngineError: it has not yet.
        """
        if self._model is None:
            raise EngineError("vLLM has not made the model yet")
        return self._model

    @model.setter
    def model(self, made: nn.Module) -> None:
        self._model = made

    def expected(self, layout: Layout) -> Mapping[str, TensorMeta]:
        """Return the parameters, ties once; what is shared has the persistent buffers too."""
        tensors = self._parameters()
        if layout is not Layout.CHECKPOINT:
            tensors |= _persistent_buffers(self.model)
        return {name: meta_of(name, tensor) for name, tensor in tensors.items()}

    def apply(self, weights: WeightSet) -> Applied:
        """Let the model load from a stream, and believe what it says it loaded.

        Raises:
            EngineError: its class does not say, or reads weights that are not in the checkpoint's folder.
        """
        model, parameters = self.model, self._parameters()
        load = _loader_of(model)
        if self._before is None:
            self._before = beside_tensors(model)
        self._touched = True
        give_memory(parameters)
        on_host = all(parameter.device.type == "cpu" for parameter in parameters.values())
        loaded = load(consumed(weights, mapped=self._map_files and on_host))
        if loaded is None:
            raise EngineError(
                f"{self._info.model} does not say which parameters it loaded, so whether it is complete "
                "cannot be known: load it with vLLM's own --load-format auto"
            )
        parameters = self._parameters()  # a quantised load may have made others
        written = parameters.keys() & loaded
        self.unshareable = self._what_else(set(loaded) - written)
        defaulted = self._defaulted(parameters.keys() - written)
        host = sum(nbytes(p) for p in parameters.values() if p.device.type == "cpu")
        return Applied(written=written, defaulted=defaulted, unused=None, host_bytes=host)

    def bind(self, weights: WeightSet) -> Applied:
        """Make the set's tensors the parameters, without a copy; buffers are copied.

        A set that says it `fills` brings its tensors into the parameters' own memory instead.

        Raises:
            CoverageError: a tensor is missing, is not expected, or differs in shape, dtype or device.
            EngineError: the layout is FINAL: what vLLM makes in post-load is not in the parameters.
        """
        if weights.layout is not Layout.SHARDED:
            raise EngineError(_not_final(self._info.device))
        parameters, buffers = self._parameters(), _persistent_buffers(self.model)
        named = self._fitting(weights.metas, buffers if weights.fills else ())
        self._buffers_made = self._buffers_made or _copies(buffers)
        if weights.fills:
            return self._fill(weights, named, parameters | buffers)
        read = dict(weights.stream(named.values()))
        given = {name: read[theirs] for name, theirs in named.items()}
        for name, tensor in given.items():
            mine = parameters[name] if name in parameters else buffers[name]
            if tensor.device != mine.device:
                raise CoverageError(
                    f"tensor {name!r} lies on {tensor.device}, the model on {mine.device}",
                    mismatched={name: f"on {tensor.device}, need {mine.device}"},
                )
        self._touched = True
        self._keep_originals(parameters)
        for name, parameter in parameters.items():
            parameter.data = given[name]
        for name, buffer in buffers.items():
            buffer.copy_(given[name])
        return Applied(written=given.keys(), unused=())

    def materialize(self, alloc: Alloc) -> int:
        """Move every parameter, before it is filled, to memory from `alloc`; return the bytes."""
        parameters = self._parameters()
        self._keep_originals(parameters)
        return move(parameters, alloc)

    def tensors(self, layout: Layout) -> Mapping[str, torch.Tensor]:
        """Return the parameters, and copies of the persistent buffers, before post-load.

        Raises:
            EngineError: the layout is FINAL, or loading left more in the model than that.
        """
        if layout is not Layout.SHARDED:
            raise EngineError(_not_final(self._info.device))
        if self.unshareable is not None:
            raise EngineError(f"{self._info.model} cannot be shared: {self.unshareable}")
        if not self._buffers:
            self._buffers = _copies(_persistent_buffers(self.model))
        return self._parameters() | self._buffers

    def untouched(self) -> bool:
        """Whether nothing was loaded, and the parameters lie where vLLM has put them."""
        return not self._touched and not self._originals

    def reinit(self) -> None:
        """Put the parameters back where they lay, to be filled again.

        Raises:
            EngineError: the model is quantised: what was loaded may have been transformed already.
        """
        if self._transformed:
            raise EngineError("vLLM's post-load had begun: make the model anew")
        if self._touched and self._info.quantization is not None:
            raise EngineError(f"a {self._info.quantization} model that was written to cannot be filled again")
        changed = self._what_else(set())
        if changed is not None:
            raise EngineError(f"a model that was written to cannot be filled again: {changed}")
        parameters = self._parameters()
        for name, data in self._originals.items():
            parameters[name].data = data
        for name, made in self._buffers_made.items():
            self.model.get_buffer(name).copy_(made)
        self._originals = {}
        self._buffers = {}
        self._touched = False

    def transforms(self) -> None:
        """Note that vLLM's post-load begins: from here on there is no way back."""
        self._transformed = True

    def loaded(self) -> None:
        """Let go of what the load replaced."""
        self._originals = {}
        self._buffers = {}
        self._buffers_made = {}

    def gather(self, value: object, timeout: float) -> Sequence[object]:
        """Ask the other ranks of vLLM's world group."""
        return self._gather(value, timeout)

    def _fill(
        self, weights: WeightSet, named: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
    ) -> Applied:
        self._touched = True
        give_memory(tensors)
        ours = {theirs: name for name, theirs in named.items()}
        spare = weights.metas.keys() - ours
        written = []
        for target in weights.fill([Target(theirs, tensors[n].detach()) for n, theirs in named.items()]):
            written.append(ours[target.name])
            weights.release([target.name])
        weights.release(spare)
        made = dict.fromkeys(tensors.keys() - named, "a buffer keeps what vLLM made it with")
        host = sum(nbytes(t) for t in self._parameters().values() if t.device.type == "cpu")
        return Applied(written=written, defaulted=made, unused=(), host_bytes=host)

    def _parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters())

    def _keep_originals(self, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in parameters.items():
            self._originals.setdefault(name, parameter.data)

    def _fitting(self, metas: Mapping[str, TensorMeta], spared: Collection[str]) -> dict[str, str]:
        """Return under which name the set has each tensor: a tied one may go by any of its names.

        Those that are `spared` may be left out: what was cut from a checkpoint has no buffers that a
        checkpoint has not.

        Raises:
            CoverageError: they are not this rank's tensors.
        """
        due = self.expected(Layout.SHARDED)
        ties = _ties(self.model)
        named: dict[str, str] = {}
        for name in due:
            found = [one for one in (name, *ties.get(name, ())) if one in metas]
            if found:
                named[name] = found[0]
        twins = {
            one
            for name, theirs in named.items()
            for one in ties.get(name, ())
            if one in metas and _at_one_place(metas[one], metas[theirs])
        }
        missing = [name for name in due if name not in named and name not in spared]
        unexpected = sorted(metas.keys() - named.values() - twins)
        mismatched = {
            theirs: f"{have.dtype} {list(have.shape)}, need {need.dtype} {list(need.shape)}"
            for theirs, have, need in ((theirs, metas[theirs], due[name]) for name, theirs in named.items())
            if (have.shape, have.dtype) != (need.shape, need.dtype)
        }
        parts = [f"missing {coverage.listed(missing)}"] if missing else []
        parts += [f"unexpected {coverage.listed(unexpected)}"] if unexpected else []
        parts += [f"{name} is {why}" for name, why in list(mismatched.items())[: coverage.SHOWN]]
        if missing and unexpected:
            parts.append("SHARDED weights for vLLM go by the names of vLLM's own parameters")
        if parts:
            raise CoverageError(
                f"the weights do not fit vLLM's {self._info.model}: {'; '.join(parts)}",
                missing=missing,
                unexpected=unexpected,
                mismatched=mismatched,
            )
        return named

    def _defaulted(self, missing: set[str]) -> dict[str, str]:
        """Return which parameters need not come from the checkpoint, and why."""
        quantization = self._info.quantization
        if quantization is not None:
            return dict.fromkeys(missing, f"vLLM does not demand it of a {quantization} checkpoint")
        theirs = [part for flag, part in _OF_THE_TARGET.items() if getattr(self.model, flag, True) is False]
        return {
            name: "the draft uses that of its target"
            for name in missing
            if any(part in name.split(".") for part in theirs)
        }

    def _what_else(self, others: set[str]) -> str | None:
        """Return what loading did beside filling parameters and persistent buffers, or None."""
        model = self.model
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        known |= _persistent_buffers(model).keys()
        strange = sorted(others - known)
        if strange:
            return f"its load_weights fills {strange[0]!r}, neither a parameter nor a persistent buffer"
        before = self._before
        if before is None:
            return None
        after = beside_tensors(model)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed:
            return f"its load_weights also sets {changed[0]!r}, which a reader would not have"
        return None


def _loader_of(model: nn.Module) -> Callable[..., Any]:
    """Return the model's own loading code.

    Raises:
        EngineError: it has none, or wants weights from elsewhere than the checkpoint's folder.
    """
    kind = type(model).__name__
    load: Callable[..., Any] | None = getattr(model, "load_weights", None)
    if load is None:
        raise EngineError(f"vLLM's {kind} has no load_weights: the load format cannot serve it")
    if getattr(model, "secondary_weights", None) or getattr(model, "allow_patterns_overrides", None):
        raise EngineError(
            f"vLLM's {kind} reads weights from several places: load it with vLLM's own --load-format auto"
        )
    return load


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """Return the further names of parameters that have several."""
    first: dict[int, str] = {}
    ties: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            ties.setdefault(first[id(parameter)], []).append(name)
    return ties


def _at_one_place(one: TensorMeta, other: TensorMeta) -> bool:
    return one.file is not None and (one.file, one.offset) == (other.file, other.offset)


def _not_final(device: str) -> str:
    return (
        f"vLLM's FINAL weights on {device} are not shared: its post-load keeps what it makes outside of the "
        "parameters, and who were given these alone would answer nonsense; share SHARDED"
    )
