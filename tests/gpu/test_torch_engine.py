# SPDX-License-Identifier: Apache-2.0
"""TorchEngine loads onto a CUDA device: right bytes, ties kept, memory as it should be."""

import pytest
import torch
from torch import nn

import weights_core as w
from weights_core.machine import facts
from weights_core.testing import write_checkpoint

pytestmark = pytest.mark.gpu
LAYERS, WIDTH = 128, 4096  # 4.3 GB of bf16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        make = {"bias": False, "dtype": torch.bfloat16}
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, **make) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WIDTH, **make)
        self.head.weight = self.layers[0].weight


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    shape = (WIDTH, WIDTH)
    return {f"layers.{i}.weight": torch.randn(shape, dtype=torch.bfloat16) for i in range(LAYERS)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tensors):
    return write_checkpoint(tmp_path_factory.mktemp("ckpt"), tensors, shards=8)


@pytest.mark.parametrize("format", ["disk", "parallel_shards"])
def test_a_meta_model_to_the_device(checkpoint, tensors, format):
    total = sum(t.nbytes for t in tensors.values())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device("meta"):
        model = Model()
    report = w.load(w.TorchEngine(model, device="cuda"), checkpoint, format)
    apply = next(phase for phase in report.phases if phase.name == "apply")
    print(
        f"{format}: {apply.gb_per_s:.2f} GB/s from page cache, host peak {report.peak_over_model >> 20} MiB, "
        f"device peak {torch.cuda.max_memory_allocated() / total:.3f} of the model"
    )
    assert model.head.weight is model.layers[0].weight
    assert all(torch.equal(model.get_parameter(name).cpu(), t) for name, t in tensors.items())
    assert torch.cuda.max_memory_allocated() < 1.05 * total


def test_in_place_on_the_device(checkpoint, tensors):
    model = Model().cuda()
    before = [p.data_ptr() for p in model.parameters()]
    w.load(w.TorchEngine(model), checkpoint)
    assert [p.data_ptr() for p in model.parameters()] == before
    assert torch.equal(model.layers[5].weight.cpu(), tensors["layers.5.weight"])


def test_what_the_doctor_sees(tmp_path):
    found = {fact.topic: fact for fact in facts(tmp_path)}
    for topic in ("cores", "memory limit", "CUDA", "NVLink", "RDMA"):
        print(f"{topic}: {found[topic].value}")
    assert torch.cuda.get_device_name() in found["CUDA"].value
