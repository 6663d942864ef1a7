# SPDX-License-Identifier: Apache-2.0

import os

import pytest
import torch
from torch import nn

import weights_core
from weights_consumable.plugin import ConsumablePlugin
from weights_consumable.weights import ConsumableWeights
from weights_core import Applied, Engine, EngineInfo, Layout, LoadRequest, ProviderPlugin, Role, TorchEngine
from weights_core.errors import ConsumedError, PluginConfigError
from weights_core.plugin import WrapperPlugin
from weights_core.testing import host_of, random_tensor, write_checkpoint
from weights_core.types import FormatClaim
from weights_core.weightset import WeightSetWrapper

MIB = 1 << 20
HOST = host_of(consumable=ConsumablePlugin)


def tensors_of(count, *shape):
    return {f"layers.{n}.weight": random_tensor(*(shape or (8, 4)), seed=n) for n in range(count)}


class DictEngine(Engine):
    """An engine that takes its weights from a mapping, one module after the other."""

    info = EngineInfo(name="dict", version="1")

    def __init__(self, shapes, take):
        self.shapes, self.take, self.params = shapes, take, {}

    def expected(self, layout):
        return {
            n: weights_core.TensorMeta(n, tuple(t.shape), "F32", t.numel() * 4)
            for n, t in self.shapes.items()
        }

    def apply(self, weights):
        self.take(self, weights)
        return Applied(written=self.params.keys(), unused=())


def load(path, take, tensors):
    engine = DictEngine(tensors, take)
    return engine, weights_core.load(engine, path, host=HOST)


def by_module(engine, weights):
    for n in range(len(engine.shapes)):
        for name, tensor in weights.filter_prefix(f"layers.{n}").items():
            engine.params[f"layers.{n}.{name}"] = tensor.clone()
        assert weights.mark_consumed(f"layers.{n}") == 1


def plainly(engine, weights):
    engine.params.update({name: tensor.clone() for name, tensor in weights.items()})


def test_it_wraps_every_source():
    request = LoadRequest(checkpoint="x", engine=EngineInfo(name="test", version="1"))
    claim = ConsumablePlugin(None).resolve_format(request)
    assert claim.roles == {Role.WRAPPER}


@pytest.mark.parametrize("take", [by_module, plainly, lambda e, w: e.params.update(w.stream())])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_engine_gets_the_same_weights_whether_it_marks_or_not(tmp_path, take, kind):
    tensors = tensors_of(12)
    engine, report = load(write_checkpoint(tmp_path, tensors, shards=2, kind=kind), take, tensors)
    assert engine.params.keys() == tensors.keys()
    assert all(
        torch.equal(engine.params[name].view(torch.uint8), t.view(torch.uint8)) for name, t in tensors.items()
    )
    assert report.plan.wrappers == ("consumable",)
    assert report.notes == ()


def test_left_overs_reach_the_report(tmp_path):
    def take(engine, weights):
        by_module(engine, weights)

    tensors = tensors_of(3)
    path = write_checkpoint(tmp_path, {**tensors, "rotary.inv_freq": torch.zeros(4)})
    _, report = load(path, take, tensors)
    assert report.notes == ("never consumed, 0.0 MB: 1 tensor: rotary.inv_freq",)


def test_over_consumption_ends_the_load_and_says_where_it_was_consumed(tmp_path):
    def take(engine, weights):
        weights.mark_consumed("layers.1")
        weights["layers.1.weight"]

    tensors = tensors_of(2)
    with pytest.raises(
        ConsumedError, match=r"layers\.1\.weight.*mark_consumed\('layers\.1'\) at .*test_plugin"
    ):
        load(write_checkpoint(tmp_path, tensors), take, tensors)


def test_an_engine_that_stops_half_way_leaves_no_file_open(tmp_path):
    def take(engine, weights):
        for _ in weights.stream():
            weights.mark_consumed("layers.0")
            raise RuntimeError("half-way")

    tensors = tensors_of(4)
    path = write_checkpoint(tmp_path, tensors)
    with pytest.raises(weights_core.WeightsError, match="half-way"):
        load(path, take, tensors)
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not [link for link in links if link.startswith(str(tmp_path))]


def test_a_kept_dict_is_named_in_the_report(tmp_path):
    kept = {}

    def take(engine, weights):  # a mapper that renames into a dict of its own, and forgets it
        kept.update({f"model.{name}": tensor for name, tensor in weights.items()})
        by_module(engine, weights)

    tensors = tensors_of(2, 64, 64)
    _, report = load(write_checkpoint(tmp_path, tensors), take, tensors)
    (note,) = report.notes
    assert note.startswith("consumed, but still referred to, 0.0 MB: 2 tensors: layers.0.weight")


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_torch_module_releases_what_it_takes(tmp_path, device, kind):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8, bias=False, device=device)
            self.other = nn.Linear(8, 8, device=device)
            self.head = nn.Linear(8, 8, bias=False, device=device)
            self.head.weight = self.one.weight

    tied = torch.randn(8, 8)
    tensors = {
        "one.weight": tied,
        "head.weight": tied if kind == "bin" else tied.clone(),
        "other.weight": torch.randn(8, 8).double(),
        "other.bias": torch.randn(8),
        "extra": torch.randn(3),
    }
    model = Tied()
    session = weights_core.open_session(
        TorchEngine(model, cast=True), write_checkpoint(tmp_path, tensors, kind=kind), host=HOST
    )
    with session:
        session.resolve()
        weights = session.load()
        assert isinstance(weights, ConsumableWeights)
        session.apply()
        assert list(weights) == ["extra"]
        assert weights.live_bytes == 0
        report = session.finish()
    assert report.notes == ()
    assert model.head.weight is model.one.weight
    assert torch.equal(model.head.weight, tied)
    assert torch.equal(model.other.weight, tensors["other.weight"].float())


def test_weights_that_are_bound_are_the_sources_own(tmp_path):
    tensors = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}

    class Sharded(WeightSetWrapper):
        layout = Layout.SHARDED

        def __init__(self, inner):
            super().__init__(inner)
            self.layout = Layout.SHARDED

        def read(self, name, slices=None):
            return tensors[name]

    class Source(ProviderPlugin[None]):
        @weights_core.hookimpl
        def resolve_format(self, request):
            return FormatClaim(roles={Role.SOURCE}, layouts={Layout.SHARDED}, reason="has shards")

        @weights_core.hookimpl
        def load_weights(self, request, engine, source):
            return Sharded(source.open())

    model = nn.Linear(3, 2, device="meta")
    path = write_checkpoint(tmp_path, tensors)
    report = weights_core.load(
        TorchEngine(model), path, host=host_of(consumable=ConsumablePlugin, shards=Source)
    )
    assert report.provider == "shards"
    assert model.weight.data_ptr() == tensors["weight"].data_ptr()


def test_a_wrapper_outside_or_inside_sees_the_same_weights(tmp_path):
    class Through(WrapperPlugin[None]):
        @weights_core.hookimpl
        def resolve_format(self, request):
            return FormatClaim(roles={Role.WRAPPER}, reason="passes through")

        @weights_core.hookimpl(wrapper=True)
        def load_weights(self, request):
            weights = yield
            return WeightSetWrapper(weights)

    def take(engine, weights):
        plainly(engine, weights)
        weights.release(list(weights))
        assert len(weights) == 0

    tensors = tensors_of(3)
    path = write_checkpoint(tmp_path, tensors)
    for order in (["consumable", "through"], ["through", "consumable"]):
        host = host_of(enable=order, consumable=ConsumablePlugin, through=Through)
        engine = DictEngine(tensors, take)
        weights_core.load(engine, path, host=host)
        assert engine.params.keys() == tensors.keys()


def test_it_has_no_settings(tmp_path):
    host = host_of(consumable=ConsumablePlugin, config={"consumable": {"window": 1}})
    with pytest.raises(PluginConfigError, match="consumable"):
        weights_core.load(TorchEngine(nn.Linear(1, 1)), write_checkpoint(tmp_path, tensors_of(1)), host=host)
