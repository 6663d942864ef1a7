# SPDX-License-Identifier: Apache-2.0
"""Brokers in folders of their own, and peers: real processes that are led step by step."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from weights_core.testing.waiting import running, until
from weights_gms import client

PEER = Path(__file__).parent / "peer.py"


class Peer:
    """A process that does one step at a time: `peer("open", mode="rw")` returns what came of it."""

    def __init__(self, nursery, settings):
        self.channel, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(nursery, [json.dumps(settings).encode()], [theirs.fileno()])
            self.pid = int(nursery.recv(32))
        self.process = os.pidfd_open(self.pid)
        self.lines = self.channel.makefile("rw")

    def __call__(self, do, **what):
        self.begin(do, **what)
        return self.answer()

    def begin(self, do, **what):
        """Tell it to do something, and don't wait."""
        self.lines.write(json.dumps({"do": do, **what}) + "\n")
        self.lines.flush()

    def answer(self, seconds=30):
        ready, _, _ = select.select([self.channel], [], [], seconds)
        assert ready, "no answer"
        return json.loads(self.lines.readline())

    def is_silent(self, seconds=0.2):
        """Whether it is still at what it was told to do."""
        return not select.select([self.channel], [], [], seconds)[0]

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)
        select.select([self.process], [], [])

    def end(self):
        self.kill()
        os.close(self.process)
        self.lines.close()
        self.channel.close()


@pytest.fixture(scope="session")
def nursery():
    """A process without torch that forks the peers."""
    ours, theirs = socket.socketpair()
    with ours:
        process = subprocess.Popen([sys.executable, PEER, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        yield ours
    process.wait(10)


@pytest.fixture
def where(tmp_path):
    """The path of a socket in a folder that isn't there yet; no broker is left when the test ends."""
    path = str(tmp_path / "run" / "broker.sock")
    yield path
    for pid in brokers_of(path):
        os.kill(pid, signal.SIGTERM)
    until(lambda: not brokers_of(path))


@pytest.fixture
def endpoint(where):
    return client.Endpoint(where)


@pytest.fixture
def peers(where, nursery):
    """Make a peer of the broker at `where`; all are killed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(**settings):
            made = Peer(nursery, {"socket": where, **settings})
            stack.callback(made.end)
            return made

        yield make


@pytest.fixture
def status(endpoint):
    """Return what the broker says of itself, or None if there is none."""
    return lambda: client.ask_once(endpoint, {"op": "status"})


def brokers_of(where):
    """Return the processes that are brokers of a socket."""
    return running("weights_gms.broker", where)
