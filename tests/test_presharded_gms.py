# SPDX-License-Identifier: Apache-2.0
"""One copy per node of what was cut beforehand: gms over presharded, each rank its own slot."""

import os
import signal
import time

import pytest
import torch

import weights_core as w
from weights_core.checkpoint import find
from weights_core.digest import content_digest
from weights_core.testing import Group, host_of, write_checkpoint
from weights_core.testing.parallel import LlamaShape, TensorParallelEngine, cut
from weights_gms.client import Endpoint, ask_once
from weights_gms.plugin import GmsPlugin
from weights_presharded import read_plan, shard
from weights_presharded.plugin import PreshardedPlugin

SHAPE = LlamaShape()
PLAN = """
schema = "weights.plan/1"
[[rule]]
match = "model.embed_tokens.weight"
as = "embed"
cut = 0
[[rule]]
as = "layers.*.qkv"
cut = 0
fuse = [
    { match = "model.layers.*.self_attn.q_proj.weight" },
    { match = "model.layers.*.self_attn.k_proj.weight" },
    { match = "model.layers.*.self_attn.v_proj.weight" },
]
[[rule]]
as = "layers.*.gate_up"
cut = 0
fuse = [{ match = "model.layers.*.mlp.gate_proj.weight" }, { match = "model.layers.*.mlp.up_proj.weight" }]
[[rule]]
match = "model.layers.*.self_attn.o_proj.weight"
as = "layers.*.o"
cut = 1
[[rule]]
match = "model.layers.*.mlp.down_proj.weight"
as = "layers.*.down"
cut = 1
[[rule]]
match = "model.layers.*.*layernorm.weight"
as = "layers.*.*layernorm"
[[rule]]
match = "model.norm.weight"
as = "norm"
"""


@pytest.fixture
def socket_path(tmp_path):
    path = str(tmp_path / "run" / "s")
    yield path
    endpoint = Endpoint(path, start=False)
    found = ask_once(endpoint, {"op": "status"})
    if found is not None:  # else it has gone by itself
        os.kill(found["broker"]["pid"], signal.SIGTERM)
    deadline = time.monotonic() + 30
    while ask_once(endpoint, {"op": "status"}) is not None:
        assert time.monotonic() < deadline, "a broker is left"
        time.sleep(0.05)


def test_the_second_engine_maps_what_the_first_read_from_its_own_files(tmp_path, socket_path):
    source = write_checkpoint(tmp_path / "source", SHAPE.checkpoint(), shards=2)
    (tmp_path / "plan.toml").write_text(PLAN)
    shard(source, tmp_path / "cut", size=2, plan=read_plan(tmp_path / "plan.toml"))
    digest = content_digest(find(source)).value

    def engine_of_two_ranks(format, folder):
        group = Group(2)

        def rank_main(rank):
            engine = TensorParallelEngine(SHAPE, size=2, rank=rank, gather=group.gather(rank))
            config = {"gms": {"socket_path": socket_path}, "presharded": {"source": False, "target": False}}
            host = host_of(gms=GmsPlugin, presharded=PreshardedPlugin, config=config)
            return engine, w.load(engine, folder, format, host=host)

        return [future.result() for future in group.run(rank_main)]

    first = engine_of_two_ranks(["gms", "presharded"], tmp_path / "cut")
    second = engine_of_two_ranks(["gms", "presharded"], tmp_path / "cut")
    third = engine_of_two_ranks("gms", source)  # of the whole checkpoint, whose content is the same
    try:
        for rank in range(2):
            due = cut(SHAPE, SHAPE.checkpoint(), 2, rank)
            for engine, report in (first[rank], second[rank], third[rank]):
                assert report.provider == "gms"
                assert engine.params.keys() == due.keys()
                assert all(torch.equal(engine.params[name], tensor) for name, tensor in due.items())
            assert any("loaded by presharded" in note for note in first[rank][1].notes)
            for _, report in (second[rank], third[rank]):
                assert any("read slot" in note for note in report.notes)
            assert any(digest in note for note in second[rank][1].notes)
    finally:
        for _, report in (*first, *second, *third):
            report.lease.close()
