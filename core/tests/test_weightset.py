# SPDX-License-Identifier: Apache-2.0
import inspect
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from weights_core import dtypes
from weights_core.errors import ConsumedError
from weights_core.guard import Guarded
from weights_core.tensors import nbytes
from weights_core.types import Layout, TensorMeta
from weights_core.weightset import (
    LazyTensor,
    Target,
    WeightSet,
    WeightSetWrapper,
    check_destination,
    normalise,
)


class InMemory(WeightSet):
    provider = "memory"

    def __init__(self, tensors):
        self.tensors = tensors
        self.reads = []

    @property
    def metas(self):
        return {name: describe(name, tensor) for name, tensor in self.tensors.items()}

    def read(self, name, slices=None):
        self.reads.append((name, slices))
        return self.tensors[name][slices or ()]


def describe(name, tensor):
    dtype = dtypes.from_torch(tensor.dtype)
    return TensorMeta(name, dtypes.stored_shape(dtype, tuple(tensor.shape)), dtype, nbytes(tensor))


A = torch.arange(20.0).reshape(4, 5)
B = torch.arange(3, dtype=torch.int64)


@pytest.fixture
def weights():
    return InMemory({"a": A, "b": B})


# The mapping ------------------------------------------------------------------------------------


def test_the_set_is_a_mapping_that_reads_on_demand(weights):
    assert isinstance(weights, Mapping)
    assert (len(weights), list(weights), list(weights.keys())) == (2, ["a", "b"], ["a", "b"])
    assert "a" in weights
    assert "ghost" not in weights
    assert 3 not in weights
    assert weights.reads == []
    assert weights["a"] is not None
    assert weights.reads == [("a", None)]
    assert {name: tensor.shape for name, tensor in weights.items()} == {"a": (4, 5), "b": (3,)}


@pytest.mark.parametrize(
    "use", [lambda w: w["ghost"], lambda w: w.meta("ghost"), lambda w: w.lazy()["ghost"]]
)
def test_an_unknown_name_is_a_key_error(weights, use):
    with pytest.raises(KeyError, match="ghost"):
        use(weights)


def test_meta_is_known_without_reading(weights):
    assert weights.meta("a") == TensorMeta("a", (4, 5), "F32", 80)
    assert weights.meta("b").torch_shape == (3,)
    assert weights.reads == []


def test_a_plain_set_holds_nothing_and_counts_nothing(weights):
    assert (weights.bytes_read, weights.notes, weights.in_place) == (0, (), False)
    assert weights.release(["a", "ghost"]) == 0
    weights.close()
    weights.close()
    assert torch.equal(weights["a"], A)


def test_repr_says_what_it_is_without_reading(weights):
    assert repr(weights) == "<InMemory of 2 tensors, checkpoint, by 'memory'>"
    assert weights.reads == []


def test_sets_are_compared_by_identity_without_reading(weights):
    assert weights == weights
    assert weights != InMemory(weights.tensors)
    assert len({weights, InMemory(weights.tensors)}) == 2
    assert weights.reads == []


def test_an_abstract_set_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        WeightSet()


# Streaming and filling --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [(None, ["a", "b"]), (["b", "a"], ["a", "b"]), ({"b"}, ["b"]), (("a", "a"), ["a"]), ([], [])],
)
def test_stream_yields_what_is_asked_for_once_in_the_order_of_the_set(weights, names, expected):
    found = list(weights.stream(names))
    assert [name for name, _ in found] == expected
    assert all(torch.equal(tensor, weights.tensors[name]) for name, tensor in found)
    assert [name for name, _ in weights.reads] == expected


def test_stream_reads_one_tensor_at_a_time(weights):
    stream = weights.stream()
    assert weights.reads == []
    assert next(stream)[0] == "a"
    assert weights.reads == [("a", None)]


def test_fill_fills_in_the_order_given_and_yields_each_target(weights):
    targets = [
        Target("b", torch.zeros(3, dtype=torch.int64)),
        Target("a", torch.zeros(4, 5)),
        Target("a", torch.zeros(2, 1), (slice(1, 3), slice(4, 5))),
    ]
    filling = weights.fill(iter(targets))
    assert weights.reads == []
    assert next(filling) is targets[0]
    assert weights.reads == [("b", None)]
    assert list(filling) == targets[1:]
    assert torch.equal(targets[0].out, B)
    assert torch.equal(targets[1].out, A)
    assert torch.equal(targets[2].out, A[1:3, 4:5])


def test_targets_are_equal_only_to_themselves():
    out = torch.zeros(1)
    assert Target("a", out) != Target("a", out)


def test_read_into_copies_into_any_view(weights):
    base = torch.zeros(5, 8)
    weights.read_into("a", base.t()[:4], None)
    assert torch.equal(base.t()[:4], A)
    assert not base.t()[4:].any()


def test_read_into_a_parameter(weights):
    out = torch.nn.Parameter(torch.zeros(4, 5))
    weights.read_into("a", out)
    assert torch.equal(out, A)
    assert out.is_leaf


@pytest.mark.parametrize(
    "out", [torch.zeros(5, 4), torch.zeros(1), torch.zeros(4, 5, 1), torch.zeros(4, 5, dtype=torch.float64)]
)
def test_read_into_refuses_to_cast_or_broadcast(weights, out):
    with pytest.raises(ValueError, match=r"tensor 'a' is torch.float32 \[4, 5\], the destination is"):
        weights.read_into("a", out)
    assert not out.any()


# The lazy view ----------------------------------------------------------------------------------


def test_the_lazy_view_knows_shape_and_dtype_without_reading(weights):
    view = weights.lazy()
    assert isinstance(view, Mapping)
    assert (list(view), len(view), "a" in view, "ghost" in view) == (["a", "b"], 2, True, False)
    value = view["a"]
    assert (value.get_shape(), value.get_dtype(), value.shape) == ([4, 5], "F32", (4, 5))
    assert repr(value) == "<LazyTensor 'a' F32 [4, 5]>"
    assert weights.reads == []


def test_the_lazy_view_has_the_shape_that_torch_gives():
    packed = torch.zeros(2, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    value = InMemory({"p": packed}).lazy()["p"]
    assert (value.get_shape(), value.get_dtype()) == ([2, 3], "F4")


@pytest.mark.parametrize(
    ("index", "read"),
    [
        (slice(1, 3), (slice(1, 3),)),
        ((slice(None), slice(2, 4)), (slice(None), slice(2, 4))),
        ((slice(-2, None, 1), slice(0, 0)), (slice(-2, None, 1), slice(0, 0))),
        ((), ()),
    ],
    ids=str,
)
def test_plain_slices_read_only_the_part(weights, index, read):
    assert torch.equal(weights.lazy()["a"][index], A[index])
    assert weights.reads == [("a", read)]


@pytest.mark.parametrize(
    "index",
    [
        ...,
        (..., slice(0, 2)),
        (slice(0, 2), ...),
        slice(None, None, 2),
        (slice(None), slice(0, 5, 3)),
        2,
        -1,
        (slice(None), 0),
        (1, 2),
        None,
        (slice(0, 2), None),
        [0, 2],
        torch.tensor([3, 0]),
        (torch.tensor([3, 0]), torch.tensor([1, 1])),
        A > 7,
        np.array([3, 0]),
        (slice(None), np.array([3, 0])),
        (np.array([3, 0]), ...),
    ],
    ids=str,
)
def test_every_other_index_selects_what_torch_selects(weights, index):
    assert torch.equal(weights.lazy()["a"][index], A[index])


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ((slice(None),) * 3, IndexError),
        (9, IndexError),
        (slice(None, None, -1), ValueError),
        ("a", TypeError),
    ],
)
def test_an_index_that_torch_refuses_is_refused(weights, index, error):
    with pytest.raises(error):
        weights.lazy()["a"][index]


def test_a_lazy_scalar():
    value = InMemory({"s": torch.tensor(3.0)}).lazy()["s"]
    assert value.get_shape() == []
    assert value[...].item() == value[()].item() == 3.0


# The wrapper ------------------------------------------------------------------------------------


@pytest.fixture
def inner(mocker):
    inner = mocker.create_autospec(InMemory, instance=True)
    inner.metas = {"a": describe("a", A)}
    inner.bytes_read = 12
    inner.notes = ("a note",)
    inner.layout = Layout.FINAL
    inner.provider = "someone"
    inner.in_place = True
    return inner


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("read", ("a", (slice(1),))),
        ("stream", (["a"],)),
        ("mapped", ({"a": (slice(1),)},)),
        ("read_into", ("a", A, (slice(1),))),
        ("fill", ([Target("a", A)],)),
        ("release", (["a"],)),
        ("allocate_from", (torch.empty,)),
        ("close", ()),
    ],
)
def test_a_wrapper_forwards_every_call_with_its_arguments_and_result(inner, method, args):
    result = getattr(WeightSetWrapper(inner), method)(*args)
    getattr(inner, method).assert_called_once_with(*args)
    if method not in ("read_into", "allocate_from", "close"):
        assert result is getattr(inner, method).return_value


@pytest.mark.parametrize("name", ["metas", "bytes_read", "notes", "layout", "provider", "in_place", "inner"])
def test_a_wrapper_forwards_every_property(inner, name):
    expected = inner if name == "inner" else getattr(inner, name)
    assert getattr(WeightSetWrapper(inner), name) is expected


def test_a_wrapper_overrides_every_method_that_a_set_may_override():
    derived = {"meta", "lazy", "keys", "items", "values", "get"}  # these follow from metas and read
    public = {name for name, _ in inspect.getmembers(WeightSet) if not name.startswith("_")} - derived
    assert public - vars(WeightSetWrapper).keys() == {"layout", "provider", "in_place", "fills"}


def test_a_set_maps_nothing_unless_it_can(weights):
    assert list(weights.mapped()) == list(weights.mapped(["a"])) == list(weights.mapped({"a": None})) == []
    with pytest.raises(KeyError, match="ghost"):
        list(weights.mapped(["a", "ghost"]))


class Mapped(InMemory):
    def mapped(self, names=None):
        yield "a", A


@pytest.mark.parametrize("way", ["read", "read_into", "stream", "fill", "metas", "release", "close"])
def test_what_a_wrapper_changes_is_not_bypassed_by_mapping(way):
    changed = property(lambda self: self.inner.metas) if way == "metas" else lambda self, *args: None
    wrapper = type("Changed", (WeightSetWrapper,), {way: changed})
    assert [name for name, _ in wrapper(Mapped({"a": A})).mapped()] == (
        ["a"] if way in ("release", "close") else []
    )


def test_a_wrapper_that_maps_itself_is_asked():
    class Own(WeightSetWrapper):
        def read(self, name, slices=None):
            return -self.inner.read(name, slices)

        def mapped(self, names=None):
            yield "b", B

    assert [name for name, _ in Own(Mapped({"a": A, "b": B})).mapped()] == ["b"]
    assert [name for name, _ in Guarded(Own(Mapped({"a": A, "b": B})), "someone").mapped()] == ["b"]


def test_a_wrapper_is_a_set_itself(weights):
    class Negated(WeightSetWrapper):
        def read(self, name, slices=None):
            return -super().read(name, slices)

    wrapped = Negated(WeightSetWrapper(weights))
    assert list(wrapped) == ["a", "b"]
    assert torch.equal(wrapped["a"], -A)
    assert torch.equal(wrapped.lazy()["a"][1:2], -A[1:2])
    assert torch.equal(dict(WeightSetWrapper(weights).stream())["a"], A)
    assert repr(wrapped) == "<Negated of 2 tensors, checkpoint, by 'memory'>"


class Shrinking(InMemory):
    """Of which each tensor can be read until it is released."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.left = dict.fromkeys(tensors)

    def read(self, name, slices=None):
        if name not in self.left:
            raise ConsumedError(name, "a test")
        return super().read(name, slices)

    def release(self, names):
        for name in names:
            del self.left[name]

    def __iter__(self):
        return iter(list(self.left))

    def __len__(self):
        return len(self.left)

    def __contains__(self, name):
        return name in self.left


@pytest.mark.parametrize("wrap", [lambda s: s, WeightSetWrapper, lambda s: Guarded(s, "someone")])
def test_a_set_may_shrink_while_it_is_iterated(wrap):
    weights = wrap(Shrinking({"a": A, "b": B, "c": A}))
    seen = []
    for name, tensor in weights.items():
        seen.append(name)
        weights.release(["b"] if name == "a" else [])
        assert tensor is not B
    assert seen == ["a", "c"]
    assert ["b" in weights, len(weights), list(weights)] == [False, 2, ["a", "c"]]
    values = iter(weights.values())
    next(values)
    weights.release(["c"])
    assert list(values) == []
    with pytest.raises(ConsumedError, match="'c' was consumed by a test, and cannot be read again"):
        weights["c"]


def test_a_wrapper_that_changes_the_metas_iterates_over_those():
    class Renamed(WeightSetWrapper):
        @property
        def metas(self):
            return {f"x.{name}": meta for name, meta in self.inner.metas.items()}

        def read(self, name, slices=None):
            return self.inner.read(name[2:], slices)

    renamed = Renamed(InMemory({"a": A, "b": B}))
    assert (list(renamed), len(renamed), "x.a" in renamed, "a" in renamed) == (["x.a", "x.b"], 2, True, False)
    assert torch.equal(dict(renamed.items())["x.a"], A)


@pytest.mark.parametrize("way", ["stream", "items", "values"])
def test_nobody_keeps_a_tensor_that_was_handed_on(way):
    class Fresh(InMemory):
        def read(self, name, slices=None):
            return super().read(name, slices).clone()

    tensors = iter(getattr(Guarded(Fresh({"a": A, "b": B}), "someone"), way)())
    for item in tensors:
        alive = weakref.ref(item if way == "values" else item[1])
        del item
        assert alive() is None


# Helpers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        (None, (range(4), range(5))),
        ((), (range(4), range(5))),
        ((slice(1, 3),), (range(1, 3), range(5))),
        ((slice(-3, -1), slice(None, 2)), (range(1, 3), range(2))),
        ((slice(2, 99), slice(-99, 1, 1)), (range(2, 4), range(1))),
        ((slice(3, 1), slice(5, None)), (range(3, 1), range(5, 5))),
    ],
)
def test_normalise_gives_one_range_for_each_dimension(slices, expected):
    assert normalise(slices, (4, 5)) == expected


def test_normalise_of_a_scalar():
    assert normalise(None, ()) == normalise((), ()) == ()


@pytest.mark.parametrize(
    ("slices", "why"),
    [
        ((slice(None),) * 3, "3 slices for 2 dimensions"),
        ((slice(0, 4, 2),), "step 1"),
        ((slice(None), slice(None, None, -1)), "step 1"),
        ((slice(None), slice(None, None, 0)), "step 1"),
    ],
)
def test_normalise_refuses(slices, why):
    with pytest.raises(ValueError, match=why):
        normalise(slices, (4, 5))


def test_check_destination_accepts_the_same_shape_and_dtype():
    check_destination("a", torch.empty(4, 5), (4, 5), torch.float32)
    check_destination("a", torch.empty(5, 4).t(), (4, 5), torch.float32)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 4), torch.float32), ((20,), torch.float32), ((4, 5), torch.float16), ((), torch.float32)],
)
def test_check_destination_says_what_both_are(shape, dtype):
    with pytest.raises(ValueError, match="'name'") as caught:
        check_destination("name", torch.empty(4, 5), shape, dtype)
    expected = f"tensor 'name' is {dtype} {list(shape)}, the destination is torch.float32 [4, 5]"
    assert str(caught.value) == expected


def test_a_lazy_tensor_reads_through_the_set_it_was_made_with(weights):
    value = LazyTensor(weights, weights.meta("b"))
    assert torch.equal(value[1:], B[1:])
