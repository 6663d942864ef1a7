# SPDX-License-Identifier: Apache-2.0
"""The engine of a traced model: all that `TorchEngine` does, by the model's own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import nn

from weights_core import Applied, EngineInfo, Layout, TensorMeta, TorchEngine, WeightSet, coverage, dtypes
from weights_core.errors import CoverageError
from weights_core.tensors import slots
from weights_transformers.alone import ALONE
from weights_transformers.mapped import ModelWeights
from weights_transformers.ranks import Ranks
from weights_transformers.recipes import fingerprint
from weights_transformers.trace import Trace

SHAREABLE = "these are the parameters; nothing is transformed after a load"


class TransformersEngine(TorchEngine):
    """Brings weights into a model that was traced, in the CHECKPOINT or the SHARDED layout.

    The model is on meta until the load; what no checkpoint holds has its values already. Nothing is
    transformed after a load, so others may map what it leaves. Of a parameter that is spread over
    ranks the model holds this rank's part until the load is complete.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        version: str,
        device: str,
        engine: str = "transformers",
        role: str = "main",
        component: str | None = None,
        map_files: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        """Take over a trace; `device` is where the weights are to live, `engine` what runs them.

        `map_files` is `TorchEngine`'s; `ranks` are those that the model is spread over.
        """
        super().__init__(
            trace.model,
            device=device,
            role=role,
            component=component,
            map_files=map_files,
            topology=ranks.topology if ranks is not None else None,
            gather=ranks.gather if ranks is not None else None,
            mutates_after_load=_trained(trace),
        )
        self._trace = trace
        self._maps_files = map_files and device == "cpu"
        self._own = attrs.evolve(
            super().info,
            name=engine,
            version=version,
            model=f"{type(trace.model).__qualname__}#{fingerprint(trace.recipes)}",
            dtype=dtypes.from_torch(trace.dtype),
            shareable={Layout.SHARDED: SHAREABLE},
        )

    @property
    def info(self) -> EngineInfo:
        """Name `transformers` or `diffusers`; the class, with a digest of what it takes; the main dtype."""
        return self._own

    def apply(self, weights: WeightSet) -> Applied:
        """Read each tensor straight to where it belongs, or make it of those it needs.

        Raises:
            CoverageError: the set is not of the checkpoint that the model was traced with, or nothing of it
                is the model's.
        """
        sources, metas = self._trace.sources, weights.metas
        if metas and not sources:
            raise nothing_fits(type(self.model), metas)
        missing = sorted(sources.keys() - metas.keys())
        if missing:
            raise CoverageError(f"missing {coverage.listed(missing)}", missing=missing)
        for name, due in sources.items():
            if (metas[name].shape, metas[name].dtype) != (due.shape, due.dtype):
                why = f"is {metas[name].dtype} {list(metas[name].shape)}, was {due.dtype} {list(due.shape)}"
                raise CoverageError(f"tensor {name!r} {why} when the model was built", mismatched={name: why})
        unused = self.unused(weights)
        tensors = self.tensors(Layout.SHARDED)
        done = super().apply(ModelWeights(weights, self._trace.recipes, tensors, map_files=self._maps_files))
        self._tie()
        held = self._trace.held
        return attrs.evolve(done, written=done.written - held.keys(), defaulted=held, unused=tuple(unused))

    def unused(self, weights: WeightSet) -> Sequence[str]:
        """Return the names that no tensor of the model is made of."""
        used = self._trace.sources
        return [name for name in weights.metas if name not in used]

    def bind(self, weights: WeightSet) -> Applied:
        """Make the set's own tensors the parameters, without a copy."""
        done = super().bind(weights)
        self._tie()
        return done

    def loaded(self) -> None:
        """Put whole parameters in the place of this rank's parts: from now on the model is Transformers'."""
        super().loaded()
        if not self._trace.cuts:
            return
        parts = self.tensors(Layout.SHARDED)
        whole = {
            id(parts[name]): _whole(cut.whole(parts[name].detach()), parts[name])
            for name, cut in self._trace.cuts.items()
        }
        for place, _, key in slots(self.model):
            place[key] = whole.get(id(place[key]), place[key])
        self._tie(whole=True)

    def _tie(self, *, whole: bool = False) -> None:
        """Tie what the checkpoint holds twice, if it is equal; what it holds once is tied already."""
        if bool(self._trace.cuts) is not whole:
            return
        model = self.model
        pairs = getattr(model, "all_tied_weights_keys", {}).items()
        if any(model.get_parameter(one) is not model.get_parameter(other) for one, other in pairs):
            with ALONE:
                model.tie_weights(missing_keys=set(self._trace.held), recompute_mapping=False)  # type: ignore[operator]


def nothing_fits(cls: type, metas: Mapping[str, TensorMeta]) -> CoverageError:
    """Return the error of a checkpoint of which a model takes nothing: all of it would be made up."""
    names = list(metas)
    return CoverageError(
        f"{cls.__name__} takes nothing of the checkpoint, which has {coverage.listed(names)}: "
        "is it of another class?",
        unexpected=names,
    )


def _trained(trace: Trace) -> str | None:
    """Say which parameters were not loaded, and so will be trained, if there are any."""
    names = [name for name in trace.held if isinstance(trace.parameter(name), nn.Parameter)]
    return f"not in the checkpoint, so to be trained: {coverage.listed(names)}" if names else None


def _whole(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    made = nn.Parameter(tensor, requires_grad=part.requires_grad)
    vars(made).update(vars(part))
    return made
