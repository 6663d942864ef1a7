# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

sys.path.insert(0, str(HERE))
pytest_plugins = ["weights_core.testing.fixtures", "lead"]


@pytest.fixture(scope="session")
def llama():
    """The module with checkpoints and a plan for the small tensor-parallel engine."""
    spec = importlib.util.spec_from_file_location("presharded_llama", HERE / "llama.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_ranks():
    """Return a function that runs `ranks.py`, and returns what each rank's process tells."""

    def run(**job):
        done = subprocess.run(
            [sys.executable, HERE / "ranks.py", json.dumps(job)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert set(told["codes"]) == {0}
        return told["ranks"]

    return run
