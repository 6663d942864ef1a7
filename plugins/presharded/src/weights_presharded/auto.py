# SPDX-License-Identifier: Apache-2.0
"""A plan from what Transformers says of a model: its `tp_plan`, asked of a model without weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from weights_core import TensorMeta
from weights_core.coverage import listed
from weights_presharded.outputs import Config
from weights_presharded.plan import SCHEMA, WHOLE, Pattern, Plan, PlanError, Rule, Take

_WHAT = (
    "give --plan FILE, a TOML file of rules that says which tensors are cut, in which dimension, and what is "
    "fused; docs/presharded.md has examples"
)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_KV = ("k_proj", "v_proj")
_RAISED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    ArithmeticError,
)
_QUANTISED = ("quantization_config", "compression_config")


@attrs.frozen
class _Style:
    """How a module's parameters are cut: counted from the last dimension; a vector in its only one."""

    cut: int | None
    vector: bool = True
    sections: int = 1


_STYLES: Mapping[str, _Style] = {
    "colwise": _Style(-2),
    "colwise_rep": _Style(-2),
    "colwise_gather_output": _Style(-2),
    "local_colwise": _Style(-2),
    "rowwise": _Style(-1, vector=False),
    "rowwise_rep": _Style(-1, vector=False),
    "rowwise_split_input": _Style(-1, vector=False),
    "local_rowwise": _Style(-1, vector=False),
    "packed_colwise": _Style(-2, sections=2),
    "packed_rowwise": _Style(-1, vector=False, sections=2),
    "embedding_rowwise": _Style(-2),
    "embedding_colwise": _Style(-1),
    **dict.fromkeys(
        (
            "replicate",
            "replicated_with_grad_allreduce",
            "sequence_parallel",
            "all_reduce",
            "mla_kv_a_proj",
            "moe_tp_experts",
            "moe_identity_expert",
            "local_params",
            "gather",
            "local",
        ),
        _Style(None),
    ),
}


def auto_plan(root: Path, metas: Mapping[str, TensorMeta], config: Config) -> Plan:
    """Return the plan by which Transformers would cut the checkpoint in `root`.

    Names stay those of the checkpoint, and nothing is fused. What Transformers does not cut is whole on
    every rank. Key and value heads stay whole: with fewer of them than ranks each is on several.

    Raises:
        PlanError: Transformers is not installed, or has no plan that fits; says what to give instead.
    """
    quantised = [key for key in _QUANTISED if config.values.get(key)]
    if quantised:
        raise PlanError(
            f"{config.path} has a {quantised[0]}, and auto does not know how scales and packed weights are "
            f"cut: cut the unquantised checkpoint, or {_WHAT}"
        )
    styles = _transformers_plan(root, metas)
    rules: dict[str, Rule] = {}
    used: set[str] = set()
    for name, meta in metas.items():
        pattern = _NUMBER.sub("*", name)
        module = pattern.rpartition(".")[0]
        key = pattern if pattern in styles else module
        if key not in styles:
            continue
        used.add(key)
        style = _STYLES.get(styles[key])
        if style is None:
            raise PlanError(
                f"Transformers cuts {key!r} as {styles[key]!r}, which auto does not know: {_WHAT}"
            )
        if style.cut is None:
            continue
        if key != pattern and pattern.rpartition(".")[2] not in ("weight", "bias"):
            raise PlanError(f"auto knows how to cut a weight and a bias, not {name!r}: {_WHAT}")
        rule = _rule(pattern, key, style, meta, config)
        if rule is not None and rules.setdefault(pattern, rule) != rule:
            raise PlanError(f"the tensors {pattern!r} are of several shapes: {_WHAT}")
    unused = [key for key, style in styles.items() if key not in used and _cuts(style)]
    if unused:
        raise PlanError(
            f"Transformers cuts {listed(unused)}, which the checkpoint has not under these names: {_WHAT}"
        )
    if not rules:
        raise PlanError(f"Transformers cuts none of the tensors of {root}: {_WHAT}")
    text = f'schema = "{SCHEMA}"\n' + "".join(map(_as_toml, rules.values())) + '\n[[rule]]\nmatch = "**"\n'
    return Plan((*rules.values(), WHOLE), "the plan of Transformers", text)


def _cuts(style: str) -> bool:
    return style in _STYLES and _STYLES[style].cut is not None


def _rule(pattern: str, key: str, style: _Style, meta: TensorMeta, config: Config) -> Rule | None:
    assert style.cut is not None
    dims = len(meta.shape)
    if dims == 1:
        if not style.vector:
            return None
        cut, sections = 0, 1  # of a vector Transformers cuts no sections
    else:
        cut, sections = dims + style.cut, style.sections
    if cut < 0:
        raise PlanError(f"Transformers cuts {meta.name!r}, which has the shape {list(meta.shape)}: {_WHAT}")
    heads = key.rpartition(".")[2] in _KV and type(config.values.get("num_key_value_heads")) is int
    take = Take(
        match=Pattern(pattern),
        heads=("num_key_value_heads",) if heads else (),
        sections=(1,) * sections if sections > 1 else (),
    )
    return Rule(takes=(take,), cut=cut)


def _transformers_plan(root: Path, metas: Mapping[str, TensorMeta]) -> dict[str, str]:
    """Return what Transformers does to each module or parameter that the model has."""
    try:
        import transformers
    except ImportError as exc:
        raise PlanError(
            f"auto asks Transformers, which is not installed: pip install transformers, or {_WHAT}"
        ) from exc
    config = _asked(
        f"Transformers has no configuration for {root}",
        lambda: transformers.AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False),
    )
    name = type(config).__name__
    if config.get_text_config() is not config:
        raise PlanError(f"{name} is of a model of several parts, and auto cuts text models alone: {_WHAT}")
    if not getattr(config, "base_model_tp_plan", None):
        raise PlanError(f"Transformers has no tensor-parallel plan for {name}: {_WHAT}")
    model = _asked(f"Transformers cannot make a model of {name}", lambda: _empty(transformers, config))
    keep, tied = _parameters(model, metas)
    given = getattr(model, "tp_plan", None) or {}
    plan = {key: style for key, style in given.items() if key in keep and key not in tied}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in metas):
        return plan
    return {key.removeprefix(prefix): style for key, style in plan.items() if key.startswith(prefix)}


def _asked(what: str, ask: Callable[[], Any]) -> Any:
    """Ask Transformers, which a config.json can have raise many things.

    Raises:
        PlanError: it raised one.
    """
    try:
        return ask()
    except _RAISED as exc:
        why = " ".join(str(exc).split())[:300]
        raise PlanError(f"{what} ({why}): {_WHAT}") from exc


def _empty(transformers: Any, config: Any) -> Any:
    """Return a model without memory, of the class that the configuration names."""
    import torch

    names = getattr(config, "architectures", None) or []
    made: Any = getattr(transformers, names[0], None) if names else None
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        made = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return made(config)


def _parameters(model: Any, metas: Mapping[str, TensorMeta]) -> tuple[set[str], set[str]]:
    """Return the names that a plan may give a model's parameters, and those that stand for others of them.

    A plan also names what only other models of its kind have: dense layers where all are experts.
    """
    keep: set[str] = set()
    tied: set[str] = set()
    for name in dict(model.named_parameters(remove_duplicate=False)):
        pattern = _NUMBER.sub("*", name)
        keep |= {pattern, pattern.rpartition(".")[0]}
    for name in getattr(model, "all_tied_weights_keys", None) or ():
        pattern = _NUMBER.sub("*", name)
        if name not in metas:
            tied |= {pattern, pattern.rpartition(".")[0]}
    return keep, tied


def _as_toml(rule: Rule) -> str:
    (take,) = rule.takes
    lines = ["", "[[rule]]", f'match = "{take.match.text}"', f"cut = {rule.cut}"]
    if take.heads:
        lines.append(f'heads = "{take.heads[0]}"')
    if take.sections:
        lines.append(f"sections = {list(take.sections)}")
    return "\n".join(lines) + "\n"
