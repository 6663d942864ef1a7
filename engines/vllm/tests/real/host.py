# SPDX-License-Identifier: Apache-2.0
"""A process with a vLLM engine that does what it is told, step by step, one line of JSON at a time."""

import gc
import json
import os
import socket
import sys
import traceback


def seen_by_workers(model):
    """What a worker has: its report, its draft's is in the log."""
    report = getattr(model, "weights_report", None)
    attention = next(layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn"))
    weight = attention.qkv_proj.weight
    linear = 0 if weight is None else weight.numel()
    if report is None:
        return {"provider": None, "linear": linear}
    return {
        "provider": report.provider,
        "notes": list(report.notes),
        "published": [[receipt.layout.value, receipt.nbytes] for receipt in report.receipts],
        "rank": report.rank,
        "bytes": report.nbytes,
        "seconds": report.seconds,
        "linear": linear,
    }


def memory_of_worker(worker):
    """Ask as vLLM's worker for GPUs does before it loads; of 8 GiB all is free but what is held."""
    from types import SimpleNamespace

    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.v1.worker.utils import request_memory

    config = worker.vllm_config
    with set_current_vllm_config(config):
        held = get_model_loader(config.load_config).get_external_weight_memory(config)
    device = SimpleNamespace(device_="made up", total_memory=8 << 30, free_memory=(8 << 30) - held)
    whole = SimpleNamespace(gpu_memory_utilization=1.0)
    return {"held": held, "granted": request_memory(device, whole, held)}


def bytes_of_a_block(worker):
    """What a block of the KV cache takes in a worker, over all layers."""
    config = worker.model_runner.kv_cache_config
    return sum(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks


class Host:
    def __init__(self):
        self.llm = None

    def load(self, model, extra=None, threads="0-1", kv="1", **arguments):
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = threads
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        if kv is not None:  # else vLLM takes what the weights and the rest have left
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = kv
        from vllm import LLM

        form = {"load_format": "auto"}
        if extra is not None:
            form = {"load_format": "weights", "model_loader_extra_config": extra}
        settings = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 2, "dtype": "bfloat16"}
        self.llm = LLM(model=model, **form, **{**settings, **arguments})
        return {
            "workers": self.llm.apply_model(seen_by_workers),
            "blocks": self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
            "block_bytes": self.llm.collective_rpc(bytes_of_a_block)[0],
        }

    def ask(self, question):
        """Answer as text, token ids and logprobs; a question is text for a chat, or token ids."""
        from vllm import SamplingParams

        wanted = SamplingParams(temperature=0, max_tokens=8, logprobs=2, ignore_eos=True)
        if isinstance(question, str):
            (answer,) = self.llm.chat([{"role": "user", "content": question}], wanted, use_tqdm=False)
        else:
            wanted.detokenize = False
            (answer,) = self.llm.generate([{"prompt_token_ids": question}], wanted, use_tqdm=False)
        told = answer.outputs[0]
        logprobs = [{str(i): one.logprob for i, one in step.items()} for step in told.logprobs]
        return {"text": told.text, "ids": list(told.token_ids), "logprobs": logprobs}

    def save_state(self, folder):
        """Have vLLM save its ranks' weights in the way it does itself."""
        self.llm.llm_engine.engine_core.save_sharded_state(path=folder, pattern=None, max_size=None)

    def memory(self):
        """What each worker is told of memory that is held elsewhere, and what vLLM makes of it."""
        return self.llm.collective_rpc(memory_of_worker)

    def register_again(self):
        from weights_vllm.plugin import register

        register()

    def tested_with(self, versions):
        """Pretend that the adapter was tested with other versions of vLLM."""
        from packaging.specifiers import SpecifierSet

        from weights_vllm import version

        version.TESTED = SpecifierSet(versions)

    def close(self):
        from vllm.distributed import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
        gc.collect()


def serve(channel):
    host = Host()
    lines = channel.makefile("rw")
    for line in lines:
        step = json.loads(line)
        try:
            told = {"ok": getattr(host, step.pop("do"))(**step)}
        except Exception as error:
            traceback.print_exc()
            told = {"error": type(error).__name__, "why": str(error)}
        lines.write(json.dumps(told) + "\n")
        lines.flush()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
