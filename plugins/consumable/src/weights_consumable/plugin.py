# SPDX-License-Identifier: Apache-2.0
"""The plugin: it wraps the set of whatever source serves the load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weights_core import FormatClaim, LoadRequest, Role, WrapperPlugin, hookimpl

if TYPE_CHECKING:
    from collections.abc import Generator

    from weights_core import WeightSet


class ConsumablePlugin(WrapperPlugin[None]):
    """Hands the engine a mapping that shrinks as it is consumed; the idea is TensorRT-LLM's PR 11119."""

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        """Wrap every source."""
        return FormatClaim(roles={Role.WRAPPER}, reason="frees weights as the engine consumes them")

    @hookimpl(wrapper=True)
    def load_weights(self, request: LoadRequest) -> Generator[None, WeightSet, WeightSet]:
        """Wrap the source's set, unless the source has written into the engine already."""
        weights = yield
        if weights.in_place:
            return weights
        from weights_consumable.weights import ConsumableWeights

        return ConsumableWeights(weights)
