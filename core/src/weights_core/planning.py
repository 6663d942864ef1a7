# SPDX-License-Identifier: Apache-2.0
"""Turn the plugins' claims into a plan: who provides, owns, wraps and publishes, and why."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from weights_core.config import did_you_mean
from weights_core.discovery import BUILT_IN
from weights_core.errors import (
    AmbiguousFormatError,
    FormatNotFoundError,
    FormatUnresolvedError,
    PluginContractError,
)
from weights_core.hooks import Hooks
from weights_core.types import Decision, EngineInfo, FormatClaim, Layout, LoadRequest, Plan, Role

AUTO = "auto"


def make_plan(hooks: Hooks, request: LoadRequest) -> Plan:
    """Ask every plugin what it would do in `request`, and decide.

    The plugins that `request.format` names come first, in that order; then the sources that were
    not named, best fit first; the built-in disk is last. An owner takes part only when named.

    Raises:
        FormatNotFoundError: a named plugin is not installed; says how to install it.
        FormatUnresolvedError: a named plugin cannot serve, or nobody can; says why.
        AmbiguousFormatError: two owners were named.
        PluginContractError: a plugin claims a role whose hook it does not implement.
    """
    named = _named(request.format)
    for name in named:
        if name not in hooks.plugins:
            _refuse_absent(name, hooks)
    claims = {name: _ask(hooks, name, request, is_named=name in named) for name in hooks.plugins}
    for name in named:
        if not claims[name].roles:
            raise FormatUnresolvedError(f"format {name!r} cannot be served: {claims[name].reason}")
    owners = [name for name in named if Role.OWNER in claims[name].roles]
    if len(owners) > 1:
        listed = " and ".join(map(repr, owners))
        raise AmbiguousFormatError(f"formats {listed} would both own the weights: name one")
    sources = _order_sources(claims, named)
    for name in _with(claims, Role.SOURCE):
        if name not in sources and name not in owners:
            claims[name] = _without_source(claims[name])
    plan = Plan(
        owner=owners[0] if owners else None,
        sources=sources,
        wrappers=tuple(_with(claims, Role.WRAPPER)),
        publishers={
            # the owner first: what it has placed is shared already when the others see it
            name: claims[name]
            for name in sorted(_with(claims, Role.PUBLISHER), key=lambda name: name not in owners)
        },
        decisions=_decisions(hooks, claims, first=(*owners, *sources)),
        layouts=frozenset().union(*(claims[name].layouts for name in (*owners, *sources)))
        & request.engine.accepts,
        held=claims[owners[0]].held if owners else None,
    )
    if not plan.providers:
        reasons = "; ".join(f"{d.plugin}: {d.reason}" for d in plan.decisions)
        raise FormatUnresolvedError(f"no plugin can serve this load: {reasons}")
    return plan


def _named(given: tuple[str, ...]) -> tuple[str, ...]:
    if given == (AUTO,):
        return ()
    named = tuple(dict.fromkeys(given))
    if not named or AUTO in named:
        raise FormatUnresolvedError(f"format is {AUTO!r} alone, or names of plugins; got {list(given)}")
    if BUILT_IN in named[:-1]:
        raise FormatUnresolvedError(f"nothing is asked after {BUILT_IN!r}: name it last")
    return named


def _refuse_absent(name: str, hooks: Hooks) -> None:
    for left_out in hooks.left_out:
        if left_out.plugin.name == name:
            raise FormatUnresolvedError(f"format {name!r} cannot be served: the plugin is {left_out.reason}")
    near = did_you_mean(name, [*hooks.plugins, AUTO])
    cure = near or f"; try: pip install weights-{name.replace('_', '-')}"
    raise FormatNotFoundError(f"{name!r} is not installed{cure}")


def _without_source(claim: FormatClaim) -> FormatClaim:
    why = f"{claim.reason}; not asked: the format ends at {BUILT_IN!r}"
    return attrs.evolve(claim, roles=claim.roles - {Role.SOURCE}, reason=why)


def _ask(hooks: Hooks, name: str, request: LoadRequest, *, is_named: bool) -> FormatClaim:
    claim = hooks.resolve_format(name, request)
    if claim is None:
        return FormatClaim.refuse("takes no part in this load")
    _check_implemented(hooks, name, claim)
    roles, reasons = claim.roles, [claim.reason]
    why = _why_not_provide(claim, request.engine, is_named=is_named)
    if why:
        roles -= {Role.OWNER, Role.SOURCE}
        reasons.append(why)
    if claim.publish_at is not None and claim.publish_at not in request.engine.shareable:
        why = f"engine {request.engine.name} cannot share {claim.publish_at.value} weights"
        if claim.required:
            raise FormatUnresolvedError(f"plugin {name!r} must publish, and {why}")
        roles -= {Role.PUBLISHER}
        reasons.append(f"does not publish: {why}")
    published = claim.publish_at if Role.PUBLISHER in roles else None
    return attrs.evolve(claim, roles=roles, publish_at=published, reason="; ".join(reasons))


def _why_not_provide(claim: FormatClaim, engine: EngineInfo, *, is_named: bool) -> str:
    """Return why a plugin cannot be asked for weights, or an empty string."""
    if Role.OWNER in claim.roles and not is_named:
        return "owns weights, so it takes part only when the format names it"
    if Role.OWNER in claim.roles and engine.mutates_after_load:
        return (
            f"engine {engine.name} changes its weights after the load ({engine.mutates_after_load}), "
            "which others would share"
        )
    if claim.roles & {Role.OWNER, Role.SOURCE} and not claim.layouts & engine.accepts:
        return f"delivers {_listed(claim.layouts)}, engine {engine.name} accepts {_listed(engine.accepts)}"
    return ""


def _listed(layouts: frozenset[Layout]) -> str:
    return " or ".join(sorted(layout.value for layout in layouts))


def _check_implemented(hooks: Hooks, name: str, claim: FormatClaim) -> None:
    needs = {
        Role.SOURCE: ("load_weights", False),
        Role.OWNER: ("load_weights", False),
        Role.WRAPPER: ("load_weights", True),
        Role.PUBLISHER: ("publish", False),
    }
    for role in claim.roles:
        hook, wrapper = needs[role]
        if not hooks.implements(name, hook, wrapper=wrapper):
            how = "as a wrapper" if wrapper else "plainly"
            raise PluginContractError(
                f"plugin {name!r} of {hooks.plugins[name].origin} claims the role {role.value} "
                f"but does not implement {hook} {how}"
            )


def _order_sources(claims: Mapping[str, FormatClaim], named: tuple[str, ...]) -> tuple[str, ...]:
    able = [n for n in _with(claims, Role.SOURCE) if Role.OWNER not in claims[n].roles]
    first = [name for name in named if name in able]
    rest = sorted((n for n in able if n not in first), key=lambda n: claims[n].fit, reverse=True)
    order = [*first, *(n for n in rest if n != BUILT_IN), *(n for n in rest if n == BUILT_IN)]
    if BUILT_IN in order:  # nothing is asked after it: naming it ends the list
        order = order[: order.index(BUILT_IN) + 1]
    return tuple(order)


def _with(claims: Mapping[str, FormatClaim], role: Role) -> list[str]:
    return [name for name, claim in claims.items() if role in claim.roles]


def _decisions(
    hooks: Hooks, claims: Mapping[str, FormatClaim], first: tuple[str, ...]
) -> tuple[Decision, ...]:
    """List the providers in the order they are asked, then the others, then those left out."""
    order = (*first, *(name for name in claims if name not in first))
    took = [
        Decision(
            plugin=name,
            distribution=hooks.plugins[name].origin,
            roles=claims[name].roles,
            reason=claims[name].reason,
        )
        for name in order
    ]
    left = [
        Decision(plugin=out.plugin.name, distribution=out.plugin.origin, roles=frozenset(), reason=out.reason)
        for out in hooks.left_out
    ]
    return tuple(took + left)
