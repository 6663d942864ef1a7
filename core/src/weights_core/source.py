# SPDX-License-Identifier: Apache-2.0
"""What a provider is handed to get at the providers below it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from weights_core.weightset import WeightSet


class Source(Protocol):
    """The rest of a plan, below the provider that holds this."""

    def open(self) -> WeightSet:
        """Ask the remaining sources in order and return the first set, wrappers around it.

        The caller owns the set and closes it.

        Raises:
            NoProviderError: every source below declined or failed.
            WeightsError: a source below failed in a way that ends the load.
        """
        ...
