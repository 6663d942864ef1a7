# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def smollm2():
    """Real weights: SmolLM2-135M-Instruct, dequantised once into the demo's cache."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from smollm2 import checkpoint
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return checkpoint(ROOT / ".cache")
