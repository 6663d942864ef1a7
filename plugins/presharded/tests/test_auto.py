# SPDX-License-Identifier: Apache-2.0
"""`--plan auto`: as Transformers would cut, from the plan of the model's configuration."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
)

from weights_presharded import PlanError, read_plan, shard
from weights_presharded.manifest import READY

HERE = Path(__file__).parent
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a small model with Transformers, and returns where and its weights."""

    def make(config, name="source"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        folder = tmp_path / name
        folder.mkdir()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        return folder, state

    return make


def ranks(out, size):
    return [
        load_file(out / f"rank-{rank}-of-{size}/model-00001-of-00001.safetensors") for rank in range(size)
    ]


ROWS = (
    *("q_proj.weight", "gate_proj.weight", "up_proj.weight", "lm_head.weight", "q_proj.bias"),
    "embed_tokens.weight",
)
COLUMNS = ("o_proj.weight", "down_proj.weight")


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_it_cuts_as_the_model_says(saved, tmp_path, config, size):
    source, state = saved(config(**SMALL))
    shard(source, tmp_path / "out", size=size)
    for rank, found in enumerate(ranks(tmp_path / "out", size)):
        assert found.keys() == state.keys()
        for name, whole in state.items():
            due = whole
            if name.endswith(ROWS):
                due = whole.chunk(size, 0)[rank]
            elif name.endswith(COLUMNS):
                due = whole.chunk(size, 1)[rank]
            elif "k_proj" in name or "v_proj" in name:
                head = whole.shape[0] // 2
                due = whole.chunk(size)[rank] if size < 2 else whole[rank * 2 // size * head :][:head]
            assert torch.equal(found[name], due), name


def test_it_cuts_what_transformers_cuts_itself(saved, tmp_path):
    """Two processes load each model with tensor parallelism of Transformers' own."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    configs = {
        "llama": LlamaConfig(**SMALL),
        "experts": Qwen3MoeConfig(**SMALL, **experts, head_dim=4),
        "some experts": Qwen3MoeConfig(**SMALL, **experts, head_dim=4, mlp_only_layers=[0]),
        "tied": Gemma3TextConfig(**SMALL, head_dim=4),
        "packed": Phi3Config(**SMALL),
    }
    made = {name: saved(config, name) for name, config in configs.items()}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "transformers_ranks.py", rank, *(folder for folder, _ in made.values())],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], errors
    for name, (source, state) in made.items():
        out = tmp_path / f"{name} cut"
        shard(source, out, size=2)
        for rank, found in enumerate(ranks(out, 2)):
            due = load_file(source / f"held-by-{rank}")
            assert found.keys() == due.keys() == state.keys()
            wrong = [key for key in due if not torch.equal(found[key], due[key])]
            assert not wrong, f"{name}: {wrong}"


def test_the_plan_it_made_is_kept_and_is_a_plan(saved, tmp_path):
    source, _ = saved(LlamaConfig(**SMALL))
    shard(source, tmp_path / "out", size=2)
    plan = tmp_path / "plan.toml"
    plan.write_text(json.loads((tmp_path / "out" / READY).read_bytes())["origin"]["plan"])
    shard(source, tmp_path / "again", size=2, plan=read_plan(plan))
    for rank in range(2):
        name = f"rank-{rank}-of-2/manifest.json"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_vectors_and_what_is_not_in_the_plan_are_whole(saved, tmp_path):
    source, state = saved(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True))
    shard(source, tmp_path / "out", size=2)
    first, _ = ranks(tmp_path / "out", 2)
    assert first["model.layers.0.self_attn.o_proj.bias"].equal(state["model.layers.0.self_attn.o_proj.bias"])
    assert first["model.layers.0.mlp.gate_proj.bias"].equal(state["model.layers.0.mlp.gate_proj.bias"][:24])
    assert first["model.norm.weight"].equal(state["model.norm.weight"])
    embedding = "model.embed_tokens.weight"  # Transformers cuts it, though no model's plan names it
    assert first[embedding].equal(state[embedding][:32])


def test_what_the_checkpoint_has_packed(saved, tmp_path):
    source, state = saved(Phi3Config(**SMALL))
    shard(source, tmp_path / "out", size=2)
    first, _ = ranks(tmp_path / "out", 2)
    name = "model.layers.0.mlp.down_proj.weight"
    assert first[name].equal(state[name].chunk(2, 1)[0])


def test_packed_experts_are_cut_half_by_half(saved, tmp_path):
    source, state = saved(MixtralConfig(**SMALL, num_local_experts=2))
    shard(source, tmp_path / "out", size=2)
    for rank, found in enumerate(ranks(tmp_path / "out", 2)):
        up = "model.layers.1.mlp.experts.gate_up_proj"
        assert state[up].shape == (2, 96, 32)
        due = torch.cat([half.chunk(2, 1)[rank] for half in state[up].chunk(2, 1)], 1)
        assert found[up].equal(due)
        down = "model.layers.1.mlp.experts.down_proj"
        assert found[down].equal(state[down].chunk(2, -1)[rank])


@pytest.mark.parametrize("architecture", ["LlamaModel", "LlamaForCausalLM", "no_such", "pipeline", None])
def test_a_model_without_a_head_is_cut_too(saved, tmp_path, architecture):
    source, state = saved(LlamaConfig(**SMALL))
    body = {name.removeprefix("model."): tensor for name, tensor in state.items() if "lm_head" not in name}
    save_file(body, source / "model.safetensors")
    values = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(
        json.dumps(values | {"architectures": architecture and [architecture]})
    )
    shard(source, tmp_path / "out", size=2)
    first, _ = ranks(tmp_path / "out", 2)
    for name in ("embed_tokens.weight", "layers.1.self_attn.q_proj.weight"):
        assert first[name].equal(body[name].chunk(2)[0])
    assert first["norm.weight"].equal(body["norm.weight"])


def test_experts_under_other_names_need_a_plan(saved, tmp_path):
    source, _ = saved(MixtralConfig(**SMALL, num_local_experts=2))
    raw = load_file(source / "model.safetensors")
    apart = {name.replace("gate_up_proj", "0.w1.weight"): tensor for name, tensor in raw.items()}
    save_file(apart, source / "model.safetensors")
    with pytest.raises(PlanError, match=r"experts\.gate_up_proj, which the checkpoint has not.*--plan FILE"):
        shard(source, tmp_path / "out", size=2)


def config(folder, **values):
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (None, "has no configuration"),
        ({"model_type": "no-such-model"}, "has no configuration"),
        ({"model_type": "gpt2"}, "has no tensor-parallel plan for GPT2Config"),
        ({"model_type": "llama", **SMALL}, "cuts 8 tensors: .*which the checkpoint has not"),
        ({"model_type": "llama", **SMALL, "num_attention_heads": 0}, "LlamaConfig|no configuration"),
        ({"model_type": "gemma3"}, "Gemma3Config is of a model of several parts"),
        (
            {"model_type": "llama", **SMALL, "quantization_config": {"quant_method": "bitsandbytes"}},
            "config.json has a quantization_config, .*: cut the unquantised checkpoint, or",
        ),
    ],
)
def test_where_there_is_no_plan_it_says_what_to_give(tmp_path, values, says):
    source = tmp_path / "source"
    source.mkdir()
    save_file({"w": torch.zeros(2)}, source / "model.safetensors")
    if values is not None:
        config(source, **values)
    with pytest.raises(PlanError, match=f"{says}.*give --plan FILE, a TOML file of rules"):
        shard(source, tmp_path / "out", size=2)
    assert not (tmp_path / "out").exists()


def test_a_scale_is_not_cut_by_guessing(saved, tmp_path):
    source, state = saved(LlamaConfig(**SMALL))
    state["model.layers.0.mlp.up_proj.weight_scale"] = torch.zeros(48)
    save_file(state, source / "model.safetensors")
    with pytest.raises(
        PlanError, match=r"weight and a bias, not 'model\.layers\.0\.mlp\.up_proj\.weight_scale'"
    ):
        shard(source, tmp_path / "out", size=2)
