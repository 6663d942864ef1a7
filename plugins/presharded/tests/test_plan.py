# SPDX-License-Identifier: Apache-2.0
"""Plans: what a file may say, and what becomes of a checkpoint's tensors by it."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from weights_core import TensorMeta, dtypes
from weights_core.tensors import as_bytes
from weights_core.testing import random_tensor, write_checkpoint
from weights_presharded import PlanError, read_plan, shard
from weights_presharded.outputs import Config, outputs
from weights_presharded.plan import Pattern, parse_plan

SCHEMA = 'schema = "weights.plan/1"\n'


def plan_of(text):
    import tomllib

    return parse_plan(tomllib.loads(SCHEMA + text), "the plan", text)


def metas_of(**shapes):
    return {
        name: TensorMeta(name, shape, "F32", dtypes.nbytes("F32", shape)) for name, shape in shapes.items()
    }


def config_of(tmp_path, **values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return Config(tmp_path / "config.json")


def cut(tmp_path, text, tensors, size, /, **values):
    """Cut a real checkpoint; return each rank's tensors, as the safetensors library reads them."""
    source = write_checkpoint(tmp_path / "source", tensors)
    (source / "config.json").write_text(json.dumps(values))
    (tmp_path / "plan.toml").write_text(SCHEMA + text)
    shard(source, tmp_path / "out", size=size, plan=read_plan(tmp_path / "plan.toml"))
    return [
        {
            k: v
            for f in (tmp_path / f"out/rank-{r}-of-{size}").glob("*.safetensors")
            for k, v in load_file(f).items()
        }
        for r in range(size)
    ]


# Patterns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "wilds"),
    [
        ("a.*.b", "a.1.b", ("1",)),
        ("a.*.b", "a.1.2.b", None),
        ("a.**", "a.1.2.b", ("1.2.b",)),
        ("**", "a", ("a",)),
        ("**.b", "b", None),
        ("a.b", "a.b", ()),
        ("a.b", "axb", None),
        ("*norm.w", "layernorm.w", ("layer",)),
        ("a[0]", "a[0]", ()),
        ("*.*", "a.b", ("a", "b")),
    ],
)
def test_a_star_is_one_part_of_a_name_and_two_are_any(pattern, name, wilds):
    assert Pattern(pattern).match(name) == wilds
    if wilds is not None:
        assert Pattern(pattern).filled(wilds) == name


# What is cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "U8", "F64", "BOOL"])
def test_any_dimension_is_cut(tmp_path, dim, size, dtype):
    tensors = {"w": random_tensor(8, 4, 12, dtype=dtype)}
    ranks = cut(tmp_path, f'[[rule]]\nmatch = "w"\ncut = {dim}\n', tensors, size)
    for rank, found in enumerate(ranks):
        assert torch.equal(as_bytes(found["w"]), as_bytes(tensors["w"].chunk(size, dim)[rank]))


def test_rows_larger_than_a_block_are_cut_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("weights_presharded.cutting.BLOCK", 1000)
    tensors = {"wide": torch.randn(3, 4096), "long": torch.randn(4096, 2), "whole": torch.randn(999)}
    text = '[[rule]]\nmatch = "wide"\ncut = 1\n[[rule]]\nmatch = "long"\ncut = 1\n[[rule]]\nmatch = "whole"\n'
    for rank, found in enumerate(cut(tmp_path, text, tensors, 2)):
        assert torch.equal(found["wide"], tensors["wide"].chunk(2, 1)[rank])
        assert torch.equal(found["long"], tensors["long"].chunk(2, 1)[rank])
        assert torch.equal(found["whole"], tensors["whole"])


@pytest.mark.parametrize("dim", [0, 1])
def test_sections_are_cut_each_by_itself(tmp_path, dim):
    tensors = {"gate_up": torch.randn(24, 24)}
    text = f'[[rule]]\nmatch = "gate_up"\ncut = {dim}\nsections = [1, 1]\n'
    for rank, found in enumerate(cut(tmp_path, text, tensors, 4)):
        halves = tensors["gate_up"].chunk(2, dim)
        assert torch.equal(found["gate_up"], torch.cat([half.chunk(4, dim)[rank] for half in halves], dim))


def test_heads_are_repeated_where_there_are_fewer_than_ranks(tmp_path):
    heads, kv, width = 8, 2, 3
    q, k, v = torch.randn(heads * width, 5), torch.randn(kv * width, 5), torch.randn(kv * width, 5)
    text = """
[[rule]]
match = "qkv"
cut = 0
sections = ["n_heads", "text.n_kv", "text.n_kv"]
heads = ["n_heads", "text.n_kv", "text.n_kv"]
"""
    ranks = cut(tmp_path, text, {"qkv": torch.cat([q, k, v])}, 4, n_heads=heads, text={"n_kv": kv})
    for rank, found in enumerate(ranks):
        own = slice(rank // 2 * width, (rank // 2 + 1) * width)
        assert torch.equal(found["qkv"], torch.cat([q.chunk(4)[rank], k[own], v[own]]))


def test_experts_are_fused_and_stacked_in_their_order(tmp_path):
    tensors = {
        f"experts.{n}.{part}": torch.randn(4, 6)
        for n in (10, 2, 0, *range(3, 10), 1)
        for part in ("up", "gate")
    }
    text = """
[[rule]]
as = "w13"
cut = 0
stack = true
fuse = [{ match = "experts.*.gate" }, { match = "experts.*.up" }]
"""
    for rank, found in enumerate(cut(tmp_path, text, tensors, 2)):
        due = [
            torch.cat([tensors[f"experts.{n}.{part}"].chunk(2)[rank] for part in ("gate", "up")])
            for n in range(11)
        ]
        assert torch.equal(found["w13"], torch.stack(due))


def test_names_are_changed_and_tied_and_tensors_dropped(tmp_path):
    tensors = {"model.embed": torch.randn(4, 2), "model.norm": torch.randn(2), "inv_freq": torch.randn(3)}
    text = """
[[rule]]
match = "model.embed"
as = ["embed", "head"]
cut = 0
[[rule]]
match = "inv_freq"
drop = true
[[rule]]
match = "model.**"
as = "**"
"""
    first, _ = cut(tmp_path, text, tensors, 2)
    assert first.keys() == {"embed", "norm"}
    manifest = json.loads((tmp_path / "out/rank-1-of-2/manifest.json").read_bytes())
    assert manifest["ties"] == {"head": "embed"}


def test_the_first_rule_that_matches_decides(tmp_path):
    text = '[[rule]]\nmatch = "a"\ncut = 0\n[[rule]]\nmatch = "*"\n'
    (a, b) = outputs(plan_of(text), metas_of(a=(4,), b=(4,)), 2, config_of(tmp_path))
    assert (a.shape, b.shape) == ((2,), (4,))


# What does not fit --------------------------------------------------------------------------------


def test_no_ranks(tmp_path):
    with pytest.raises(PlanError, match="one rank or more, not for 0"):
        outputs(plan_of('[[rule]]\nmatch = "**"\n'), metas_of(a=(1,)), 0, config_of(tmp_path))


MISFITS = {
    "left over": ('[[rule]]\nmatch = "a"\n', r"says nothing of 1 tensor: b.*match = '\*\*'"),
    "uneven": (
        '[[rule]]\nmatch = "*"\ncut = 0\n',
        "tensor 'a', dimension 0: 3 can't be cut into 2 equal parts",
    ),
    "no such dimension": ('[[rule]]\nmatch = "*"\ncut = 2\n', r"cuts dimension 2 of 'a', which is \[3, 4\]"),
    "no such number": (
        '[[rule]]\nmatch = "*"\ncut = 1\nheads = "n.heads"\n',
        r"config.json has no number 'n.heads' \(it says None\)",
    ),
    "not heads": ('[[rule]]\nmatch = "*"\ncut = 1\nheads = 3\n', "4 are not 3 heads"),
    "uneven heads": (
        '[[rule]]\nmatch = "a"\ncut = 0\nheads = 3\n[[rule]]\nmatch = "*"',
        "3 heads are neither shared",
    ),
    "not sections": ('[[rule]]\nmatch = "*"\ncut = 1\nsections = [2, 1]\n', "are not 3 equal parts"),
    "one of two": (
        '[[rule]]\nas = "x"\nfuse = [{match = "a"}, {match = "c"}]\n[[rule]]\nmatch = "*"\n',
        "needs 'c', which is not there",
    ),
    "other shapes": (
        '[[rule]]\nas = "x"\nfuse = [{match = "a"}, {match = "b"}]\n',
        "join tensors of the shapes",
    ),
    "one name for two": (
        '[[rule]]\nmatch = "a"\nas = "x"\n[[rule]]\nmatch = "b"\nas = "x"\n',
        "the name 'x'",
    ),
    "two for one place": (
        '[[rule]]\nas = "x"\nfuse = [{match = "a"}]\n[[rule]]\nmatch = "b"\nas = "x"\n',
        "'x'",
    ),
    "nothing left": ('[[rule]]\nmatch = "*"\ndrop = true\n', "leaves nothing"),
    "no number": (
        '[[rule]]\nmatch = "*"\nas = "x"\nstack = true\n',
        "stacks by number, and 'a' of 'a' is none",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_plan_that_does_not_fit_names_the_tensor(tmp_path, case):
    text, says = MISFITS[case]
    with pytest.raises(PlanError, match=says):
        outputs(plan_of(text), metas_of(a=(3, 4), b=(4, 8)), 2, config_of(tmp_path))


def test_experts_with_a_gap_are_refused(tmp_path):
    text = '[[rule]]\nmatch = "*.w"\nas = "w"\nstack = true\n'
    with pytest.raises(PlanError, match=r"needs '1\.w', which is not there"):
        outputs(plan_of(text), metas_of(**{"0.w": (2,), "2.w": (2,)}), 1, config_of(tmp_path))
    with pytest.raises(PlanError, match="would stack 1000000001 tensors"):
        outputs(plan_of(text), metas_of(**{"0.w": (2,), "1000000000.w": (2,)}), 1, config_of(tmp_path))
    with pytest.raises(PlanError, match=r"takes both '1\.w' and '01\.w'"):
        outputs(plan_of(text), metas_of(**{"1.w": (2,), "01.w": (2,)}), 1, config_of(tmp_path))
    with pytest.raises(PlanError, match="of other shapes"):
        outputs(plan_of(text), metas_of(**{"0.w": (2,), "1.w": (3,)}), 1, config_of(tmp_path))


def test_dtypes_are_not_mixed_and_bytes_not_split(tmp_path):
    metas = metas_of(a=(4, 4)) | {"b": TensorMeta("b", (4, 4), "BF16", 32)}
    text = '[[rule]]\nas = "x"\nfuse = [{match = "a"}, {match = "b"}]\n'
    with pytest.raises(PlanError, match="would join F32 'a', BF16 'b'"):
        outputs(plan_of(text), metas, 1, config_of(tmp_path))
    packed = {"p": TensorMeta("p", (2, 2), "F4", 2)}
    with pytest.raises(PlanError, match=r"cuts 'p' .F4. within a byte"):
        outputs(plan_of('[[rule]]\nmatch = "p"\ncut = 1\n'), packed, 2, config_of(tmp_path))


WRONG_FILES = {
    "no schema": ("", "is of the schema None"),
    "no rule": (SCHEMA, r"has no \[\[rule\]\]"),
    "not TOML": ("schema = ", "is not TOML"),
    "misspelt": (
        SCHEMA + '[[rule]]\nmatch = "a"\ncuts = 0\n',
        "'cuts' has no place here .did you mean 'cut'",
    ),
    "both": (SCHEMA + '[[rule]]\nmatch = "a"\nfuse = []\n', "either match, or fuse"),
    "negative": (SCHEMA + '[[rule]]\nmatch = "a"\ncut = -1\n', "cut is a dimension, from 0, not -1"),
    "no name": (SCHEMA + '[[rule]]\nfuse = [{match = "a"}, {match = "b"}]\n', "needs a name of its own"),
    "wildcards of the name": (SCHEMA + '[[rule]]\nmatch = "a.*"\nas = "b"\n', "'b' must have 1 wildcards"),
    "wildcards": (
        SCHEMA + '[[rule]]\nas = "x"\nfuse = [{match = "a"}, {match = "b.*"}]\n',
        "same number of wildcards",
    ),
    "heads of nothing": (SCHEMA + '[[rule]]\nmatch = "a"\nheads = 2\n', "give cut"),
    "heads of sections": (
        SCHEMA + '[[rule]]\nmatch = "a"\ncut = 0\nsections = [1, 1]\nheads = 2\n',
        "each of the 2",
    ),
    "drop and cut": (
        SCHEMA + '[[rule]]\nmatch = "a"\ncut = 0\ndrop = true\n',
        "neither cut, fused nor renamed",
    ),
    "drop as a word": (SCHEMA + '[[rule]]\nmatch = "a"\ndrop = "yes"\n', "drop is true or false"),
    "a number as a pattern": (SCHEMA + "[[rule]]\nmatch = 3\n", "3 is no pattern"),
    "no heads": (SCHEMA + '[[rule]]\nmatch = "a"\ncut = 0\nheads = 0\n', "neither a number from 1"),
    "nothing to stack": (SCHEMA + '[[rule]]\nmatch = "a"\nas = "b"\nstack = true\n', "needs a wildcard"),
    "fuse of names": (SCHEMA + '[[rule]]\nas = "x"\nfuse = ["a"]\n', "a source is {match"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_plan_file_that_is_none_says_where(tmp_path, case):
    text, says = WRONG_FILES[case]
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=says) as info:
        read_plan(path)
    assert "plan.toml" in str(info.value)


def test_a_plan_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="No such file"):
        read_plan(tmp_path / "absent.toml")


TOML_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 4) | st.sampled_from(["a", "a.*", "**", "", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["match", "fuse", "as", "cut", "heads", "sections", "stack", "drop", "other"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(TOML_LIKE, min_size=1, max_size=3))
def test_any_rules_are_a_plan_that_fits_or_an_error_that_says_so(rules):
    metas = metas_of(**{"a": (4, 2), "a.0": (2,), "a.1": (2,)})
    try:
        plan = parse_plan({"schema": "weights.plan/1", "rule": rules}, "the plan", "")
        made = outputs(plan, metas, 2, Config(Path("/nonexistent/config.json")))
    except PlanError:
        return
    for output in made:
        assert sum(part.nbytes(0) for part in output.parts) == output.nbytes
        assert math.prod(output.shape) * 4 == output.nbytes


# The page on plans --------------------------------------------------------------------------------


def test_the_plan_in_the_documentation_does_what_it_says(tmp_path):
    page = (Path(__file__).parents[3] / "docs/presharded.md").read_text()
    (text,) = re.findall(r"```toml\n(schema.*?)```", page, re.DOTALL)
    layer = "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": torch.randn(8, 4),
        f"{layer}.self_attn.q_proj.weight": torch.randn(8, 4),
        f"{layer}.self_attn.k_proj.weight": torch.randn(4, 4),
        f"{layer}.self_attn.v_proj.weight": torch.randn(4, 4),
        f"{layer}.self_attn.o_proj.weight": torch.randn(4, 8),
        f"{layer}.mlp.gate_up_proj.weight": torch.randn(16, 4),
        **{
            f"{layer}.mlp.experts.{n}.{part}_proj.weight": torch.randn(4, 4)
            for n in (0, 1)
            for part in ("gate", "up")
        },
        f"{layer}.self_attn.rotary_emb.inv_freq": torch.randn(2),
        "model.norm.weight": torch.randn(4),
    }
    source = write_checkpoint(tmp_path / "source", tensors)
    (source / "config.json").write_text('{"num_key_value_heads": 2}')
    (tmp_path / "plan.toml").write_text(text)
    shard(source, tmp_path / "out", size=4, plan=read_plan(tmp_path / "plan.toml"))
    shapes = {
        name: tuple(t.shape)
        for name, t in load_file(tmp_path / "out/rank-1-of-4/model-00001-of-00001.safetensors").items()
    }
    assert shapes == {
        "embed": (2, 4),
        "layers.0.qkv": (2 + 2 + 2, 4),
        "layers.0.o": (4, 2),
        f"{layer}.mlp.gate_up_proj.weight": (4, 4),
        "layers.0.w13": (2, 2, 4),
        "norm.weight": (4,),
    }
