# SPDX-License-Identifier: Apache-2.0
"""What the core costs before the first byte: import, discovery, host and session.

Prints medians over repeated runs, beside what the core stands on. The bars: importing under 80 ms
and without torch; discovery, host and session under 2 ms a load.
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
FRESH = {
    "import weights_core": "import weights_core",
    "  and all that load() needs": "import weights_core.api, weights_core.disk",
    "  attrs and pluggy alone": "import attrs, pluggy",
    "first discovery in a process": "from weights_core import PluginHost; PluginHost.discover()",
}


def main() -> None:
    """Measure and print."""
    print(f"In a fresh interpreter, torch not imported, median of {RUNS}:")
    fresh: dict[str, list[float]] = {name: [] for name in FRESH}
    for _ in range(RUNS):  # interleaved, so that a slow moment of the machine meets all alike
        for name, statement in FRESH.items():
            fresh[name].append(seconds_in_a_fresh_interpreter(statement))
    for name, seconds in fresh.items():
        print(f"  {name:<30} {median_ms(seconds):7.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder) / "c", {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
        measured = [overhead_seconds(path) for _ in range(RUNS)]
    print(f"In a load, in a process that has loaded before, median of {RUNS}:")
    for part in measured[0]:
        print(f"  {part:<30} {median_ms([m[part] for m in measured]):7.2f} ms")
    total = [sum(seconds for part, seconds in m.items() if part != "whole load") for m in measured]
    print(f"  {'added to reading and applying':<30} {median_ms(total):7.2f} ms")


def seconds_in_a_fresh_interpreter(statement: str) -> float:
    """Return the seconds one statement takes."""
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
