# SPDX-License-Identifier: Apache-2.0
"""Small models as Transformers saves them, and brokers of their own."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    UMT5Config,
    UMT5EncoderModel,
)

from weights_gms import client

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
CAUSAL = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "llama-even": LlamaConfig(**{**SMALL, "vocab_size": 200}, tie_word_embeddings=False),
    "qwen3-even": Qwen3Config(**{**SMALL, "vocab_size": 200}, head_dim=16, tie_word_embeddings=True),
}
BERT = BertConfig(
    vocab_size=199, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
)


def in_8_bit(tensors, block):
    """Return a checkpoint in 8-bit floats, with a scale for each block of the projections."""
    made = dict(tensors)
    for name, value in tensors.items():
        if "_proj" in name:
            rows, columns = value.shape
            blocks = value.float().reshape(rows // block, block, columns // block, block)
            scale = blocks.abs().amax((1, 3)) / 448
            scaled = (blocks / scale[:, None, :, None]).reshape(rows, columns)
            made[name] = scaled.to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = scale
    return made


@pytest.fixture
def in_fp8(saved, tmp_path):
    """A function that returns the folder of a model in 8-bit floats, with a head of its own if it is tied."""

    def folder(name, block, copy=""):
        to = tmp_path / f"fp8-{name}-{block}{copy}"
        to.mkdir()
        tensors = {}
        for file in saved(name).glob("*.safetensors"):
            tensors |= load_file(file)
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
        save_file(in_8_bit(tensors, block), to / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((saved(name) / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
        (to / "config.json").write_text(json.dumps(config))
        return to

    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A function that returns the folder of a model by name, saved once, in several shards."""
    made = {}

    def folder(name):
        if name not in made:
            torch.manual_seed(3)
            config, auto = (BERT, AutoModel) if name == "bert" else (CAUSAL[name], AutoModelForCausalLM)
            made[name] = tmp_path_factory.mktemp(name)
            auto.from_config(config).eval().save_pretrained(made[name], max_shard_size="80KB")
        return made[name]

    return folder


def transformer():
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip


@pytest.fixture(scope="session")
def wan(tmp_path_factory):
    """A tiny Wan 2.2: two transformers that keep modules in float32, a video VAE, a text encoder."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )
    pipeline = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
        ),
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer().eval(),
        transformer_2=transformer().eval(),
        boundary_ratio=0.5,
    )
    path = tmp_path_factory.mktemp("wan")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def vault(tmp_path):
    """Settings of gms for a broker of its own, that is gone when the test ends."""
    where = str(tmp_path / "run" / "broker.sock")
    yield {"gms": {"socket_path": where, "timeout": 60.0}}
    found = (
        client.ask_once(client.Endpoint(where, start=False), {"op": "status"})
        if Path(where).exists()
        else None
    )
    if found is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(found["broker"]["pid"], signal.SIGTERM)
        end = time.monotonic() + 10
        while Path(where).exists() and time.monotonic() < end:
            time.sleep(0.01)


@pytest.fixture(scope="session")
def logits():
    """A function that returns what a model says to tokens that are always the same."""

    def answers(model, vocabulary=199):
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(0, vocabulary, (2, 17), generator=generator)
        with torch.no_grad():
            return model(ids)[0]

    return answers


@pytest.fixture(scope="session")
def smollm2():
    """Real weights: SmolLM2-135M-Instruct, dequantised once into the demo's cache."""
    root = Path(__file__).parents[3]
    sys.path.insert(0, str(root / "examples"))
    try:
        from smollm2 import checkpoint
    finally:
        sys.path.remove(str(root / "examples"))
    return checkpoint(root / ".cache")
