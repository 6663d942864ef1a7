# SPDX-License-Identifier: Apache-2.0
"""One rank of several, started by torchrun: loads a model by Transformers, then by weights, and compares.

python -m torch.distributed.run --nproc-per-node 2 tensor_parallel.py CHECKPOINT FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from weights_transformers import load


def main():
    """Write what was found to a file of this rank."""
    path, folder = map(Path, sys.argv[1:])
    theirs = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_plan="auto"))
    config = {"gms": {"socket_path": str(folder / "run" / "broker.sock"), "timeout": 60.0}}
    told, kept = {}, []
    for name in ("parallel_shards", "gms first", "gms second"):
        ours = load(
            AutoModelForCausalLM, path, format=name.split()[0], config=config, tp_plan="auto", timeout=60.0
        )
        told[name] = compared(ours.model, theirs)
        told[name] |= {"provider": ours.report.provider, "bytes": ours.report.nbytes}
        kept.append(ours)
    rank = dist.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(told))
    for ours in kept:
        ours.report.lease.close()
    dist.destroy_process_group()


@torch.no_grad()
def compared(ours, theirs):
    """Return what differs, and what this rank's share of the bytes is."""
    mine, others = (
        {name: local(value) for name, value in model.named_parameters()} for model in (ours, theirs)
    )
    assert mine.keys() == others.keys()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    ids = torch.arange(2 * 17, device=device).reshape(2, 17)
    return {
        "differ": [name for name, value in others.items() if not torch.equal(mine[name], value)],
        "logits": torch.equal(full(ours(ids).logits), full(theirs(ids).logits)),
        "cut": sum(hasattr(value, "placements") for value in ours.parameters()),
        "share": sum(value.nbytes for value in mine.values()),
        "devices": sorted({str(value.device) for value in mine.values()}),
    }


def local(tensor):
    """Return this rank's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor):
    """Return the whole of a tensor that is spread."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    main()
