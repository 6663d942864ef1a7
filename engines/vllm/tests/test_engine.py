# SPDX-License-Identifier: Apache-2.0
"""The adapter over a small model that loads as vLLM's do; vLLM itself is in `real/`."""

import sys
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

import weights_core as w
from weights_core.errors import CoverageError, EngineError, FormatUnresolvedError, LoadError
from weights_core.testing import host_of, write_checkpoint
from weights_vllm.engine import VllmEngine

sys.path.insert(0, str(Path(__file__).parent))
from models import Attention, Model, checkpoint, due

sys.path.pop(0)

INFO = w.EngineInfo(
    name="vllm",
    version="0.32.0",
    model="Model",
    dtype="F32",
    accepts={w.Layout.CHECKPOINT, w.Layout.SHARDED},
    shareable={w.Layout.SHARDED: "before post-load"},
)


def engine_of(model, folder=Path("nowhere"), **info):
    engine = VllmEngine(attrs.evolve(INFO, **info), folder, lambda value, timeout: [value])
    engine.model = model
    return engine


class Held(w.WeightSet):
    """Tensors in memory, in any layout."""

    provider = "held"

    def __init__(self, tensors, layout=w.Layout.SHARDED):
        self.tensors = tensors
        self.layout = layout
        names = {torch.float32: "F32", torch.bfloat16: "BF16"}
        self._metas = {
            name: w.TensorMeta(name, tuple(t.shape), names[t.dtype], t.nbytes) for name, t in tensors.items()
        }

    @property
    def metas(self):
        return self._metas

    def read(self, name, slices=None):
        return self.tensors[name][slices or ...]


def sharded(seed=0):
    return {**due(checkpoint(seed)), "attention.scale": torch.full((), 3.0)}


def blank(model):
    """What nobody has loaded into must be seen to be overwritten."""
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def holds(model, tensors):
    return all(torch.equal(dict(model.named_parameters())[name], t) for name, t in tensors.items())


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", checkpoint(), shards=2)


def test_a_checkpoint_goes_through_the_models_own_loading(folder):
    model = blank(Model())
    report = w.load(engine_of(model, folder), folder)
    assert holds(model, due(checkpoint()))
    assert model.head is model.embed
    assert report.applied.written == due(checkpoint()).keys()
    assert report.applied.unused is None
    assert report.applied.host_bytes == sum(p.nbytes for p in model.parameters())


class Lends(Held):
    """Lends all but one where they lie."""

    def __init__(self, tensors):
        super().__init__(tensors, w.Layout.CHECKPOINT)
        self.was_read = set()

    def mapped(self, names=None):
        yield from (item for item in self.tensors.items() if item[0] != "norm")

    def read(self, name, slices=None):
        self.was_read.add(name)
        return super().read(name, slices)


@pytest.mark.parametrize("map_files", [True, False])
def test_a_model_on_the_host_copies_straight_out_of_the_files(map_files):
    model, given = blank(Model()), Lends(checkpoint())
    engine = VllmEngine(INFO, Path("nowhere"), lambda value, timeout: [value], map_files=map_files)
    engine.model = model
    engine.apply(given)
    assert holds(model, due(checkpoint()))
    assert given.was_read == ({"norm"} if map_files else checkpoint().keys())


def test_no_file_is_in_use_when_the_model_has_copied_it(folder):
    engine = engine_of(blank(Model()), folder)
    report = w.load(engine, folder)
    assert holds(engine.model, due(checkpoint()))
    assert not report.notes
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_the_checkpoint_is_the_engines_own(folder, tmp_path):
    model = blank(Model())
    assert w.load(engine_of(model, folder), tmp_path / "another").checkpoint == folder
    assert holds(model, due(checkpoint()))


def test_parameters_are_bound_without_a_copy_and_buffers_are_copied():
    model, given = blank(Model()), sharded()
    qkv, scale = model.attention.qkv, model.attention.scale
    applied = engine_of(model).bind(Held(given))
    assert applied.written == given.keys()
    assert holds(model, due(checkpoint()))
    assert model.attention.qkv is qkv
    assert qkv.data_ptr() == given["attention.qkv"].data_ptr()
    assert qkv.weight_loader.__name__ == "fused"
    assert model.attention.scale is scale
    assert scale == 3
    assert scale.data_ptr() != given["attention.scale"].data_ptr()
    assert model.head is model.embed
    assert torch.equal(model.attention.cache, torch.arange(4.0))


def test_a_set_that_fills_brings_its_tensors_into_the_parameters_own_memory():
    model, given = blank(Model()), Held(sharded())
    given.fills = True
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert engine_of(model).bind(given).written == given.keys()
    assert holds(model, due(checkpoint()))
    assert model.attention.scale == 3
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


def test_what_was_cut_from_a_checkpoint_may_lack_buffers_that_no_checkpoint_has():
    model, tensors = blank(Model()), due(checkpoint())
    with pytest.raises(CoverageError, match=r"missing 1 tensor: attention\.scale"):
        engine_of(model).bind(Held(tensors))  # it was shared, so it should be there
    given = Held(tensors)
    given.fills = True
    applied = engine_of(model).bind(given)
    assert applied.written == tensors.keys()
    assert applied.defaulted == {"attention.scale": "a buffer keeps what vLLM made it with"}
    assert holds(model, tensors)
    assert model.attention.scale == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"norm": None}, "missing 1 tensor: norm"),
        ({"more": torch.zeros(1)}, "unexpected 1 tensor: more"),
        ({"norm": torch.zeros(7)}, r"norm is F32 \[7\], need F32 \[16\]"),
        ({"norm": torch.zeros(16, dtype=torch.bfloat16)}, r"norm is BF16 \[16\], need F32"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_bound(change, why):
    model, engine = Model(), None
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    given = {name: t for name, t in {**sharded(), **change}.items() if t is not None}
    engine = engine_of(model)
    with pytest.raises(CoverageError, match=why):
        engine.bind(Held(given))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert engine.untouched()


def test_final_weights_are_neither_taken_nor_given(folder):
    engine = engine_of(Model(), folder)
    with pytest.raises(EngineError, match="FINAL weights on cpu are not shared"):
        engine.bind(Held(sharded(), w.Layout.FINAL))
    with pytest.raises(EngineError, match="FINAL weights on cpu are not shared"):
        engine.tensors(w.Layout.FINAL)
    assert engine.untouched()


class MustShareFinal:
    weights_api = 1

    @w.hookimpl
    def resolve_format(self):
        return w.FormatClaim(
            roles={w.Role.PUBLISHER}, publish_at=w.Layout.FINAL, required=True, reason="shares FINAL"
        )

    @w.hookimpl
    def publish(self):
        raise AssertionError("never asked")


def test_a_plugin_that_must_share_final_weights_is_refused_before_the_load(folder):
    model = Model()
    with pytest.raises(FormatUnresolvedError, match="engine vllm cannot share final weights"):
        w.load(engine_of(model, folder), folder, host=host_of(final=MustShareFinal))


def test_materialised_parameters_are_filled_where_they_were_placed(folder):
    model = Model()
    engine = engine_of(model, folder)
    places = {}

    def alloc(meta):
        places[meta.name] = torch.full(meta.torch_shape, float("nan"))
        return places[meta.name]

    assert engine.materialize(alloc) == sum(p.nbytes for p in model.parameters())
    assert not engine.untouched()
    assert torch.equal(model.norm, torch.ones(16))  # a default is kept
    w.load(engine, folder)
    assert torch.equal(places["attention.qkv"], due(checkpoint())["attention.qkv"])
    assert holds(model, places)


def test_what_is_shared_is_parameters_and_copies_of_buffers():
    model = Model()
    engine = engine_of(model)
    first, second = engine.tensors(w.Layout.SHARDED), engine.tensors(w.Layout.SHARDED)
    assert set(first) == set(engine.expected(w.Layout.SHARDED)) == sharded().keys()
    assert first["norm"] is model.norm
    assert first["attention.scale"].data_ptr() != model.attention.scale.data_ptr()
    assert first["attention.scale"].data_ptr() == second["attention.scale"].data_ptr()


class Remembers(Model):
    def load_weights(self, weights):
        self.attention.seen = True
        return super().load_weights(weights)


class FillsCache(Model):
    def load_weights(self, weights):
        return super().load_weights(weights) | {"attention.cache"}


class Replaces(Model):
    def load_weights(self, weights):
        loaded = super().load_weights(weights)
        self.norm = nn.Parameter(self.norm.data.clone(), requires_grad=False)
        return loaded


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Remembers, "also sets 'attention.seen'"),
        (FillsCache, "fills 'attention.cache', neither"),
        (Replaces, "also sets 'norm'"),
    ],
)
def test_a_model_whose_loading_leaves_more_than_tensors_is_loaded_but_not_shared(folder, kind, why):
    engine = engine_of(blank(kind()), folder)
    w.load(engine, folder)
    assert holds(engine.model, due(checkpoint()))
    with pytest.raises(EngineError, match=why):
        engine.tensors(w.Layout.SHARDED)


class Silent(Model):
    def load_weights(self, weights):
        super().load_weights(weights)


class Forgets(Model):
    def load_weights(self, weights):
        return super().load_weights(weights) - {"norm"}


class Crashes(Model):
    def load_weights(self, weights):
        next(iter(weights))
        raise AssertionError("shapes differ")


class Elsewhere(Model):
    secondary_weights = ("another/repository",)


class OtherFiles(Model):
    allow_patterns_overrides = ("vae/*.safetensors",)


@pytest.mark.parametrize(
    ("kind", "error", "why"),
    [
        (Silent, EngineError, "does not say which parameters it loaded"),
        (Forgets, CoverageError, "missing 1 tensor: norm"),
        (Crashes, LoadError, "AssertionError: shapes differ"),
        (Elsewhere, EngineError, "Elsewhere reads weights from several places"),
        (OtherFiles, EngineError, "OtherFiles reads weights from several places"),
        (Attention, EngineError, "Attention has no load_weights"),
    ],
)
def test_a_model_that_cannot_be_served_is_one_error(folder, kind, error, why):
    with pytest.raises(error, match=why):
        w.load(engine_of(kind(), folder), folder)


def test_a_quantised_model_says_itself_what_it_needs(folder):
    model = blank(Forgets())
    report = w.load(engine_of(model, folder, quantization="fp8"), folder)
    assert report.applied.defaulted == {"norm": "vLLM does not demand it of a fp8 checkpoint"}


class Head(nn.Module):
    """A draft that may come without an embedding: vLLM gives it that of its target."""

    has_own_embed_tokens = False

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(4, 4)
        self.norm = nn.Parameter(torch.ones(16), requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "norm":
                self.norm.data.copy_(tensor)
        return {"norm"}


def test_a_draft_may_lack_what_its_target_has(folder):
    report = w.load(engine_of(Head(), folder, role="draft"), folder)
    assert report.applied.defaulted == {"embed_tokens.weight": "the draft uses that of its target"}
    owning = Head()
    owning.has_own_embed_tokens = True
    with pytest.raises(CoverageError, match=r"missing 1 tensor: embed_tokens\.weight"):
        w.load(engine_of(owning, folder, role="draft"), folder)


class Notes(Model):
    def load_weights(self, weights):
        self.attention.seen = True
        return super().load_weights(weights)


def test_a_model_that_notes_what_it_loads_is_not_filled_again(folder):
    with pytest.raises(EngineError, match=r"cannot be filled again: its load_weights also sets"):
        w.load(engine_of(Notes(), folder), folder, host=host_of(breaks=BreaksPlugin))


class Breaks(w.WeightSet):
    """Fails in the middle of the stream, as a source whose peer has gone."""

    provider = "breaks"

    def __init__(self, below):
        self.below = below

    @property
    def metas(self):
        return self.below.metas

    def read(self, name, slices=None):
        if name == "norm":
            raise w.LoadFailed("the peer is gone", mutated=False)
        return torch.full(self.metas[name].torch_shape, 7.0)


class BreaksPlugin:
    weights_api = 1

    @w.hookimpl
    def resolve_format(self):
        return w.FormatClaim(roles={w.Role.SOURCE}, reason="breaks")

    @w.hookimpl
    def load_weights(self, source):
        return Breaks(source.open())


def test_a_source_that_fails_half_way_is_followed_by_the_next(folder):
    model = blank(Model())
    report = w.load(engine_of(model, folder), folder, host=host_of(breaks=BreaksPlugin))
    assert report.provider == "disk"
    assert holds(model, due(checkpoint()))


class GoesAway(Held):
    """Of which everything arrives, but who knows."""

    fills = True

    def fill(self, targets):
        yield from super().fill(targets)
        raise w.LoadFailed("the peer is gone", mutated=True)


class GoesAwayPlugin:
    weights_api = 1

    @w.hookimpl
    def resolve_format(self):
        return w.FormatClaim(roles={w.Role.SOURCE}, layouts={w.Layout.SHARDED}, reason="goes away")

    @w.hookimpl
    def load_weights(self):
        return GoesAway(sharded(seed=1))


def test_a_shard_that_fails_half_way_leaves_no_buffer_behind(folder):
    model = blank(Model())
    report = w.load(engine_of(model, folder), folder, host=host_of(away=GoesAwayPlugin))
    assert report.provider == "disk"
    assert model.attention.scale == 1
    assert holds(model, due(checkpoint()))


def test_a_quantised_model_that_was_written_to_is_not_filled_again(folder):
    with pytest.raises(EngineError, match="was written to cannot be filled again"):
        w.load(engine_of(Model(), folder, quantization="fp8"), folder, host=host_of(breaks=BreaksPlugin))


def test_once_post_load_has_begun_there_is_no_way_back(folder):
    engine = engine_of(Model(), folder)
    engine.transforms()
    with pytest.raises(EngineError, match="post-load had begun"):
        engine.reinit()


def test_there_is_no_model_before_vllm_has_made_it():
    engine = VllmEngine(INFO, Path("nowhere"), lambda value, timeout: [value])
    assert engine.anchor is engine
    with pytest.raises(EngineError, match="has not made the model yet"):
        engine.expected(w.Layout.SHARDED)


def in_file(given, **places):
    """Say of tensors where in a file they lie."""
    given._metas = {
        name: attrs.evolve(meta, file=Path("model.safetensors"), offset=places[name])
        if name in places
        else meta
        for name, meta in given.metas.items()
    }
    return given


@pytest.mark.parametrize("fills", [True, False])
def test_a_tied_parameter_may_go_by_any_of_its_names(fills):
    model, tensors = blank(Model()), sharded()
    tensors["head"] = tensors.pop("embed")
    given = Held(tensors)
    given.fills = fills
    assert engine_of(model).bind(given).written == sharded().keys()
    assert model.head is model.embed
    assert holds(model, due(checkpoint()))


def test_both_names_of_a_tied_parameter_must_be_of_one_tensor():
    model, tensors = blank(Model()), sharded()
    tensors["head"] = tensors["embed"]
    given = in_file(Held(tensors), embed=8, head=8)
    given.fills = True
    assert engine_of(model).bind(given).written == sharded().keys()
    assert holds(model, due(checkpoint()))
    with pytest.raises(CoverageError, match="unexpected 1 tensor: head"):
        engine_of(Model()).bind(in_file(Held(tensors), embed=8, head=16))
    with pytest.raises(CoverageError, match="unexpected 1 tensor: head"):
        engine_of(Model()).bind(Held(tensors))


def test_weights_by_other_names_are_told_which_names_are_due():
    with pytest.raises(CoverageError, match="go by the names of vLLM's own parameters"):
        engine_of(Model()).bind(Held(checkpoint()))
