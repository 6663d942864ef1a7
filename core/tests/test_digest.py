# SPDX-License-Identifier: Apache-2.0
"""The digest of a checkpoint: by the hub's names, a sidecar, the cache, or by reading every byte."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import xxhash

from weights_core import digest as digests
from weights_core.checkpoint import find
from weights_core.digest import (
    SIDECAR,
    check_form,
    checkpoint_digest,
    content_digest,
    write_content,
    write_sidecar,
)
from weights_core.errors import CheckpointError
from weights_core.testing import write_checkpoint


@pytest.fixture
def path(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", {"a": torch.arange(9.0), "b": torch.ones(3)}, shards=2)


@pytest.fixture
def environ(tmp_path):
    return {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": "/nonexistent"}


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)


def origins(found):
    return set(found.origins.values())


def test_one_file_is_hashed_and_found_again(tmp_path, environ, settled):
    path = write_checkpoint(tmp_path / "ckpt", {"a": torch.arange(3_000_000.0)})
    first = content_digest(find(path), environ=environ)
    raw = (path / "model.safetensors").read_bytes()
    assert first.value == f"xxh3_128:{xxhash.xxh3_128_hexdigest(raw)}"
    assert (origins(first), first.bytes_hashed) == ({"hashed"}, len(raw))
    assert "hashed now (1), 12.0 MB in" in str(first)
    again = content_digest(find(path), environ=environ)
    assert (again.value, origins(again), again.bytes_hashed) == (first.value, {"cache"}, 0)
    assert str(again).endswith("hashed before (1)")


def test_names_and_places_do_not_matter_and_content_does(path, tmp_path, environ):
    there = tmp_path / "there"
    there.mkdir()
    for old, new in zip(sorted(path.glob("*.safetensors")), ["z.safetensors", "y.safetensors"], strict=True):
        (there / new).write_bytes(old.read_bytes())
    here = content_digest(find(path), environ=environ).value
    assert content_digest(find(there), environ=environ).value == here
    other = write_checkpoint(tmp_path / "other", {"a": torch.arange(9.0), "b": torch.zeros(3)}, shards=2)
    assert content_digest(find(other), environ=environ).value != here


def test_a_rewritten_file_is_hashed_anew(path, environ, settled):
    before = content_digest(find(path), environ=environ).value
    file = sorted(path.glob("*.safetensors"))[0]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    times = file.stat()
    file.write_bytes(raw)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the change time tells
    after = content_digest(find(path), environ=environ)
    assert after.value != before
    assert sorted(after.origins.values()) == ["cache", "hashed"]


def test_a_file_changed_a_moment_ago_is_not_kept(path, environ, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_NS", 10**18)
    for _ in range(2):
        assert origins(content_digest(find(path), environ=environ)) == {"hashed"}


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b'{"key": 1}', b'{"key": KEY, "digest": "../etc"}'])
def test_a_torn_entry_of_the_cache_is_hashed_anew(path, environ, settled, tmp_path, left):
    value = content_digest(find(path), environ=environ).value
    for entry in (tmp_path / "cache/weights/digests").iterdir():
        key = json.dumps(json.loads(entry.read_bytes())["key"]).encode()
        entry.write_bytes(left.replace(b"KEY", key))
    again = content_digest(find(path), environ=environ)
    assert (again.value, origins(again)) == (value, {"hashed"})
    assert origins(content_digest(find(path), environ=environ)) == {"cache"}


def test_a_cache_that_others_may_write_or_nobody_can_make_is_not_used(path, environ, settled, tmp_path):
    folder = tmp_path / "cache/weights/digests"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    (tmp_path / "file").touch()
    for where in (environ, {"XDG_CACHE_HOME": str(tmp_path / "file/x")}, {}, {"XDG_CACHE_HOME": "relative"}):
        assert origins(content_digest(find(path), environ=where)) == {"hashed"}
    assert not list(folder.iterdir())
    assert origins(content_digest(find(path), environ={"HOME": str(tmp_path / "home")})) == {"hashed"}
    assert (tmp_path / "home/.cache/weights/digests").stat().st_mode & 0o777 == 0o700


def test_the_hubs_cache_names_files_by_their_content(tmp_path, environ):
    repo = tmp_path / "models--org--name"
    made = write_checkpoint(tmp_path / "made", {"a": torch.ones(4)})
    raw = (made / "model.safetensors").read_bytes()
    name = hashlib.sha256(raw).hexdigest()
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / name).write_bytes(raw)
    snapshot = repo / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{name}")
    found = content_digest(find(snapshot), environ=environ)
    assert found.value == f"sha256:{name}"
    assert (origins(found), found.bytes_hashed) == ({"hub"}, 0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / name).write_bytes(raw)
    (elsewhere / "model.safetensors").symlink_to(elsewhere / name)
    assert origins(content_digest(find(elsewhere / "model.safetensors"), environ=environ)) == {"hashed"}


def test_a_sidecar_is_believed_while_the_sizes_agree(path, environ):
    written = write_sidecar(find(path))
    assert written.name == SIDECAR
    found = content_digest(find(path), environ=environ)
    assert origins(found) == {"sidecar"}
    assert found.value.startswith("sha256:")
    assert not list(path.glob("*.part"))
    said = json.loads(written.read_text())
    name, entry = said["files"].popitem()
    written.write_text(json.dumps(said))
    mixed = content_digest(find(path), environ=environ)
    assert mixed.value.startswith("mixed:")
    assert "said by the sidecar (1), hashed now (1)" in str(mixed)
    said["files"][name] = entry | {"bytes": 1}
    written.write_text(json.dumps(said))
    with pytest.raises(
        CheckpointError, match=rf"{SIDECAR}: is of other files: {name} has \d+ bytes, it says 1"
    ):
        content_digest(find(path), environ=environ)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSON"),
        ("[" * 9999, "JSON"),
        ("[]", "schema"),
        ('{"schema": "weights.digests/1", "files": []}', "schema"),
    ],
)
def test_a_broken_sidecar_is_named(path, environ, text, says):
    (path / SIDECAR).write_text(text)
    with pytest.raises(CheckpointError, match=f"{SIDECAR}.*{says}"):
        content_digest(find(path), environ=environ)


def test_a_sidecar_without_a_digest_is_named(path, environ):
    names = [p.name for p in path.glob("*.safetensors")]
    files = {name: {"bytes": 1, "digest": "sha256:no hex"} for name in names}
    (path / SIDECAR).write_text(json.dumps({"schema": digests.SCHEMA, "files": files}))
    with pytest.raises(CheckpointError, match="has no digest, algorithm:hex, for model-00001"):
        content_digest(find(path), environ=environ)


def test_a_folder_says_of_which_checkpoint_it_holds_the_weights(path, tmp_path, environ):
    due = content_digest(find(path), environ=environ).value
    assert checkpoint_digest(path, environ=environ).value == due
    other = tmp_path / "other"
    (other / "part").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no weights"):
        checkpoint_digest(other, environ=environ)
    write_content(other, due)
    found = checkpoint_digest(other, environ=environ)
    assert (found.value, origins(found), found.bytes_hashed) == (due, {"sidecar"}, 0)
    assert checkpoint_digest(other, "part", environ=environ).value == due
    write_content(other / "part", "xxh3_128:" + "0" * 32)
    assert checkpoint_digest(other, "part", environ=environ).value == "xxh3_128:" + "0" * 32


def test_a_folder_that_says_no_digest_is_named(tmp_path, environ):
    with pytest.raises(ValueError, match="is no digest"):
        write_content(tmp_path, "made up")
    (tmp_path / SIDECAR).write_text('{"schema": "weights.digests/1", "files": {}, "content": "made up"}')
    with pytest.raises(CheckpointError, match=f"{SIDECAR}.*its content is no digest"):
        checkpoint_digest(tmp_path, environ=environ)


def test_a_file_that_changes_while_it_is_hashed_is_an_error(tmp_path, environ, monkeypatch):
    path = write_checkpoint(tmp_path / "ckpt", {"a": torch.ones(4000)})
    file = path / "model.safetensors"

    class Meddling:
        def __init__(self):
            os.utime(file, ns=(1, 1))

        def update(self, _part):
            return

    monkeypatch.setattr(xxhash, "xxh3_128", Meddling)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        content_digest(find(path), environ=environ)


def test_hashing_ends_when_it_is_no_longer_wanted(path, environ):
    stop = threading.Event()
    stop.set()
    with pytest.raises(CheckpointError, match="no longer wanted"):
        content_digest(find(path), environ=environ, stop=stop)
    assert origins(content_digest(find(path), environ=environ)) == {"hashed"}


def test_processes_that_ask_at_once_hash_once(tmp_path, environ):
    path = write_checkpoint(tmp_path / "ckpt", {"a": torch.ones(2_000_000)})
    time.sleep(digests._SETTLED_NS / 1e9)
    code = """
import sys
from weights_core.checkpoint import find
from weights_core.digest import content_digest
from pathlib import Path
found = content_digest(find(Path(sys.argv[1])))
print(*found.origins.values(), found.value)
"""
    asking = [
        subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True, env=environ)
        for _ in range(6)
    ]
    answers = [p.communicate(timeout=60)[0].split() for p in asking]
    assert sorted(a[0] for a in answers) == ["cache"] * 5 + ["hashed"]
    assert len({a[1] for a in answers}) == 1


def test_what_is_no_digest_is_refused():
    assert check_form("sha256:" + "0" * 64)
    for wrong in ("", "sha256", "sha256:xyz", "abc", "sha256:" + "0" * 15):
        with pytest.raises(ValueError, match="is no digest"):
            check_form(wrong)
