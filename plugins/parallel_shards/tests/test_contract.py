# SPDX-License-Identifier: Apache-2.0
"""The plugin honours the contract of a source, for safetensors files and for files of torch."""

import torch

from weights_core.testing import SourceContract, write_checkpoint
from weights_parallel_shards.plugin import ParallelShardsPlugin


class TestSafetensorsFiles(SourceContract):
    name = "parallel_shards"
    plugin = ParallelShardsPlugin


class TestTorchFiles(SourceContract):
    name = "parallel_shards"
    plugin = ParallelShardsPlugin

    def prepare(self, folder, tensors):
        return write_checkpoint(folder / "model", tensors, shards=3, kind="bin")

    def oracle(self, checkpoint):
        files = [torch.load(file, weights_only=True) for file in sorted(checkpoint.glob("*.bin"))]
        return {name: tensor for file in files for name, tensor in file.items()}
