# SPDX-License-Identifier: Apache-2.0
"""Ask the planned providers in order until one serves; the rules of fallback live here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from weights_core.errors import (
    Declined,
    EngineDirtyError,
    LifecycleError,
    LoadFailed,
    NoProviderError,
    PluginContractError,
    PluginFailedError,
    RanksDisagreeError,
    WeightsError,
)
from weights_core.report import Attempt

if TYPE_CHECKING:
    from weights_core.engine import Engine
    from weights_core.hooks import Hooks
    from weights_core.ranks import Ranks
    from weights_core.types import LoadRequest, Plan
    from weights_core.weightset import WeightSet


@attrs.frozen(eq=False)
class Provided:
    """A set, who provided it, and who is to be asked if it fails."""

    provider: str
    weights: WeightSet
    rest: tuple[str, ...]


class Chain:
    """The providers of one plan.

    `attempts` records everyone asked and what came of it; `opened` every set that was returned,
    those of an owner's sources included, so that none is left open when the load ends. `wrote` is
    true while a provider may have written into the engine behind the engine's back.
    """

    def __init__(self, hooks: Hooks, plan: Plan, request: LoadRequest, engine: Engine, ranks: Ranks) -> None:
        self._hooks = hooks
        self._plan = plan
        self._request = request
        self._engine = engine
        self._ranks = ranks
        self.attempts: list[Attempt] = []
        self.opened: list[WeightSet] = []
        self.wrote = False

    def open(self, names: Sequence[str]) -> Provided:
        """Return the set of the first of `names` that serves on every rank.

        Raises:
            NoProviderError: none does; `reasons` says why.
            WeightsError: one failed in a way that ends the load.
        """
        reasons: dict[str, str] = {}
        for index, name in enumerate(names):
            rest = tuple(names[index + 1 :])
            weights, error = self._ask(name, rest)
            try:
                if self._ranks.served("load", name, error) and weights is not None:
                    self._record(name, "provided the weights")
                    return Provided(name, weights, rest)
                reasons[name] = self.give_up(name, weights, error, wrote=self.wrote)
            finally:
                del error  # its traceback holds what the attempt held
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NoProviderError(f"no provider could serve: {listed or 'none is left'}", reasons=reasons)

    def give_up(self, name: str, weights: WeightSet | None, error: Exception | None, *, wrote: bool) -> str:
        """Close what `name` provided and bring the engine back, on every rank, before the next.

        Returns the reason that was recorded.

        Raises:
            EngineDirtyError: the engine was written to and cannot be re-initialised.
        """
        reason = _brief(error) if error is not None else "another rank was not served"
        if weights is not None:
            self.opened.remove(weights)
            try:
                weights.close()
            except Exception as exc:  # noqa: BLE001 - the provider has failed already; both are recorded
                reason += f"; closing its weights failed too: {exc}"
        self._record(name, "declined" if isinstance(error, Declined) else "failed", reason)
        stuck: EngineDirtyError | None = None
        if wrote:
            try:
                self._engine.reinit()
                self.wrote = False
            except Exception as exc:  # noqa: BLE001 - raised by `together`, once the other ranks know
                stuck = EngineDirtyError(f"{name} failed after writing to the engine ({reason}), and {exc}")
                stuck.__cause__ = error
        self._ranks.together("recovery", name, stuck)
        return reason

    def _ask(self, name: str, rest: tuple[str, ...]) -> tuple[WeightSet | None, Exception | None]:
        wrappers = () if name == self._plan.owner else self._plan.wrappers
        below = _Below(self, rest)
        try:
            weights = self._hooks.load_weights(name, wrappers, self._request, self._engine, below)
            self.opened.append(weights)
            self.wrote = self.wrote or weights.in_place
            self._check(name, weights)
        except Exception as exc:  # noqa: BLE001 - `Ranks.served` raises it once the other ranks know
            crashed = isinstance(exc, PluginFailedError)  # and may have written anything
            told = isinstance(exc, LoadFailed | RanksDisagreeError) and exc.mutated
            self.wrote = self.wrote or crashed or told
            return None, exc
        finally:
            below.close()
        return weights, None

    def _check(self, name: str, weights: WeightSet) -> None:
        accepts = self._request.engine.accepts
        if weights.layout not in accepts:
            raise PluginContractError(
                f"returned weights in the layout {weights.layout.value}, engine {self._request.engine.name} "
                f"accepts {', '.join(sorted(layout.value for layout in accepts))}"
            ).stamp(
                plugin=name,
                distribution=self._hooks.plugins[name].origin,
                hook="load_weights",
                rank=self._request.rank,
            )

    def _record(self, name: str, result: str, reason: str = "") -> None:
        origin = self._hooks.plugins[name].origin
        self.attempts.append(Attempt(plugin=name, distribution=origin, result=result, reason=reason))


class _Below:
    """The `source` that a provider is handed: the providers after it, for the length of its call."""

    def __init__(self, chain: Chain, names: tuple[str, ...]) -> None:
        self._chain: Chain | None = chain
        self._names = names

    def open(self) -> WeightSet:
        if self._chain is None:
            raise LifecycleError("source.open() is for the call of load_weights, which is over")
        return self._chain.open(self._names).weights

    def close(self) -> None:
        self._chain = None  # a set that keeps its source must not keep the engine


def _brief(error: Exception) -> str:
    return error.brief if isinstance(error, WeightsError) else str(error)
