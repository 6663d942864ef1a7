# SPDX-License-Identifier: Apache-2.0
"""A model whose weights are used as they are stored is built once, without a trace."""

import json
import os
from typing import ClassVar

import pytest
import torch
import transformers.core_model_loading as loading
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertForSequenceClassification

import weights_core as w
from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.errors import CoverageError, EngineError
from weights_core.testing import host_of
from weights_transformers import load, open_engine, opening
from weights_transformers.plain import Undecided, stored_as_needed

SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"


@pytest.fixture
def traces(mocker):
    return mocker.spy(opening, "trace")


@pytest.fixture
def pools(mocker):
    return mocker.spy(loading, "ThreadPoolExecutor")


def ties(model):
    """The names of parameters, grouped by what they stand for."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def same(ours, theirs):
    """Whether two models hold the same under the same names, ties included."""
    mine, other = ours.state_dict(), theirs.state_dict()
    return (
        list(mine) == list(other)
        and all(mine[n].dtype == other[n].dtype and torch.equal(mine[n], other[n]) for n in mine)
        and ties(ours) == ties(theirs)
    )


@pytest.mark.parametrize("map_files", [True, False])
@pytest.mark.parametrize("format", ["disk", "parallel_shards", "auto"])
@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_a_model_that_nobody_shares_is_built_once(saved, traces, pools, name, format, map_files):
    loaded = load(AutoModelForCausalLM, saved(name), format=format, map_files=map_files)
    assert traces.call_count == pools.call_count == 0
    assert same(loaded.model, AutoModelForCausalLM.from_pretrained(saved(name)))
    assert loaded.report.applied.unused == ()
    assert loaded.report.applied.written >= set(loaded.model.state_dict())


def test_direct_reads_fill_what_is_not_mapped(saved, traces, mocker):
    """As many threads read as the source has, not one value after the other as Transformers asks."""
    fill = mocker.spy(ShardSet, "fill")
    into = mocker.spy(ShardSet, "read_into")
    config = {"parallel_shards": {"direct": "always"}}
    loaded = load(AutoModelForCausalLM, saved("llama"), format="parallel_shards", config=config)
    assert traces.call_count == into.call_count == fill.call_count == 0  # it has a `fill` of its own
    assert same(loaded.model, AutoModelForCausalLM.from_pretrained(saved("llama")))


@pytest.mark.parametrize(
    ("name", "cls", "how"),
    [
        ("llama", AutoModelForCausalLM, {"dtype": "float32"}),
        ("llama", AutoModelForCausalLM, {"dtype": torch.float16}),
        ("llama", AutoModel, {}),
        ("mixtral", AutoModelForCausalLM, {}),
    ],
)
def test_what_is_converted_or_left_out_is_traced(saved, traces, name, cls, how):
    loaded = load(cls, saved(name), **how)
    assert traces.call_count == 1
    assert same(loaded.model, cls.from_pretrained(saved(name), **how))


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16", torch.bfloat16])
def test_a_dtype_may_be_asked_for_that_it_has(saved, dtype):
    settings = AutoConfig.from_pretrained(saved("llama"))
    cls = AutoModelForCausalLM._model_mapping[type(settings)]
    assert stored_as_needed(cls, settings, {"dtype": dtype}) == "BF16"
    settings.dtype = None
    assert stored_as_needed(cls, settings, {"dtype": dtype}) is None


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": "float3"},
        {"dtype": "float32"},
        {"dtype": {"": "bfloat16"}},
        {"torch_dtype": torch.float32},
        {"dtype": None, "torch_dtype": torch.float32},
    ],
)
def test_another_dtype_is_another_matter(saved, given):
    settings = AutoConfig.from_pretrained(saved("llama"))
    cls = AutoModelForCausalLM._model_mapping[type(settings)]
    assert stored_as_needed(cls, settings, given) is None


@pytest.mark.parametrize("map_files", [True, False])
def test_what_the_model_has_no_place_for_is_not_read(saved, mocker, map_files):
    path, how = saved("llama"), {"num_hidden_layers": 1}
    brought = mocker.spy(ShardSet, "mapped" if map_files else "fill")
    loaded = load(AutoModelForCausalLM, path, format="disk", map_files=map_files, **how)
    assert same(loaded.model, AutoModelForCausalLM.from_pretrained(path, **how))
    assert brought.call_count == 1
    assert loaded.report.nbytes == sum(p.nbytes for p in loaded.model.parameters())
    held = opening.headers(find(path))
    assert set(loaded.report.applied.unused) == {name for name in held if ".1." in name or ".2." in name}


def test_what_is_stored_otherwise_than_the_configuration_says(saved, tmp_path, traces):
    """The configuration is only believed as to what is likely."""
    path = saved("llama")
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        save_file(
            {n: t.float() if "q_proj" in n else t for n, t in tensors.items()},
            file,
            metadata={"format": "pt"},
        )
    loaded = load(AutoModelForCausalLM, tmp_path)
    assert traces.call_count == 0
    assert same(loaded.model, AutoModelForCausalLM.from_pretrained(tmp_path))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_what_does_not_fit_is_initialised_and_told(saved_bert):
    how = {"num_labels": 5, "ignore_mismatched_sizes": True}
    torch.manual_seed(3)
    theirs = BertForSequenceClassification.from_pretrained(saved_bert, **how)
    torch.manual_seed(3)
    loaded = load(BertForSequenceClassification, saved_bert, **how)
    assert set(loaded.report.applied.defaulted) == {"classifier.weight", "classifier.bias"}
    assert same(loaded.model, theirs)
    state = torch.get_rng_state()
    with pytest.raises(CoverageError, match=r"classifier\.bias is \[2\], need \[5\], classifier\.weight is"):
        load(BertForSequenceClassification, saved_bert, num_labels=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def saved_bert(saved, tmp_path):
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


class Publishing(w.PublisherPlugin[None]):
    seen: ClassVar = []

    @w.hookimpl
    def resolve_format(self, request):
        return w.FormatClaim(roles={w.Role.PUBLISHER}, reason="publishes", publish_at=w.Layout.SHARDED)

    @w.hookimpl
    def publish(self, request, engine, layout):
        self.seen[:] = [request.engine.model, *engine.tensors(layout)]
        return w.PublishReceipt(layout=layout, nbytes=0, detail="seen")


def test_who_publishes_is_given_names_and_an_identity(saved, traces):
    loaded = load(AutoModelForCausalLM, saved("llama"), host=host_of(publishing=Publishing))
    assert traces.call_count == 1
    model, *names = Publishing.seen
    assert model.startswith("LlamaForCausalLM#")
    assert names == list(loaded.model.state_dict())


def test_who_looks_before_the_post_load_sees_the_tensors(saved, traces):
    seen = {}

    class Looking(w.WrapperPlugin[None]):
        @w.hookimpl
        def resolve_format(self, request):
            return w.FormatClaim(roles={w.Role.WRAPPER}, reason="looks")

        @w.hookimpl(wrapper=True)
        def load_weights(self, request):
            return (yield)

        @w.hookimpl
        def before_post_load(self, request, weights, engine):
            seen.update(engine.tensors(w.Layout.SHARDED))

    loaded = load(AutoModelForCausalLM, saved("qwen3-tied"), host=host_of(looking=Looking))
    assert traces.call_count == 0
    assert list(seen) == list(loaded.model.state_dict())
    assert all(seen[name] is parameter for name, parameter in loaded.model.named_parameters())


def test_a_source_of_the_models_own_tensors(saved, traces):
    """It delivers SHARDED, which takes an engine that knows what each tensor is made of."""
    path = saved("llama")
    theirs = AutoModelForCausalLM.from_pretrained(path)

    class Held(w.WeightSet):
        layout = w.Layout.SHARDED

        def __init__(self, tensors):
            self.tensors = tensors
            self._metas = {n: w.TensorMeta(n, tuple(t.shape), "BF16", t.nbytes) for n, t in tensors.items()}

        @property
        def metas(self):
            return self._metas

        def read(self, name, slices=None):
            return self.tensors[name]

    class Holding(w.ProviderPlugin[None]):
        @w.hookimpl
        def resolve_format(self, request):
            return w.FormatClaim(roles={w.Role.SOURCE}, reason="holds", layouts={w.Layout.SHARDED})

        @w.hookimpl
        def load_weights(self, request, engine, source):
            return Held({n: t.detach() for n, t in theirs.state_dict().items()})

    loaded = load(AutoModelForCausalLM, path, host=host_of(holding=Holding))
    assert loaded.report.provider == "holding"
    assert traces.call_count == 1
    assert same(loaded.model, theirs)


def test_the_switch_of_transformers_is_put_back(saved, pools, monkeypatch):
    path = saved("llama")
    load(AutoModelForCausalLM, path)
    open_engine(AutoModelForCausalLM, path)
    assert SWITCH not in os.environ
    with pytest.raises(EngineError):
        load(AutoModelForCausalLM, path, attn_implementation="none-such")
    assert SWITCH not in os.environ
    assert pools.call_count == 0
    monkeypatch.setenv(SWITCH, "0")
    load(AutoModelForCausalLM, path)
    assert pools.call_count == 1
    assert os.environ[SWITCH] == "0"


def test_an_engine_that_is_not_chosen_yet_takes_nothing(saved):
    path = saved("llama")
    found = opening.opening(
        AutoModelForCausalLM, path, map_files=True, timeout=5, model_config=None, host=None, arguments={}
    )
    undecided = Undecided(found, "BF16")
    assert undecided.expected(w.Layout.CHECKPOINT) == {}
    assert undecided.untouched()
    assert json.loads((path / "config.json").read_text())["architectures"] == [undecided.info.model]
    with pytest.raises(EngineError, match="once the load is planned"):
        undecided.apply(None)
