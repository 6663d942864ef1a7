# SPDX-License-Identifier: Apache-2.0
"""What the core costs before the first byte: import, discovery, host and session.

Prints medians over repeated runs. The bars: import under 80 ms and without torch; discovery, host
and session under 2 ms a load.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import weights_core as w
from weights_core.testing import write_checkpoint

RUNS = 30


def main() -> None:
    """Measure and print."""
    imports = [import_seconds() for _ in range(RUNS)]
    empty = [import_seconds("pass") for _ in range(RUNS)]
    print(f"import weights_core    {median_ms(imports):7.2f} ms in a fresh interpreter, torch not imported")
    print(f"  of a bare statement  {median_ms(empty):7.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder) / "c", {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
        measured = [overhead_seconds(path) for _ in range(RUNS)]
    for part in measured[0]:
        print(f"{part:<22} {median_ms([m[part] for m in measured]):7.2f} ms")
    total = [sum(seconds for part, seconds in m.items() if part != "whole load") for m in measured]
    print(f"{'host + session':<22} {median_ms(total):7.2f} ms added to a load")


def import_seconds(statement: str = "import weights_core") -> float:
    """Return the seconds one statement takes in a fresh interpreter."""
    code = (
        f"import sys, time; t = time.perf_counter(); {statement}; "
        "print(time.perf_counter() - t); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def overhead_seconds(path: Path) -> dict[str, float]:
    """Return the seconds of each part of a load that isn't reading or applying."""
    engine = w.TorchEngine(torch.nn.Linear(2, 2))
    marks = [time.perf_counter()]
    host = w.PluginHost.discover()
    marks.append(time.perf_counter())
    request = w.LoadRequest(checkpoint=path, engine=engine.info)
    with host.session(request, engine) as session:
        session.resolve()
        marks.append(time.perf_counter())
        session.load()
        session.apply()
        marks.append(time.perf_counter())
        session.publish(w.Layout.SHARDED)
        session.post_load()
        session.publish(w.Layout.FINAL)
        session.finish()
    marks.append(time.perf_counter())
    names = ("discovery and host", "session.resolve", "load and apply", "publish and finish")
    spans = [b - a for a, b in itertools.pairwise(marks)]
    parts = dict(zip(names, spans, strict=True))
    whole = sum(spans)
    del parts["load and apply"]
    return parts | {"whole load": whole}


def median_ms(seconds: list[float]) -> float:
    """Return the median in milliseconds."""
    return statistics.median(seconds) * 1e3


if __name__ == "__main__":
    main()
