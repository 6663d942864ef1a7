# SPDX-License-Identifier: Apache-2.0
"""A process that does on the vault what it is told, step by step, one line of JSON at a time.

It imports no torch, so that tests may start, kill and fork many. A step that fails answers with the
error's type and text.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback

from weights_core import wire
from weights_core.memory import HostSegment
from weights_gms import client


class Peer:
    def __init__(self, socket, start=True, owners=()):
        owned = frozenset(owners) or frozenset({os.geteuid()})
        self.endpoint = client.Endpoint(socket, start, owned)
        self.grant = self.lease = self.segment = None

    def open(self, mode="auto", identity="a", slot="s", members=None, rank=0, group=None, **terms):
        members = members or [[slot, {"digest": identity}]]
        ask = client.Ask(
            members=members, rank=rank, group=group or f"{os.getpid()}-{time.monotonic_ns()}", mode=mode,
            **{"timeout": 30.0, **terms},
        )  # fmt: skip
        self.identity = members[rank][1]
        self.grant = client.open_slot(self.endpoint, ask)
        return {"got": self.grant.kind, "number": self.grant.reply["number"], "broker": self.pid_of_broker()}

    def pid_of_broker(self):
        return self.grant.reply["broker"]["pid"]

    def fill(self, text, half=False):
        raw = text.encode()
        self.size = len(raw)
        self.segment = HostSegment.create(self.size)
        ctypes.memmove(self.segment.address, raw, self.size // 2 if half else self.size)

    def seal(self):
        self.segment.seal(self.size)

    def half_a_commit(self):
        data = wire.pack({"op": "commit", "generation": "half", "nbytes": 1, "detail": {"memory": "host"}})
        wire.send(self.grant.sock, data[: len(data) // 2], [self.segment.descriptor] * 2)

    def commit(self, text=None, keep=0.0):
        if text is not None:
            self.fill(text)
            self.seal()
        held = {"identity": self.identity, "keep": keep, "nbytes": self.size, "detail": {"memory": "host"}}
        self.lease = client.commit(self.grant, str(self.size).encode(), [self.segment], held)

    def map(self):
        self.size = int(client.read_manifest(self.grant))
        self.segment = HostSegment.attach(self.grant.fds.pop(1), self.size)
        self.lease = client.keep(self.grant, [self.segment])
        return self.text()

    def text(self):
        return ctypes.string_at(self.segment.address, self.size).decode()

    def whole(self, text, pause=0.0, **terms):
        """What an engine does: load and offer, or read."""
        granted = self.open(**terms)
        if granted["got"] == "write":
            time.sleep(pause)
            self.commit(text)
        else:
            self.map()
        return {**granted, "text": self.text()}

    def close(self):
        (self.lease or self.grant).close()
        self.lease = self.grant = None

    def cycles(self, count):
        before = self.count()
        for _ in range(count):
            self.whole("x")
            self.close()
            self.segment = None
        return {"before": before, "after": self.settled(before)}

    def settled(self, before, seconds=5):
        """Count again once a thread that is about to end has ended."""
        deadline = time.monotonic() + seconds
        while (after := self.count()) != before and time.monotonic() < deadline:
            time.sleep(0.01)
        return after

    def count(self):
        with open("/proc/self/maps") as maps:
            mapped = sum("memfd:" in line for line in maps)
        with open("/proc/self/status") as status:
            threads = next(int(line.split()[1]) for line in status if line.startswith("Threads"))
        return {"fds": len(os.listdir("/proc/self/fd")), "maps": mapped, "threads": threads}

    def fork(self):
        """Leave behind a child that has inherited everything and does nothing."""
        child = os.fork()
        if child == 0:
            for fd in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), fd)
            time.sleep(120)
            os._exit(0)
        return child

    def fork_reads(self):
        """Let a child read what is mapped; return what it saw."""
        out, into = os.pipe()
        if os.fork() == 0:
            os.write(into, self.text().encode())
            self.close() if self.lease is not None else None
            os._exit(0)
        os.wait()
        with os.fdopen(out) as read:
            os.close(into)
            return read.read()

    def fork_writes(self):
        """Let a child write what is mapped; return how it ended."""
        child = os.fork()
        if child == 0:
            ctypes.memset(self.segment.address, 0, 1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def swarm(self, count, **terms):
        """Start `count` engines at once; return what each did, while all still hold it."""
        ways, ends = [], os.pipe()
        for number in range(count):
            out, into = os.pipe()
            if os.fork() == 0:
                os.close(ends[1])
                try:
                    told = self.whole(f"by {number}", **terms)
                except Exception as error:
                    told = {"error": type(error).__name__, "why": str(error)}
                os.write(into, json.dumps(told).encode())
                os.close(into)
                os.read(ends[0], 1)
                os._exit(0)
            os.close(into)
            ways.append(out)
        told = []
        for way in ways:
            with os.fdopen(way) as read:
                told.append(json.loads(read.read()))
        os.close(ends[1])
        os.close(ends[0])
        for _ in range(count):
            os.wait()
        return told


def serve(settings, channel):
    peer = Peer(**settings)
    lines = channel.makefile("rw")
    for line in lines:
        step = json.loads(line)
        try:
            told = getattr(peer, step.pop("do"))(**step)
        except Exception as error:
            told = {"error": type(error).__name__, "why": str(error), "trace": traceback.format_exc()}
        lines.write(json.dumps(told) + "\n")
        lines.flush()


def nursery(orders):
    """Fork a peer for each order that comes: settings, and a socket to lead it by."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        raw, fds, _, _ = socket.recv_fds(orders, 1 << 16, 1)
        if not raw:
            return
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            orders.close()
            serve(json.loads(raw), socket.socket(fileno=fds[0]))
            os._exit(0)
        os.close(fds[0])
        orders.send(str(child).encode())


if __name__ == "__main__":
    nursery(socket.socket(fileno=int(sys.argv[1])))
