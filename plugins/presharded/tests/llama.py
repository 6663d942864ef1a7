# SPDX-License-Identifier: Apache-2.0
"""A plan for the small tensor-parallel engine: its names, its fused and duplicated parameters."""

from pathlib import Path

from weights_core.testing.checkpoints import write_checkpoint
from weights_core.testing.parallel import LlamaShape

SHAPE = LlamaShape()

PLAN = """
schema = "weights.plan/1"

[[rule]]
match = "model.embed_tokens.weight"
as = "embed"
cut = 0

[[rule]]
as = "layers.*.qkv"
cut = 0
fuse = [
    { match = "model.layers.*.self_attn.q_proj.weight" },
    { match = "model.layers.*.self_attn.k_proj.weight", heads = "num_key_value_heads" },
    { match = "model.layers.*.self_attn.v_proj.weight", heads = "num_key_value_heads" },
]

[[rule]]
as = "layers.*.gate_up"
cut = 0
fuse = [{ match = "model.layers.*.mlp.gate_proj.weight" }, { match = "model.layers.*.mlp.up_proj.weight" }]

[[rule]]
match = "model.layers.*.self_attn.o_proj.weight"
as = "layers.*.o"
cut = 1

[[rule]]
match = "model.layers.*.mlp.down_proj.weight"
as = "layers.*.down"
cut = 1

[[rule]]
match = "model.layers.*.*layernorm.weight"
as = "layers.*.*layernorm"

[[rule]]
match = "model.norm.weight"
as = "norm"

[[rule]]
match = "lm_head.weight"
as = "lm_head"
cut = 0
"""


def checkpoint(folder: Path, shape: LlamaShape = SHAPE, *, seed: int = 0, **how) -> Path:
    """Write a checkpoint of the engine's, with a configuration and a tokenizer beside it."""
    path = write_checkpoint(folder, shape.checkpoint(seed), **how)
    (path / "config.json").write_text(
        f'{{"num_key_value_heads": {shape.kv_heads}, "num_attention_heads": {shape.heads}}}'
    )
    (path / "tokenizer.json").write_text("{}")
    return path


def plan(folder: Path) -> Path:
    """Write the plan file."""
    path = folder / "plan.toml"
    path.write_text(PLAN)
    return path
