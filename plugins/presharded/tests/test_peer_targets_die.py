# SPDX-License-Identifier: Apache-2.0
"""Targets that are killed in the middle of a transfer: the source is as it was, and all memory comes back."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from weights_core.testing.waiting import until

VOCAB = 1 << 19
"""Rows of 64 bytes: a tensor of 32 MiB, so that what is not given back is seen."""
SLACK = 8 << 20
HOLD = {"local": "hold_copies", "nixl": "hold_reads"}


def shared_by(pid):
    """Return the inodes of the shared memory that a process has mapped or open."""
    mapped = [
        line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/memfd:" in line
    ]
    found = {int(fields[4]) for fields in mapped}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            if os.readlink(entry).startswith("/memfd:"):
                found.add(entry.stat().st_ino)
    return found


def shared_by_all():
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                found |= shared_by(folder.name)
    return found


@pytest.mark.parametrize("transport", HOLD)
def test_targets_that_die_while_they_copy_leave_nothing(
    workers, checkpoints, due, registry, tmp_path, transport
):
    """What a target has taken is gone with it; what it made its source hold is given back."""
    checkpoint = checkpoints(vocab=VOCAB)
    source = workers(transport=transport, limit=1)
    source("load", checkpoint=checkpoint, vocab=VOCAB)
    of_source = shared_by(source.pid)
    assert of_source

    def is_idle():
        return [json.loads(path.read_text())["active"] for path in Path(registry).glob("*.json")] == [0]

    def start(name, **settings):
        held = tmp_path / name
        held.mkdir()
        target = workers(transport=transport, in_place=False, threads=1, **settings)
        target.begin("load", checkpoint=checkpoint, vocab=VOCAB, **{HOLD[transport]: held})
        return target, held

    def killed(name):
        target, held = start(name)
        until(lambda: list(held.glob("held-*")))
        taken = shared_by(target.pid) - shared_by(source.pid)
        assert taken
        target.kill()
        until(is_idle)
        assert not taken & shared_by_all()

    killed("first")  # what the libraries set up once is no leak
    before = source("holds")
    for name in ("second", "third"):
        killed(name)

    def grown():
        now = source("holds")
        return {
            what: now[what] - n for what, n in before.items() if now[what] > n + SLACK * (what == "bytes")
        }

    until(lambda: not grown())
    assert source("now") == due(vocab=VOCAB)
    target, held = start("last", source=False)
    (held / "go").touch()
    told = target.answer()
    assert (told["provider"], told["seen"]) == ("presharded", due(vocab=VOCAB)), told
    until(is_idle)
    assert not shared_by(target.pid) & of_source
    until(lambda: not grown())  # also while the target goes on
    assert (target.leave(), source.leave()) == (0, 0)
    assert not of_source & shared_by_all()
