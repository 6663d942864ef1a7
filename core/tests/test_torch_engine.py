# SPDX-License-Identifier: Apache-2.0

import gc
import json
import os
import struct
import weakref
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import weights_core
from weights_core import Axis, FormatClaim, Layout, LoadFailed, PublishReceipt, Role, Topology, hookimpl
from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.errors import (
    CheckpointError,
    CoverageError,
    EngineError,
    PublishError,
    WeightsError,
)
from weights_core.plugin import ProviderPlugin, PublisherPlugin
from weights_core.shards import open_shards
from weights_core.tensors import as_bytes, nbytes
from weights_core.testing import every_dtype, host_of, random_tensor, write_checkpoint
from weights_core.torch_engine import TorchEngine
from weights_core.types import TensorMeta
from weights_core.weightset import WeightSet, WeightSetWrapper

LAYOUTS = [Layout.CHECKPOINT, Layout.SHARDED, Layout.FINAL]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        self.register_buffer("scale", torch.zeros(5, 2))
        self.register_buffer("cache", torch.full((2,), 7.0, device="cpu"), persistent=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


class Holder(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


class Held(WeightSet):
    """Tensors in memory, counted as they are read."""

    def __init__(self, tensors, layout=Layout.SHARDED):
        self.layout = layout
        self.tensors = dict(tensors)
        self.reads = []

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        dtype = weights_core.torch_engine.dtypes.from_torch
        return {
            name: TensorMeta(name, tuple(t.shape), dtype(t.dtype), nbytes(t))
            for name, t in self.tensors.items()
        }

    def read(self, name, slices=None):
        self.reads.append(name)
        return self.tensors[name]


class FailsAfter(WeightSetWrapper):
    def __init__(self, inner, count, error):
        super().__init__(inner)
        self.count, self.error = count, error

    def fill(self, targets):
        for index, target in enumerate(self.inner.fill(targets)):
            if index == self.count:
                raise self.error
            yield target


def fails_with(error, count=2):
    class Flaky(ProviderPlugin[None]):
        @hookimpl
        def resolve_format(self, request):
            return FormatClaim(roles={Role.SOURCE}, reason="breaks down")

        @hookimpl
        def load_weights(self, request, engine, source):
            return FailsAfter(disk_set(request.checkpoint), count, error)

    return Flaky


def on_meta(make):
    with torch.device("meta"):
        return make()


def disk_set(path):
    return ShardSet(open_shards(find(path)), provider="disk")


def seeded(model, **changes):
    """Random tensors for every entry of the model, each name's its own."""
    entries = model.state_dict(keep_vars=True)
    tensors = {
        name: torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(t.dtype)
        for i, (name, t) in enumerate(entries.items())
    }
    tensors.update(changes)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def saved(tmp_path, model, **changes):
    return write_checkpoint(tmp_path / "checkpoint", seeded(model, **changes), shards=2)


def oracle(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def load(engine, path, *, host=None, **kwargs):
    return weights_core.load(engine, path, host=host or host_of(), **kwargs)


def assert_same(have, want):
    assert have.dtype == want.dtype
    assert have.shape == want.shape
    assert torch.equal(as_bytes(have.cpu()), as_bytes(want))


def assert_holds(model, want):
    have = model.state_dict()
    assert have.keys() == want.keys()
    for name in want:
        assert_same(have[name], want[name])


def state(model):
    """Which tensor objects the model holds, where they lie, and their bytes."""
    found = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        found[name] = (
            id(tensor),
            tensor.is_meta,
            None if tensor.is_meta else bytes(as_bytes(tensor).numpy()),
        )
    return found


def refused(engine, path, **kwargs):
    """Load up to apply, which must raise CoverageError; return it and the set."""
    session = weights_core.open_session(engine, path, host=host_of(), **kwargs)

    def steps():
        with session:
            session.resolve()
            session.load()
            session.apply()

    with pytest.raises(CoverageError) as caught:
        steps()
    return caught.value, session.weights


# Models on meta ---------------------------------------------------------------------------------


def test_meta_model_receives_the_exact_bytes(tmp_path):
    model = on_meta(Net)
    folder = saved(tmp_path, model)
    report = load(TorchEngine(model), folder)
    assert_holds(model, oracle(folder))
    assert report.applied.written == oracle(folder).keys()
    assert report.nbytes == sum(nbytes(t) for t in oracle(folder).values())
    assert report.applied.host_bytes == report.nbytes


@pytest.mark.parametrize("dtype", every_dtype())
def test_meta_parameter_of_every_dtype(tmp_path, dtype):
    wanted = random_tensor(3, 4, dtype=dtype)
    parameter = nn.Parameter(torch.empty_like(wanted, device="meta"), requires_grad=False)
    model = Holder(w=parameter)
    load(TorchEngine(model), write_checkpoint(tmp_path, {"w": wanted}))
    assert_same(model.w, wanted)
    assert type(model.w) is nn.Parameter
    assert not model.w.requires_grad


@pytest.mark.parametrize("dtype", every_dtype())
def test_real_parameter_of_every_dtype(tmp_path, dtype):
    wanted = random_tensor(3, 4, dtype=dtype)
    parameter = nn.Parameter(torch.zeros_like(wanted.view(torch.uint8)).view(wanted.dtype), False)
    model = Holder(w=parameter)
    load(TorchEngine(model), write_checkpoint(tmp_path, {"w": wanted}))
    assert model.w is parameter
    assert_same(model.w, wanted)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalar_and_zero_element_parameters(tmp_path, shape, device):
    wanted = random_tensor(*shape, dtype="I32")
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.int32, device=device), requires_grad=False)
    model = Holder(w=parameter, other=nn.Parameter(torch.zeros(2, device=device)))
    load(TorchEngine(model), write_checkpoint(tmp_path, {"w": wanted, "other": torch.ones(2)}))
    assert_same(model.w, wanted)


def test_two_zero_element_parameters_are_not_taken_for_a_tie(tmp_path):
    model = Holder(a=nn.Parameter(torch.zeros(0)), b=nn.Parameter(torch.zeros(0)))
    error, _ = refused(TorchEngine(model), write_checkpoint(tmp_path, {"a": torch.zeros(0)}))
    assert error.missing == ("b",)


class Special(nn.Parameter):
    pass


@pytest.mark.parametrize("requires_grad", [True, False])
def test_parameter_subclass_attributes_and_requires_grad_are_kept(tmp_path, requires_grad):
    def loader(parameter, tensor):
        parameter.copy_(tensor)

    parameter = Special(torch.empty(2, 3, device="meta"), requires_grad=requires_grad)
    parameter.weight_loader = loader
    parameter.quantized = {"group": 128}
    model = Holder(w=parameter)
    load(TorchEngine(model), write_checkpoint(tmp_path, {"w": torch.ones(2, 3)}))
    assert type(model.w) is Special
    assert model.w is not parameter
    assert model.w.weight_loader is loader
    assert model.w.quantized is parameter.quantized
    assert model.w.requires_grad is requires_grad
    assert model.w.is_leaf


def test_attributes_of_a_buffer_are_kept(tmp_path):
    model = Holder(scale=torch.empty(2, device="meta"))
    model.scale.axis = 1
    load(TorchEngine(model), write_checkpoint(tmp_path, {"scale": torch.ones(2)}))
    assert model.scale.tolist() == [1.0, 1.0]
    assert model.scale.axis == 1


def test_a_loaded_parameter_can_be_trained(tmp_path):
    model = on_meta(lambda: nn.Linear(3, 2))
    load(TorchEngine(model), saved(tmp_path, model))
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad.tolist() == [[1.0] * 3] * 2


def test_persistent_buffers_are_loaded_and_others_left_alone(tmp_path):
    model = on_meta(Net)
    cache = model.cache
    folder = saved(tmp_path, model)
    load(TorchEngine(model), folder)
    assert_same(model.scale, oracle(folder)["scale"])
    assert model.cache is cache
    assert model.cache.tolist() == [7.0, 7.0]
    assert "cache" not in model.state_dict()


def test_non_persistent_buffers_on_meta_are_refused_by_name():
    model = on_meta(Net)
    model.inner[0].register_buffer("rope", torch.empty(3, device="meta"), persistent=False)
    model.register_buffer("mask", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(EngineError, match=r"2 tensors: mask, inner\.0\.rope"):
        TorchEngine(model)


def test_meta_and_real_parameters_in_one_model(tmp_path):
    model = Net()
    model.embed = on_meta(lambda: nn.Embedding(6, 4))
    real = model.inner[0].weight
    address = real.data_ptr()
    folder = saved(tmp_path, model)
    report = load(TorchEngine(model), folder)
    assert_holds(model, oracle(folder))
    assert model.inner[0].weight is real
    assert real.data_ptr() == address
    assert report.applied.host_bytes == nbytes(model.embed.weight)


def test_model_without_tensors(tmp_path):
    model = nn.ReLU()
    report = load(TorchEngine(model), write_checkpoint(tmp_path, {"extra": torch.ones(1)}))
    assert report.applied.written == frozenset()
    assert report.applied.unused == ("extra",)


def test_a_meta_parameter_keeps_its_memory_order(tmp_path):
    model = Holder(w=nn.Parameter(torch.empty(4, 3, device="meta").t()))
    wanted = random_tensor(3, 4)
    load(TorchEngine(model), write_checkpoint(tmp_path, {"w": wanted}))
    assert_same(model.w, wanted)
    assert model.w.stride() == (1, 3)


# Models that have memory ------------------------------------------------------------------------


def test_real_model_is_written_in_place(tmp_path):
    model = Net()
    before = {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
    folder = saved(tmp_path, model)
    report = load(TorchEngine(model), folder)
    assert_holds(model, oracle(folder))
    assert {n: (id(t), t.data_ptr()) for n, t in model.state_dict(keep_vars=True).items()} == before
    assert report.applied.host_bytes == 0
    assert model.cache.tolist() == [7.0, 7.0]


def test_non_contiguous_parameter_is_written_in_place(tmp_path):
    memory = torch.zeros(4, 6)
    model = Holder(w=nn.Parameter(memory.t()[::2]))
    wanted = random_tensor(3, 4)
    load(TorchEngine(model), write_checkpoint(tmp_path, {"w": wanted}))
    assert_same(model.w, wanted)
    assert_same(memory.t()[::2].contiguous(), wanted)
    assert not memory[:, 1::2].any()


# Failures half-way ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("kind", [CheckpointError, RuntimeError, KeyboardInterrupt])
def test_a_set_that_fails_half_way_leaves_a_meta_model_untouched(tmp_path, kind, count):
    error = kind("torn")
    model = on_meta(Net)
    before = state(model)
    folder = saved(tmp_path, model)
    with pytest.raises((WeightsError, KeyboardInterrupt)) as caught:
        load(TorchEngine(model), folder, host=host_of(flaky=fails_with(error, count)))
    causes = [caught.value, caught.value.__cause__, getattr(caught.value.__cause__, "__cause__", None)]
    assert any(cause is error for cause in causes)
    assert caught.value.__notes__ == ["the engine is untouched"]
    assert state(model) == before
    load(TorchEngine(model), folder)
    assert_holds(model, oracle(folder))


@pytest.mark.parametrize("make", [Net, Tied])
def test_a_file_truncated_after_opening_leaves_a_meta_model_untouched(tmp_path, make):
    model = on_meta(make)
    before = state(model)
    folder = write_checkpoint(tmp_path, seeded(model))
    session = weights_core.open_session(TorchEngine(model), folder, host=host_of())

    def steps():
        with session:
            session.resolve()
            session.load()
            file = folder / "model.safetensors"
            os.truncate(file, file.stat().st_size - 4)
            session.apply()

    with pytest.raises(CheckpointError, match=r"became shorter|was changed") as caught:
        steps()
    assert caught.value.__notes__ == ["the engine is untouched"]
    assert state(model) == before


@pytest.mark.parametrize("make", [Net, lambda: nn.Sequential(nn.Linear(2, 2), on_meta(Tied))])
def test_an_in_place_failure_says_the_model_must_not_be_used(tmp_path, make):
    model = make()
    host = host_of(flaky=fails_with(CheckpointError("torn")))
    with pytest.raises(CheckpointError, match="torn") as caught:
        load(TorchEngine(model), saved(tmp_path, model), host=host)
    (note,) = caught.value.__notes__
    assert "do not use it" in note
    assert "reinit=" in note


def test_an_in_place_failure_does_not_replace_meta_parameters_of_the_same_model(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), on_meta(lambda: nn.Linear(2, 2)))
    meta = model[1].weight
    with pytest.raises(CheckpointError, match="torn"):
        load(
            TorchEngine(model),
            saved(tmp_path, model),
            host=host_of(flaky=fails_with(CheckpointError("torn"))),
        )
    assert model[1].weight is meta
    assert meta.is_meta


def test_an_in_place_load_that_another_provider_could_take_over_aborts_without_reinit(tmp_path):
    model = Net()
    host = host_of(flaky=fails_with(LoadFailed("the line is cut", mutated=False)))
    with pytest.raises(EngineError, match="written in place") as caught:
        load(TorchEngine(model), saved(tmp_path, model), host=host)
    assert "the line is cut" in str(caught.value)
    assert caught.value.__notes__ == ["do not use the engine"]


def test_with_reinit_the_next_provider_takes_over_an_in_place_load(tmp_path):
    model = Net()
    called = []

    def reinit(given):
        called.append(given)
        for tensor in given.state_dict().values():
            tensor.fill_(0)

    folder = saved(tmp_path, model)
    host = host_of(flaky=fails_with(LoadFailed("the line is cut", mutated=False)))
    report = load(TorchEngine(model, reinit=reinit), folder, host=host)
    assert called == [model]
    assert report.provider == "disk"
    assert [(a.plugin, a.result) for a in report.attempts] == [
        ("flaky", "provided the weights"),
        ("flaky", "failed"),
        ("disk", "provided the weights"),
    ]
    assert_holds(model, oracle(folder))


def test_with_reinit_an_in_place_load_that_ends_in_an_error_is_reinitialised_once(tmp_path):
    model = Net()
    called = []
    host = host_of(flaky=fails_with(CheckpointError("torn")))
    with pytest.raises(CheckpointError, match="torn") as caught:
        load(TorchEngine(model, reinit=called.append), saved(tmp_path, model), host=host)
    assert called == [model]
    assert caught.value.__notes__ == ["the engine was re-initialised"]


def test_a_reinit_that_fails_does_not_hide_why_the_load_failed(tmp_path):
    def reinit(given):
        raise RuntimeError("no memory left")

    model = Net()
    host = host_of(flaky=fails_with(CheckpointError("torn")))
    with pytest.raises(CheckpointError, match="torn") as caught:
        load(TorchEngine(model, reinit=reinit), saved(tmp_path, model), host=host)
    (note,) = caught.value.__notes__
    assert "do not use it" in note
    assert "no memory left" in note


def test_a_meta_model_needs_no_reinit_for_the_next_provider(tmp_path):
    model = on_meta(Net)
    folder = saved(tmp_path, model)
    host = host_of(flaky=fails_with(LoadFailed("the line is cut", mutated=False)))
    report = load(TorchEngine(model), folder, host=host)
    assert report.provider == "disk"
    assert_holds(model, oracle(folder))


# What does not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Net, lambda: on_meta(Net)])
def test_missing_tensors_are_refused_before_anything_is_read(tmp_path, make):
    model = make()
    before = state(model)
    folder = saved(tmp_path, model, **{"inner.1.bias": None, "scale": None})
    error, weights = refused(TorchEngine(model), folder)
    assert sorted(error.missing) == ["inner.1.bias", "scale"]
    assert "missing 2 tensors" in str(error)
    assert "inner.1.bias" in str(error)
    assert weights.bytes_read == 0
    assert state(model) == before


@pytest.mark.parametrize("make", [Net, lambda: on_meta(Net)])
@pytest.mark.parametrize("wrong", [(3, 5), (4,), (4, 3), (1, 3, 4), ()])
def test_another_shape_is_refused_naming_both(tmp_path, make, wrong):
    model = make()
    before = state(model)
    folder = saved(tmp_path, model, **{"inner.0.weight": torch.zeros(wrong)})
    error, weights = refused(TorchEngine(model, cast=True), folder)
    assert f"inner.0.weight: checkpoint has shape {list(wrong)}, model [3, 4]" in str(error)
    assert error.mismatched.keys() == {"inner.0.weight"}
    assert weights.bytes_read == 0
    assert state(model) == before


@pytest.mark.parametrize("make", [Net, lambda: on_meta(Net)])
def test_another_dtype_is_refused_naming_both(tmp_path, make):
    model = make()
    before = state(model)
    folder = saved(tmp_path, model, **{"embed.weight": torch.zeros(6, 4, dtype=torch.bfloat16)})
    error, weights = refused(TorchEngine(model), folder)
    assert "embed.weight: checkpoint has dtype BF16, model F32" in str(error)
    assert "cast=True" in str(error)
    assert weights.bytes_read == 0
    assert state(model) == before


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float16),
        (torch.int64, torch.int32),
    ],
)
def test_cast_converts_as_torch_does(tmp_path, stored, held, device):
    values = (torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) * 3).to(stored)
    same = random_tensor(2, 2, dtype="I16")
    model = Holder(
        w=nn.Parameter(torch.empty(5, 3, dtype=held, device=device), requires_grad=False),
        same=torch.zeros(2, 2, dtype=torch.int16, device=device),
    )
    load(TorchEngine(model, cast=True), write_checkpoint(tmp_path, {"w": values, "same": same}))
    assert_same(model.w, values.to(held))
    assert_same(model.same, same)


@pytest.mark.parametrize(("stored", "width"), [("F4", 8), ("F6_E2M3", 8)])
def test_a_dtype_that_torch_cannot_convert_is_refused_before_reading_even_with_cast(tmp_path, stored, width):
    bits = {"F4": 4, "F6_E2M3": 6}[stored]
    data = bytes(2 * width * bits // 8)
    header = {"w": {"dtype": stored, "shape": [2, width], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    model = Holder(w=nn.Parameter(torch.empty(2, width, device="meta")))
    session = weights_core.open_session(TorchEngine(model, cast=True), tmp_path, host=host_of())

    def steps():
        with session:
            session.resolve()
            session.load()
            session.apply()

    with pytest.raises(CoverageError, match=rf"w: .*{stored}.*F32"):
        steps()
    assert session.weights.bytes_read == 0
    assert model.w.is_meta


def test_many_mismatches_are_listed_and_counted(tmp_path):
    model = on_meta(lambda: nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(20)))
    tensors = {name: torch.zeros(3, 3) for name in model.state_dict()}
    error, weights = refused(TorchEngine(model), write_checkpoint(tmp_path, tensors))
    assert error.mismatched.keys() == tensors.keys()
    assert str(error).count("checkpoint has shape") == 1  # once for all that have it in common
    assert "20 tensors: 0.weight" in str(error)
    assert weights.bytes_read == 0


def test_missing_and_mismatched_are_told_together(tmp_path):
    model = on_meta(Net)
    folder = saved(tmp_path, model, **{"embed.weight": torch.zeros(1), "scale": None})
    error, _ = refused(TorchEngine(model), folder)
    assert error.missing == ("scale",)
    assert error.mismatched.keys() == {"embed.weight"}
    assert "scale" in str(error)
    assert "embed.weight" in str(error)


def test_unexpected_tensors_are_reported(tmp_path):
    model = on_meta(Net)
    folder = saved(tmp_path, model, extra=torch.zeros(100, 100), other=torch.zeros(1))
    report = load(TorchEngine(model), folder)
    assert sorted(report.applied.unused) == ["extra", "other"]
    assert "2 tensors of the checkpoint were not used" in str(report)
    assert report.nbytes < 100 * 100 * 4
    assert model.state_dict().keys() == report.applied.written


@pytest.mark.parametrize("make", [Net, lambda: on_meta(Net)])
def test_unexpected_tensors_are_refused_if_asked_for(tmp_path, make):
    folder = saved(tmp_path, make(), extra=torch.zeros(1))
    error, _ = refused(TorchEngine(make()), folder, unused="refuse")
    assert error.unexpected == ("extra",)
    assert "unexpected 1 tensor: extra" in str(error)


@pytest.mark.parametrize("make", [Net, lambda: on_meta(Net)])
def test_refusing_unexpected_tensors_leaves_the_model_as_it_was(tmp_path, make):
    model = make()
    before = state(model)
    refused(TorchEngine(model), saved(tmp_path, model, extra=torch.zeros(1)), unused="refuse")
    assert state(model) == before


def test_unexpected_tensors_are_refused_before_anything_is_read(tmp_path):
    model = on_meta(Net)
    folder = saved(tmp_path, model, extra=torch.zeros(1))
    _, weights = refused(TorchEngine(model), folder, unused="refuse")
    assert weights.bytes_read == 0


# Ties -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Tied, lambda: on_meta(Tied)])
@pytest.mark.parametrize("given", ["embed.weight", "head.weight"])
def test_either_name_of_a_tie_is_enough(tmp_path, make, given):
    model = make()
    wanted = random_tensor(6, 4)
    report = load(TorchEngine(model), write_checkpoint(tmp_path, {given: wanted}))
    assert model.head.weight is model.embed.weight
    assert_same(model.embed.weight, wanted)
    assert report.applied.written == {"embed.weight", "head.weight"}
    assert report.applied.unused == ()


@pytest.mark.parametrize("make", [Tied, lambda: on_meta(Tied)])
def test_both_names_of_a_tie_with_equal_bytes(tmp_path, make):
    model = make()
    wanted = random_tensor(6, 4)
    tensors = {"embed.weight": wanted, "head.weight": wanted.clone()}
    report = load(TorchEngine(model), write_checkpoint(tmp_path, tensors))
    assert model.head.weight is model.embed.weight
    assert_same(model.embed.weight, wanted)
    assert report.applied.unused == ()
    assert report.applied.host_bytes in (0, nbytes(wanted))


def test_both_names_of_a_tie_with_nan_bytes_are_compared_as_bytes(tmp_path):
    model = on_meta(Tied)
    wanted = torch.full((6, 4), torch.nan)
    load(
        TorchEngine(model),
        write_checkpoint(tmp_path, {"embed.weight": wanted, "head.weight": wanted.clone()}),
    )
    assert_same(model.head.weight, wanted)


def test_both_names_of_a_tie_with_different_bytes_leave_a_meta_model_untouched(tmp_path):
    model = on_meta(Tied)
    before = state(model)
    wanted = torch.zeros(6, 4)
    other = wanted.clone()
    other[-1, -1] = -0.0
    folder = write_checkpoint(tmp_path, {"embed.weight": wanted, "head.weight": other})
    error, _ = refused(TorchEngine(model), folder)
    assert error.mismatched.keys() < {"embed.weight", "head.weight"}
    assert len(error.mismatched) == 1
    assert "tied" in str(error)
    assert error.__notes__ == ["the engine is untouched"]
    assert state(model) == before


def test_no_name_of_a_tie_is_missing_once(tmp_path):
    model = on_meta(Tied)
    error, weights = refused(TorchEngine(model), write_checkpoint(tmp_path, {"other": torch.zeros(1)}))
    assert error.missing == ("embed.weight",)
    assert weights.bytes_read == 0


def test_the_second_name_of_a_tie_must_fit_too(tmp_path):
    model = on_meta(Tied)
    tensors = {"embed.weight": torch.zeros(6, 4), "head.weight": torch.zeros(4, 6)}
    error, weights = refused(TorchEngine(model), write_checkpoint(tmp_path, tensors))
    assert error.mismatched.keys() == {"head.weight"}
    assert weights.bytes_read == 0


def test_both_names_of_a_tie_that_are_cast(tmp_path):
    model = on_meta(Tied).to(torch.bfloat16)
    wanted = torch.randn(6, 4)
    tensors = {"embed.weight": wanted, "head.weight": wanted.to(torch.float64)}
    load(TorchEngine(model, cast=True), write_checkpoint(tmp_path, tensors))
    assert_same(model.head.weight, wanted.to(torch.bfloat16))
    assert model.head.weight is model.embed.weight


class TwiceRegistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.second = self.first


@pytest.mark.parametrize("make", [TwiceRegistered, lambda: on_meta(TwiceRegistered)])
@pytest.mark.parametrize("prefixes", [("first",), ("second",), ("first", "second")])
def test_a_module_registered_twice(tmp_path, make, prefixes):
    model = make()
    one = seeded(model.first, num_batches_tracked=torch.tensor(5))
    tensors = {f"{prefix}.{name}": t.clone() for prefix in prefixes for name, t in one.items()}
    report = load(TorchEngine(model), write_checkpoint(tmp_path, tensors))
    assert model.first is model.second
    for name, wanted in one.items():
        assert_same(model.second.state_dict()[name], wanted)
    assert report.applied.written == model.state_dict().keys()
    assert report.applied.unused == ()


def test_parameters_that_share_memory_without_being_one_object_are_a_tie(tmp_path):
    memory = torch.zeros(3, 2)
    model = Holder(a=nn.Parameter(memory), b=nn.Parameter(memory))
    assert model.a is not model.b
    wanted = random_tensor(3, 2)
    report = load(TorchEngine(model), write_checkpoint(tmp_path, {"b": wanted}))
    assert_same(memory, wanted)
    assert report.applied.written == {"a", "b"}


def test_a_tied_buffer_and_parameter_attributes_survive(tmp_path):
    shared = torch.empty(3, device="meta")
    model = nn.Sequential(Holder(t=shared), Holder(t=shared))
    load(TorchEngine(model), write_checkpoint(tmp_path, {"1.t": torch.ones(3)}))
    assert model[0].t is model[1].t
    assert model[0].t.tolist() == [1.0] * 3


# bind -------------------------------------------------------------------------------------------


class Resident(ProviderPlugin[None]):
    """Delivers tensors that are in memory; a subclass says which."""

    given: WeightSet

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim(roles={Role.SOURCE}, layouts={Layout.SHARDED}, reason="holds them")

    @hookimpl
    def load_weights(self, request, engine, source):
        return self.given


def resident(weights):
    return type("ResidentOfThis", (Resident,), {"given": weights})


@pytest.mark.parametrize("make", [Net, lambda: on_meta(Net)])
def test_bind_makes_the_sets_own_tensors_the_parameters(tmp_path, make):
    model = make()
    tensors = seeded(model)
    folder = saved(tmp_path, model)
    report = load(TorchEngine(model), folder, host=host_of(resident=resident(Held(tensors))))
    assert report.provider == "resident"
    assert_holds(model, tensors)
    entries = model.state_dict(keep_vars=True)
    assert {n: t.data_ptr() for n, t in entries.items()} == {n: t.data_ptr() for n, t in tensors.items()}
    assert isinstance(model.embed.weight, nn.Parameter)
    assert model.embed.weight.requires_grad
    assert not isinstance(model.scale, nn.Parameter)
    assert report.applied.host_bytes == 0


class Filling(Held):
    """Tensors that `bind` is to bring into memory of the engine's own."""

    fills = True


@pytest.mark.parametrize("make", [Net, lambda: on_meta(Net)])
def test_bind_fills_memory_of_its_own_where_the_set_says_so(tmp_path, make):
    model = make()
    tensors = seeded(model)
    before = {n: t.data_ptr() for n, t in model.state_dict(keep_vars=True).items() if not t.is_meta}
    given = Filling(tensors)
    report = load(TorchEngine(model), saved(tmp_path, model), host=host_of(resident=resident(given)))
    assert report.provider == "resident"
    assert_holds(model, tensors)
    entries = model.state_dict(keep_vars=True)
    theirs = {t.data_ptr() for t in tensors.values()}
    assert not theirs & {t.data_ptr() for t in entries.values()}
    assert before == {n: t.data_ptr() for n, t in entries.items() if n in before}


def test_bind_checks_what_it_fills_before_it_is_filled():
    model = Net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tensors = seeded(model)
    for wrong, match in (
        (tensors | {"stranger": torch.ones(1)}, "unexpected .*stranger"),
        (tensors | {"embed.weight": torch.ones(1)}, "embed.weight: checkpoint has shape"),
        ({n: t for n, t in tensors.items() if n != "scale"}, "missing .*scale"),
        (tensors | {"scale": tensors["scale"].double()}, "checkpoint has dtype F64"),
    ):
        engine = TorchEngine(model, cast=True)
        with pytest.raises(CoverageError, match=match):
            engine.bind(Filling(wrong))
        assert engine.untouched()
    assert_holds(model, before)


def test_bind_keeps_subclass_and_attributes():
    parameter = Special(torch.empty(2, device="meta"), requires_grad=False)
    parameter.weight_loader = print
    model = Holder(w=parameter)
    data = torch.ones(2)
    TorchEngine(model).bind(Held({"w": data}))
    assert type(model.w) is Special
    assert model.w.weight_loader is print
    assert not model.w.requires_grad
    assert model.w.data_ptr() == data.data_ptr()


@pytest.mark.parametrize(
    ("changes", "attribute", "names"),
    [
        ({"extra": torch.zeros(1)}, "unexpected", ["extra"]),
        ({"scale": None}, "missing", ["scale"]),
        ({"scale": torch.zeros(2, 5)}, "mismatched", ["scale"]),
        ({"scale": torch.zeros(5, 2, dtype=torch.float16)}, "mismatched", ["scale"]),
    ],
)
@pytest.mark.parametrize("cast", [False, True])
def test_bind_refuses_what_does_not_fit_exactly(changes, attribute, names, cast):
    model = on_meta(Net)
    before = state(model)
    weights = Held(seeded(model, **changes))
    engine = TorchEngine(model, cast=cast)
    with pytest.raises(CoverageError) as caught:
        engine.bind(weights)
    assert list(getattr(caught.value, attribute)) == names
    assert names[0] in str(caught.value)
    assert weights.reads == []
    assert state(model) == before
    assert engine.untouched()


def test_a_bind_that_fails_half_way_leaves_the_model_untouched():
    class Torn(Held):
        def read(self, name, slices=None):
            if name == "scale":
                raise CheckpointError("torn", tensor=name)
            return super().read(name, slices)

    for model in (Net(), on_meta(Net)):
        before = state(model)
        engine = TorchEngine(model)
        with pytest.raises(CheckpointError, match="torn"):
            engine.bind(Torn(seeded(model)))
        assert state(model) == before
        assert engine.untouched()


@pytest.mark.parametrize("given", [("embed.weight",), ("head.weight",), ("embed.weight", "head.weight")])
def test_bind_keeps_ties(given):
    model = on_meta(Tied)
    data = random_tensor(6, 4)
    applied = TorchEngine(model).bind(Held(dict.fromkeys(given, data)))
    assert model.head.weight is model.embed.weight
    assert model.head.weight.data_ptr() == data.data_ptr()
    assert applied.written == {"embed.weight", "head.weight"}


def test_bind_refuses_a_tie_whose_names_hold_different_bytes():
    model = on_meta(Tied)
    before = state(model)
    tensors = {"embed.weight": torch.zeros(6, 4), "head.weight": torch.ones(6, 4)}
    with pytest.raises(CoverageError, match="tied"):
        TorchEngine(model).bind(Held(tensors))
    assert state(model) == before


def test_reinit_after_bind_puts_the_models_own_parameters_back():
    for model in (Net(), on_meta(Net)):
        before = state(model)
        engine = TorchEngine(model)
        engine.bind(Held(seeded(model)))
        assert not engine.untouched()
        engine.reinit()
        assert state(model) == before
        assert engine.untouched()


def test_reinit_after_the_load_does_not_claim_to_have_restored_what_was_let_go():
    model = Net()
    engine = TorchEngine(model)
    engine.bind(Held(seeded(model)))
    engine.loaded()
    with pytest.raises(EngineError):
        engine.reinit()


class MustPublish(PublisherPlugin[None]):
    @hookimpl
    def resolve_format(self, request):
        return FormatClaim(roles={Role.PUBLISHER}, reason="must", publish_at=Layout.SHARDED, required=True)

    @hookimpl
    def publish(self, request, engine, layout):
        raise PublishError("nobody listens")


@pytest.mark.parametrize("plugins", [{}, {"resident": True}])
def test_a_required_publisher_that_fails_brings_a_meta_model_back(tmp_path, plugins):
    model = on_meta(Net)
    before = state(model)
    providers = {name: resident(Held(seeded(model))) for name in plugins}
    with pytest.raises(PublishError, match="nobody listens") as caught:
        load(TorchEngine(model), saved(tmp_path, model), host=host_of(must=MustPublish, **providers))
    assert caught.value.__notes__ == ["the engine was re-initialised"]
    assert state(model) == before


# materialize ------------------------------------------------------------------------------------


class Arena:
    def __init__(self):
        self.memory = torch.zeros(1 << 12, dtype=torch.uint8)
        self.used = 0
        self.asked = []

    def __call__(self, meta):
        self.asked.append(meta.name)
        piece = self.memory[self.used : self.used + meta.nbytes]
        self.used += (meta.nbytes + 63) // 64 * 64
        return piece.view(weights_core.torch_engine.dtypes.to_torch(meta.dtype)).reshape(meta.torch_shape)

    def holds(self, tensor):
        begin = self.memory.data_ptr()
        return begin <= tensor.data_ptr() < begin + self.memory.numel()


def test_materialize_allocates_each_parameter_once_and_apply_writes_there(tmp_path):
    model = on_meta(lambda: nn.ModuleDict({"net": Net(), "tied": Tied()}))
    model["net"].embed.weight.weight_loader = print
    engine, arena = TorchEngine(model), Arena()
    size = engine.materialize(arena)
    tied = {"tied.embed.weight", "tied.head.weight"}
    assert len(arena.asked) == len(set(arena.asked))
    assert set(arena.asked) | tied == model.state_dict().keys()
    assert len(tied & set(arena.asked)) == 1
    assert size == sum(nbytes(t) for t in model.parameters()) + nbytes(model["net"].scale)
    assert model["tied"].embed.weight is model["tied"].head.weight
    assert not engine.untouched()
    placed = {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
    assert all(arena.holds(t) for t in model.state_dict().values())

    folder = saved(tmp_path, model, **{"tied.head.weight": None})
    applied = engine.apply(disk_set(folder))
    now = model.state_dict(keep_vars=True)
    assert {name: (id(t), t.data_ptr()) for name, t in now.items()} == placed
    assert_holds(model, oracle(folder) | {"tied.head.weight": oracle(folder)["tied.embed.weight"]})
    assert applied.host_bytes == size
    assert isinstance(model["net"].embed.weight, nn.Parameter)
    assert model["net"].embed.weight.weight_loader is print


def test_materialize_leaves_parameters_that_have_memory(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), on_meta(lambda: nn.Linear(2, 2)))
    real = model[0].weight
    arena = Arena()
    assert TorchEngine(model).materialize(arena) == (4 + 2) * 4
    assert sorted(arena.asked) == ["1.bias", "1.weight"]
    assert model[0].weight is real
    assert TorchEngine(model).materialize(arena) == 0


def test_reinit_after_materialize_gives_the_meta_parameters_back():
    model = on_meta(Net)
    before = state(model)
    engine = TorchEngine(model)
    engine.materialize(Arena())
    engine.reinit()
    assert state(model) == before
    assert engine.untouched()


def test_reinit_after_a_failure_in_materialized_memory_gives_the_meta_parameters_back(tmp_path):
    model = on_meta(Net)
    before = state(model)
    engine = TorchEngine(model)
    engine.materialize(Arena())
    with pytest.raises(CheckpointError, match="torn"):
        engine.apply(FailsAfter(disk_set(saved(tmp_path, model)), 2, CheckpointError("torn")))
    engine.reinit()
    assert state(model) == before
    assert engine.untouched()


# What the engine says of itself -----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [Net, Tied, TwiceRegistered, lambda: on_meta(Net)])
def test_expected_is_the_state_dict_in_every_layout(make, layout):
    model = make()
    expected = TorchEngine(model).expected(layout)
    entries = model.state_dict()
    assert expected.keys() == entries.keys()
    for name, tensor in entries.items():
        meta = expected[name]
        assert (meta.name, meta.torch_shape, meta.nbytes) == (name, tuple(tensor.shape), nbytes(tensor))
        assert meta.file is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_the_models_own_objects_with_every_name_of_a_tie(layout):
    model = nn.ModuleDict({"net": Net(), "tied": Tied()})
    tensors = TorchEngine(model).tensors(layout)
    assert tensors.keys() == model.state_dict().keys()
    assert tensors["tied.head.weight"] is tensors["tied.embed.weight"] is model["tied"].embed.weight
    assert tensors["net.scale"] is model["net"].scale


def test_info_describes_the_engine():
    topology = Topology.tensor_parallel(1, 0)
    info = TorchEngine(
        on_meta(Tied).to(torch.bfloat16),
        device="cpu",
        role="draft",
        component="vae",
        topology=topology,
        quantization="int4",
        mutates_after_load="adapters",
    ).info
    assert (info.name, info.version, info.model) == ("torch", torch.__version__, "Tied")
    assert (info.dtype, info.device, info.quantization) == ("BF16", "cpu", "int4")
    assert (info.role, info.component, info.mutates_after_load) == ("draft", "vae", "adapters")
    assert info.topology == topology
    assert info.accepts == {Layout.CHECKPOINT, Layout.SHARDED}
    assert info.shareable.keys() == {Layout.SHARDED}


def test_info_names_no_dtype_for_a_model_of_several():
    assert TorchEngine(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())).info.dtype is None
    assert TorchEngine(nn.ReLU()).info.dtype is None


def test_defaults_of_info():
    info = TorchEngine(Net()).info
    assert (info.role, info.component, info.topology) == ("main", None, Topology())
    assert info.mutates_after_load is None


@pytest.mark.parametrize("others", [{}, {"b": nn.Parameter(torch.zeros(1))}])
def test_a_model_whose_dtype_no_checkpoint_can_hold_is_refused_by_name(others):
    model = Holder(w=nn.Parameter(torch.zeros(2, dtype=torch.complex128)), **others)
    with pytest.raises(EngineError, match="complex128"):
        TorchEngine(model).expected(Layout.CHECKPOINT)


def test_several_ranks_need_gather():
    topology = Topology(world=Axis(2, 1))
    with pytest.raises(EngineError, match="gather="):
        TorchEngine(Net(), topology=topology)


def test_gather_is_the_one_given_or_this_rank_alone():
    def gather(value, timeout):
        return [value, ("other", timeout)]

    engine = TorchEngine(Net(), topology=Topology(world=Axis(2, 0)), gather=gather)
    assert engine.gather("mine", 3.0) == ["mine", ("other", 3.0)]
    assert TorchEngine(Net()).gather("mine", 3.0) == ["mine"]


def test_the_lease_lives_as_long_as_the_model_and_not_the_engine(tmp_path):
    model = on_meta(Net)
    engine = TorchEngine(model)
    assert engine.anchor is model
    lease = load(engine, saved(tmp_path, model)).lease
    ended = []
    lease.add(lambda: ended.append(True))
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert not lease.closed
    assert ended == []
    del model
    gc.collect()
    assert lease.closed
    assert ended == [True]


def test_replaced_meta_parameters_hold_no_memory_of_a_failed_load(tmp_path):
    model = on_meta(Net)
    engine = TorchEngine(model)
    alive = []

    class Watched(WeightSetWrapper):
        def fill(self, targets):
            targets = list(targets)
            alive.extend(weakref.ref(t.out) for t in targets)
            yield from FailsAfter(self.inner, 1, CheckpointError("torn")).fill(targets)

    with pytest.raises(CheckpointError, match="torn"):
        engine.apply(Watched(disk_set(saved(tmp_path, model))))
    gc.collect()
    assert alive
    assert all(ref() is None for ref in alive)


def test_the_engines_own_checkpoint_wins_over_the_path_given(tmp_path):
    model = on_meta(Net)
    own = write_checkpoint(tmp_path / "own", seeded(model))
    other = write_checkpoint(tmp_path / "other", {name: t + 1 for name, t in seeded(model).items()})
    report = load(TorchEngine(model, checkpoint=own), other)
    assert report.checkpoint == own
    assert_holds(model, oracle(own))


@pytest.mark.parametrize("convert", [str, lambda path: path])
def test_checkpoint_is_kept_as_a_path(tmp_path, convert):
    assert TorchEngine(Net(), checkpoint=convert(tmp_path)).checkpoint == tmp_path
    assert TorchEngine(Net()).checkpoint is None


class Renaming(nn.Module):
    """Its state dict has other names and holds copies."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_state_dict_post_hook(self._rename)

    @staticmethod
    def _rename(module, entries, prefix, metadata):
        for name in list(entries):
            entries[name.replace("linear", "renamed")] = entries.pop(name).clone()


@pytest.mark.parametrize("make", [Renaming, lambda: on_meta(Renaming)])
def test_names_come_from_the_modules_and_not_from_state_dict_hooks(tmp_path, make):
    model = make()
    assert "renamed.weight" in model.state_dict()
    tensors = {"linear.weight": random_tensor(2, 2), "linear.bias": random_tensor(2)}
    engine = TorchEngine(model)
    assert engine.expected(Layout.CHECKPOINT).keys() == tensors.keys()
    load(engine, write_checkpoint(tmp_path, tensors))
    assert_same(model.linear.weight, tensors["linear.weight"])
    assert_same(model.linear.bias, tensors["linear.bias"])


# Reading ----------------------------------------------------------------------------------------


class Recorder(WeightSetWrapper):
    def __init__(self, inner):
        super().__init__(inner)
        self.events = []

    def read(self, name, slices=None):
        self.events.append(("read", name))
        return super().read(name, slices)

    def stream(self, names=None):
        for name, tensor in super().stream(names):
            self.events.append(("read", name))
            yield name, tensor

    def fill(self, targets):
        for target in super().fill(targets):
            self.events.append(("read", target.name))
            yield target

    def release(self, names):
        self.events += [("release", name) for name in names]
        return super().release(names)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_each_name_is_read_once_and_released_when_it_was_consumed(tmp_path, kind):
    model = on_meta(lambda: nn.ModuleDict({"net": Net(), "tied": Tied()}))
    tensors = seeded(model, **{"net.scale": torch.zeros(5, 2, dtype=torch.float64), "extra": torch.zeros(1)})
    tensors["tied.head.weight"] = tensors["tied.embed.weight"].clone()
    folder = write_checkpoint(tmp_path, tensors, shards=2, kind=kind)
    weights = Recorder(disk_set(folder))
    applied = TorchEngine(model, cast=True).apply(weights)
    assert applied.unused == ("extra",)
    reads = [name for event, name in weights.events if event == "read"]
    assert sorted(reads) == sorted(model.state_dict())
    assert weights.events == [(event, name) for name in reads for event in ("read", "release")]
    weights.close()


# Pipelines --------------------------------------------------------------------------------------


class Offers(PublisherPlugin[None]):
    """Records what is published and withdrawn, per component."""

    published: list[str]
    withdrawn: list[str]

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim(roles={Role.PUBLISHER}, reason="offers", publish_at=Layout.SHARDED)

    @hookimpl
    def publish(self, request, engine, layout):
        name = request.engine.component
        self.published.append(name)
        return PublishReceipt(
            layout=layout, nbytes=0, detail="here", close=lambda: self.withdrawn.append(name)
        )


def offers():
    return type("TheseOffers", (Offers,), {"published": [], "withdrawn": []})


def pipeline(tmp_path, **components):
    for name, tensors in components.items():
        write_checkpoint(tmp_path / name, tensors)
    listed = {name: ["diffusers", "Model"] for name in components}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **listed}))
    return tmp_path


def test_the_components_of_a_pipeline_are_loaded_each_into_its_engine(tmp_path):
    models = {"transformer": on_meta(Net), "vae": on_meta(Tied)}
    tied = {"embed.weight": random_tensor(6, 4)}
    path = pipeline(tmp_path, transformer=seeded(models["transformer"]), vae=tied)
    engines = {name: TorchEngine(model, component=name) for name, model in models.items()}
    plugin = offers()
    reports = weights_core.load_pipeline(engines, path, host=host_of(offers=plugin))
    assert list(reports) == ["transformer", "vae"]
    assert plugin.published == ["transformer", "vae"]
    assert plugin.withdrawn == []
    assert_holds(models["transformer"], oracle(path / "transformer"))
    assert_same(models["vae"].head.weight, tied["embed.weight"])
    for report in reports.values():
        report.lease.close()
    assert plugin.withdrawn == ["transformer", "vae"]


def test_an_unknown_component_is_refused_before_the_first_is_loaded(tmp_path):
    model = on_meta(Net)
    before = state(model)
    path = pipeline(tmp_path, transformer=seeded(model), vae={"w": torch.zeros(1)})
    engines = {
        "transformer": TorchEngine(model, component="transformer"),
        "text_encoder": TorchEngine(nn.Linear(1, 1), component="text_encoder"),
    }
    plugin = offers()
    with pytest.raises(CheckpointError, match="no component 'text_encoder'; it has transformer, vae"):
        weights_core.load_pipeline(engines, path, host=host_of(offers=plugin))
    assert plugin.published == []
    assert state(model) == before


def test_a_failing_second_component_ends_the_lease_of_the_first(tmp_path):
    models = {"transformer": on_meta(Net), "vae": on_meta(Net)}
    path = pipeline(
        tmp_path,
        transformer=seeded(models["transformer"]),
        vae=seeded(models["vae"], scale=torch.zeros(1)),
    )
    engines = {name: TorchEngine(model, component=name) for name, model in models.items()}
    plugin = offers()
    before = state(models["vae"])
    with pytest.raises(CoverageError, match="scale"):
        weights_core.load_pipeline(engines, path, host=host_of(offers=plugin))
    assert plugin.published == ["transformer"]
    assert plugin.withdrawn == ["transformer"]
    assert state(models["vae"]) == before


def test_leases_that_cannot_be_closed_do_not_hide_why_a_later_component_failed(tmp_path):
    class Sticky(Offers):
        withdrawn: list[str] = []  # noqa: RUF012

        @hookimpl
        def publish(self, request, engine, layout):
            def close():
                self.withdrawn.append(request.engine.component)
                if request.engine.component == "a":
                    raise OSError("the socket is stuck")

            return PublishReceipt(layout=layout, nbytes=0, detail="here", close=close)

    path = pipeline(tmp_path, a={"w": torch.ones(1)}, b={"w": torch.ones(1)}, c={"w": torch.ones(2)})
    models = {name: Holder(w=nn.Parameter(torch.zeros(1, device="meta"))) for name in "abc"}
    engines = {name: TorchEngine(model, component=name) for name, model in models.items()}
    with pytest.raises(CoverageError, match="w: checkpoint has shape") as caught:
        weights_core.load_pipeline(engines, path, host=host_of(sticky=Sticky))
    assert sorted(Sticky.withdrawn) == ["a", "b"]
    assert any("the socket is stuck" in note for note in caught.value.__notes__)


def test_an_engine_for_another_component_than_it_is_given_for_is_refused(tmp_path):
    path = pipeline(tmp_path, vae={"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="'vae' says its component is None"):
        weights_core.load_pipeline({"vae": TorchEngine(Net())}, path, host=host_of())


def test_main_and_draft_are_loads_of_their_own(tmp_path):
    roles = []

    class Notes(ProviderPlugin[None]):
        @hookimpl
        def resolve_format(self, request):
            roles.append(request.engine.role)
            return FormatClaim.refuse("only looks")

        @hookimpl
        def load_weights(self, request, engine, source):
            raise AssertionError("refused")

    host = host_of(notes=Notes)
    main, draft = on_meta(Net), on_meta(Tied)
    drafts = write_checkpoint(tmp_path / "draft", {"head.weight": random_tensor(6, 4)})
    load(TorchEngine(main), saved(tmp_path, main), host=host)
    load(TorchEngine(draft, role="draft", checkpoint=drafts), saved(tmp_path, main), host=host)
    assert roles == ["main", "draft"]
    assert_same(draft.embed.weight, oracle(drafts)["head.weight"])


# Parameters that lie in the files -----------------------------------------------------------------


def lies_in_a_file(tensor, folder):
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = (int(one, 16) for one in line.split(maxsplit=1)[0].split("-"))
            if begin <= tensor.data_ptr() < end:
                return str(folder) in line
    raise AssertionError("nowhere")


@pytest.mark.parametrize("make", [Net, Tied])
def test_parameters_lie_in_the_files_if_asked(tmp_path, make):
    path = saved(tmp_path, make(), **({"head.weight": None} if make is Tied else {}))
    want = oracle(path)
    for map_files in (False, True):
        model = on_meta(make)
        report = load(TorchEngine(model, map_files=map_files), path)
        for name, tensor in want.items():
            assert_same(model.state_dict()[name], tensor)
            assert lies_in_a_file(model.state_dict()[name], path) is map_files
        if make is Tied:
            assert model.head.weight is model.embed.weight
        assert report.applied.host_bytes == report.nbytes == sum(t.nbytes for t in want.values())
        assert any("where they lie in the files" in note for note in report.notes) is map_files


def test_training_parameters_that_lie_in_the_files_changes_no_byte_of_these(tmp_path):
    path = saved(tmp_path, Net())
    before = {file: file.read_bytes() for file in path.iterdir()}
    want = oracle(path)
    model, other = on_meta(Net), on_meta(Net)
    for one in (model, other):
        load(TorchEngine(one, map_files=True), path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.inner(model.embed(torch.tensor([1, 2]))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.embed.weight, want["embed.weight"])
    assert_holds(other, want)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


def test_what_has_memory_another_dtype_or_other_strides_is_copied(tmp_path):
    tensors = {n: torch.randn(6, 4, 4, 4) for n in ("here", "narrow", "strided", "plain")}
    path = write_checkpoint(tmp_path / "checkpoint", tensors)
    strided = torch.empty(6, 4, 4, 4, device="meta", memory_format=torch.channels_last)
    model = Holder(
        here=nn.Parameter(torch.zeros(6, 4, 4, 4)),
        narrow=nn.Parameter(torch.empty(6, 4, 4, 4, dtype=torch.float16, device="meta")),
        strided=nn.Parameter(strided),
        plain=nn.Parameter(torch.empty(6, 4, 4, 4, device="meta")),
    )
    here = model.here.data_ptr()
    load(TorchEngine(model, map_files=True, cast=True), path)
    mapped = {name for name, tensor in model.named_parameters() if lies_in_a_file(tensor, path)}
    assert mapped == {"plain"}
    assert model.here.data_ptr() == here
    assert model.strided.is_contiguous(memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name].to(parameter.dtype))


def test_names_of_a_tie_that_differ_are_found_if_one_is_mapped(tmp_path):
    path = saved(tmp_path, Tied(), **{"head.weight": torch.ones(6, 4)})
    model = on_meta(Tied)
    with pytest.raises(CoverageError, match=r"'head\.weight' is tied to another"):
        load(TorchEngine(model, map_files=True), path)
    assert model.embed.weight.is_meta


def test_a_file_cut_short_after_it_was_opened_leaves_the_model_as_it_was(tmp_path):
    path = saved(tmp_path, Net())
    model = on_meta(Net)
    before = state(model)
    session = weights_core.open_session(TorchEngine(model, map_files=True), path, host=host_of())

    def steps():
        with session:
            session.resolve()
            session.load()
            file = sorted(path.glob("*.safetensors"))[-1]
            os.truncate(file, file.stat().st_size - 4)
            session.apply()

    with pytest.raises(WeightsError, match=r"shorter|changed"):
        steps()
    assert state(model) == before
