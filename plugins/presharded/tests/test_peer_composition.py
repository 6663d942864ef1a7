# SPDX-License-Identifier: Apache-2.0
"""One copy per node over a pull from another node, over a wrapper, over the disk: two nodes on one host."""

import json
import os
import signal
from pathlib import Path

import pytest

from weights_core.testing.waiting import running, until

FORMAT = ["gms", "presharded"]


@pytest.fixture
def sockets():
    """The brokers' sockets; no broker is left when a test, and its workers, have ended."""
    made = []
    yield made
    for socket in made:
        for pid in brokers_of(socket):
            os.kill(pid, signal.SIGTERM)
        until(lambda socket=socket: not brokers_of(socket))


@pytest.fixture
def node(sockets, workers, tmp_path):
    """Make an engine of a node: a broker of its own, and the registry that all nodes meet at."""

    def make(name, **settings):
        sockets.append(tmp_path / name / "broker.sock")
        gms = {"socket_path": str(sockets[-1]), "timeout": 20.0}
        one = workers(**settings)

        def load(checkpoint, **more):
            plugins = ["gms", "consumable"]
            return one, one("load", checkpoint=checkpoint, format=FORMAT, plugins=plugins, gms=gms, **more)

        return load

    return make


def brokers_of(where):
    return running("weights_gms.broker", str(where))


def entries(registry):
    return [json.loads(path.read_text()) for path in Path(registry).glob("*.json")]


def test_one_node_reads_the_disk_the_other_pulls_and_each_holds_one_copy(node, checkpoint, due, registry):
    first, told = node("a")(checkpoint)
    assert (told["provider"], told["seen"]) == ("gms", due())
    notes = " ".join(told["notes"])
    assert "wrote slot" in notes
    assert "gms: loaded by disk" in notes
    assert told["moved"] == 0
    assert len(entries(registry)) == 1
    held = first("shared")

    second, told = node("b")(checkpoint)
    assert (told["provider"], told["seen"]) == ("gms", due())
    notes = " ".join(told["notes"])
    assert "gms: loaded by presharded" in notes
    assert f"weights of pid {first.pid} by local" in notes
    assert told["moved"] == 0
    assert second("shared") == held

    third, told = node("b")(checkpoint)
    assert (told["provider"], told["seen"]) == ("gms", due())
    assert "read slot" in " ".join(told["notes"])
    assert third("now") == due()
    assert len(entries(registry)) == 3  # a reader serves what it maps, at no cost
    assert told["moved"] == 0

    first.kill()
    second.kill()
    fourth, told = node("c")(checkpoint)
    assert "gms: loaded by presharded" in " ".join(told["notes"])
    assert f"weights of pid {third.pid} by local" in " ".join(told["notes"])
    assert fourth("now") == due()


def test_a_bad_peer_leaves_the_node_to_its_disk(node, workers, checkpoint, due):
    source = workers()
    source("spoil", how="bit flip")
    source("load", checkpoint=checkpoint)
    _, told = node("a", source=False)(checkpoint)
    assert (told["provider"], told["seen"]) == ("gms", due())
    assert "gms: loaded by disk" in " ".join(told["notes"])
    assert "arrived with the digest" in told["attempts"]["presharded"]


def test_an_engine_that_writes_later_keeps_serving_what_it_loaded(node, workers, checkpoint, due):
    engine = {"transforms": True}
    first, told = node("a", snapshot=True)(checkpoint, engine=engine)
    assert told["now"] != told["seen"] == due()
    told = workers(source=False)("load", checkpoint=checkpoint, engine=engine)
    assert (told["provider"], told["seen"]) == ("presharded", due())
    assert first("now") != due()
