# SPDX-License-Identifier: Apache-2.0
"""When a model can be loaded without a trace: nothing of its checkpoint is to be converted, nor shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from weights_core import Applied, Engine, EngineInfo, Layout, Plan, TensorMeta, WeightSet, dtypes
from weights_core.errors import EngineError
from weights_transformers.arguments import asked_dtype

if TYPE_CHECKING:
    from weights_transformers.direct import DirectEngine
    from weights_transformers.engine import TransformersEngine
    from weights_transformers.opening import Opening


class Undecided(Engine):
    """Stands for a model's engine until it is known who takes part in the load; `chosen` is it then.

    To trace a model takes as long as to build it. That is for those who share its weights, and for
    weights in another layout than the checkpoint's: they need to know what each is made of.
    """

    def __init__(self, opening: Opening, dtype: str) -> None:
        """Choose for `opening`, whose weights are stored as `dtype`."""
        self._opening = opening
        self.chosen: DirectEngine | TransformersEngine = opening.plain(dtype)

    @property
    def info(self) -> EngineInfo:
        """That of the engine chosen so far."""
        return self.chosen.info

    @property
    def model(self) -> Any:
        """That of the engine chosen, once it is loaded."""
        return self.chosen.model

    def planned(self, plan: Plan) -> Engine:
        """Choose the plain engine if all that takes part are sources of the checkpoint."""
        if plan.publishers or plan.layouts - {Layout.CHECKPOINT}:
            self.chosen = self._opening.engine()
        return self.chosen

    def expected(self, layout: Layout) -> Mapping[str, TensorMeta]:
        """Return nothing: that is not known yet."""
        del layout
        return {}

    def apply(self, weights: WeightSet) -> Applied:
        """Refuse: another engine is to do that."""
        raise EngineError("what takes the weights is chosen once the load is planned")

    def untouched(self) -> bool:
        """Nothing is touched before the plan."""
        return True


def stored_as_needed(cls: Any, settings: Any, arguments: Mapping[str, Any]) -> str | None:
    """Return what the weights of `cls` are stored as, if all of them are used as they are, else None.

    That is so where the checkpoint is of this very class, its configuration says the dtype that is wanted,
    and Transformers has no operation for it beyond other names. It is a guess about the files: what
    turns out to be stored otherwise is read and converted.
    """
    classes = getattr(settings, "architectures", None)
    if not isinstance(classes, list) or cls.__name__ not in classes or settings.sub_configs:
        return None
    stored = getattr(settings, "dtype", None)
    wanted = asked_dtype(arguments)
    named = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(stored, torch.dtype) or (wanted not in (None, "auto") and named != stored):
        return None
    if not stored.is_floating_point or any(_converts(name) for name in (cls.__name__, settings.model_type)):
        return None
    return dtypes.from_torch(stored)


def _converts(name: str) -> bool:
    """Whether Transformers makes tensors of others for models of this class or type."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    known: Sequence[object] = get_checkpoint_conversion_mapping(name) or ()
    return any(isinstance(one, WeightConverter) for one in known)
