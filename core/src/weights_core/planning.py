# SPDX-License-Identifier: Apache-2.0
"""Turn the plugins' claims into a plan: who provides, owns, wraps and publishes, and why."""

from __future__ import annotations

from collections.abc import Mapping

from weights_core.config import did_you_mean
from weights_core.discovery import BUILT_IN
from weights_core.errors import (
    AmbiguousFormatError,
    FormatNotFoundError,
    FormatUnresolvedError,
    PluginContractError,
)
from weights_core.hooks import Hooks
from weights_core.types import Decision, FormatClaim, Layout, LoadRequest, Plan, Role

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
    named = tuple(dict.fromkeys(name for name in request.format if name != AUTO))
    for name in named:
        if name not in hooks.plugins:
            _refuse_absent(name, hooks)
    claims = {name: _ask(hooks, name, request, is_named=name in named) for name in hooks.plugins}
    for name in named:
        if not claims[name].roles:
            raise FormatUnresolvedError(f"format {name!r} cannot be served: {claims[name].reason}")

    owners = [name for name in named if Role.OWNER in claims[name].roles]
    if len(owners) > 1:
        raise AmbiguousFormatError(
            f"formats {' and '.join(map(repr, owners))} would both own the weights: name one"
        )
    if BUILT_IN in named[:-1]:
        raise FormatUnresolvedError(f"nothing is asked after {BUILT_IN!r}: name it last")
    sources = _order_sources(claims, named)
    if not owners and not sources:
        reasons = "; ".join(f"{d.plugin}: {d.reason}" for d in _decisions(hooks, claims))
        raise FormatUnresolvedError(f"no plugin can serve this load: {reasons}")
    return Plan(
        owner=owners[0] if owners else None,
        sources=sources,
        wrappers=tuple(_with(claims, Role.WRAPPER)),
        publishers={name: claims[name] for name in _with(claims, Role.PUBLISHER)},
        decisions=_decisions(hooks, claims),
    )


def _refuse_absent(name: str, hooks: Hooks) -> None:
    for left_out in hooks.left_out:
        if left_out.plugin.name == name:
            raise FormatUnresolvedError(f"format {name!r} cannot be served: the plugin is {left_out.reason}")
    near = did_you_mean(name, [*hooks.plugins, AUTO])
    raise FormatNotFoundError(
        f"{name!r} is not installed{near}; try: pip install weights-{name.replace('_', '-')}"
    )


def _ask(hooks: Hooks, name: str, request: LoadRequest, *, is_named: bool) -> FormatClaim:
    claim = hooks.resolve_format(name, request)
    if claim is None:
        return FormatClaim.refuse("takes no part in this load")
    _check_implemented(hooks, name, claim)
    engine = request.engine
    if Role.OWNER in claim.roles:
        if not is_named:
            return FormatClaim.refuse("owns weights, so it takes part only when the format names it")
        if engine.mutates_after_load:
            return FormatClaim.refuse(
                f"engine {engine.name} changes its weights after the load ({engine.mutates_after_load}), "
                "which others would share"
            )
    provides = claim.roles & {Role.OWNER, Role.SOURCE}
    if provides and not claim.layouts & engine.accepts:
        return FormatClaim.refuse(
            f"delivers {_listed(claim.layouts)}, engine {engine.name} accepts {_listed(engine.accepts)}"
        )
    if claim.publish_at is not None and claim.publish_at not in engine.shareable:
        why = f"engine {engine.name} cannot share {claim.publish_at.value} weights"
        if claim.required:
            raise FormatUnresolvedError(f"plugin {name!r} must publish, and {why}")
        return FormatClaim(
            roles=claim.roles - {Role.PUBLISHER},
            reason=f"{claim.reason}; does not publish: {why}",
            layouts=claim.layouts,
            fit=claim.fit,
        )
    return claim


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


def _decisions(hooks: Hooks, claims: Mapping[str, FormatClaim]) -> tuple[Decision, ...]:
    took = [
        Decision(plugin=name, distribution=hooks.plugins[name].origin, roles=claim.roles, reason=claim.reason)
        for name, claim in claims.items()
    ]
    left = [
        Decision(plugin=out.plugin.name, distribution=out.plugin.origin, roles=frozenset(), reason=out.reason)
        for out in hooks.left_out
    ]
    return tuple(took + left)
