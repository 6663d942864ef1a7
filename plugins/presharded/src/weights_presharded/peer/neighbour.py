# SPDX-License-Identifier: Apache-2.0
"""For the contract: a process beside this one whose engines serve checkpoints, so that they can be pulled."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import attrs

from weights_core.errors import WeightsError

if TYPE_CHECKING:
    import torch

    from weights_core import Engine
    from weights_core.lease import Lease

REGISTRY = "peers"


class NeighbourError(WeightsError):
    """The process beside this one could not serve."""


class Neighbour:
    """Starts with the first checkpoint, and ends with this object or with this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def prepare(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
        """Write tensors as a plain checkpoint, and have an engine of another process serve them.

        They meet in `REGISTRY` beside `folder`. What was served elsewhere is withdrawn.

        Raises:
            NeighbourError: it could not; says why.
        """
        from weights_core.testing.checkpoints import write_three_files

        checkpoint = write_three_files(folder, tensors)
        told = self._ask({"checkpoint": str(checkpoint), "registry": str(folder.parent / REGISTRY)})
        if "error" in told:
            raise NeighbourError(told["error"])
        return checkpoint

    def _ask(self, order: dict[str, str]) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # it ends as its input does, also after Ctrl-C
            )
            weakref.finalize(self, _end, self._process)
        asks, answers = _pipes(self._process)
        asks.write(json.dumps(order) + "\n")
        asks.flush()
        line = answers.readline()
        if not line:
            raise NeighbourError("the process that serves has ended")
        found: dict[str, Any] = json.loads(line)
        return found


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _end(process: subprocess.Popen[str]) -> None:
    with process:  # closes the pipes, at which it ends, and waits for it
        pass


@attrs.frozen(eq=False)
class _Served:
    """An engine, which lives as long as it is served, and the lease of its load."""

    engine: Engine
    lease: Lease


def _serve(order: Mapping[str, str]) -> _Served:
    """Load a checkpoint into an engine that is equal to those of the contract, and serve it."""
    import weights_core as w
    from weights_core.testing.checkpoints import read_with_safetensors
    from weights_core.testing.engines import FakeEngine
    from weights_core.testing.hosts import host_of
    from weights_presharded.plugin import PreshardedPlugin

    settings = {"registry": order["registry"], "source": True, "target": False, "limit": 64}
    host = host_of(config={"presharded": settings}, presharded=PreshardedPlugin)
    engine = FakeEngine(read_with_safetensors(Path(order["checkpoint"])))
    report = w.load(engine, order["checkpoint"], host=host, progress="never")
    if not report.receipts:
        raise NeighbourError(f"nothing is served: {'; '.join(report.notes)}")
    return _Served(engine, report.lease)


def _orders(lines: IO[str]) -> Iterator[dict[str, str]]:
    for line in lines:
        yield json.loads(line)


def main() -> None:
    """Serve one checkpoint after the other, as standard input says, until that ends."""
    place = ""
    serving: list[_Served] = []
    for order in _orders(sys.stdin):
        if order["registry"] != place:
            place = order["registry"]
            while serving:
                serving.pop().lease.close()
        try:
            serving.append(_serve(order))
            told = {}
        except WeightsError as exc:
            told = {"error": str(exc)}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
