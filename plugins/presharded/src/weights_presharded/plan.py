# SPDX-License-Identifier: Apache-2.0
"""A plan: how each tensor of a checkpoint is cut, fused, renamed or repeated for the ranks.

A plan file is TOML. Each `[[rule]]` takes the tensors that its patterns match and that no rule before
it took; in a pattern `*` stands for one part of a dotted name, `**` for any number of them.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from weights_core.config import did_you_mean
from weights_core.errors import PluginConfigError

SCHEMA = "weights.plan/1"
_WILD = re.compile(r"\*\*|\*")


class PlanError(PluginConfigError):
    """A plan is malformed, or does not fit the checkpoint; names the rule or the tensor."""


Number = int | str
"""A count, or the name of a setting in the checkpoint's `config.json`."""


@attrs.frozen
class Pattern:
    """A dotted name with wildcards."""

    text: str

    @property
    def wildcards(self) -> int:
        """How many there are."""
        return len(_WILD.findall(self.text))

    def match(self, name: str) -> tuple[str, ...] | None:
        """Return what the wildcards stand for in `name`, or None."""
        found = _regex(self.text).fullmatch(name)
        return found.groups() if found else None

    def filled(self, wilds: Sequence[str]) -> str:
        """Return the name in which the wildcards stand for `wilds`."""
        parts = iter(wilds)
        return _WILD.sub(lambda _: next(parts), self.text)


@functools.cache
def _regex(text: str) -> re.Pattern[str]:
    parts = [re.escape(part) for part in _WILD.split(text)]
    wilds = ["(.+)" if wild == "**" else r"([^.]+)" for wild in _WILD.findall(text)]
    pairs = zip(parts, [*wilds, ""], strict=True)
    return re.compile("".join(part + wild for part, wild in pairs), re.DOTALL)


@attrs.frozen(kw_only=True)
class Take:
    """One source of a rule.

    `sections` are the relative sizes of what lies side by side in the dimension that is cut, each cut by
    itself: a `qkv` that the checkpoint has fused, say. `heads` counts the units that must stay whole,
    for each section: with fewer heads than ranks, each is repeated on several ranks.
    """

    match: Pattern
    heads: tuple[Number, ...] = ()
    sections: tuple[Number, ...] = ()


@attrs.frozen(kw_only=True)
class Rule:
    """What becomes of the tensors that `takes` match.

    Several takes are joined along the first dimension. `cut` is the dimension that is cut, None for
    tensors that every rank has whole. `names` are the templates of the new name, and of names tied to
    it; none keeps the name. With `stack` the last wildcard of the sources numbers what is put one after
    the other in a new first dimension. With `drop` the tensors are left out.
    """

    takes: tuple[Take, ...]
    cut: int | None = None
    names: tuple[Pattern, ...] = ()
    stack: bool = False
    drop: bool = False

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return f"rule {' + '.join(take.match.text for take in self.takes)!r}"


@attrs.frozen
class Plan:
    """The rules, in order, and where they come from; `text` tells one plan from another."""

    rules: tuple[Rule, ...]
    origin: str
    text: str


WHOLE = Rule(takes=(Take(match=Pattern("**")),))
"""What no other rule took is whole on every rank."""


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: it cannot be read, or is no plan; names the rule and what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        given = tomllib.loads(text)
    except OSError as exc:
        raise PlanError(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise PlanError(f"{path} is not TOML: {exc}") from exc
    return parse_plan(given, str(path), text)


def parse_plan(given: Mapping[str, Any], origin: str, text: str) -> Plan:
    """Return the plan that a parsed plan file holds.

    Raises:
        PlanError: it holds none.
    """
    if given.get("schema") != SCHEMA:
        raise PlanError(f"{origin} is of the schema {given.get('schema')!r}: a plan says schema = {SCHEMA!r}")
    rules = given.get("rule")
    _known(given, ("schema", "rule"), origin)
    if not isinstance(rules, list) or not rules:
        raise PlanError(f"{origin} has no [[rule]]")
    return Plan(tuple(_rule(rule, f"{origin}, rule {n}") for n, rule in enumerate(rules, 1)), origin, text)


def _rule(given: Any, where: str) -> Rule:
    if not isinstance(given, dict):
        raise PlanError(f"{where} is no table")
    _known(given, ("match", "heads", "sections", "fuse", "as", "cut", "stack", "drop"), where)
    if ("match" in given) == ("fuse" in given):
        raise PlanError(f"{where}: give either match, or fuse with a list of {{match = …}}")
    if "match" in given:
        takes = [_take({key: given[key] for key in ("match", "heads", "sections") if key in given}, where)]
    else:
        _known(given, ("fuse", "as", "cut", "stack"), where)
        if not isinstance(given["fuse"], list) or not given["fuse"]:
            raise PlanError(f"{where}: fuse is a list of {{match = …}}")
        takes = [_take(take, where) for take in given["fuse"]]
    rule = Rule(
        takes=tuple(takes),
        cut=_cut(given.get("cut"), where),
        names=tuple(_pattern(name, where) for name in _list(given.get("as", []))),
        stack=_flag(given.get("stack", False), "stack", where),
        drop=_flag(given.get("drop", False), "drop", where),
    )
    _check(rule, where)
    return rule


def _check(rule: Rule, where: str) -> None:
    first, *others = [take.match.wildcards for take in rule.takes]
    if any(count != first for count in others):
        raise PlanError(f"{where}: what is fused must have the same number of wildcards in each pattern")
    if rule.drop and (rule.cut is not None or rule.names or rule.stack or len(rule.takes) > 1):
        raise PlanError(f"{where}: what is dropped is neither cut, fused nor renamed")
    if (rule.stack or len(rule.takes) > 1) and not rule.names:
        raise PlanError(f'{where}: what is joined needs a name of its own, as = "…"')
    if rule.stack and not first:
        raise PlanError(f"{where}: stack needs a wildcard that numbers what is stacked")
    due = first - rule.stack
    for name in rule.names:
        if name.wildcards != due:
            raise PlanError(f"{where}: {name.text!r} must have {due} wildcards, as the sources have")
    for take in rule.takes:
        if (take.heads or take.sections) and rule.cut is None:
            raise PlanError(f"{where}: heads and sections are of the dimension that is cut: give cut")
        if take.heads and len(take.heads) != max(1, len(take.sections)):
            raise PlanError(f"{where}: give heads for each of the {max(1, len(take.sections))} sections")


def _take(given: Any, where: str) -> Take:
    if not isinstance(given, dict) or "match" not in given:
        raise PlanError(f"{where}: a source is {{match = …}}, not {given!r}")
    _known(given, ("match", "heads", "sections"), where)
    return Take(
        match=_pattern(given["match"], where),
        heads=tuple(_number(n, where) for n in _list(given.get("heads", []))),
        sections=tuple(_number(n, where) for n in _list(given.get("sections", []))),
    )


def _pattern(value: Any, where: str) -> Pattern:
    if not isinstance(value, str) or not value:
        raise PlanError(f"{where}: {value!r} is no pattern of names")
    return Pattern(value)


def _cut(value: Any, where: str) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise PlanError(f"{where}: cut is a dimension, from 0, not {value!r}")
    return value


def _flag(value: Any, name: str, where: str) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"{where}: {name} is true or false, not {value!r}")
    return value


def _number(value: Any, where: str) -> Number:
    if not isinstance(value, str) and (type(value) is not int or value < 1):
        raise PlanError(f"{where}: {value!r} is neither a number from 1 nor the name of one in config.json")
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _known(given: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in given:
        if name not in names:
            raise PlanError(f"{where}: {name!r} has no place here{did_you_mean(name, names)}")
