# SPDX-License-Identifier: Apache-2.0
"""Two real processes that load together over torch.distributed agree on one path."""

import subprocess
import sys

import torch

from weights_core.testing import write_checkpoint

RANK_MAIN = """
import datetime, sys
import torch, torch.distributed as dist
import weights_core as w
from weights_core.testing import host_of

rank, store, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))

def gather(value, timeout):
    everyone = [None, None]
    dist.all_gather_object(everyone, value)
    return everyone

class Flaky:
    weights_api = 1
    @w.hookimpl
    def resolve_format(self):
        return w.FormatClaim(roles={w.Role.SOURCE}, fit=w.Fit.BEST, reason="serves rank 0 only")
    @w.hookimpl
    def load_weights(self, request, source):
        if request.rank == 1:
            raise w.Declined("not me")
        from weights_core.checkpoint import find
        from weights_core.disk import ShardSet
        from weights_core.shards import open_shards
        return ShardSet(open_shards(find(request.checkpoint)), provider="flaky")

with torch.device("meta"):
    model = torch.nn.Linear(3, 2)
engine = w.TorchEngine(model, topology=w.Topology.tensor_parallel(2, rank), gather=gather)
report = w.load(engine, path, host=host_of(flaky=Flaky))
print(report.provider, float(model.weight.sum()))
dist.destroy_process_group()
"""


def test_one_rank_is_not_served_so_both_read_the_disk(tmp_path):
    tensors = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    path = write_checkpoint(tmp_path / "ckpt", tensors)
    script = tmp_path / "rank.py"
    script.write_text(RANK_MAIN)
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "store", path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    for out, _ in outputs:
        assert out.split() == ["disk", str(float(tensors["weight"].sum()))]
