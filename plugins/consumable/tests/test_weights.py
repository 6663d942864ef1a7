# SPDX-License-Identifier: Apache-2.0

import ctypes
import gc
import pickle
import threading
from collections.abc import ItemsView, KeysView, ValuesView
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from weights_consumable.weights import ConsumableWeights
from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.errors import ConsumedError, WeightsError
from weights_core.guard import Guarded
from weights_core.meter import rss
from weights_core.shards import open_shards
from weights_core.testing import every_dtype, random_tensor, write_checkpoint
from weights_core.types import TensorMeta
from weights_core.weightset import Target, WeightSet

MIB = 1 << 20


def tensors_of(*names, shape=(4, 8), dtype="F32"):
    return {name: random_tensor(*shape, dtype=dtype, seed=n) for n, name in enumerate(names)}


LAYERS = tensors_of("embed", *(f"layers.{n}.{p}" for n in (1, 2, 10) for p in ("k", "q", "v")), "layers.1")


def same(one, other):
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.fixture
def opened(tmp_path):
    """Open a checkpoint of given tensors as a consumable set, closed when the test ends."""
    opened = []

    def open_(tensors=LAYERS, **how):
        path = write_checkpoint(tmp_path / str(len(opened)), tensors, **how)
        opened.append(ConsumableWeights(ShardSet(open_shards(find(path)), provider="disk")))
        return opened[-1]

    yield open_
    for weights in opened:
        weights.close()


@pytest.fixture(params=["bare", "guarded"])
def weights(request, opened):
    """The set as an engine sees it in a load, and bare."""
    return opened() if request.param == "bare" else Guarded(opened(), "disk")


class DictSet(WeightSet):
    """Tensors of a dict."""

    def __init__(self, tensors):
        self.tensors = tensors
        self._metas = {name: TensorMeta(name, tuple(t.shape), "F32", t.nbytes) for name, t in tensors.items()}

    @property
    def metas(self):
        return self._metas

    def read(self, name, slices=None):
        return self.tensors[name]


# What is mapped -------------------------------------------------------------------------------------


def test_what_is_mapped_is_no_memory_to_free(weights):
    mapped = dict(weights.mapped())
    assert all(same(tensor, LAYERS[name]) for name, tensor in mapped.items())
    assert mapped.keys() == LAYERS.keys()
    assert weights.live_bytes == 0
    assert weights.release(["embed"]) == 0
    assert same(mapped["embed"], LAYERS["embed"])


def test_a_consumed_name_is_not_mapped(weights):
    weights.mark_consumed("layers")
    assert [name for name, _ in weights.mapped()] == list(weights)
    with pytest.raises(ConsumedError, match=r"layers\.1\.q"):
        list(weights.mapped(["embed", "layers.1.q"]))
    with pytest.raises(ConsumedError, match=r"layers\.1\.q"):
        list(weights.mapped({"layers.1.q": None}))
    mapped = weights.mapped(sorted(weights))
    first, _ = next(mapped)
    weights.mark_consumed_keys([name for name in weights if name != first])
    assert list(mapped) == []


# A mapping that shrinks ------------------------------------------------------------------------


def test_unconsumed_it_is_what_it_wraps(weights):
    assert set(weights) == weights.keys() == set(weights.metas) == set(LAYERS)
    assert len(weights) == len(LAYERS)
    assert all(same(weights[name], tensor) for name, tensor in LAYERS.items())
    assert all(same(tensor, LAYERS[name]) for name, tensor in weights.items())
    assert all(same(tensor, LAYERS[name]) for name, tensor in weights.stream())
    assert same(weights.read("embed", (slice(1, 3), slice(2, 5))), LAYERS["embed"][1:3, 2:5])
    out = torch.empty(4, 8)
    for target in weights.fill([Target("embed", out)]):
        assert target.out is out
    assert same(out, LAYERS["embed"])
    assert weights.notes == ()
    with pytest.raises(KeyError, match="ghost"):
        weights["ghost"]


def test_a_prefix_is_consumed_at_the_dot_and_a_repeat_counts_nothing(weights):
    assert weights.mark_consumed("layers.1") == 4
    assert set(weights) == set(LAYERS) - {"layers.1", "layers.1.q", "layers.1.k", "layers.1.v"}
    assert weights.mark_consumed("layers.1") == 0
    assert weights.mark_consumed("layers.1.q") == 0
    assert same(weights["layers.10.q"], LAYERS["layers.10.q"])
    assert weights.mark_consumed("") == len(LAYERS) - 4
    assert (len(weights), list(weights)) == (0, [])


def test_keys_are_consumed_as_named(weights):
    assert weights.mark_consumed_keys(["layers.1", "ghost", "embed", "embed"]) == 2
    assert weights.mark_consumed_keys(iter(["embed"])) == 0
    assert len(weights) == len(LAYERS) - 2
    assert "layers.1" not in weights
    assert "layers.1.q" in weights
    assert weights.consumed_bytes == 2 * 128


def test_what_is_consumed_is_gone_from_every_way_of_looking(weights):
    keys, items, values = weights.keys(), weights.items(), weights.values()
    weights.mark_consumed("layers")
    assert (list(keys), len(keys), "layers.1" in keys) == (["embed"], 1, False)
    assert [name for name, _ in items] == ["embed"]
    assert len(values) == len(list(values)) == 1
    assert isinstance(keys, KeysView)
    assert isinstance(items, ItemsView)
    assert isinstance(values, ValuesView)
    assert keys & {"embed", "layers.1"} == {"embed"}
    assert weights.get("layers.1") is None
    assert [name for name, _ in weights.stream()] == ["embed"]
    assert weights.metas.keys() == LAYERS.keys()  # what the checkpoint holds
    assert weights.meta("layers.1").nbytes == 128


def test_iterating_is_not_disturbed_by_consuming(weights):
    seen = []
    for name, tensor in weights.items():
        assert same(tensor, LAYERS[name])
        seen.append(name)
        weights.mark_consumed(name.rpartition(".")[0] or name)
    assert len(seen) == len({name.rpartition(".")[0] or name for name in seen}) < len(LAYERS)
    assert len(weights) == 0


@pytest.mark.parametrize("names", [None, list(LAYERS)])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_stream_passes_over_what_was_consumed_before_its_turn(opened, kind, names):
    weights = opened(kind=kind)
    seen = []
    for name, tensor in weights.stream(names):
        assert same(tensor, LAYERS[name])
        seen.append(name)
        if name == "layers.1.k":  # a fused module fetches the rest of itself
            assert same(weights["layers.1.v"], LAYERS["layers.1.v"])
            assert weights.mark_consumed("layers.1") == 4
    assert "layers.1.v" not in seen
    assert set(LAYERS) - set(seen) <= {"layers.1", "layers.1.q", "layers.1.v"}
    assert len(seen) == len(set(seen))


def test_every_name_is_released_to_the_inner_set_once_and_not_before_the_stream_has_passed_it():
    released = []

    class Lending(DictSet):
        def release(self, names):
            released.extend(names)
            return 0

    weights = ConsumableWeights(Lending({name: torch.zeros(1) for name in "abcd"}))
    stream = weights.stream()
    next(stream)
    weights.release(["a", "c", "d"])
    assert released == ["a"]
    assert next(stream)[0] == "b"
    weights.release(["b"])
    assert released == ["a", "b"]
    stream.close()
    assert sorted(released) == ["a", "b", "c", "d"]
    assert list(weights.stream()) == []


# Reading what was consumed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("consume", "call"),
    [
        (lambda w: w.mark_consumed("layers.1"), "mark_consumed('layers.1')"),
        (lambda w: w.mark_consumed_keys(["layers.1.q"]), "mark_consumed_keys()"),
        (lambda w: w.release(["layers.1.q"]), "release()"),
        (lambda w: w.take_ownership({}), "take_ownership()"),
    ],
)
@pytest.mark.parametrize(
    "read",
    [
        lambda w: w["layers.1.q"],
        lambda w: w.read("layers.1.q", (slice(0, 1),)),
        lambda w: w.read_into("layers.1.q", torch.empty(4, 8)),
        lambda w: list(w.stream(["layers.1.q"])),
        lambda w: list(w.fill([Target("layers.1.q", torch.empty(4, 8))])),
        lambda w: w.filter_prefix("layers.1")["q"],
        lambda w: w.lazy()["layers.1.q"][:],
    ],
    ids=["[]", "read", "read_into", "stream", "fill", "filter_prefix", "lazy"],
)
def test_reading_what_was_consumed_says_who_consumed_it(weights, consume, call, read):
    consume(weights)
    with pytest.raises(ConsumedError) as caught:
        read(weights)
    where = f"{call} at {__file__}:{consume.__code__.co_firstlineno}"
    assert caught.value.tensor == "layers.1.q"
    assert caught.value.by == where
    assert str(caught.value) == f"tensor 'layers.1.q' was consumed by {where}, and cannot be read again"
    assert isinstance(caught.value, WeightsError)
    assert isinstance(caught.value, KeyError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_layers_that_two_modules_share_are_read_by_both_or_the_early_mark_is_named(weights):
    def module(prefix, *, last):
        taken = {name: tensor.clone() for name, tensor in weights.filter_prefix(prefix).items()}
        read = weights[f"{prefix}.q"].clone()
        if last:
            weights.mark_consumed(prefix)
        return taken, read

    first, second = module("layers.2", last=False), module("layers.2", last=True)
    assert same(first[1], second[1])
    assert first[0].keys() == second[0].keys() == {"q", "k", "v"}
    with pytest.raises(ConsumedError, match=r"layers\.2\.q.*mark_consumed\('layers\.2'\) at .*test_weights"):
        module("layers.2", last=True)


# filter_prefix ----------------------------------------------------------------------------------


def test_a_filtered_view_has_shorter_names_and_lives(weights):
    view = weights.filter_prefix("layers.1")
    assert set(view) == {"", "q", "k", "v"}
    assert len(view) == 4
    assert same(view["q"], LAYERS["layers.1.q"])
    assert same(view[""], LAYERS["layers.1"])
    assert {
        name: same(t, LAYERS[f"layers.1.{name}".rstrip(".")]) for name, t in view.items()
    } == dict.fromkeys(view, True)
    weights.mark_consumed_keys(["layers.1.q"])
    assert "q" not in view
    assert view.keys() == {"", "k", "v"}
    assert len(list(view.values())) == 3
    assert "4" not in repr(view)
    assert weights.filter_prefix("").keys() == set(weights)
    assert weights.filter_prefix("nothing").keys() == set()
    with pytest.raises(KeyError, match=r"layers\.1\.x"):
        view["x"]
    assert view != weights.filter_prefix("layers.1")


# Memory -----------------------------------------------------------------------------------------


BIG = tensors_of(*(f"m.{n}.{p}" for n in range(4) for p in ("a", "b")), shape=(8, MIB), dtype="BF16")
MANY = {
    f"m.{n}.experts.{e}.{kind}": random_tensor(256, 256, dtype="F8_E4M3") if kind == "w" else torch.ones(1, 2)
    for n in range(4)
    for e in range(256)
    for kind in ("w", "s")
}


def settled():
    """Return the resident memory when what other tests have left has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return rss()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("tensors", [BIG, MANY], ids=["bf16", "fp8 and scales"])
def test_memory_falls_with_each_module_read_by_name(opened, tensors, kind):
    weights = opened(tensors, kind=kind)
    size = sum(t.numel() * t.element_size() for t in tensors.values()) // 4
    weights.filter_prefix("m.0").keys()
    start = settled()
    for n in range(4):
        module = dict(weights.filter_prefix(f"m.{n}").items())
        assert 0.95 * size < rss() - start < 1.1 * size + 4 * MIB
        assert weights.live_bytes == size
        assert all(same(tensor, tensors[f"m.{n}.{name}"]) for name, tensor in module.items())
        module.clear()
        assert weights.mark_consumed(f"m.{n}") == len(tensors) // 4
        assert rss() - start < 4 * MIB
        assert weights.live_bytes == 0
    assert weights.consumed_bytes == 4 * size


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("tensors", [BIG, MANY], ids=["bf16", "fp8 and scales"])
def test_memory_falls_with_each_module_streamed(opened, tensors, guard):
    weights = opened(tensors)
    size = sum(t.numel() * t.element_size() for t in tensors.values()) // 4
    left = {f"m.{n}": set(weights.names_under(f"m.{n}")) for n in range(4)}
    gathered = {prefix: {} for prefix in left}
    start = settled()
    for name, tensor in (Guarded(weights, "disk") if guard else weights).stream():
        prefix = name[:3]
        gathered[prefix][name] = tensor
        del tensor
        left[prefix].remove(name)
        assert weights.live_bytes < 1.1 * size
        if not left[prefix]:
            assert rss() - start > 0.95 * size
            gathered[prefix].clear()
            weights.mark_consumed(prefix)
            assert rss() - start < 8 * MIB
    assert len(weights) == 0


def test_release_returns_the_bytes_that_nothing_refers_to(weights):
    kept = weights["layers.1.q"]
    weights["layers.1.k"]
    weights["layers.1.k"]
    assert weights.release(["layers.1.q", "layers.1.k", "layers.1.v"]) == 2 * 128
    assert weights.release(["layers.1.q", "layers.1.k", "layers.1.v"]) == 0
    assert weights.live_bytes == 128
    assert same(kept, LAYERS["layers.1.q"])
    del kept
    assert weights.live_bytes == 0


def test_a_kept_view_never_changes(opened):
    weights = opened(BIG)
    view = weights["m.0.a"][3:4, 10:20]
    streamed = [tensor[:1, :5] for _, tensor in weights.stream(["m.1.a", "m.1.b"])]
    weights.mark_consumed("m")
    for name in BIG:
        weights.inner.read(name)
    weights.close()
    assert same(view, BIG["m.0.a"][3:4, 10:20])
    assert same(streamed[1], BIG["m.1.b"][:1, :5])


@pytest.mark.parametrize("dtype", every_dtype())
@pytest.mark.parametrize("shape", [(), (0, 4), (6, 4)])
def test_every_dtype_and_shape_reads_as_it_is(opened, dtype, shape):
    if dtype == "F4" and not shape:
        pytest.skip("F4 is packed by rows")
    tensor = random_tensor(*shape, dtype=dtype)
    weights = opened({"t": tensor})
    read = weights["t"]
    assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
    assert read.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_name_asked_for_twice_is_read_twice_and_neither_changes_the_other(weights):
    first, second = weights["embed"], weights["embed"]
    first.zero_()
    assert same(second, LAYERS["embed"])
    assert same(weights["embed"], LAYERS["embed"])


def test_names_on_one_storage_are_freed_together_and_counted_once():
    base = torch.arange(12.0)

    class Tied(DictSet):
        def read(self, name, slices=None):
            return self.tensors[name]

    weights = ConsumableWeights(Tied({"a": base, "b": base.view(3, 4), "c": base[4:]}))
    for name in "abc":
        weights[name]
    weights.inner.tensors.clear()
    assert weights.live_bytes == 48
    assert weights.release(["a"]) == 0
    assert weights.release(["b"]) == 0
    assert weights.live_bytes == 48
    del base
    assert weights.release(["c"]) == 48


def test_a_set_that_counts_what_it_gives_back_is_believed():
    class Lending(DictSet):
        def release(self, names):
            return 1000 * len(list(names))

    weights = ConsumableWeights(Lending({"a": torch.zeros(1), "b": torch.zeros(1)}))
    assert weights.release(["a", "b", "ghost"]) == 2000
    assert weights.release(["a"]) == 0


# take_ownership ---------------------------------------------------------------------------------


def test_a_renamed_dict_takes_the_weights_over_and_pins_nothing(opened):
    weights = opened(BIG)
    derived = {name.replace("m.", "model."): tensor for name, tensor in weights.items()}
    start = rss()
    owned = weights.take_ownership(derived)
    assert len(weights) == 0
    assert weights.live_bytes == 0
    assert owned.live_bytes == 8 * 16 * MIB
    assert set(owned) == set(derived)
    for n in range(4):
        module = dict(owned.filter_prefix(f"model.{n}").items())
        assert same(module["a"], BIG[f"m.{n}.a"])
        module.clear()
        assert owned.mark_consumed(f"model.{n}") == 2
        assert start - rss() > (n + 1) * 31 * MIB
    assert derived == {}
    assert (owned.consumed_bytes, owned.live_bytes, weights.consumed_bytes) == (8 * 16 * MIB, 0, 0)
    with pytest.raises(ConsumedError, match=r"take_ownership\(\) at .*test_weights\.py"):
        weights["m.0.a"]
    with pytest.raises(ConsumedError, match=r"mark_consumed\('model\.3'\)"):
        owned["model.3.b"]


def test_parts_of_one_tensor_are_freed_with_the_last(opened):
    weights = opened({"qkv": random_tensor(12, 8)})
    derived = dict(zip("qkv", weights["qkv"].split(4), strict=True))
    owned = weights.take_ownership(derived)
    assert owned.live_bytes == 12 * 8 * 4
    assert [owned.release([name]) for name in "qkv"] == [0, 0, 12 * 8 * 4]


def test_what_was_taken_over_can_be_taken_over_again(opened):
    weights = opened()
    first = weights.take_ownership(dict(weights.items()))
    second = first.take_ownership({f"x.{name}": tensor for name, tensor in first.items()})
    assert second.release(list(second)) == len(LAYERS) * 128
    assert weights.notes == ()


def test_left_overs_of_what_was_taken_over_are_reported_and_closing_leaves_the_dict(opened):
    weights = opened()
    derived = {"one": weights["embed"], "two": weights["layers.1"]}
    owned = weights.take_ownership(derived)
    owned.mark_consumed("one")
    (note,) = weights.notes
    assert note == "never consumed, 0.0 MB: 1 tensor: two"
    weights.close()
    assert same(derived["two"], LAYERS["layers.1"])


@pytest.mark.parametrize("value", [None, "text", torch.zeros(1, dtype=torch.complex128)])
def test_only_weights_can_be_taken_over_and_a_refusal_leaves_the_set_as_it_was(opened, value):
    weights = opened()
    with pytest.raises(TypeError, match="'bad'"):
        weights.take_ownership({"bad": value})
    assert len(weights) == len(LAYERS)


# Accounting -------------------------------------------------------------------------------------


def test_an_observer_is_told_of_each_consumption(weights):
    told = []
    weights.observe(told.append)
    weights["layers.1.q"]
    weights.mark_consumed("layers.1")
    weights.mark_consumed("layers.1")
    weights.observe(None)
    weights.mark_consumed("embed")
    (one,) = told
    assert set(one.names) == {"layers.1", "layers.1.q", "layers.1.k", "layers.1.v"}
    assert (one.nbytes, one.freed) == (4 * 128, 128)
    assert one.by.startswith("mark_consumed('layers.1') at ")


def test_left_overs_and_what_is_still_held_are_reported_if_the_engine_marked(opened):
    weights = opened(BIG)
    held = weights["m.0.a"]
    weights.release(["m.0.b"])
    assert weights.notes == ()
    weights.mark_consumed("m.0")
    weights.mark_consumed("m.1")
    assert weights.notes == (
        "never consumed, 67.1 MB: 4 tensors: m.2.a, m.2.b, m.3.a, m.3.b",
        "consumed, but still referred to, 16.8 MB: 1 tensor: m.0.a",
    )
    del held
    weights.mark_consumed("")
    assert weights.notes == ()


def test_threads_consume_each_name_once(opened):
    names = [f"l.{n}.e.{e}" for n in range(40) for e in range(10)]
    weights = opened({name: torch.full((3,), float(n)) for n, name in enumerate(names)})
    begin = threading.Barrier(4)

    def work(number):
        begin.wait(20)
        count = 0
        for n in range(40):
            for name in list(weights)[number::4][:5]:
                tensor = weights.get(name)
                assert tensor is None or torch.all(tensor == names.index(name))
            count += weights.mark_consumed(f"l.{n}") + weights.mark_consumed_keys([f"l.{39 - n}.e.{number}"])
        return count

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4), timeout=60)) == len(names)
    assert (len(weights), weights.live_bytes) == (0, 0)
    assert weights.consumed_bytes == len(names) * 12


def test_closing_leaves_what_was_read_and_is_repeatable(weights):
    kept = weights["embed"]
    weights.close()
    weights.close()
    assert same(kept, LAYERS["embed"])
