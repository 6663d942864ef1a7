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
