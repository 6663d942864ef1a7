# SPDX-License-Identifier: Apache-2.0
import pytest
from stack import written


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run by tests/gpu/run.sh")


@pytest.fixture(scope="session", autouse=True)
def device_name():
    import torch

    name = torch.cuda.get_device_name()
    print(f"\n{name}, torch {torch.__version__}")
    return name


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The tensors of a model of 2.1 GB, and the folder that they were written to."""
    return written(tmp_path_factory.mktemp("ckpt"))


@pytest.fixture(scope="session")
def tensors(checkpoint):
    return checkpoint[0]


@pytest.fixture(scope="session")
def path(checkpoint):
    return checkpoint[1]
