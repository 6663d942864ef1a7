# SPDX-License-Identifier: Apache-2.0
"""Transformers models on a GPU: the same as `from_pretrained` makes them, to the bit, by every format."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5", reason="needs Transformers: pip install 'transformers>=5'"
)
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from weights_transformers import load

pytestmark = pytest.mark.gpu
COMMON = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "dtype": "bfloat16",
}
MODELS = {
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**COMMON, head_dim=128, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, tie_word_embeddings=False),
}
FORMATS = ["auto", "disk", "parallel_shards", "gms", "gms"]


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp(request.param)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(MODELS[request.param])
    model.save_pretrained(path, max_shard_size="100MB")
    return path


@torch.no_grad()
def answer(model):
    ids = torch.arange(2 * 17, device="cuda").reshape(2, 17)
    return model(ids).logits


def test_one_device(folder, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")
    expected = dict(theirs.named_parameters())
    logits = answer(theirs)
    config = {"gms": {"socket_path": str(tmp_path / "run" / "broker.sock"), "timeout": 60.0}}
    kept = []
    for name in FORMATS:
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        ours = load(AutoModelForCausalLM, folder, format=name, config=config, device_map="cuda")
        torch.cuda.empty_cache()
        taken = before - torch.cuda.mem_get_info()[0]
        found = dict(ours.model.named_parameters())
        assert found.keys() == expected.keys()
        assert [one for one in expected if not torch.equal(found[one], expected[one])] == []
        assert torch.equal(answer(ours.model), logits)
        if kept:  # the second that shares
            assert ours.report.nbytes == 0
            assert taken < 64 << 20
        if name == "gms":
            kept.append(ours)
    for ours in kept:
        ours.report.lease.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_ranks_of_two_devices(folder, tmp_path):
    """Under torchrun, over NCCL: each rank reads its slices, and has what `from_pretrained` gives it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("tensor_parallel.py")
    process = subprocess.Popen(
        [*command, script, folder, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        log, _ = process.communicate(timeout=240)
    finally:
        process.terminate()  # torchrun ends its ranks
        process.wait()
    assert process.returncode == 0, log[-6000:]
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert list(told) == ["parallel_shards", "gms first", "gms second"]
        for name, one in told.items():
            assert one["differ"] == [], name
            assert one["logits"], name
            assert one["cut"], name
            print(f"\n{folder.name} {rank} {name}: {one}")
        assert told["parallel_shards"]["bytes"] <= 1.02 * told["parallel_shards"]["share"]
        assert told["gms second"]["bytes"] == 0
