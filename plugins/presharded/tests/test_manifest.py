# SPDX-License-Identifier: Apache-2.0
"""What a folder says of itself is believed only as far as it can be true."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weights_core import Layout, TensorMeta
from weights_core.errors import CheckpointError, WeightsError
from weights_core.types import Axis, EngineInfo, Topology
from weights_presharded.manifest import (
    MANIFEST,
    RANK_SCHEMA,
    READY,
    SCHEMA,
    Maker,
    RankEntry,
    RankManifest,
    Ready,
    digest_of,
)

DIGEST = "xxh3_128:" + "0" * 32
NAMES = st.text(min_size=1, max_size=20)


def ready(**changes):
    fields = {
        "layout": Layout.SHARDED,
        "digest": DIGEST,
        "axes": {"tp": 2},
        "ranks": tuple(RankEntry(f"rank-{r}-of-2", {"tp": r}, 10, DIGEST) for r in range(2)),
    }
    return Ready(**(fields | changes))


def written(tmp_path, told):
    (tmp_path / READY).write_text(told if isinstance(told, str) else json.dumps(told))
    return tmp_path


@pytest.mark.parametrize(
    "told",
    [
        ready(),
        ready(layout=Layout.FINAL, component="vae", origin={"plan": "x", "key": "y"}),
        ready(maker=Maker("vllm", "1.0", "llama", "BF16", None)),
        ready(axes={}, ranks=(RankEntry("rank-0-of-1", {}, 0, DIGEST),)),
    ],
)
def test_ready_is_read_as_it_was_written(tmp_path, told):
    (tmp_path / READY).write_bytes(told.dumps())
    assert Ready.read(tmp_path) == told


def info(**axes):
    topology = Topology(axes={name: Axis(*axis) for name, axis in axes.items()})
    return EngineInfo(name="e", version="1", topology=topology)


def test_each_rank_finds_its_place_on_every_axis(tmp_path):
    ranks = tuple(
        RankEntry(f"rank-{2 * pp + tp}-of-4", {"tp": tp, "pp": pp}, 0, DIGEST)
        for pp in range(2)
        for tp in range(2)
    )
    found = ready(axes={"tp": 2, "pp": 2}, ranks=ranks)
    assert found.rank_for(info(tp=(2, 1), pp=(2, 0)), tmp_path).folder == "rank-1-of-4"
    assert found.rank_for(info(pp=(2, 1), tp=(2, 0), dp=(1, 0)), tmp_path).folder == "rank-2-of-4"
    with pytest.raises(WeightsError, match="cut for pp 2, tp 2, this engine needs tp 2"):
        found.rank_for(info(tp=(2, 1)), tmp_path)


def test_an_axis_of_one_is_none(tmp_path):
    alone = ready(axes={"tp": 1}, ranks=(RankEntry("rank-0-of-1", {"tp": 0}, 0, DIGEST),))
    assert alone.rank_for(info(), tmp_path).folder == "rank-0-of-1"
    assert alone.rank_for(info(tp=(1, 0), ep=(1, 0)), tmp_path).folder == "rank-0-of-1"


WRONG = {
    "a list": ("[]", "schema 'list'"),
    "no layout": ({"layout": None}, "None is not a valid Layout"),
    "of checkpoints": ({"layout": "checkpoint"}, "not cut for ranks"),
    "a made-up digest": ({"digest": "abc"}, "'abc' is no digest"),
    "no digest": ({"digest": None}, "None is no text"),
    "an axis of nothing": ({"axes": {"tp": 0}}, "0 is not a count"),
    "an axis of true": ({"axes": {"tp": True}}, "True is not a count"),
    "no ranks": ({"ranks": []}, "names no rank"),
    "ranks of a word": ({"ranks": "ranks"}, "not a valid READY"),
    "maker of a word": ({"maker": "vllm"}, "'vllm' is no table"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_ready_that_cannot_be_true_says_why(tmp_path, case):
    change, says = WRONG[case]
    told = change if isinstance(change, str) else json.loads(ready().dumps()) | change
    with pytest.raises(CheckpointError, match=says) as error:
        Ready.read(written(tmp_path, told))
    assert error.value.file == tmp_path / READY


RANKS = {
    "outside": ({"folder": "../../etc"}, "is not the plain name"),
    "hidden": ({"folder": ".ssh"}, "is not the plain name"),
    "absolute": ({"folder": "/etc"}, "is not the plain name"),
    "a number": ({"folder": 3}, "is not the plain name"),
    "another axis": ({"axes": {"pp": 0}}, "is not in"),
    "beyond": ({"axes": {"tp": 2}}, "is not in"),
    "negative": ({"axes": {"tp": -1}}, "-1 is not a count"),
    "negative bytes": ({"bytes": -1}, "-1 is not a count"),
    "no digest": ({"manifest": "sha256:00"}, "is no digest"),
}


@pytest.mark.parametrize("case", RANKS)
def test_a_rank_that_cannot_be_true_says_why(tmp_path, case):
    change, says = RANKS[case]
    told = json.loads(ready().dumps())
    told["ranks"][0] |= change
    with pytest.raises(CheckpointError, match=says):
        Ready.read(written(tmp_path, told))


# A rank's manifest --------------------------------------------------------------------------------


def manifest_in(folder):
    metas = {
        "a": TensorMeta("a", (2, 3), "F32", 24, folder / "m.safetensors"),
        "é": TensorMeta("é", (), "BF16", 2, folder / "m.safetensors"),
    }
    return RankManifest({"m.safetensors": 26}, metas, dict.fromkeys(metas, DIGEST), {"b": "a"})


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    raw = manifest_in(tmp_path).dumps()
    (tmp_path / MANIFEST).write_bytes(raw)
    assert RankManifest.read(tmp_path, digest_of(raw)) == manifest_in(tmp_path)
    with pytest.raises(CheckpointError, match="its digest differs"):
        RankManifest.read(tmp_path, DIGEST)


ROWS = {
    "dtype": (["F33", [2], "m.safetensors", DIGEST], "tensor 'a' has the dtype 'F33'"),
    "dtype of a list": ([[], [2], "m.safetensors", DIGEST], "not a valid manifest"),
    "shape": (["F32", "2", "m.safetensors", DIGEST], "tensor 'a' has the shape '2'"),
    "size": (["F32", [-2], "m.safetensors", DIGEST], "-2 is not a count"),
    "too large": (["F32", [2**40, 2**40], "m.safetensors", DIGEST], "too large"),
    "another file": (["F32", [2], "n.safetensors", DIGEST], "'n.safetensors', which is none of its files"),
    "digest": (["F32", [2], "m.safetensors", "abc"], "has the digest 'abc'"),
    "short": (["F32", [2]], "not a valid manifest"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_tensor_that_cannot_be_says_why(tmp_path, case):
    row, says = ROWS[case]
    told = json.loads(manifest_in(tmp_path).dumps())
    told["tensors"]["a"] = row
    (tmp_path / MANIFEST).write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=says):
        RankManifest.read(tmp_path, None)


@pytest.mark.parametrize(
    ("ties", "says"), [({"b": "c"}, "tensor 'b'.*tied to 'c'"), ({"a": "a"}, "tensor 'a'.*itself")]
)
def test_a_tie_to_nothing_is_refused(tmp_path, ties, says):
    told = json.loads(manifest_in(tmp_path).dumps()) | {"ties": ties}
    (tmp_path / MANIFEST).write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=says):
        RankManifest.read(tmp_path, None)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
READY_FIELDS = ["layout", "digest", "axes", "ranks", "component", "maker", "origin"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(READY_FIELDS), JSON_VALUES, st.booleans())
def test_any_value_of_any_field_is_sound_or_an_error(tmp_path_factory, field, value, in_rank):
    folder = tmp_path_factory.mktemp("ready")
    told = json.loads(ready().dumps())
    (told["ranks"][0] if in_rank else told)[field] = value
    try:
        found = Ready.read(written(folder, told))
    except CheckpointError:
        return
    assert all("/" not in rank.folder for rank in found.ranks)
    assert Ready.read(written(folder, found.dumps().decode())) == found


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["files", "tensors", "ties"]), JSON_VALUES | st.dictionaries(NAMES, st.lists(JSON_VALUES))
)
def test_any_manifest_is_sound_or_an_error(tmp_path_factory, field, value):
    folder = tmp_path_factory.mktemp("rank")
    told = json.loads(manifest_in(folder).dumps()) | {field: value}
    (folder / MANIFEST).write_text(json.dumps(told))
    try:
        found = RankManifest.read(folder, None)
    except CheckpointError:
        return
    assert all(meta.file.parent == folder for meta in found.tensors.values())
    assert set(found.ties.values()) <= found.tensors.keys()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([SCHEMA, RANK_SCHEMA]))
def test_any_bytes_are_an_error(tmp_path_factory, raw, schema):
    folder = tmp_path_factory.mktemp("bytes")
    for content in (raw, b'{"schema": "' + schema.encode() + b'", ' + raw):
        (folder / READY).write_bytes(content)
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(CheckpointError):
            Ready.read(folder)
        with pytest.raises(CheckpointError):
            RankManifest.read(folder, None)
