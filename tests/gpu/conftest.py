# SPDX-License-Identifier: Apache-2.0
import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run by tests/gpu/run.sh")


@pytest.fixture(scope="session", autouse=True)
def device_name():
    import torch

    name = torch.cuda.get_device_name()
    print(f"\n{name}, torch {torch.__version__}")
    return name
