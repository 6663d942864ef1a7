# SPDX-License-Identifier: Apache-2.0
"""Build a model as `from_pretrained` does, without bytes, and learn what it makes of the checkpoint.

Transformers renames, fuses, cuts and converts. Rather than know how, we let it: `from_pretrained` runs
with a state dict of traced tensors, and what ends up in the model says where each byte belongs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from weights_core import coverage
from weights_core.errors import EngineError, WeightsError
from weights_core.tensors import slots
from weights_transformers.alone import in_one_thread
from weights_transformers.recipes import Held, Recipe, leaves
from weights_transformers.straight import straight
from weights_transformers.traced import Tracer, values

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from weights_core import TensorMeta


INITIALISED = "the checkpoint does not hold it, so it was initialised as Transformers does"


@attrs.frozen(eq=False)
class Cut:
    """How a parameter is spread over ranks; during the load the model holds this rank's part in its place."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def whole(self, local: torch.Tensor) -> torch.Tensor:
        """Return the parameter of which `local` is this rank's part."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


@attrs.frozen(eq=False, slots=False)
class Trace:
    """A model on meta, and how each of its tensors comes about.

    `recipes` and `cuts` are by name, a tied tensor under one of its names. `held` maps the names of
    tensors that no checkpoint holds to the reason.
    """

    model: Any
    recipes: Mapping[str, Recipe]
    cuts: Mapping[str, Cut]
    held: Mapping[str, str]

    @property
    def dtype(self) -> torch.dtype:
        """The main one, as the model itself says."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def parameter(self, name: str) -> torch.Tensor:
        """Return what stands for a parameter or buffer now."""
        named = {full: (place, key) for place, full, key in slots(self.model)}
        place, key = named[name]
        tensor: torch.Tensor = place[key]
        return tensor

    @functools.cached_property
    def sources(self) -> dict[str, TensorMeta]:
        """What of the checkpoint is used."""
        pieces = (one for recipe in self.recipes.values() for one in leaves(recipe))
        return {block.meta.name: block.meta for one in pieces for block in one.blocks}


class UntraceableError(EngineError):
    """The model must be loaded by Transformers alone: the trace cannot follow what it does."""


def trace(cls: Any, config: Any, metas: Mapping[str, TensorMeta], arguments: Mapping[str, Any]) -> Trace:
    """Return the trace of `cls.from_pretrained` over a checkpoint of `metas`.

    Raises:
        UntraceableError: it does more than can be traced; nothing has changed.
        CoverageError: tensors of the checkpoint have other shapes than the model's.
        EngineError: Transformers refuses.
    """
    tracer = Tracer()
    state = torch.get_rng_state()
    is_elsewhere = arguments.keys() & {"device_map", "distributed_config"}
    try:
        made = values(metas, tracer)

        def bring(names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
            return ((name, made[name][...]) for name in names)

        reserved = NothingReserved() if is_elsewhere else contextlib.nullcontext()
        with in_one_thread(), straight(cls, made, bring), reserved:
            model, info = cls.from_pretrained(
                None, config=config, state_dict=made, output_loading_info=True, **arguments
            )
        if tracer.lost is not None:  # Transformers went on without it
            raise tracer.lost
        with torch._C.DisableTorchFunctionSubclass():  # what is asked here is not to be traced
            return _read(model, info, tracer)
    except Exception as exc:  # Transformers may raise anything
        torch.set_rng_state(state)
        if tracer.lost is not None:
            raise UntraceableError(tracer.lost.brief) from exc
        if isinstance(exc, WeightsError):
            raise
        raise refused(cls, exc) from exc


class NothingReserved(TorchFunctionMode):
    """Has Transformers reserve nothing on a device.

    It allocates as many bytes as the model has before it loads, so that torch has them cached. Here the
    load takes what it needs by itself, and nothing where the weights are shared.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Put on meta what is allocated just as `caching_allocator_warmup` does."""
        del types
        given = dict(kwargs or {})
        if func is torch.empty and given.keys() == {"dtype", "device", "requires_grad"}:
            is_plain = len(args) == 1 and isinstance(args[0], int)
            if is_plain and given["dtype"] is torch.float16 and torch.device(given["device"]).type != "cpu":
                given["device"] = "meta"
        return func(*args, **given)


def refused(cls: type, exc: Exception) -> EngineError:
    """Return the error that says that Transformers would not build or load the model, and why."""
    return EngineError(f"Transformers refuses to load {cls.__name__}: {type(exc).__name__}: {exc}")


def _read(model: nn.Module, info: Mapping[str, Any], tracer: Tracer) -> Trace:
    """Put plain meta tensors in the place of traced ones, and of those that no checkpoint holds."""
    recipes: dict[str, Recipe] = {}
    cuts: dict[str, Cut] = {}
    held: dict[str, str] = {}
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old one too, so that its id stays its
    for place, name, key in slots(model):
        tensor = place[key]
        if id(tensor) not in replaced:
            local = tensor
            if isinstance(tensor, DTensor):
                with torch.no_grad():
                    local = tensor.to_local()
                cuts[name] = Cut(tensor.device_mesh, tensor.placements, tensor.shape, tuple(tensor.stride()))
            recipe = tracer.recipe_of(local)
            if recipe is not None:
                recipes[name] = recipe
            elif local.is_meta:
                raise tracer.lose(f"the trace has lost {name}")
            else:
                recipes[name] = Held(local.detach())
                held[name] = INITIALISED
            blank = _blank(tensor, local)
            replaced[id(tensor)] = tensor, blank
            replaced[id(blank)] = blank, blank  # where modules are shared, it is met again
        place[key] = replaced[id(tensor)][1]
    result = Trace(model, recipes, cuts, held)
    mismatched = {str(entry[0]) for entry in info.get("mismatched_keys", ())}
    if not mismatched:
        lost = sorted(tracer.asked - result.sources.keys())
        if lost:
            raise tracer.lose(f"it takes {coverage.listed(lost)} elsewhere than into its parameters")
    return result


def _blank(old: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return a tensor on meta in the place of `old`, with its flags and attributes."""
    blank = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype, device="meta")
    made = nn.Parameter(blank, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else blank
    kept = {
        k: v
        for k, v in vars(old).items()
        if k not in ("recipe", "tracer", "_is_param", "_local_tensor", "_spec")
    }
    vars(made).update(kept)
    return made
