# SPDX-License-Identifier: Apache-2.0
"""The host holds the model and a little more, whatever is fused or converted."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from transformers.modeling_utils import caching_allocator_warmup

from weights_transformers import load
from weights_transformers.trace import NothingReserved

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


class Allocated(TorchFunctionMode):
    """Notes on which devices torch is asked for memory, and gives none."""

    def __init__(self):
        super().__init__()
        self.devices = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            self.devices.append(torch.device(kwargs["device"]).type)
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def test_transformers_reserves_nothing_on_a_device_while_it_is_traced(monkeypatch):
    for ask, answer in {
        "mem_get_info": (1 << 40, 1 << 40),
        "memory_reserved": 0,
        "memory_allocated": 0,
    }.items():
        monkeypatch.setattr(torch.cuda, ask, lambda index, answer=answer: answer)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LARGE, num_hidden_layers=1))
    where = dict.fromkeys(model.state_dict(), "cuda:0")
    with Allocated() as asked:
        caching_allocator_warmup(model, where, None)
    assert asked.devices == ["cuda"]
    with Allocated() as asked, NothingReserved():
        caching_allocator_warmup(model, where, None)
        torch.empty(3, dtype=torch.float16, device="cuda:0")
        torch.empty(3, dtype=torch.float32, device="cuda:0", requires_grad=False)
    assert asked.devices == ["meta", "cuda", "cuda"]
