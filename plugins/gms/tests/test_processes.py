# SPDX-License-Identifier: Apache-2.0
"""Writers, waiters, readers and the broker as real processes, killed at every step of the protocol."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weights_core.testing.waiting import until
from weights_gms import client

sys.path.insert(0, str(Path(__file__).parent))
from conftest import brokers_of

sys.path.pop(0)


def served(peers, text, **terms):
    """A newcomer is served `text` and nothing else."""
    newcomer = peers()
    granted = newcomer("open", **terms)
    assert granted.get("got") == "read", granted
    assert newcomer("map") == text
    return newcomer


def may_write(peers, number):
    """A newcomer is told to write generation `number`, and all goes well then."""
    newcomer = peers()
    granted = newcomer("open")
    assert (granted.get("got"), granted.get("number")) == ("write", number), granted
    assert newcomer("commit", text="anew") is None
    served(peers, "anew")


# Steps of a writer; after each it is killed. What a newcomer finds then, with and without a reader of
# the generation before: "empty" or "committed".
WRITER = {
    "connected": [],
    "granted": [("open", {"mode": "rw"})],
    "half filled": [("open", {"mode": "rw"}), ("fill", {"text": "second", "half": True})],
    "sealed": [("open", {"mode": "rw"}), ("fill", {"text": "second"}), ("seal", {})],
    "half a commit": [
        ("open", {"mode": "rw"}),
        ("fill", {"text": "second"}),
        ("seal", {}),
        ("half_a_commit", {}),
    ],
    "committed": [("open", {"mode": "rw"}), ("commit", {"text": "second"})],
}


@pytest.mark.parametrize("first", [False, True], ids=["empty slot", "served slot"])
@pytest.mark.parametrize("step", WRITER)
def test_a_writer_killed_at_each_step(peers, status, step, first):
    if first:
        keeper = peers()
        assert keeper("whole", text="first")["got"] == "write"
    writer = peers()
    for do, what in WRITER[step]:
        told = writer(do, **what)
        assert not isinstance(told, dict) or "error" not in told, told
    if step == "committed":
        served(peers, "second")  # before it dies, else nobody would hold it
    waiter = peers()
    waiter.begin("open", mode="auto" if step != "committed" else "ro")
    writer.kill()
    told = waiter.answer()
    if step == "committed":
        assert told["got"] == "read"
        assert waiter("map") == "second"
    elif first:
        assert told["got"] == "read"
        assert waiter("map") == "first"
        assert keeper("text") == "first"
    else:
        assert (told["got"], told["number"]) == ("write", 1)
        assert waiter("commit", text="second try") is None
        served(peers, "second try")
    until(lambda: not [slot for slot in status()["slots"] if slot["writer"]])


def test_a_dead_waiter_changes_nothing(peers, status):
    writer, dead, alive = peers(), peers(), peers()
    writer("open")
    dead.begin("open")
    until(lambda: len((status() or {}).get("waiting", [])) == 1)
    alive.begin("open")
    until(lambda: len((status() or {}).get("waiting", [])) == 2)
    dead.kill()
    until(lambda: len((status() or {}).get("waiting", [])) == 1)
    assert alive.is_silent()
    writer("commit", text="x")
    assert alive.answer()["got"] == "read"
    assert alive("map") == "x"


def test_the_next_waiter_is_promoted_and_not_the_dead_one(peers, status):
    writer, dead, alive = peers(), peers(), peers()
    writer("open")
    dead.begin("open")
    until(lambda: len((status() or {}).get("waiting", [])) == 1)
    alive.begin("open")
    until(lambda: len((status() or {}).get("waiting", [])) == 2)
    dead.kill()
    writer.kill()
    assert alive.answer()["got"] == "write"


@pytest.mark.parametrize("step", ["granted", "mapped"])
def test_a_reader_killed_at_each_step(peers, status, step):
    writer, reader = peers(), peers()
    writer("whole", text="x")
    reader("open")
    if step == "mapped":
        reader("map")

    def leases():
        return status()["slots"][0]["generations"][0]["leases"]

    assert len(leases()) == 2
    reader.kill()
    until(lambda: len(leases()) == 1)
    served(peers, "x")


def test_the_last_lease_gives_the_memory_back_and_the_broker_goes(peers, where, status):
    writer = peers()
    broker = writer("whole", text="x")["broker"]
    reader = served(peers, "x")
    writer.kill()
    served(peers, "x").kill()
    assert len(os.listdir(f"/proc/{broker}/fd")) > 5
    reader("close")
    until(lambda: status() is None or not status()["slots"])
    assert reader("text") == "x"  # what is mapped stays, though nobody else can have it
    until(lambda: not brokers_of(where))
    assert sorted(os.listdir(os.path.dirname(where))) == ["broker.lock", "start.lock"]


# The broker is killed -------------------------------------------------------------------------------


def kill_broker(where):
    (pid,) = brokers_of(where)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_broker_killed_readers_go_on_and_the_next_attach_works(peers, where, status):
    writer = peers()
    writer("whole", text="x")
    readers = [served(peers, "x") for _ in range(2)]
    killed = kill_broker(where)
    newcomer = served(peers, "x")
    assert [r("text") for r in (writer, *readers)] == ["x"] * 3
    until(lambda: len(status()["slots"][0]["generations"][0]["leases"]) == 4)
    assert len(status()["slots"]) == len(status()["slots"][0]["generations"]) == 1
    assert brokers_of(where) != [killed]
    for peer in (writer, *readers, newcomer):
        peer("close")
    until(lambda: not brokers_of(where))


def test_broker_killed_again_and_again(peers, where, status):
    writer = peers()
    writer("whole", text="x")
    for _ in range(3):
        killed = kill_broker(where)
        until(lambda killed=killed: brokers_of(where) not in ([], [killed]) and (status() or {}).get("slots"))
    served(peers, "x")


def test_broker_killed_and_the_writer_dead_a_reader_alone_brings_it_back(peers, where):
    writer = peers()
    writer("whole", text="x")
    reader = served(peers, "x")
    writer.kill()
    kill_broker(where)
    served(peers, "x")
    assert reader("text") == "x"


def test_broker_killed_while_a_writer_writes(peers, where, status):
    writer, waiter = peers(), peers()
    writer("open")
    waiter.begin("open")
    until(lambda: status()["waiting"])
    kill_broker(where)
    assert writer("commit", text="late") is None
    told = waiter.answer()
    if told["got"] == "write":  # it came first, and a moment passed: two copies, both right
        assert waiter("commit", text="late") is None
    else:
        assert waiter("map") == "late"
    served(peers, "late")


def test_broker_killed_with_nobody_there(peers, where):
    peer = peers()
    peer("whole", text="x")
    peer.kill()
    kill_broker(where)
    may_write(peers, 1)


def test_a_broker_that_was_stopped_cleanly_is_replaced_too(peers, where, status):
    peers()("whole", text="x")
    reader = served(peers, "x")
    (pid,) = brokers_of(where)
    os.kill(pid, signal.SIGTERM)
    until(lambda: brokers_of(where) not in ([], [pid]) and status())
    served(peers, "x")
    assert reader("text") == "x"


# Many at once ---------------------------------------------------------------------------------------


def test_twenty_engines_at_once_load_once(peers, where):
    told = peers()("swarm", count=20, pause=0.1)
    assert [t for t in told if "error" in t] == []
    writers = [t for t in told if t["got"] == "write"]
    assert len(writers) == 1
    assert {t["text"] for t in told} == {writers[0]["text"]}
    assert {t["broker"] for t in told} == {writers[0]["broker"]}
    until(lambda: not brokers_of(where))


def test_a_thousand_cycles_leak_nothing(peers, where):
    peer = peers()
    keeper = peers()
    keeper("whole", text="x")
    counted = peer("cycles", count=500)
    assert counted["after"] == counted["before"]
    (pid,) = brokers_of(where)
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    counted = peer("cycles", count=500)
    assert counted["after"] == counted["before"]
    assert len(os.listdir(f"/proc/{pid}/fd")) == fds
    keeper("close")
    counted = peer("cycles", count=20)  # each of them writes
    assert counted["after"] == counted["before"]
    until(lambda: not brokers_of(where))
    assert sorted(os.listdir(os.path.dirname(where))) == ["broker.lock", "start.lock"]


def test_two_engines_of_two_ranks_started_in_opposite_order(peers, status):
    members = [["r0", {"digest": "a"}], ["r1", {"digest": "a"}]]
    x0, x1, y0, y1 = (peers() for _ in range(4))
    x0.begin("whole", text="r0", members=members, rank=0, group="x")
    y1.begin("whole", text="r1", members=members, rank=1, group="y")
    until(lambda: len((status() or {}).get("waiting", [])) == 2)
    y0.begin("whole", text="r0", members=members, rank=0, group="y")
    x1.begin("whole", text="r1", members=members, rank=1, group="x")
    told = {name: peer.answer() for name, peer in {"x0": x0, "x1": x1, "y0": y0, "y1": y1}.items()}
    assert {name: t["text"] for name, t in told.items()} == {"x0": "r0", "x1": "r1", "y0": "r0", "y1": "r1"}
    engines = {(told[f"{name}0"]["got"], told[f"{name}1"]["got"]) for name in "xy"}
    assert engines == {("write", "write"), ("read", "read")}


# Refusals ---------------------------------------------------------------------------------------------


def test_other_weights_are_refused_naming_the_field(peers):
    peers()("whole", text="x", identity="a")
    told = peers()("open", identity="b")
    assert told["error"] == "IdentityMismatchError"
    assert "digest: need 'b', has 'a'. Use another tag, or mode='rw'" in told["why"]


def test_waiting_ends_with_an_error_that_says_for_what(peers):
    peers()("open")
    told = peers()("open", timeout=0.2)
    assert told["error"] == "VaultError"
    assert told["why"] == "waited in vain for the engine that loads these weights"
    told = peers()("open", mode="ro", slot="t", timeout=0.2)
    assert told["why"] == "waited in vain for an engine that loads these weights"


def test_a_writer_may_not_offer_what_can_still_be_changed(peers, status):
    writer = peers()
    writer("open")
    writer("fill", text="x")
    told = writer("commit")
    assert (told["error"], told["why"]) == ("VaultError", "the memory could still be changed")
    assert status()["slots"] == []
    may_write(peers, 1)


# Forks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["writer", "reader"])
def test_a_forked_child_keeps_no_lease(peers, status, where, role):
    peer = peers()
    if role == "reader":
        keeper = peers()
        keeper("whole", text="x")
    peer("whole", text="x")
    child = peer("fork")
    try:
        if role == "reader":
            keeper("close")
        peer.kill()
        until(lambda: status() is None or not status()["slots"])
        may_write(peers, 1)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_forked_while_the_writer_writes_keeps_nothing(peers):
    writer = peers()
    writer("open")
    writer("fill", text="x")
    child = writer("fork")
    try:
        assert writer("seal") is None
        assert writer("commit") is None
        served(peers, "x").kill()
        writer.kill()
        may_write(peers, 1)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("role", ["writer", "reader"])
def test_a_child_reads_and_its_end_is_not_the_parents(peers, role):
    writer = peers()
    writer("whole", text="x")
    peer = writer if role == "writer" else served(peers, "x")
    assert peer("fork_reads") == "x"
    assert peer("fork_writes") == -signal.SIGSEGV
    assert peer("text") == "x"
    served(peers, "x")


# The broker itself --------------------------------------------------------------------------------------


def test_serving_in_the_foreground(where, peers):
    broker = subprocess.Popen(
        client.command(client.Endpoint(where), foreground=True), stdout=subprocess.PIPE, text=True
    )
    try:
        assert broker.stdout.readline() == f"weights-gms: ready at {where}, pid {broker.pid}\n"
        peer = peers(start=False)
        assert peer("whole", text="x")["broker"] == broker.pid
        time.sleep(1.2)  # it does not go when it is idle
        assert broker.poll() is None
        broker.terminate()
        assert broker.wait(10) == 0
        assert not os.path.exists(where)
        assert peer("text") == "x"
    finally:
        broker.kill()
        broker.wait()
        broker.stdout.close()


def test_a_sidecar_that_comes_back_is_told_what_is_held(where, peers):
    def sidecar():
        broker = subprocess.Popen(
            client.command(client.Endpoint(where), foreground=True), stdout=subprocess.PIPE, text=True
        )
        broker.stdout.readline()
        return broker

    broker = sidecar()
    try:
        reader = peers(start=False)
        reader("whole", text="x")
        for sent in ("kill", "terminate"):
            getattr(broker, sent)()
            broker.wait(10)
            broker.stdout.close()
            assert peers(start=False)("open")["why"].startswith(f"no broker at {where}: start one with")
            broker = sidecar()
            newcomer = peers(start=False)
            newcomer.begin("open", mode="ro")
            assert newcomer.answer()["got"] == "read"
            assert newcomer("map") == "x"
            newcomer.kill()
    finally:
        broker.kill()
        broker.wait()
        broker.stdout.close()


def test_a_second_broker_does_not_take_the_place(where, peers, monkeypatch):
    peers()("whole", text="x")
    again = subprocess.run(
        client.command(client.Endpoint(where), foreground=True), capture_output=True, text=True
    )
    assert again.returncode == 1
    assert "another broker holds this place" in again.stderr
    served(peers, "x")


def test_the_broker_imports_little(where, peers):
    pid = peers()("whole", text="x")["broker"]
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "torch" not in maps
    assert "site-packages" not in maps
    resident = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    assert int(resident.split()[1]) < 20_000, resident
