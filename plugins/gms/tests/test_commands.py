# SPDX-License-Identifier: Apache-2.0
"""`weights gms status`, `evict`, `serve` and `digest`, as an operator uses them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from weights_core.cli import main
from weights_core.testing import write_checkpoint
from weights_core.testing.waiting import until

WEIGHTS = Path(sys.executable).parent / "weights"


@pytest.fixture
def run(where):
    def run(command, *arguments):
        return CliRunner().invoke(main, ["gms", command, "--socket", where, *arguments])

    return run


def test_nothing_is_shared_where_there_is_no_broker(run, where):
    done = run("status")
    assert (done.exit_code, done.output) == (0, f"no broker at {where}: nothing is shared\n")
    shown = json.loads(run("status", "--json").output)
    assert shown == {"schema": "weights.gms-status/1", "slots": [], "waiting": [], "broker": None}
    done = run("evict", "s")
    assert (done.exit_code, done.output) == (1, f"slot s has no weights at {where}\n")
    assert not Path(where).parent.exists()


def test_status_shows_who_holds_writes_and_waits(run, peers, status):
    holder, writer, waiter = peers(), peers(), peers()
    holder("whole", text="x" * 2_000_000)
    writer("open", mode="rw")
    waiter.begin("open", mode="ro", slot="t")
    until(lambda: status()["waiting"])
    done = run("status")
    for line in (
        "s\n  generation 1: 2.0 MB, served, 1 leases\n    digest a\n",
        f"    pid {holder.pid}, for 0 s\n",
        f"  written by pid {writer.pid}, for 0 s\n",
        f"pid {waiter.pid} waits for an engine that loads these weights, for 0 s\n",
    ):
        assert line in done.output
    shown = json.loads(run("status", "--json").output)
    assert shown["schema"] == "weights.gms-status/1"
    (slot,) = (s for s in shown["slots"] if s["slot"] == "s")
    (generation,) = slot["generations"]
    assert (generation["number"], generation["serving"], generation["bytes"]) == (1, True, 2_000_000)
    assert [lease["pid"] for lease in generation["leases"]] == [holder.pid]
    assert slot["writer"]["pid"] == writer.pid


def test_evict_serves_nobody_more(run, peers):
    holder = peers()
    holder("whole", text="x")
    done = run("evict", "s")
    assert (done.exit_code, done.output) == (0, "evicted the weights of s\n")
    assert "generation 1: 0.0 MB, replaced, held by its readers" in run("status").output
    assert peers()("open", identity="b")["got"] == "write"
    assert holder("text") == "x"
    assert run("evict", "s").exit_code == 1


def test_serve_says_when_it_is_ready_and_ends_with_sigterm(where, peers):
    served = subprocess.Popen(
        [WEIGHTS, "gms", "serve", "--socket", where, "--allow-uid", "12345"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert served.stdout.readline() == f"weights-gms: ready at {where}, pid {served.pid}\n"
        assert Path(where).parent.stat().st_mode & 0o777 == 0o711
        peer = peers(start=False)
        assert peer("whole", text="x")["broker"] == served.pid
        served.terminate()
        assert served.wait(10) == 0
    finally:
        served.kill()
        served.wait()
        served.stdout.close()


def test_serve_refuses_an_open_folder(tmp_path):
    tmp_path.chmod(0o777)
    done = subprocess.run(
        [WEIGHTS, "gms", "serve", "--socket", tmp_path / "broker.sock"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "can be written by others; chmod 700 it: refused" in done.stderr


def test_digest_is_shown_and_written(tmp_path):
    path = write_checkpoint(tmp_path / "c", {"a": torch.ones(3)})
    shown = CliRunner().invoke(main, ["gms", "digest", str(path)])
    assert shown.output.startswith("xxh3_128:")
    written = CliRunner().invoke(main, ["gms", "digest", str(path), "--write"])
    assert written.output.splitlines()[0] == f"wrote {path}/weights-digests.json"
    assert "sha256:" in written.output
    assert "said by the sidecar (1)" in written.output


def test_the_commands_have_help():
    for command in ("status", "evict", "serve", "digest"):
        done = CliRunner().invoke(main, ["gms", command, "--help"])
        assert done.exit_code == 0
        assert "Example" in done.output
