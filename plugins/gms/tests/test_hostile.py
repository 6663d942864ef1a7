# SPDX-License-Identifier: Apache-2.0
"""What must not get in, and must harm nobody who is in: strangers, links, malformed and greedy clients."""

import contextlib
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weights_core import place, wire
from weights_core.testing.waiting import until
from weights_gms import broker, client
from weights_gms.client import Endpoint, VaultError

sys.path.insert(0, str(Path(__file__).parent))
from conftest import brokers_of

sys.path.pop(0)

STATUS = wire.pack({"op": "status"})
OPEN = {
    "op": "open",
    "members": [["s", {"digest": "a"}]],
    "rank": 0,
    "group": "g",
    "mode": "ro",
    "replace": "keep",
    "keep": 0,
    "timeout": 60,
}


@pytest.fixture
def served(peers):
    """A peer that holds a slot, and must go on holding it."""
    holder = peers()
    holder("whole", text="x")
    return holder


@pytest.fixture
def raw(where, served):
    """Connect without the client's manners."""
    made = []

    def connect():
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(where)
        made.append(sock)
        return sock

    yield connect
    for sock in made:
        sock.close()


def is_unharmed(endpoint, peers):
    """One who behaves is served as before."""
    newcomer = peers()
    assert newcomer("open")["got"] == "read"
    assert newcomer("map") == "x"
    newcomer.kill()
    assert len(client.ask_once(endpoint, {"op": "status"})["slots"]) == 1


def told(sock):
    """Return what the broker says before it hangs up, or None."""
    inbox = wire.Inbox(wire.MAX_REPLY)
    try:
        while (taken := inbox.take()) is None:
            if not inbox.receive(sock):
                return None
    except ConnectionError:
        return None
    return taken[0]


def hung_up(sock):
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


MALFORMED = {
    "too long": (struct.pack("!I", wire.MAX_REQUEST + 1) + b"x", "at most 262144 are taken"),
    "far too long": (b"\xff" * 64, "at most"),
    "no JSON": (struct.pack("!I", 3) + b"{]}", "no JSON"),
    "deep": (struct.pack("!I", 100_000) + b"[" * 100_000, "no JSON"),
    "no object": (struct.pack("!I", 2) + b"[]", "no JSON object"),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", "at most"),
    "another version": (wire.pack({"v": 2, "op": "status"}), "speaks version 2 of the protocol, this one 1"),
    "nothing asked": (wire.pack({}), "None is nothing to ask for"),
    "pickle": (struct.pack("!I", 4) + b"\x80\x04N.", "no JSON"),
    "no members": (wire.pack(OPEN | {"members": 3}), "members are pairs"),
    "members of members": (wire.pack(OPEN | {"members": [["s", []]]}), "members are pairs"),
    "no rank": (wire.pack(OPEN | {"rank": "0"}), "rank is a number"),
    "true rank": (wire.pack(OPEN | {"rank": True}), "rank is a number"),
    "rank out of range": (wire.pack(OPEN | {"rank": 1}), "must each ask once"),
    "endless": (wire.pack(OPEN | {"timeout": float("inf")}), "timeout is a number"),
    "not a number": (wire.pack(OPEN | {"timeout": float("nan")}), "timeout is a number"),
    "mode": (wire.pack(OPEN | {"mode": "wo"}), "mode 'wo'"),
    "long name": (wire.pack(OPEN | {"group": "g" * 1025}), "group is a short string"),
    "commit without a grant": (wire.pack({"op": "commit", "generation": "x"}), "a generation is a manifest"),
    "reseed without memory": (wire.pack({"op": "reseed", "slot": "s"}), "a generation is a manifest"),
    "evict what": (wire.pack({"op": "evict", "slot": {}}), "slot is a short string"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_messages_are_refused_and_hung_up_on(raw, endpoint, peers, name):
    sent, says = MALFORMED[name]
    sock = raw()
    sock.sendall(sent)
    answer = told(sock)
    assert answer["error"] == "protocol"
    assert says in answer["why"]
    assert hung_up(sock)
    is_unharmed(endpoint, peers)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8)))
def test_whatever_comes_the_broker_goes_on(raw, endpoint, noise):
    sock = raw()
    sock.sendall(noise if isinstance(noise, bytes) else wire.pack(OPEN | noise))
    sock.shutdown(socket.SHUT_WR)
    hung_up(sock)
    sock.close()
    assert client.ask_once(endpoint, {"op": "status"})["slots"]


def send_fds(sock, data, count):
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        socket.send_fds(sock, [data], [fd] * count)
    finally:
        os.close(fd)


def fds_of(where):
    (pid,) = brokers_of(where)
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("data", [STATUS, STATUS[:3], wire.pack(OPEN)], ids=["status", "a part", "open"])
def test_descriptors_where_none_are_due_are_closed(raw, where, endpoint, peers, data):
    before = fds_of(where)
    sock = raw()
    send_fds(sock, data, 200)
    if len(data) > 3:
        assert "descriptors" in told(sock)["why"]
    sock.close()
    until(lambda: fds_of(where) == before)
    is_unharmed(endpoint, peers)


def test_a_flood_of_descriptors_is_refused(raw, where, endpoint, peers):
    before = fds_of(where)
    sock = raw()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        until(lambda: send_fds(sock, b"\0", 250))
    sock.close()
    until(lambda: fds_of(where) == before)
    is_unharmed(endpoint, peers)


def test_memory_that_is_none_is_refused(raw, where, endpoint, peers):
    before = fds_of(where)
    for kind in ("host", "elsewhere"):
        sock = raw()
        send_fds(sock, wire.pack({"op": "reseed", "detail": {"memory": kind}, "nbytes": 1}), 2)
        assert "manifest could still be changed" in told(sock)["why"]
    until(lambda: fds_of(where) == before)
    is_unharmed(endpoint, peers)


def test_a_client_that_reads_nothing_is_dropped_and_others_are_served(raw, endpoint, peers):
    greedy = raw()
    greedy.settimeout(0.2)
    with pytest.raises(OSError, match=r"Broken pipe|reset|timed out"):
        until(lambda: greedy.sendall(STATUS * 50))
    is_unharmed(endpoint, peers)


def test_an_unread_answer_arrives_in_parts_when_it_is_read(raw):
    sock = raw()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    count = 500
    sock.sendall(STATUS * count)
    time.sleep(0.2)
    inbox, answers = wire.Inbox(wire.MAX_REPLY), 0
    while answers < count:
        while inbox.take() is not None:
            answers += 1
        if answers < count:
            assert inbox.receive(sock)


def test_with_no_descriptor_left_the_broker_turns_away_and_goes_on(raw, where, endpoint, peers):
    (pid,) = brokers_of(where)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (fds_of(where) + 3, before[1]))
    crowd = [raw() for _ in range(12)]
    for sock in crowd:
        try:
            sock.sendall(STATUS)
        except OSError:
            continue
    time.sleep(0.1)

    def ticks():
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    spent = ticks()
    time.sleep(0.3)
    assert ticks() - spent < 20  # hundredths of a second: it does not spin
    for sock in crowd:
        sock.close()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    until(lambda: client.ask_once(endpoint, {"op": "status"}))
    is_unharmed(endpoint, peers)


# Strangers ------------------------------------------------------------------------------------------


def in_thread(path, **options):
    """Run a broker in a thread of this process; return how to stop it."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listening.bind(path)
    listening.listen()
    made = broker.Broker(listening, path, idle=None, grace=0.0, **options)
    thread = threading.Thread(target=made.run)
    thread.start()

    def stop():
        made.stop()
        with socket.socket(socket.AF_UNIX) as knock:
            knock.connect(path)
        thread.join()
        made.close()
        listening.close()

    return stop


def test_slow_clients_keep_nobody_waiting_and_are_hung_up_on(tmp_path, monkeypatch):
    monkeypatch.setattr(broker, "HELLO_SECONDS", 0.5)
    path = str(tmp_path / "s")
    stop = in_thread(path, allow={os.geteuid()})
    try:
        slow = [socket.socket(socket.AF_UNIX) for _ in range(20)]
        for sock in slow:
            sock.connect(path)
            sock.send(STATUS[:5])
        with socket.socket(socket.AF_UNIX) as quick:
            quick.connect(path)
            quick.send(STATUS)
            assert told(quick)["ok"] == "status"
            assert all(hung_up(sock) for sock in slow)
            quick.send(STATUS)
            assert told(quick)["ok"] == "status"
        for sock in slow:
            sock.close()
    finally:
        stop()


def test_another_user_is_told_so(tmp_path):
    path = str(tmp_path / "s")
    stop = in_thread(path, allow={os.geteuid() + 1})
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            assert told(sock) == {
                "v": 1,
                "error": "refused",
                "why": f"user {os.geteuid()} is not allowed here",
            }
            assert hung_up(sock)
    finally:
        stop()


def test_more_clients_than_are_served_are_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(broker, "MAX_CLIENTS", 2)
    path = str(tmp_path / "s")
    stop = in_thread(path, allow={os.geteuid()})
    try:
        crowd = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for sock in crowd:
            sock.connect(path)
        assert told(crowd[2])["why"] == "too many clients"
        for sock in crowd:
            sock.close()

        def is_served():
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                with contextlib.suppress(BrokenPipeError):
                    sock.send(STATUS)
                return (told(sock) or {}).get("ok") == "status"

        until(is_served)
    finally:
        stop()


AS_NOBODY = """
import os, sys, socket
sys.path.append(sys.argv[1])
from weights_core import wire
os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[2])
    inbox = wire.Inbox(wire.MAX_REPLY)
    try:
        sock.send(wire.pack({"op": "status"}))
    except BrokenPipeError:
        pass
    while (taken := inbox.take()) is None and inbox.receive(sock):
        pass
    print(taken and taken[0].get("why", taken[0].get("ok")))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("allow", "says"),
    [([], "PermissionError"), ([12345], "user 65534 is not allowed here"), ([65534], "status")],
)
def test_another_user_for_real(allow, says):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        where = f"{folder}/run/broker.sock"
        process = subprocess.Popen(
            client.command(Endpoint(where), foreground=True, allow=allow), stdout=subprocess.PIPE, text=True
        )
        try:
            assert "ready" in process.stdout.readline()
            source = Path(wire.__file__).parent.parent
            asked = subprocess.run(
                [sys.executable, "-I", "-S", "-c", AS_NOBODY, source, where],
                capture_output=True,
                text=True,
            )
            assert asked.stdout.strip() == says, asked.stderr
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


# The place --------------------------------------------------------------------------------------------


def test_a_wide_open_folder_is_refused_by_both_sides(tmp_path):
    for mode, who in ((0o777, "written"), (0o770, "written"), (0o755, "entered")):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(place.PlaceError, match=f"can be {who} by others"):
            broker.serve(str(folder / "broker.sock"))
    with pytest.raises(VaultError, match=r"can be written by others; chmod 700 it: refused"):
        client.connect(Endpoint(str(tmp_path / "777/broker.sock")), 0)
    with pytest.raises(VaultError, match=r"cannot be started.*can be entered by others"):
        client.connect(Endpoint(str(tmp_path / "755/broker.sock")), 0)
    assert not list(tmp_path.rglob("*.sock"))


def test_somebody_elses_folder_and_broker_are_refused(tmp_path, where, served):
    stranger = frozenset({os.geteuid() + 1})
    with pytest.raises(VaultError, match=f"belongs to user {os.geteuid()}: refused"):
        client.connect(Endpoint(where, False, stranger), 0)
    folder = os.open(os.path.dirname(where), os.O_RDONLY)
    with pytest.raises(place.PlaceError, match=r"broker.sock belongs to user"):
        place.check_socket(folder, "broker.sock", stranger)
    os.close(folder)


def test_links_are_refused(tmp_path, where, served):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(VaultError, match=r"link is a link or no folder: refused"):
        client.connect(Endpoint(str(tmp_path / "link/broker.sock")), 0)
    (real / "broker.sock").symlink_to(where)
    with pytest.raises(VaultError, match=r"broker.sock is a link or a file, not a socket: refused"):
        client.connect(Endpoint(str(real / "broker.sock")), 0)
    with pytest.raises(place.PlaceError, match="is a link or a file"):
        broker.serve(str(real / "broker.sock"))
    (real / "broker.lock").unlink(missing_ok=True)
    (real / "broker.sock").unlink()
    (real / "broker.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        broker.serve(str(real / "broker.sock"))
    assert not (tmp_path / "victim").exists()


def test_a_path_of_any_length_will_do(tmp_path, peers):
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    where = str(folder / "run" / "broker.sock")
    peer = peers(socket=where)
    assert peer("whole", text="x")["got"] == "write"
    assert peers(socket=where)("whole", text="y")["text"] == "x"


def test_a_folder_that_cannot_be_made_is_an_error_and_no_hang(tmp_path):
    with pytest.raises(VaultError, match="cannot be reached: No such file or directory"):
        client.connect(Endpoint(str(tmp_path / "no/such/broker.sock")), 0)
    (tmp_path / "file").touch()
    with pytest.raises(VaultError, match=r"Not a directory|link or no folder"):
        client.connect(Endpoint(str(tmp_path / "file/broker.sock")), 0)


def test_where_the_users_own_broker_is(tmp_path):
    uid = os.geteuid()
    assert client.default_socket({}, uid) == f"/tmp/weights-gms-{uid}/broker.sock"
    theirs = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert client.default_socket(theirs, uid) == f"{tmp_path}/weights-gms/broker.sock"


# A broker that misbehaves ---------------------------------------------------------------------------


@pytest.fixture
def impostor(tmp_path):
    """A broker that answers every message with given bytes, and perhaps hangs up."""
    folder = tmp_path / "impostor"
    folder.mkdir(mode=0o700)
    path = str(folder / "broker.sock")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    threads, answers = [], []

    def answer_all():
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            with sock:
                if sock.recv(1 << 16) and answers:
                    sock.sendall(answers.pop(0))

    threads.append(threading.Thread(target=answer_all))
    threads[0].start()

    def impersonate(*given):
        answers[:] = given
        return Endpoint(path, start=False)

    yield impersonate
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    threads[0].join()


ASK = {"members": [("s", {"digest": "a"})], "rank": 0, "group": "g", "timeout": 0.3}


@pytest.mark.parametrize(
    ("mode", "answers", "says"),
    [
        (
            "ro",
            [wire.pack({"ok": "write", "slot": "s", "number": 1})],
            "asked for mode 'ro', the broker granted 'write'",
        ),
        (
            "rw",
            [wire.pack({"ok": "read", "slot": "s", "number": 1})],
            "asked for mode 'rw', the broker granted 'read'",
        ),
        ("auto", [wire.pack({"v": 9})], "speaks version 9"),
        ("auto", [b"\xff" * 8], "at most"),
        ("auto", [], "hung up, again and again"),
    ],
)
def test_an_unexpected_answer_is_an_error(impostor, mode, answers, says):
    with pytest.raises(VaultError, match=says):
        client.open_slot(impostor(*answers), client.Ask(mode=mode, **ASK))


def test_a_broker_that_hangs_is_an_error_and_no_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_SLACK", 0.3)
    folder = tmp_path / "hung"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "broker.sock"))
        listening.listen()
        endpoint = Endpoint(str(folder / "broker.sock"), start=False)
        with pytest.raises(VaultError, match="does not answer"):
            client.open_slot(endpoint, client.Ask(mode="auto", **ASK))
        with pytest.raises(VaultError, match="does not answer"):
            client.ask_once(endpoint, {"op": "status"}, seconds=0.2)


def test_a_broker_that_cannot_start_says_why(tmp_path, monkeypatch):
    endpoint = Endpoint(str(tmp_path / "run/broker.sock"))
    monkeypatch.setattr(client.sys, "executable", "/bin/false")
    with pytest.raises(VaultError, match="a broker cannot be started"):
        client.connect(endpoint, 0)
    monkeypatch.setattr(client.sys, "executable", "")
    with pytest.raises(Exception, match="weights gms serve"):
        client.connect(endpoint, 0)


def test_a_request_that_is_too_long_is_not_sent(endpoint, served):
    ask = client.Ask(mode="auto", **(ASK | {"members": [("s", {"digest": "a" * wire.MAX_REQUEST})]}))
    with pytest.raises(VaultError, match=r"a request of \d+ bytes"):
        client.open_slot(endpoint, ask)


def test_nobody_there_to_be_asked(tmp_path):
    assert client.ask_once(Endpoint(str(tmp_path / "run/broker.sock"), start=False), {"op": "status"}) is None
    assert client.SOCKET == "broker.sock"
