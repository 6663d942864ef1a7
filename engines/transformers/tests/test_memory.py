# SPDX-License-Identifier: Apache-2.0
"""The host holds the model and a little more, whatever is fused or converted."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from weights_transformers import load

MIB = 1 << 20
LARGE = {
    "vocab_size": 2000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def large(request, tmp_path_factory):
    if request.param == "llama":
        config = LlamaConfig(**LARGE, num_hidden_layers=8)
    else:
        config = MixtralConfig(**LARGE, num_hidden_layers=2, num_local_experts=8)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="60MB")
    return path


@pytest.mark.parametrize("format", ["disk", "auto"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_load_holds_little_beside_the_model(large, dtype, format):
    loaded = load(AutoModelForCausalLM, large, dtype=dtype, format=format)
    size = sum(parameter.nbytes for parameter in loaded.model.parameters())
    assert size > 160 * MIB
    assert loaded.report.applied.host_bytes >= size
    assert loaded.report.peak_over_model < 64 * MIB
    if dtype == "float32":
        assert all(parameter.dtype is torch.float32 for parameter in loaded.model.parameters())
