# SPDX-License-Identifier: Apache-2.0
"""What the weights cost vLLM at the start: its own loader, ours, and the second engine of a node.

The bar: the second engine's weights take at most 0.2 of the first's. Needs vLLM, which `make vllm` brings:

    tests/in_place.sh ~/.cache/weights/vllm-0.32.0/bin/python benchmarks/vllm_.py

Every engine is a process of its own, and the ways take turns. The files are in the page cache, or with
`--cold` are put out of it before each engine. For vLLM's own loader its `load_weights` is timed; for ours
it is all phases of the report, digest and publishing included. Post-load, the same in all, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from weights_core.testing import write_checkpoint

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 2048, 5632, 10, 32, 8, 32000

ENGINE = """
import json, sys, time
from vllm import LLM
from vllm.model_executor.model_loader import DefaultModelLoader

own = []
load_weights = DefaultModelLoader.load_weights

def timed(self, model, model_config):
    start = time.perf_counter()
    load_weights(self, model, model_config)
    own.append(time.perf_counter() - start)

DefaultModelLoader.load_weights = timed

def seen(model):
    report = getattr(model, "weights_report", None)
    return {p.name: p.seconds for p in report.phases} if report is not None else {"load": own[0]}

model, form = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(model=model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, max_num_seqs=2,
          dtype="bfloat16", **form)
(phases,) = llm.apply_model(seen)
print("RESULT", json.dumps(phases), flush=True)
sys.stdin.read()
"""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


class Engine:
    """A process with an engine that lives until it is closed."""

    def __init__(self, path: Path, form: dict[str, Any], cache: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENGINE, str(path), json.dumps(form)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **ENVIRONMENT, "XDG_CACHE_HOME": str(cache)},
        )
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if line.startswith("RESULT ")), None)
        if line is None:
            raise SystemExit(f"an engine did not start with {form}")
        self.phases: dict[str, float] = json.loads(line.removeprefix("RESULT "))

    @property
    def seconds(self) -> float:
        """Seconds for the weights."""
        return sum(self.phases.values())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def checkpoint(path: Path) -> Path:
    """Write a random Llama of about 1 GB."""
    torch.manual_seed(0)
    head = HIDDEN // HEADS
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        sizes |= {
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (KV_HEADS * head, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (KV_HEADS * head, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, FFN),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
    sizes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    write_checkpoint(path, {n: (torch.randn(s) * 0.02).bfloat16() for n, s in sizes.items()}, shards=4)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 2048,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def evict(path: Path) -> None:
    """Put the files out of the page cache."""
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> tuple[int, float]:
    """Read every file into memory that was touched; return the bytes and seconds: the limit of any loader."""
    total, spent = 0, 0.0
    for file in path.glob("*.safetensors"):
        buffer = bytearray(file.stat().st_size)
        with file.open("rb", buffering=0) as opened:
            start = time.perf_counter()
            while total_read := opened.readinto(memoryview(buffer)[opened.tell() :]):
                total += total_read
            spent += time.perf_counter() - start
    return total, spent


def main() -> None:
    """Measure in turn, and print medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        cache = Path(folder) / "cache"
        path = checkpoint(Path(folder) / "model")
        gms = {"format": "gms", "config": {"gms": {"socket_path": f"{folder}/run/broker.sock"}}}
        forms: dict[str, dict[str, Any]] = {
            "vLLM's own loader": {"load_format": "auto"},
            "weights, auto": {"load_format": "weights"},
            "not mapped": {"load_format": "weights", "model_loader_extra_config": {"map_files": False}},
            "gms, first engine": {"load_format": "weights", "model_loader_extra_config": gms},
            "gms, second engine": {"load_format": "weights", "model_loader_extra_config": gms},
        }
        taken: dict[str, list[float]] = {name: [] for name in (*forms, "plain reads")}
        phases: dict[str, dict[str, float]] = {}
        nbytes = 0
        for _ in range(given.runs):
            if given.cold:
                evict(path)
            nbytes, seconds = read(path)
            taken["plain reads"].append(seconds)
            running = []
            for name, form in forms.items():
                if given.cold:
                    evict(path)
                engine = Engine(path, form, cache)
                taken[name].append(engine.seconds)
                phases[name] = engine.phases
                running.append(engine)
                if not name.startswith("gms, first"):  # the first stays for the second
                    running.pop().close()
            for engine in running:
                engine.close()
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    print(
        f"{nbytes / 1e9:.2f} GB, {'cold' if given.cold else 'warm'}, medians of {given.runs}, and the range"
    )
    own = taken["vLLM's own loader"]
    for name, seconds in medians.items():
        ratios = [one / base for one, base in zip(taken[name], own, strict=True)]
        spread = f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{name:<20}{seconds:8.3f} s {nbytes / seconds / 1e9:7.2f} GB/s {spread} of vLLM's own, by round"
        )
    for name in list(forms)[1:]:
        print(f"{name}: " + ", ".join(f"{p} {s:.3f}" for p, s in phases[name].items() if s >= 0.001))
    second = medians["gms, second engine"]
    print(f"second engine: {second / medians['gms, first engine']:.3f} of the first's (bar 0.2)")


if __name__ == "__main__":
    main()
