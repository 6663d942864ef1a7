# SPDX-License-Identifier: Apache-2.0
"""Workers: real processes that load and serve, led step by step; and checkpoints for them."""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from weights_core.testing import write_checkpoint
from weights_core.testing.parallel import LlamaShape, cut

WORKER = Path(__file__).parent / "worker.py"


class Lead:
    """A worker: `lead("load", checkpoint=…)` returns what came of it."""

    def __init__(self, nursery, settings):
        self._nursery = nursery
        self.channel, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(nursery, [json.dumps(settings).encode()], [theirs.fileno()])
            self.pid = int(nursery.recv(32))
        self.lines = self.channel.makefile("rw")
        self.ended = False

    def __call__(self, do, **what):
        self.begin(do, **what)
        return self.answer()

    def begin(self, do, **what):
        """Tell it to do something, and don't wait."""
        self.lines.write(json.dumps({"do": do, **what}, default=str) + "\n")
        self.lines.flush()

    def answer(self, seconds=60):
        ready, _, _ = select.select([self.channel], [], [], seconds)
        assert ready, "no answer"
        line = self.lines.readline()
        assert line, "it has died"
        return json.loads(line)

    def signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """End it at once; return its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self._reaped()

    def leave(self):
        """Let it end as programs do; return its exit code."""
        self.begin("leave")
        return self._reaped()

    def end(self):
        if not self.ended:
            self.kill()
        self.lines.close()
        self.channel.close()

    def _reaped(self):
        self._nursery.send(json.dumps({"reap": self.pid}).encode())
        self.ended = True
        return int(self._nursery.recv(32))


@pytest.fixture(scope="session")
def nursery():
    """A process that has imported torch, and forks the workers."""
    ours, theirs = socket.socketpair()
    with ours:
        process = subprocess.Popen([sys.executable, WORKER, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        yield ours
    process.wait(10)


@pytest.fixture
def registry(tmp_path):
    """The path of a registry that isn't there yet; nothing but the token is left when a test ends."""
    return str(tmp_path / "peers")


@pytest.fixture
def workers(nursery, registry):
    """Make a worker that meets others at `registry`; all are killed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(**settings):
            made = Lead(nursery, {"registry": registry, "beat": 0.5, "stall": 5.0, **settings})
            stack.callback(made.end)
            return made

        yield make


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Return the checkpoint of a small decoder with so many heads of keys and values."""

    @functools.cache
    def make(kv_heads=2, seed=0, vocab=48):
        folder = tmp_path_factory.mktemp("decoder") / "ckpt"
        return write_checkpoint(folder, LlamaShape(kv_heads=kv_heads, vocab=vocab).checkpoint(seed))

    return make


@pytest.fixture
def checkpoint(checkpoints):
    """The checkpoint of the small decoder."""
    return checkpoints()


@pytest.fixture(scope="session")
def due():
    """What one rank must hold, as `summed` tells it, without any of our loading."""
    from worker import summed

    @functools.cache
    def made(size=1, rank=0, kv_heads=2, seed=0, vocab=48):
        shape = LlamaShape(kv_heads=kv_heads, vocab=vocab)
        return summed(cut(shape, shape.checkpoint(seed), size, rank))

    return made


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep digests in a folder of the tests' own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
