# SPDX-License-Identifier: Apache-2.0
"""Ranks in processes of their own gather over gloo; one that stays away, or is gone, is an error."""

import os
import signal
import subprocess
import sys

import pytest

RANK = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from weights_vllm.ranks import gather

rank, size, store, act = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
group = dist.group.WORLD
print(gather(group, {"rank": rank}, 60), flush=True)
if act == "stay away" and rank == 1:
    time.sleep(60)
if act == "die" and rank == 1:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
try:
    print(gather(group, rank, 2 if act == "stay away" else 30), flush=True)
except TimeoutError as error:
    print("TimeoutError:", error, flush=True)
    import os
    os._exit(0)
except RuntimeError as error:
    print("RuntimeError:", error, flush=True)
"""


@pytest.fixture
def ranks(tmp_path):
    """Start a group that does something; all are killed when the test ends."""
    started = []

    def start(size, act):
        command = [sys.executable, "-c", RANK]
        started.extend(
            subprocess.Popen(
                [*command, str(rank), str(size), str(tmp_path / "store"), act],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(size)
        )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_every_rank_sees_what_all_say(ranks):
    for process in ranks(2, "agree"):
        told, _ = process.communicate(timeout=90)
        assert told.splitlines() == ["[{'rank': 0}, {'rank': 1}]", "[0, 1]"]


def test_a_rank_that_stays_away_is_a_time_out(ranks):
    here, _ = ranks(2, "stay away")
    told, _ = here.communicate(timeout=90)
    assert "TimeoutError: a rank stayed away for 2 s" in told
    assert "1" in told.partition("2 s")[2]  # which rank


def test_a_rank_that_is_gone_ends_the_wait(ranks):
    here, gone = ranks(2, "die")
    told, _ = here.communicate(timeout=90)
    assert gone.wait(30) == -signal.SIGKILL
    assert "Error:" in told
