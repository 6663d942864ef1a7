# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism with real processes: a rank reads its slices, and the model is the same."""

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weights_presharded import shard

RANK = Path(__file__).parent / "rank.py"


@pytest.fixture
def run(tmp_path):
    """A function that starts two ranks, and returns what they told and saved; with `wait` they live on."""
    with contextlib.ExitStack() as stack:

        def start(folder, name, wait=False, **how):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            outs = [tmp_path / f"{name}.{rank}.pt" for rank in range(2)]
            logs = [stack.enter_context((tmp_path / f"{name}.{r}.log").open("w")) for r in range(2)]
            ranks = [
                subprocess.Popen(
                    [
                        sys.executable,
                        RANK,
                        str(r),
                        "2",
                        str(port),
                        folder,
                        json.dumps({**how, "wait": wait}),
                        outs[r],
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=logs[r],
                    text=True,
                )
                for r in range(2)
            ]
            for rank in ranks:
                stack.callback(end, rank)
            told = []
            for r, rank in enumerate(ranks):
                lines = iter(rank.stdout.readline, "")
                line = next((one for one in lines if one.startswith("{")), None)
                assert line, (tmp_path / f"{name}.{r}.log").read_text()[-3000:]
                told.append(json.loads(line))
            if not wait:
                for rank in ranks:
                    end(rank)
                    assert rank.returncode == 0
            return told, [torch.load(out) if out.exists() else None for out in outs]

        yield start


def end(process):
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()  # the second time does nothing


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["cut"] == other["cut"]
        assert mine["parameters"].keys() == other["parameters"].keys()
        for name, value in other["parameters"].items():
            assert torch.equal(mine["parameters"][name], value), name
        assert torch.equal(mine["answer"], other["answer"])


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "mixtral"])
def test_a_rank_reads_its_slices_alone(saved, run, name):
    path = saved(name)
    _, theirs = run(path, "theirs", by="transformers")
    told, ours = run(path, "ours", by="parallel_shards")
    assert not [one["error"] for one in told if "error" in one]
    assert_same(ours, theirs)
    assert ours[0]["cut"]
    for rank, one in enumerate(told):
        assert one["engine"] == "TransformersEngine"
        assert one["axes"] == f"{{'tp': Axis(size=2, rank={rank})}}"
        assert one["provider"] == "parallel_shards"
        assert one["share"] <= one["bytes"] <= one["share"] * 1.02


@pytest.mark.parametrize("name", ["llama-even", "qwen3-even"])
def test_ranks_read_their_own_files_of_a_checkpoint_that_was_cut(saved, run, tmp_path, name):
    path = saved(name)
    shard(path, tmp_path / "cut", size=2)
    _, theirs = run(path, "theirs", by="transformers")
    told, ours = run(path, "ours", by="presharded", source=str(tmp_path / "cut"))
    assert not [one["error"] for one in told if "error" in one]
    assert [one["provider"] for one in told] == ["presharded"] * 2
    assert_same(ours, theirs)
    assert all(one["bytes"] <= one["share"] * 1.02 for one in told)


def test_ranks_share_with_those_of_another_engine(saved, run, vault):
    path = saved("llama")
    _, theirs = run(path, "theirs", by="transformers")
    wrote, first = run(path, "first", by="gms", config=vault, wait=True)
    read, second = run(path, "second", by="gms", config=vault)
    assert not [one["error"] for one in wrote + read if "error" in one]
    assert [one["published"] for one in wrote] == [1, 1]
    assert [(one["provider"], one["bytes"], one["published"]) for one in read] == [("gms", 0, 0)] * 2
    assert_same(first, theirs)
    assert_same(second, theirs)
