# SPDX-License-Identifier: Apache-2.0
"""The plugin honours the contract of a source."""

import numpy as np
import torch

from weights_core.testing import SourceContract
from weights_hello.plugin import HelloPlugin


class TestHello(SourceContract):
    name = "hello"
    plugin = HelloPlugin
    dtypes = ("BOOL", "U8", "I8", "I16", "I32", "I64", "U16", "U32", "U64", "F16", "F32", "F64", "C64")

    def prepare(self, folder, tensors):
        np.savez(folder / "model.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
        return folder / "model.npz"

    def oracle(self, checkpoint):
        with np.load(checkpoint) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}


class TestHelloWithChecksums(TestHello):
    def config(self, folder):
        return {"verify": True}
