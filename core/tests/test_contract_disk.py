# SPDX-License-Identifier: Apache-2.0
"""The built-in disk source honours the contract, for safetensors files and for files of torch."""

import torch

from weights_core.disk import DiskPlugin
from weights_core.testing import SourceContract, write_checkpoint


class TestSafetensorsFiles(SourceContract):
    name = "plain"
    plugin = DiskPlugin


class TestTorchFiles(SourceContract):
    name = "plain"
    plugin = DiskPlugin

    def prepare(self, folder, tensors):
        return write_checkpoint(folder / "model", tensors, shards=3, kind="bin")

    def oracle(self, checkpoint):
        files = [torch.load(file, weights_only=True) for file in checkpoint.glob("*.bin")]
        return {name: tensor for file in files for name, tensor in file.items()}
