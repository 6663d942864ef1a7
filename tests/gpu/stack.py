# SPDX-License-Identifier: Apache-2.0
"""A model of 2.1 GB, its checkpoint, and what tells its bytes; for tests and the processes they start."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from weights_core.testing import write_checkpoint

LAYERS, WIDTH = 64, 4096
SIZE = LAYERS * WIDTH * WIDTH * 2
MIB = 1 << 20


class Stack(nn.Module):
    """Linear layers of one width in bf16, and a head that is tied to the first."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.layers[0].weight

    def forward(self, x):
        for layer in self.layers[:4]:
            x = layer(x)
        return self.head(x)


def meta():
    """Return a model that has no memory yet."""
    with torch.device("meta"):
        return Stack()


def written(folder):
    """Write a checkpoint; return its tensors and where it is."""
    torch.manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn((WIDTH, WIDTH), dtype=torch.bfloat16) for i in range(LAYERS)}
    path = write_checkpoint(folder, tensors, shards=4)
    time.sleep(0.2)  # a digest is kept of files that have settled
    return tensors, path


def right(model, tensors):
    """Whether a model has exactly these tensors."""
    return all(torch.equal(model.get_parameter(name).cpu(), t) for name, t in tensors.items())


def total(tensors):
    """Return a number that tells these bytes."""
    return sum(int(t.view(torch.int16).sum(dtype=torch.int64)) for t in tensors)


def free(device=None):
    """Return the bytes that a device has free, with nothing cached."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def started(script, *arguments):
    """Start a process that can import this; speak with it through its standard streams."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
