# SPDX-License-Identifier: Apache-2.0
"""NIXL between processes of one host, over shared memory and TCP: what two hosts would do."""

import json
import re
import signal
from pathlib import Path

import pytest

from weights_core.testing.waiting import until
from weights_presharded.peer import nixl
from weights_presharded.peer.client import PeerError

PEER = "presharded"


def entry_of(registry):
    return json.loads(next(Path(registry).glob("*.json")).read_text())


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("listen", [None, "127.0.0.1:0"], ids=["socket", "address"])
def test_weights_come_over_nixl_and_both_processes_end_well(
    workers, checkpoint, due, registry, in_place, listen
):
    source = workers(transport="nixl", listen=listen)
    source("load", checkpoint=checkpoint)
    assert (entry_of(registry)["address"] is None) == (listen is None)
    target = workers(transport="nixl", source=False, in_place=in_place)
    told = target("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == (PEER, due()), told
    assert f"pid {source.pid} by nixl: " in told["notes"][0]
    assert told["bytes"] <= told["share"] * 1.01 + 4096
    assert target.leave() == 0
    assert source.leave() == 0


def test_a_source_that_serves_no_nixl_says_so(workers, checkpoint):
    workers()("load", checkpoint=checkpoint)
    told = workers(transport="nixl", source=False)("load", checkpoint=checkpoint)
    assert "it does not serve by 'nixl'" in told["attempts"][PEER]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_flipped_bit_is_found_and_the_engine_brought_back(workers, checkpoint, due, in_place):
    source = workers(transport="nixl")
    source("spoil", how="bit flip")
    source("load", checkpoint=checkpoint)
    target = workers(transport="nixl", source=False, in_place=in_place)
    told = target("load", checkpoint=checkpoint)
    assert (told["provider"], told["seen"]) == ("disk", due())
    assert "arrived with the digest" in told["attempts"][PEER]


def test_an_engine_that_was_written_and_cannot_be_brought_back_is_not_used(workers, checkpoint):
    source = workers(transport="nixl")
    source("spoil", how="bit flip")
    source("load", checkpoint=checkpoint)
    told = workers(transport="nixl", source=False)("load", checkpoint=checkpoint, reinit=False)
    assert told["error"] == "EngineDirtyError", told
    assert "failed after writing to the engine" in told["why"]
    assert "do not use the engine" in told["notes"]


@pytest.mark.parametrize(
    ("how", "says"), [(signal.SIGKILL, "NIXL|read"), (signal.SIGSTOP, "for 1 s|within 1 s")]
)
def test_a_source_that_dies_or_stops_is_given_up(workers, checkpoint, due, tmp_path, how, says):
    held = tmp_path / "held"
    held.mkdir()
    source = workers(transport="nixl")
    source("load", checkpoint=checkpoint)
    target = workers(transport="nixl", source=False, stall=1.0)
    target.begin("load", checkpoint=checkpoint, hold=held)
    until(lambda: list(held.glob("held-*")))
    source.kill() if how == signal.SIGKILL else source.signal(how)
    (held / "go").touch()
    told = target.answer()
    assert (told.get("provider"), told.get("seen")) == ("disk", due()), told
    assert re.search(says, told["attempts"][PEER])
    assert target.leave() == 0


TCP = {"UCX_TLS": "tcp"}
"""Over shared memory a source is read that has been stopped: its bytes are there and are verified."""


@pytest.fixture
def reading(workers, checkpoint, registry, tmp_path):
    """Return a function: sources, a target with some pieces here and others on their way, and `go`.

    The first source is the one that is being read.
    """
    held = tmp_path / "held"
    held.mkdir()

    def begin(count=1, reinit=True, environ=TCP, **settings):
        common = {"transport": "nixl", "environ": environ, "stall": 1.0}
        sources = {}
        for _ in range(count):
            one = workers(**common, target=False)
            sources[one.pid] = one
            one("load", checkpoint=checkpoint)
        target = workers(**common, **{"source": False} | settings)
        target.begin("load", checkpoint=checkpoint, hold_reads=held, reinit=reinit)
        until(lambda: list(held.glob("held-*")))

        def asked():
            entries = [json.loads(path.read_text()) for path in Path(registry).glob("*.json")]
            return [sources[entry["pid"]] for entry in entries if entry["active"]]

        (first,) = until(asked)
        others = [one for one in sources.values() if one is not first]
        return [first, *others], target, (held / "go").touch

    return begin


def end(source, how):
    source.kill() if how == signal.SIGKILL else source.signal(how)


ENDS = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])


@ENDS
@pytest.mark.parametrize("in_place", [True, False])
def test_a_source_that_dies_or_stops_while_it_is_read_is_given_up(reading, due, registry, how, in_place):
    (source,), target, go = reading(in_place=in_place)
    end(source, how)
    go()
    told = target.answer()
    assert (told.get("provider"), told.get("seen")) == ("disk", due()), told
    assert re.search("the read failed|hung up|no byte came for 1 s", told["attempts"][PEER])
    target("scribble")
    written = target("now")
    if how == signal.SIGSTOP:  # what was on its way must not arrive in what is the engine's by now
        source.signal(signal.SIGCONT)
        served = entry_of(registry)["active"]
        assert served == 1
        until(lambda: entry_of(registry)["active"] == 0)
        assert source("now") == due()
    assert target("now") == written
    assert target.leave() == 0


@pytest.mark.parametrize(("how", "in_place"), [(signal.SIGKILL, True), (signal.SIGSTOP, False)])
def test_the_next_source_takes_over_from_one_that_ends_while_it_is_read(reading, due, how, in_place):
    (source, other), target, go = reading(2, in_place=in_place, reinit=False)
    end(source, how)
    go()
    told = target.answer()
    assert (told.get("provider"), told.get("seen")) == (PEER, due()), told
    assert f"pid {other.pid} by nixl: " in told["notes"][0]
    assert any(f"passed over pid {source.pid}: " in note for note in told["notes"])


def test_who_cannot_be_brought_back_is_not_used_when_its_source_dies_while_it_is_read(reading):
    (source,), target, go = reading(reinit=False)
    source.kill()
    go()
    told = target.answer()
    assert told["error"] == "EngineDirtyError", told
    assert "failed after writing to the engine" in told["why"]
    assert "do not use the engine" in told["notes"]
    assert target.leave() == 0


@pytest.mark.parametrize("in_place", [True, False])
def test_what_came_half_is_not_served_on(reading, workers, checkpoint, due, in_place):
    (source,), target, go = reading(source=True, in_place=in_place)
    source.kill()
    go()
    told = target.answer()
    assert (told.get("provider"), told.get("seen")) == ("disk", due()), told
    told = workers(transport="nixl", environ=TCP, source=False)("load", checkpoint=checkpoint)
    assert (told.get("provider"), told.get("seen")) == (PEER, due()), told
    assert f"pid {target.pid} by nixl: " in told["notes"][0]


def _scribbled(source, **_):
    source("scribble")


def _withdrawn(source, **_):
    source("close")


def _ended(source, **_):
    assert source.leave() == 0


def _restarted(source, workers, checkpoint):
    source.kill()
    workers(transport="nixl", environ=TCP, target=False)("load", checkpoint=checkpoint)


@pytest.mark.parametrize("happens", [_scribbled, _withdrawn, _ended, _restarted])
def test_whatever_a_source_does_while_it_is_read_no_wrong_byte_arrives(
    reading, workers, checkpoint, due, happens
):
    (source,), target, go = reading()
    happens(source, workers=workers, checkpoint=checkpoint)
    go()
    told = target.answer()
    assert told.get("seen") == due(), told
    assert told["provider"] in ("disk", PEER)
    assert target.leave() == 0


@ENDS
def test_over_shared_memory_too_no_wrong_byte_arrives(reading, due, how):
    (source,), target, go = reading(environ={})
    end(source, how)
    go()
    told = target.answer()
    assert told.get("seen") == due(), told
    assert target.leave() == 0


def test_ucx_without_tcp_is_refused_with_the_cure():
    with pytest.raises(PeerError, match=r"UCX_TLS=sm leaves out tcp, .*: add it"):
        nixl.prepare({"UCX_TLS": "sm"})
    for fine in ({}, {"UCX_TLS": "sm,tcp"}, {"UCX_TLS": "^cma"}, {"UCX_TLS": "all"}):
        nixl.prepare(dict(fine))


def test_where_there_is_no_infiniband_its_module_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(nixl, "_IB", tmp_path / "none")
    found = {}
    nixl.prepare(found)
    assert found.pop("UCX_MODULES") == "^ib"
    (tmp_path / "some" / "mlx5_0").mkdir(parents=True)
    monkeypatch.setattr(nixl, "_IB", tmp_path / "some")
    found = {}
    nixl.prepare(found)
    assert "UCX_MODULES" not in found
