# SPDX-License-Identifier: Apache-2.0
"""A program: one rank that has Transformers load models cut by itself, and saves what it holds of each."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def main(rank, *folders):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for folder in map(Path, folders):
        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_plan="auto")
        )
        held = {
            name: (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone().contiguous()
            for name, tensor in model.named_parameters()
        }
        save_file(held, folder / f"held-by-{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main(*sys.argv[1:])
