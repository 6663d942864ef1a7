# SPDX-License-Identifier: Apache-2.0
"""What goes wrong between peers: real processes, real signals; no wrong byte reaches a post-load."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from weights_core.testing.waiting import until

DISK = "disk"
PEER = "presharded"


@pytest.fixture
def source(workers, checkpoint):
    made = workers()
    made("load", checkpoint=checkpoint)
    return made


@pytest.fixture
def held(tmp_path):
    """A folder in which a transfer waits until `go` is there."""
    folder = tmp_path / "held"
    folder.mkdir()
    return folder


def go(held):
    (held / "go").touch()


def waits(held):
    until(lambda: list(held.glob("held-*")))


def reasons(told):
    return told["attempts"][PEER]


# While bytes are on their way ---------------------------------------------------------------------


def _killed(source, **_):
    source.kill()


def _stopped(source, **_):
    source.signal(signal.SIGSTOP)


def _ended(source, **_):
    source.leave()


def _scribbled(source, **_):
    source("scribble")


def _withdrawn(source, **_):
    source("close")


def _restarted(source, workers, checkpoint):
    source.kill()
    workers()("load", checkpoint=checkpoint)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("happens", [_killed, _stopped, _ended, _scribbled, _withdrawn, _restarted])
def test_a_transfer_within_a_host_survives_its_source(
    workers, checkpoint, due, source, held, happens, in_place
):
    target = workers(source=False, in_place=in_place)
    target.begin("load", checkpoint=checkpoint, hold=held)
    waits(held)
    happens(source, workers=workers, checkpoint=checkpoint)
    go(held)
    told = target.answer()
    assert (told["provider"], told["seen"]) == (PEER, due()), told


def test_a_target_that_dies_takes_nothing_with_it(workers, checkpoint, due, source, held, registry):
    target = workers(source=False)
    target.begin("load", checkpoint=checkpoint, hold=held)
    waits(held)
    entry = next(Path(registry).glob("*.json"))
    until(lambda: json.loads(entry.read_text())["active"] == 1)
    target.kill()
    until(lambda: json.loads(entry.read_text())["active"] == 0)
    assert source("now") == due()
    told = workers(source=False)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == (PEER, due())


def active(registry):
    return [json.loads(entry.read_text())["active"] for entry in Path(registry).glob("*.json")]


def test_a_source_serves_no_more_at_a_time_than_it_may(workers, checkpoint, due, held, registry):
    source = workers(limit=1)
    source("load", checkpoint=checkpoint)
    first = workers(source=False)
    first.begin("load", checkpoint=checkpoint, hold=held)
    waits(held)
    told = workers(source=False, stall=0.5)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == (DISK, due())
    assert f"pid {source.pid}: serves 1 already" in reasons(told)
    patient = workers(source=False, wait=60.0)
    patient.begin("load", checkpoint=checkpoint)
    until(lambda: active(registry) == [1])
    go(held)
    for one in (first, patient):
        told = one.answer()
        assert (told["provider"], told["seen"]) == (PEER, due()), told


def test_a_target_that_is_stopped_loses_its_place_and_not_its_bytes(workers, checkpoint, due, held, registry):
    source = workers(limit=1)
    source("impatient")
    source("load", checkpoint=checkpoint)
    stopped = workers(source=False)
    stopped.begin("load", checkpoint=checkpoint, hold=held)
    waits(held)
    until(lambda: active(registry) == [1])
    stopped.signal(signal.SIGSTOP)
    until(lambda: active(registry) == [0])
    told = workers(source=False)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == (PEER, due())
    go(held)
    stopped.signal(signal.SIGCONT)
    told = stopped.answer()
    assert (told["provider"], told["seen"]) == (PEER, due()), told


# A source that is not what it says ----------------------------------------------------------------


BAD = {
    "bit flip": "arrived with the digest xxh3_128:",
    "truncation": "the shared memory has 4,096 bytes, the manifest says",
    "unsealed": "memory that could still be changed",
    "missing": "has another catalog: missing 1 tensor: norm",
    "extra": "has another catalog: unexpected 1 tensor: stranger",
    "reshaped": r"has another catalog: norm is BF16 [2, 16], need BF16 [32]",
    "no digest": "gives no digest of tensor 'norm'",
}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("how", BAD)
def test_a_bad_source_is_passed_over_for_disk(workers, checkpoint, due, how, in_place):
    source = workers()
    source("spoil", how=how)
    source("load", checkpoint=checkpoint)
    target = workers(source=False, in_place=in_place)
    told = target("load", checkpoint=checkpoint, reinit=False)
    assert (told["provider"], told["seen"]) == (DISK, due())
    assert f"pid {source.pid}: " in reasons(told)
    assert BAD[how] in reasons(told)


@pytest.mark.parametrize("how", BAD)
def test_of_two_sources_the_good_one_serves(workers, checkpoint, due, how):
    bad, good = workers(), workers(target=False)
    bad("spoil", how=how)
    bad("load", checkpoint=checkpoint)
    good("load", checkpoint=checkpoint)
    for _ in range(3):
        told = workers(source=False)("load", checkpoint=checkpoint)
        assert (told["provider"], told["seen"]) == (PEER, due())
        assert f"pid {good.pid}" in told["notes"][0]


def test_without_verification_it_is_said_so(workers, checkpoint, source):
    told = workers(source=False)("load", checkpoint=checkpoint, verify=False)
    assert "not verified, as the settings say" in told["notes"][0]


# Other weights ------------------------------------------------------------------------------------


OTHERS = {
    "revision": ({"digest": "xxh3_128:" + "0" * 32}, "digest: need 'xxh3_128:000"),
    "engine version": ({"engine": {"version": "2"}}, "engine_version: need '2', has '1'"),
    "dtype": ({"engine": {"dtype": "F16"}}, "dtype: need 'F16', has 'BF16'"),
    "topology": ({"size": 2, "rank": 1}, "axes: need {'tp': Axis(size=2, rank=1)}"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_weights_are_refused_naming_the_field(workers, checkpoint, source, tmp_path, what):
    change, why = OTHERS[what]
    if what == "topology":
        ranks = [workers(source=False), workers(source=False)]
        for rank, one in enumerate(ranks):
            one.begin("load", checkpoint=checkpoint, gather=tmp_path, size=2, rank=rank)
        told = [one.answer() for one in ranks]
        assert [one["provider"] for one in told] == [DISK] * 2
        assert why in reasons(told[1])
        return
    told = workers(source=False)("load", checkpoint=checkpoint, **change)
    assert told["provider"] == DISK
    assert "the nearest, pid" in reasons(told)
    assert why in reasons(told)


# The registry -------------------------------------------------------------------------------------


def test_a_stale_entry_is_passed_over_and_removed(workers, checkpoint, source, registry):
    source.kill()
    assert list(Path(registry).glob("*.json"))
    told = workers(source=False)("load", checkpoint=checkpoint)
    assert told["provider"] == DISK
    assert "is not there any more" in reasons(told)
    assert sorted(os.listdir(registry)) == ["token"]


def test_the_socket_of_a_source_that_was_killed_goes_with_the_next(workers, checkpoint, source, registry):
    living, _ = workers(), source.kill()
    living("load", checkpoint=checkpoint, target=False)
    entries = [json.loads(path.read_text()) for path in Path(registry).glob("*.json")]
    (left,) = Path(registry).glob("*.sock")
    assert [e["pid"] for e in entries if e["socket"] == str(left)] == [living.pid]


def test_a_source_that_is_silent_for_long_is_stale(workers, checkpoint, source, registry):
    source.signal(signal.SIGSTOP)
    entry = next(Path(registry).glob("*.json"))
    os.utime(entry, (0, 0))
    told = workers(source=False)("load", checkpoint=checkpoint)
    assert "(1 stale entries)" in reasons(told)
    source.signal(signal.SIGCONT)
    until(lambda: entry.stat().st_mtime > 1)
    assert workers(source=False)("load", checkpoint=checkpoint)["provider"] == PEER


def test_a_source_that_does_not_answer_is_given_up(workers, checkpoint, due, source):
    source.signal(signal.SIGSTOP)
    told = workers(source=False, stall=0.5)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == (DISK, due())
    assert "did not answer within 0.5 s" in reasons(told)


def test_a_registry_that_was_wiped_comes_back(workers, checkpoint, due, source, registry):
    shutil.rmtree(registry)
    until(lambda: list(Path(registry).glob("*.json")) and list(Path(registry).glob("*.sock")))
    assert len(list(Path(registry).glob("*.json"))) == 1
    told = workers(source=False)("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == (DISK, due())
    assert "token" in reasons(told)


def test_a_registry_that_cannot_be_is_no_reason_to_fail(workers, checkpoint, due, tmp_path):
    (tmp_path / "file").touch()
    for where in (tmp_path / "file", tmp_path / "no" / "such"):
        told = workers(registry=str(where))("load", checkpoint=checkpoint)
        assert (told["provider"], told["seen"]) == (DISK, due())
        assert told["published"] == []
        assert any("presharded did not publish" in note for note in told["notes"])


def test_a_target_waits_for_a_source_if_it_is_told_to(workers, checkpoint, due, registry):
    target = workers(source=False, wait=30.0)
    target.begin("load", checkpoint=checkpoint)
    workers(target=False)("load", checkpoint=checkpoint)
    told = target.answer()
    assert (told["provider"], told["seen"]) == (PEER, due())


# Publishing ---------------------------------------------------------------------------------------


def test_a_publish_that_failed_is_never_tried_again(workers, checkpoint, due, registry):
    source = workers()
    source("spoil", how="fail")
    told = source("load", checkpoint=checkpoint, engine={"transforms": True}, snapshot=True)
    assert told["seen"] == due()
    assert told["published"] == []
    assert "presharded did not publish: told to fail" in told["notes"]
    assert not list(Path(registry).glob("*.json"))


def test_who_writes_to_its_weights_later_is_no_source_unless_told_how(workers, checkpoint, due, registry):
    told = workers()("load", checkpoint=checkpoint, engine={"transforms": True})
    assert told["published"] == []
    assert "not a source: engine tensor-parallel writes to its weights later" in told["decisions"][PEER]
    assert "snapshot=true" in told["decisions"][PEER]
    assert not Path(registry).exists()


def test_weights_that_post_load_is_about_to_change_are_drained(workers, checkpoint, due, registry):
    source, target = workers(drain=30.0), workers(source=False)
    source.begin("load", checkpoint=checkpoint, engine={"transforms": True})
    until(lambda: list(Path(registry).glob("*.json")))
    told = target("load", checkpoint=checkpoint, engine={"transforms": True})
    assert (told["provider"], told["seen"]) == (PEER, due())
    served = source.answer()
    assert "1 took the weights, then its post-load went on" in served["published"][0]
    assert not list(Path(registry).glob("*.json"))


def test_draining_ends_at_its_deadline(workers, checkpoint, due, registry):
    told = workers(drain=0.2)("load", checkpoint=checkpoint, engine={"transforms": True})
    assert "0 took the weights, the time was over" in told["published"][0]
    assert told["seen"] == due()
    assert not list(Path(registry).glob("*.json"))


# Ranks --------------------------------------------------------------------------------------------


def ranks_of(workers, checkpoint, meet, size=4, **what):
    meet.mkdir()
    ranks = [workers(source=False, **what) for _ in range(size)]
    for rank, one in enumerate(ranks):
        one.begin("load", checkpoint=checkpoint, gather=meet, size=size, rank=rank)
    return [one.answer() for one in ranks]


def sources_of(workers, checkpoint, meet, size=4, spoil=None):
    meet.mkdir()
    made = [workers(target=False, beat=5.0) for _ in range(size)]
    for rank, one in enumerate(made):
        if rank == spoil:
            one("spoil", how="bit flip")
        one.begin("load", checkpoint=checkpoint, gather=meet, size=size, rank=rank)
    assert all("provider" in one.answer() for one in made)
    return made


def test_one_rank_of_four_without_a_source_sends_all_to_disk(workers, checkpoint, due, tmp_path):
    made = sources_of(workers, checkpoint, tmp_path / "s")
    made[2]("close")
    told = ranks_of(workers, checkpoint, tmp_path / "t")
    for rank, one in enumerate(told):
        assert (one["provider"], one["seen"], one["bytes"]) == (DISK, due(4, rank), one["share"])
        assert "rank 2: " in reasons(one)


@pytest.mark.parametrize("in_place", [True, False])
def test_one_rank_of_four_whose_source_is_bad_sends_all_to_disk(workers, checkpoint, due, tmp_path, in_place):
    sources_of(workers, checkpoint, tmp_path / "s", spoil=1)
    told = ranks_of(workers, checkpoint, tmp_path / "t", in_place=in_place)
    for rank, one in enumerate(told):
        assert (one.get("provider"), one.get("seen")) == (DISK, due(4, rank)), one
        assert "rank 1: " in reasons(one)
        assert "arrived with the digest" in reasons(one)


@pytest.mark.parametrize("stuck", [{0, 2, 3}, {2}], ids=["all", "one"])
def test_ranks_that_were_filled_and_cannot_be_brought_back_end_the_load_on_all(
    workers, checkpoint, tmp_path, registry, stuck
):
    sources_of(workers, checkpoint, tmp_path / "s", spoil=1)
    before = sorted(Path(registry).glob("*.json"))
    (tmp_path / "t").mkdir()
    ranks = [workers() for _ in range(4)]
    for rank, one in enumerate(ranks):
        able = rank not in stuck
        one.begin("load", checkpoint=checkpoint, gather=tmp_path / "t", size=4, rank=rank, reinit=able)
    told = [one.answer() for one in ranks]
    first = min(stuck)
    for rank, one in enumerate(told):
        assert one["error"] == ("EngineDirtyError" if rank in stuck else "RanksDisagreeError"), one
        assert "rank 1: " in one["why"]
        assert "arrived with the digest" in one["why"]
        assert "there is no way back" in one["why"]
        if rank in stuck:
            assert "do not use the engine" in one["notes"]
        else:
            assert f"rank {first} failed at recovery of 'presharded'" in one["why"]
            assert set(one["notes"]) & {"the engine is untouched", "the engine was re-initialised"}
    assert sorted(Path(registry).glob("*.json")) == before


def test_a_rank_that_dies_while_it_copies_ends_the_load_of_the_others_at_their_deadline(
    workers, checkpoint, held, tmp_path
):
    sources_of(workers, checkpoint, tmp_path / "s", size=2)
    meet = tmp_path / "t"
    meet.mkdir()
    one, other = (workers(source=False) for _ in range(2))
    common = {"checkpoint": checkpoint, "gather": meet, "size": 2, "timeout": 2}
    other.begin("load", rank=1, hold=held, **common)
    one.begin("load", rank=0, **common)
    waits(held)
    met = len(list(meet.glob("*-1")))
    other.kill()
    told = one.answer()
    assert told["error"] == "RanksDisagreeError", told
    assert "waited 2 s for the other ranks" in told["why"]
    assert "the engine was re-initialised" in told["notes"]
    assert len(list(meet.glob("*-0"))) == met + 1  # it waited for one answer, not for another one after it


def test_a_token_that_is_missing_sends_to_disk_and_is_said(workers, checkpoint, due, source, tmp_path):
    told = workers(source=False, token_file=str(tmp_path / "none"))("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == (DISK, due())
    assert "No such file" in reasons(told)
