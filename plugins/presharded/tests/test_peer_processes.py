# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own: the first loads from disk, the others from it, bit for bit."""

import json
import os
from pathlib import Path

import pytest

from weights_core.testing.waiting import until


def world(workers, count, tmp_path, name, checkpoint, **what):
    """Start one engine of `count` ranks; return its workers and what each was told."""
    meet = tmp_path / f"gather-{name}"
    meet.mkdir()
    ranks = [workers() for _ in range(count)]
    for rank, one in enumerate(ranks):
        one.begin("load", checkpoint=checkpoint, size=count, rank=rank, gather=meet, **what)
    return ranks, [one.answer() for one in ranks]


def entries(registry):
    return [json.loads(path.read_text()) for path in Path(registry).glob("*.json")]


@pytest.mark.parametrize("engine", [{"final": True}, {"transforms": True}], ids=["final", "sharded"])
@pytest.mark.parametrize(("size", "kv_heads"), [(1, 2), (2, 2), (3, 1), (4, 2)])
def test_every_rank_pulls_its_own_shard_and_nothing_else(
    workers, checkpoints, due, tmp_path, size, kv_heads, engine
):
    options = {"engine": engine, "snapshot": True, "kv_heads": kv_heads}
    _, told = world(workers, size, tmp_path, "source", checkpoints(kv_heads), **options)
    assert [one["provider"] for one in told] == ["disk"] * size
    layout = "final" if "final" in engine else "sharded"
    assert [one["layouts"] for one in told] == [[layout]] * size
    _, told = world(workers, size, tmp_path, "target", checkpoints(kv_heads), **options)
    for rank, one in enumerate(told):
        assert one["provider"] == "presharded", one
        assert one["seen"] == due(size, rank, kv_heads)
        assert one["bytes"] == one["share"]
    assert [one["now"] != one["seen"] for one in told] == ["transforms" in engine] * size


def test_a_target_is_a_source_for_the_next(workers, checkpoint, due, registry):
    first, second, third = workers(), workers(), workers()
    first("load", checkpoint=checkpoint)
    told = second("load", checkpoint=checkpoint, in_place=False)
    assert told["moved"] == 0
    assert "a target that is a source now" in told["published"][0]
    assert first.leave() == 0
    assert len(until(lambda: entries(registry))) == 1
    told = third("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == ("presharded", due())
    assert f"pid {second.pid}" in told["notes"][0]


def test_processes_end_as_programs_do_and_leave_nothing(workers, checkpoint, registry):
    source, target = workers(), workers()
    source("load", checkpoint=checkpoint)
    target("load", checkpoint=checkpoint)
    assert target.leave() == 0
    assert source.leave() == 0
    assert sorted(os.listdir(registry)) == ["token"]


def offered_by(pid):
    """Return how many descriptors of shared memory a process has."""
    folder = Path(f"/proc/{pid}/fd")
    return sum(os.readlink(entry).startswith("/memfd:") for entry in folder.iterdir())


def test_a_lease_that_is_closed_ends_the_offer_and_frees_the_memory(workers, checkpoint, registry, due):
    source, target = workers(), workers()
    source("load", checkpoint=checkpoint)
    target("load", checkpoint=checkpoint)
    target("close")
    assert len(entries(registry)) == 1
    assert offered_by(source.pid) > 0
    source("close")
    assert sorted(os.listdir(registry)) == ["token"]
    assert offered_by(source.pid) == 0
    assert source("now") == due()  # in its own mapping, which goes with the model
    assert source("shared") > 0
    source("drop")
    assert source("shared") == 0
    told = target("load", checkpoint=checkpoint)
    assert told["provider"] == "disk"
    assert told["attempts"]["presharded"].startswith("no source is in the directory")


def test_eight_targets_at_once(workers, checkpoint, due):
    source = workers(limit=2)
    source("load", checkpoint=checkpoint)
    targets = [workers(source=False) for _ in range(8)]
    for one in targets:
        one.begin("load", checkpoint=checkpoint)
    for one in targets:
        told = one.answer()
        assert (told["provider"], told["seen"]) == ("presharded", due()), told
    assert source("now") == due()


def test_what_the_engine_writes_later_is_not_served(workers, checkpoint, due):
    source, target = workers(), workers()
    source("load", checkpoint=checkpoint)
    source("scribble")
    told = target("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == ("presharded", due())
    assert source("now") != due()


def test_within_a_host_nothing_needs_to_be_configured(workers, checkpoint, due, tmp_path):
    common = {"registry": None, "environ": {"XDG_RUNTIME_DIR": str(tmp_path)}}
    source, target = workers(**common), workers(**common)
    assert source("load", checkpoint=checkpoint)["provider"] == "disk"
    told = target("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == ("presharded", due())
    folder = tmp_path / "weights-presharded"
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "token").stat().st_mode & 0o077 == 0
