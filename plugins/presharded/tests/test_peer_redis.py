# SPDX-License-Identifier: Apache-2.0
"""Peers that find each other in Redis: a real server, on loopback, with a password."""

import secrets
import shutil
import socket
import subprocess
import time

import pytest

from weights_presharded.peer.redis import PREFIX, RedisRegistry
from weights_presharded.peer.registry import RegistryError

PEER = "presharded"


class Server:
    """A Redis server that can be ended and started again."""

    def __init__(self, folder):
        self.folder = folder
        self.password = secrets.token_hex(8)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://:{self.password}@127.0.0.1:{self.port}/0"
        self.process = None

    def start(self):
        binary = shutil.which("redis-server")
        assert binary, "redis-server is not installed: sudo apt-get install -y redis-server"
        command = [binary, "--bind", "127.0.0.1", "--port", str(self.port), "--requirepass", self.password]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while True:
            try:
                return self.client().ping()
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.02)

    def client(self):
        import redis

        return _Closing(redis.Redis.from_url(self.url))

    def stop(self):
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
        self.process = None


class _Closing:
    """A client that is closed after each call."""

    def __init__(self, client):
        self._client = client

    def __getattr__(self, name):
        import redis

        def call(*args):
            try:
                return getattr(self._client, name)(*args)
            except redis.ConnectionError as exc:
                raise OSError(str(exc)) from exc
            finally:
                self._client.close()

        return call


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def peers(workers, server, tmp_path):
    """Workers that know the token, and meet in Redis."""
    path = tmp_path / "token"
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    here = {"XDG_RUNTIME_DIR": str(tmp_path)}
    common = {"registry": server.url, "token_file": str(path), "environ": here}
    return lambda **more: workers(**common | more)


def test_a_target_finds_its_source(peers, checkpoint, due, server):
    source = peers()
    source("load", checkpoint=checkpoint)
    told = peers(source=False)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == (PEER, due()), told
    (key,) = server.client().keys("*")
    assert key.decode().startswith(PREFIX)
    assert 0 < server.client().pttl(key) <= 2500
    assert source.leave() == 0
    assert server.client().keys("*") == []


def test_a_source_that_dies_is_forgotten(peers, checkpoint, due, server):
    source = peers(beat=0.1)
    source("load", checkpoint=checkpoint)
    source.kill()
    told = peers(source=False)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == ("disk", due())
    end = time.monotonic() + 10
    while server.client().keys("*"):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_registry_that_is_wiped_or_restarted_fills_again(peers, checkpoint, due, server):
    peers(beat=0.1)("load", checkpoint=checkpoint)
    server.client().flushall()
    _until_keys(server)
    server.stop()
    told = peers(source=False)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == ("disk", due())
    assert "Redis at redis://127.0.0.1" in told["attempts"][PEER]
    assert server.password not in str(told)
    server.start()
    _until_keys(server)
    told = peers(source=False)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == (PEER, due())


def _until_keys(server):
    end = time.monotonic() + 20
    while not server.client().keys("*"):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_registry_that_is_down_is_no_reason_to_fail(peers, checkpoint, due, server):
    server.stop()
    told = peers()("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"], told["published"]) == ("disk", due(), [])
    assert any("presharded did not publish" in note for note in told["notes"])


def test_a_wrong_password_is_said(peers, checkpoint, due, server):
    wrong = server.url.replace(server.password, "wrong")
    told = peers(registry=wrong)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == ("disk", due())
    assert "invalid username-password" in told["attempts"][PEER] or "WRONGPASS" in told["attempts"][PEER]
    assert "wrong@" not in str(told)


def test_many_hosts_need_a_token_of_their_own(peers, checkpoint, due):
    told = peers(token_file=None)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == ("disk", due())
    assert any("needs a token that is the same on all: token_file=PATH" in note for note in told["notes"])


def test_what_others_keep_there_is_left_alone(server):
    client = server.client()
    client.set("mine", "x")
    client.set(PREFIX + "0" * 32, "noise")
    client.lpush(PREFIX + "list", "x")
    registry = RedisRegistry(server.url)
    assert registry.entries() == []
    assert len(client.keys("*")) == 3
    registry.close()


def test_an_address_that_is_none_is_refused():
    with pytest.raises(RegistryError, match="Redis at redis://host"):
        RedisRegistry("redis://:secret@host:port/x")
