# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism with real processes: a rank reads its slices, and the model is the same."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from weights_presharded import shard

RANK = Path(__file__).parent / "rank.py"
DEADLINE = 150


@pytest.fixture
def run(tmp_path):
    """A function that starts two ranks, and returns what they told and saved; with `wait` they live on."""
    with contextlib.ExitStack() as stack:

        def start(folder, name, wait=False, expect=2, **how):
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
            deadline = threading.Timer(DEADLINE, lambda: [rank.kill() for rank in ranks])
            stack.callback(deadline.cancel)
            deadline.start()
            told = []
            for r, rank in enumerate(ranks[:expect]):
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


def test_ranks_of_a_quantised_model_read_their_slices_and_agree(in_fp8, run):
    path = in_fp8("qwen3-even", 16)
    _, theirs = run(path, "theirs", by="transformers")
    told, ours = run(path, "ours", by="parallel_shards")
    assert not [one["error"] for one in told if "error" in one]
    assert_same(ours, theirs)
    assert ours[0]["cut"]
    size = (path / "model.safetensors").stat().st_size
    for rank, one in enumerate(told):
        assert one["engine"] == "DirectEngine"
        assert one["axes"] == f"{{'tp': Axis(size=2, rank={rank})}}"
        assert one["bytes"] < 0.6 * size


def test_a_rank_that_fails_while_another_waits_in_a_collective_call_of_transformers(in_fp8, run):
    path, own = in_fp8("qwen3-even", 16), in_fp8("qwen3-even", 16, copy="-1")
    only = {"1": {"folder": str(own), "cut_short": str(own / "model.safetensors")}}
    told, _ = run(path, "ours", by="disk", only=only, timeout=600.0, wait=True)  # both processes live on
    waited, failed = (one["error"] for one in told)
    assert failed.startswith("CheckpointError")
    assert "the file was changed while it was read" in failed
    assert waited.startswith("RanksDisagreeError: rank 1 failed while Transformers loads")
    assert f"{own}/model.safetensors" in waited


@pytest.mark.parametrize("quantised", [True, False])
def test_a_rank_that_cannot_open_its_files_is_one_error_on_all(saved, in_fp8, run, tmp_path, quantised):
    path, own = in_fp8("llama-even", 16) if quantised else saved("llama-even"), tmp_path / "own"
    shutil.copytree(path, own)
    file = sorted(own.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 1)
    told, _ = run(path, "ours", by="disk", only={"1": {"folder": str(own)}}, timeout=600.0, wait=True)
    here, there = (one["error"] for one in told)
    assert there.startswith("CheckpointError")
    assert f"rank 1 could not open the model: {file}" in here


def test_ranks_that_see_different_checkpoints(saved, run):
    only = {"1": {"folder": str(saved("qwen3-even"))}}
    told, _ = run(saved("llama-even"), "ours", by="disk", only=only, timeout=600.0, wait=True)
    for one in told:
        assert "LlamaForCausalLM" in one["error"]
        assert "Qwen3ForCausalLM" in one["error"]


def test_a_rank_that_stays_away_is_waited_for_no_longer_than_was_said(in_fp8, run):
    only = {"0": {"timeout": 5.0}, "1": {"stays_away": True}}
    path = in_fp8("llama-even", 16)
    told, _ = run(path, "ours", by="disk", only=only, wait=True, expect=1)
    assert "waited 5 s for the other ranks" in told[0]["error"]


def test_blocks_that_cannot_be_cut_for_the_ranks(in_fp8, run):
    told, _ = run(in_fp8("llama-even", 32), "ours", by="disk", timeout=600.0, wait=True)  # 3 blocks of rows
    for one in told:
        assert one["error"].startswith("EngineError: tensor 'model.layers.")
        assert "no whole number of blocks of 32×32" in one["error"]


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
