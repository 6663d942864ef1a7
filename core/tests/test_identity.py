# SPDX-License-Identifier: Apache-2.0
"""What makes weights interchangeable, and how a mismatch is told."""

import json
import pickle

import attrs
import pytest

from weights_core import Axis, EngineInfo, Identity, Layout, Topology
from weights_core.errors import IdentityMismatchError

INFO = EngineInfo(
    name="toy",
    version="1.2",
    model="Llama",
    dtype="BF16",
    quantization="fp8",
    device="cuda:1",
    topology=Topology(world=Axis(8, 5), axes={"tp": Axis(4, 1), "pp": Axis(2, 1)}),
    role="draft",
    component="transformer",
    accepts={Layout.FINAL},
    shareable={Layout.FINAL: "x"},
    mutates_after_load="adapters",
)
OTHER = {
    "name": ("engine", "another"),
    "version": ("engine_version", "2"),
    "model": ("model", "Mistral"),
    "dtype": ("dtype", "F16"),
    "quantization": ("quantization", None),
    "role": ("role", "main"),
    "component": ("component", "vae"),
}
IRRELEVANT = {
    "device": "cpu",
    "accepts": {Layout.CHECKPOINT},
    "shareable": {},
    "mutates_after_load": None,
}
ENGINE_LAYOUTS = [Layout.SHARDED, Layout.FINAL]


@pytest.mark.parametrize("layout", Layout)
def test_the_same_engine_and_digest_are_interchangeable(layout):
    mine, theirs = Identity.of(INFO, "abc", layout), Identity.of(attrs.evolve(INFO), "abc", layout)
    assert mine == theirs
    assert mine.differences(theirs) == {}
    mine.require(theirs)


@pytest.mark.parametrize("layout", ENGINE_LAYOUTS)
def test_an_identity_holds_what_the_engine_says(layout):
    made = Identity.of(INFO, "abc", layout)
    assert attrs.asdict(made, recurse=False) == {
        "digest": "abc",
        "layout": layout,
        "role": "draft",
        "component": "transformer",
        "engine": "toy",
        "engine_version": "1.2",
        "model": "Llama",
        "dtype": "BF16",
        "quantization": "fp8",
        "axes": {"tp": Axis(4, 1), "pp": Axis(2, 1)},
    }


@pytest.mark.parametrize("layout", ENGINE_LAYOUTS)
@pytest.mark.parametrize(("engine_field", "expected"), OTHER.items())
def test_each_field_of_the_engine_counts(layout, engine_field, expected):
    field, value = expected
    mine = Identity.of(INFO, "abc", layout)
    theirs = Identity.of(attrs.evolve(INFO, **{engine_field: value}), "abc", layout)
    assert mine.differences(theirs) == {field: (getattr(mine, field), value)}
    with pytest.raises(IdentityMismatchError):
        mine.require(theirs)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(("field", "value"), IRRELEVANT.items())
def test_what_does_not_change_the_weights_does_not_count(layout, field, value):
    mine = Identity.of(INFO, "abc", layout)
    assert mine == Identity.of(attrs.evolve(INFO, **{field: value}), "abc", layout)


@pytest.mark.parametrize("layout", ENGINE_LAYOUTS)
@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"tp": Axis(4, 1)},
        {"tp": Axis(4, 2), "pp": Axis(2, 1)},
        {"tp": Axis(8, 1), "pp": Axis(2, 1)},
        {"tp": Axis(4, 1), "pp": Axis(2, 1), "ep": Axis(2, 0)},
    ],
)
def test_every_axis_and_rank_of_the_topology_counts(layout, axes):
    topology = Topology(world=INFO.topology.world, axes=axes)
    theirs = Identity.of(attrs.evolve(INFO, topology=topology), "abc", layout)
    assert list(Identity.of(INFO, "abc", layout).differences(theirs)) == ["axes"]


@pytest.mark.parametrize(
    "topology",
    [
        Topology(world=INFO.topology.world, axes={"pp": Axis(2, 1), "tp": Axis(4, 1)}),
        Topology(world=Axis(16, 13), axes=INFO.topology.axes),
    ],
    ids=["axes in another order", "another world"],
)
def test_the_order_of_axes_and_the_world_do_not_count(topology):
    mine = Identity.of(INFO, "abc", Layout.FINAL)
    assert mine == Identity.of(attrs.evolve(INFO, topology=topology), "abc", Layout.FINAL)


def test_at_checkpoint_the_engine_does_not_matter():
    another = EngineInfo(name="another", version="9", dtype="F16", role="draft", component="transformer")
    mine = Identity.of(INFO, "abc", Layout.CHECKPOINT)
    assert mine == Identity.of(another, "abc", Layout.CHECKPOINT)
    assert (mine.engine, mine.model, mine.dtype, mine.quantization, dict(mine.axes)) == (
        "",
        "",
        None,
        None,
        {},
    )


@pytest.mark.parametrize(("field", "value"), [("role", "main"), ("component", None)])
def test_at_checkpoint_role_and_component_still_matter(field, value):
    mine = Identity.of(INFO, "abc", Layout.CHECKPOINT)
    theirs = Identity.of(attrs.evolve(INFO, **{field: value}), "abc", Layout.CHECKPOINT)
    assert list(mine.differences(theirs)) == [field]


def test_another_digest_or_layout_is_a_difference():
    mine = Identity.of(INFO, "abc", Layout.SHARDED)
    assert mine.differences(Identity.of(INFO, "abd", Layout.SHARDED)) == {"digest": ("abc", "abd")}
    assert mine.differences(Identity.of(INFO, "abc", Layout.FINAL)) == {
        "layout": (Layout.SHARDED, Layout.FINAL)
    }


def test_the_error_names_every_field_that_differs_with_both_values_and_no_other():
    mine = Identity.of(INFO, "abc", Layout.FINAL)
    theirs = Identity.of(attrs.evolve(INFO, dtype="F16", version="2"), "xyz", Layout.FINAL)
    with pytest.raises(IdentityMismatchError) as info:
        mine.require(theirs)
    assert str(info.value) == (
        "not the same weights: digest: need 'abc', got 'xyz'; "
        "engine_version: need '1.2', got '2'; dtype: need 'BF16', got 'F16'"
    )
    assert info.value.fields == {
        "digest": ("abc", "xyz"),
        "engine_version": ("1.2", "2"),
        "dtype": ("BF16", "F16"),
    }


def test_differences_are_told_from_ones_own_side():
    mine, theirs = Identity.of(INFO, "a", Layout.FINAL), Identity.of(INFO, "b", Layout.FINAL)
    assert mine.differences(theirs) == {"digest": ("a", "b")}
    assert theirs.differences(mine) == {"digest": ("b", "a")}


@pytest.mark.parametrize("layout", Layout)
def test_an_empty_digest_is_refused(layout):
    with pytest.raises(ValueError, match="digest"):
        Identity.of(INFO, "", layout)


def test_an_identity_cannot_be_changed():
    made = Identity.of(INFO, "abc", Layout.FINAL)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        made.digest = "xyz"


def test_an_identity_does_not_share_the_mapping_it_was_given():
    axes = {"tp": Axis(2, 0)}
    made = Identity(digest="abc", layout=Layout.FINAL, axes=axes)
    axes["tp"] = Axis(2, 1)
    assert dict(made.axes) == {"tp": Axis(2, 0)}


def test_an_identity_can_be_sent_to_another_process():
    made = Identity.of(INFO, "abc", Layout.FINAL)
    assert pickle.loads(pickle.dumps(made)) == made


def test_plain_values_there_and_back():
    made = Identity.of(INFO, "abc", Layout.SHARDED)
    assert Identity.from_dict(json.loads(json.dumps(made.as_dict()))) == made


@pytest.mark.parametrize(
    "wrong",
    [
        {"digest": ""},
        {"digest": 3},
        {"dtype": 3},
        {"layout": "flat"},
        {"axes": {"tp": [2, 2]}},
        {"axes": {"tp": [2.0, 1]}},
        {"axes": {"tp": 2}},
        {"axes": None},
        {"more": 1},
    ],
    ids=str,
)
def test_what_is_no_identity_is_refused(wrong):
    with pytest.raises(ValueError, match=r"."):
        Identity.from_dict(Identity.of(INFO, "abc", Layout.SHARDED).as_dict() | wrong)
    with pytest.raises(ValueError, match="is no identity"):
        Identity.from_dict({})
