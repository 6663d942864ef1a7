# SPDX-License-Identifier: Apache-2.0
"""Who has not the token, or makes no sense, learns nothing, writes nothing and disturbs nobody."""

import contextlib
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_contract_peers import ask

from weights_core import wire
from weights_presharded.peer import token
from weights_presharded.peer.entry import Entry
from weights_presharded.peer.registry import DirectoryRegistry
from weights_presharded.peer.token import TokenError

NONCE = "0" * 64


@pytest.fixture
def source(workers, checkpoint, request):
    by_address = "how" in request.fixturenames and request.getfixturevalue("how") == "address"
    made = workers(listen="127.0.0.1:0") if by_address else workers()
    made("load", checkpoint=checkpoint)
    return made


@pytest.fixture
def entry(source, registry):
    return json.loads(next(Path(registry).glob("*.json")).read_text())


def reach(entry, how):
    if how == "socket":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(entry["socket"])
    else:
        host, port = entry["address"].split(":")
        sock = socket.create_connection((host, int(port)))
    sock.settimeout(10)
    return sock


def heard(sock):
    """Return all that a source says until it hangs up, and how many descriptors came."""
    data, fds = b"", 0
    with contextlib.suppress(ConnectionError):
        while True:
            part, ancillary, _, _ = sock.recvmsg(1 << 16, 4096)
            fds += len(ancillary)
            if not part:
                break
            data += part
    return data, fds


PULL = {"op": "pull", "transport": "local", "wait": 0.0}


@pytest.mark.parametrize("how", ["socket", "address"])
@pytest.mark.parametrize(
    "messages",
    [
        [PULL],
        [{"op": "hello", "nonce": NONCE}, PULL],
        [{"op": "hello", "nonce": NONCE}, PULL | {"proof": "0" * 64}],
        [{"op": "hello", "nonce": NONCE}, PULL | {"proof": None}],
        [{"op": "hello", "nonce": NONCE}, PULL | {"proof": "é"}],
        [{"op": "hello", "nonce": NONCE}, {"op": "hello", "nonce": NONCE}],
        [{"op": "hello", "nonce": "short"}],
        [{"op": "hello"}],
        [{"op": "done"}],
        [{"op": "alive"}],
        [{"op": ["hello"]}],
        [{}],
    ],
    ids=str,
)
def test_without_the_token_nothing_is_told(entry, source, how, messages, workers, checkpoint, due):
    with reach(entry, how) as sock:
        for message in messages:
            with contextlib.suppress(ConnectionError):
                sock.sendall(wire.pack(message))
        told, fds = heard(sock)
    assert fds == 0
    assert entry["identity"]["digest"].encode() not in told
    inbox = wire.Inbox(1 << 16)
    inbox._data += told
    answers = []
    while (taken := inbox.take()) is not None:
        answers.append(taken[0])
    assert [set(answer) for answer in answers] in ([], [{"v", "ok", "nonce", "proof"}])
    assert source("now") == due()


def test_a_proof_cannot_be_reflected(entry):
    """What a source proves is of no use to whoever wants to be a target."""
    with reach(entry, "socket") as sock:
        sock.sendall(wire.pack({"op": "hello", "nonce": NONCE}))
        inbox = wire.Inbox(1 << 16)
        while (taken := inbox.take()) is None:
            inbox.receive(sock)
        sock.sendall(wire.pack(PULL | {"proof": taken[0]["proof"], "identity": entry["identity"]}))
        assert heard(sock) == (b"", 0)


@pytest.mark.parametrize(
    "noise",
    [b"\xff" * 100, b"GET / HTTP/1.0\r\n\r\n", struct.pack("!I", 1 << 30), wire.pack({"v": 99}), b"\x00"],
    ids=["ones", "http", "huge", "version", "half"],
)
def test_noise_is_hung_up_on_and_others_are_served(entry, noise, workers, checkpoint, due):
    with reach(entry, "socket") as sock:
        sock.sendall(noise)
        told = workers(source=False)("load", checkpoint=checkpoint)
        assert (told["provider"], told["seen"]) == ("presharded", due())
        assert heard(sock) == (b"", 0)  # also what never becomes a message


def test_descriptors_that_come_unasked_are_closed(entry, source):
    before = source("descriptors")
    for _ in range(5):
        with reach(entry, "socket") as sock, open(os.devnull) as null:
            socket.send_fds(sock, [wire.pack({"op": "hello", "nonce": NONCE})], [null.fileno()] * 20)
            sock.recv(1)
    deadline = time.monotonic() + 10
    while source("descriptors") > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert source("descriptors") <= before


@pytest.mark.parametrize("change", [{"digest": "x:0000000000000000"}, {"axes": {"tp": [2, 0]}}], ids=str)
def test_with_the_token_other_weights_are_refused_by_name(entry, registry, change):
    told, fds = ask(entry["socket"], registry, entry, identity=entry["identity"] | change)
    assert fds == []
    assert (told["error"], set(told["fields"])) == ("mismatch", set(change))


@pytest.mark.parametrize("identity", [None, {}, {"digest": 3}, []], ids=str)
def test_with_the_token_an_identity_that_is_none_is_hung_up_on(entry, registry, identity):
    with pytest.raises(AssertionError, match="hung up"):
        ask(entry["socket"], registry, entry, identity=identity)


def test_what_is_handed_over_cannot_be_written(entry, registry):
    _, fds = ask(entry["socket"], registry, entry)
    for fd in fds:
        with pytest.raises(OSError, match=r"Bad file descriptor|not permitted|denied"):
            os.write(fd, b"x")
        with pytest.raises(OSError, match=r"not permitted|denied"):
            os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC)
        os.close(fd)


def test_another_token_serves_nobody(workers, checkpoint, due, tmp_path, source):
    other = tmp_path / "other-token"
    other.write_text(secrets.token_hex(32))
    other.chmod(0o600)
    told = workers(source=False, token_file=str(other))("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == ("disk", due())
    assert "has not the token, or another one" in told["attempts"]["presharded"]


def test_a_false_source_is_found_out_before_anything_is_told(
    workers, checkpoint, due, registry, entry, source
):
    """Whoever can write the registry, but has no token, is not even told what is wanted."""
    said = []
    path = str(Path(registry) / "false.sock")
    false = {**entry, "id": secrets.token_hex(16), "socket": path, "active": 0, "address": None}
    source("close")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        listening.settimeout(20)
        raw = Entry.loads(json.dumps({**false}).encode(), 0.0)
        DirectoryRegistry(registry, {os.geteuid()}).put(raw)
        target = workers(source=False, transport="local")
        target.begin("load", checkpoint=checkpoint)
        sock, _ = listening.accept()
        with sock:
            said.append(sock.recv(1 << 16))
            sock.sendall(wire.pack({"ok": "hello", "nonce": NONCE, "proof": "0" * 64}))
            said.append(sock.recv(1 << 16))
        told = target.answer()
    assert (told["provider"], told["seen"]) == ("disk", due())
    assert set(json.loads(said[0][4:])) == {"v", "op", "nonce"}
    assert said[1] == b""


# Tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [("x" * 31, 0o600, "holds 31 bytes, need 32"), ("x" * 64, 0o640, "can be read by others; chmod 600")],
)
def test_a_bad_token_file_is_refused(tmp_path, content, mode, why):
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(TokenError, match=why):
        token.read_token(str(path), {os.geteuid()})
    with pytest.raises(TokenError, match="No such file"):
        token.read_token(str(tmp_path / "none"), {os.geteuid()})


def test_one_token_is_made_however_many_ask_at_once(tmp_path):
    code = """
import os, sys
from weights_presharded.peer.token import own_token
print(own_token(sys.argv[1], {os.geteuid()}).decode())
"""
    asking = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "t"], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    made = {process.communicate()[0] for process in asking}
    assert len(made) == 1
    assert os.listdir(tmp_path / "t") == ["token"]


# The place where all of this is -------------------------------------------------------------------


def _linked(folder, elsewhere):
    folder.symlink_to(elsewhere)
    return "is a link or no folder"


def _open_to_all(folder, elsewhere):
    folder.mkdir()
    folder.chmod(0o1777)
    return "can be written by others; chmod 700 it"


def _of_a_stranger(folder, elsewhere):
    if os.geteuid() != 0:
        pytest.skip("only root can make what is another user's")
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    return "belongs to user 65534"


def _file(folder, elsewhere):
    folder.touch()
    return "is a link or no folder"


@pytest.mark.parametrize("made", [_linked, _open_to_all, _of_a_stranger, _file])
def test_a_default_place_that_somebody_else_made_is_not_used(workers, checkpoint, due, tmp_path, made):
    """Neither side tells anything there, both load, and `weights peers` says what is wrong."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    folder = tmp_path / "weights-presharded"
    says = made(folder, elsewhere)
    for _ in range(2):
        told = workers(registry=None, environ=environ)("load", checkpoint=checkpoint)
        assert (told["provider"], told["seen"], told["published"]) == ("disk", due(), [])
        for why in (told["attempts"]["presharded"], *(n for n in told["notes"] if "did not publish" in n)):
            assert f"{folder} {says}: refused; mend that, or set registry=FOLDER" in why
    assert any("did not publish" in note for note in told["notes"])
    assert not os.listdir(elsewhere)
    assert folder.is_file() or not os.listdir(folder)
    done = subprocess.run(
        [Path(sys.executable).parent / "weights", "peers"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "WEIGHTS_CONFIG"} | environ,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"weights: RegistryError: registry: {folder} {says}: refused; ")
    assert len(done.stderr.splitlines()) == 1


def test_what_is_in_a_place_is_for_its_user_alone(source, registry):
    with contextlib.suppress(FileNotFoundError):
        for path in (Path(registry), *Path(registry).iterdir()):
            assert path.lstat().st_mode & 0o077 == 0, path


# The directory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 60000, b'{"schema": 1}'])
def test_what_is_no_entry_is_passed_over(tmp_path, content):
    (tmp_path / f"{'0' * 32}.json").write_bytes(content)
    assert DirectoryRegistry(str(tmp_path), {os.geteuid()}).entries() == []


def test_only_files_of_trusted_users_count_and_no_links(entry, registry, tmp_path):
    trusted = DirectoryRegistry(registry, {os.geteuid()})
    (found,) = trusted.entries()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    name = f"{found.id}.json"
    (elsewhere / name).symlink_to(Path(registry) / name)
    assert DirectoryRegistry(str(elsewhere), {os.geteuid()}).entries() == []
    (elsewhere / name).unlink()
    (elsewhere / f"{'0' * 32}.json").write_bytes(found.dumps())  # under another's name
    assert DirectoryRegistry(str(elsewhere), {os.geteuid()}).entries() == []
    os.mkfifo(elsewhere / f"{'1' * 32}.json")
    assert DirectoryRegistry(str(elsewhere), {os.geteuid()}).entries() == []


@pytest.mark.parametrize(
    "change",
    [
        {"pid": -1},
        {"pid": True},
        {"nbytes": "1"},
        {"id": "../../x"},
        {"beat": None},
        {"more": 1},
        {"identity": {}},
    ],
    ids=str,
)
def test_an_entry_that_makes_no_sense_is_none(entry, change):
    with pytest.raises(ValueError, match=r"."):
        Entry.loads(json.dumps(entry | change).encode(), 0.0)
