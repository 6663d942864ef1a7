# SPDX-License-Identifier: Apache-2.0
"""`weights inspect`, `load` and `explain` of folders that were cut for ranks: each rank's part."""

import json

import attrs
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from weights_core import Axis, Layout, Topology
from weights_core.cli import main
from weights_core.testing import FakeEngine, Group
from weights_core.testing.parallel import cut
from weights_presharded import read_plan, save, shard
from weights_presharded.manifest import READY, Ready

NAMES = 14


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No settings of this machine, and a registry where nobody is."""
    settings = tmp_path / "weights.toml"
    settings.write_text(f'[presharded]\nregistry = "{tmp_path / "peers"}"\n')
    monkeypatch.setenv("WEIGHTS_CONFIG", str(settings))
    monkeypatch.delenv("WEIGHTS_BLOCK", raising=False)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeeded(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def failed(*arguments, code=1):
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def by_plan(llama, folder, size):
    return shard(
        llama.checkpoint(folder / "ckpt"), folder / "cut", size=size, plan=read_plan(llama.plan(folder))
    ).folder


def by_vllm(llama, folder, size):
    out = folder / "vllm"
    out.mkdir()
    for rank in range(size):
        tensors = cut(llama.SHAPE, llama.SHAPE.checkpoint(), size, rank)
        names = list(tensors)
        for part in range(2):
            save_file(
                {name: tensors[name].contiguous() for name in names[part::2]},
                out / f"model-rank-{rank}-part-{part}.safetensors",
            )
    return out


@pytest.fixture(params=[by_plan, by_vllm])
def folder(request, llama, tmp_path):
    return request.param(llama, tmp_path, 2)


def told(*arguments):
    return json.loads(succeeded(*arguments, "--json"))


def test_inspect_shows_each_ranks_tensors_and_where_it_stands(folder, llama):
    found = told("inspect", folder)
    assert [(one["rank"], one["axes"], one["layout"]) for one in found] == [
        (rank, {"tp": [2, rank]}, "sharded") for rank in range(2)
    ]
    for rank, one in enumerate(found):
        due = cut(llama.SHAPE, llama.SHAPE.checkpoint(), 2, rank)
        shapes = {tensor["name"]: tensor["shape"] for tensor in one["tensors"]}
        assert shapes == {name: list(tensor.shape) for name, tensor in due.items()}
        assert one["bytes"] == sum(tensor.nbytes for tensor in due.values())
        assert one["faults"] == []
    out = succeeded("inspect", folder)
    for rank in range(2):
        assert f"{folder}, rank {rank} of 2: sharded, {NAMES} tensors, " in out
    assert out.count("no faults") == 2


def test_inspect_says_of_what_it_was_cut_and_whether_there_are_digests(llama, tmp_path):
    ready = Ready.read(by_plan(llama, tmp_path, 2))
    out = succeeded("inspect", tmp_path / "cut")
    assert f"note: presharded: cut by a plan for tp 2, of the checkpoint {ready.digest}" in out
    assert "every tensor is verified as it is read" in out
    assert "has no digests to verify" in succeeded("inspect", by_vllm(llama, tmp_path, 1))


def test_load_reads_every_rank_or_the_one_that_is_named(folder):
    both = told("load", folder, "--verify")
    assert [(one["rank"], one["provider"], one["tensors_written"]) for one in both] == [
        (rank, "presharded", NAMES) for rank in range(2)
    ]
    assert all(one["verified_bytes"] == one["bytes"] > 0 for one in both)
    (one,) = told("load", folder, "--rank", 1)
    assert one["rank"] == 1
    out = succeeded("load", folder, "--verify")
    assert out.startswith(f"rank 0 of 2\n{folder}: {NAMES} tensors, ")
    assert f"\nrank 1 of 2\n{folder}: {NAMES} tensors, " in out


def test_a_format_that_is_named_reads_it_and_asks_where_nobody_is(folder, tmp_path):
    (one,) = told("load", folder, "-f", "presharded", "--rank", 0, "--verify")
    assert one["provider"] == "presharded"
    assert not (tmp_path / "peers").exists()


def test_a_rank_that_is_not_there_or_not_cut_is_one_line(folder, llama, tmp_path):
    assert f"{folder} was cut for ranks 0 to 1, not for 2" in failed("load", folder, "--rank", 2, code=2)
    whole = llama.checkpoint(tmp_path / "whole")
    assert f"{whole} is not cut for ranks" in failed("load", whole, "--rank", 0, code=2)
    assert "no such file or folder" in failed("load", tmp_path / "nowhere", "--rank", 0)


def test_explain_says_who_would_load_each_rank(folder):
    out = succeeded("explain", folder)
    assert [out.count(f"{folder}, rank {rank} of 2: ") for rank in range(2)] == [1, 1]
    assert "sources, in order: presharded, " in out


def test_what_one_rank_was_cut_for_is_read_as_a_whole_one(llama, tmp_path):
    folder = by_plan(llama, tmp_path, 1)
    out = succeeded("inspect", folder)
    assert out.startswith(f"{folder}: sharded, {NAMES} tensors, ")
    assert succeeded("load", folder, "--verify").startswith(f"{folder}: {NAMES} tensors, ")


def test_what_an_engine_saved_is_read_as_that_engine_would(tmp_path):
    engine = FakeEngine({"a": torch.ones(2), "b": torch.ones(3)})
    engine._info = attrs.evolve(engine.info, model="m", quantization="fp8", dtype="F32")
    engine.params["b"] = engine.params["a"]
    engine.expected(Layout.FINAL)["b"] = attrs.evolve(engine.expected(Layout.FINAL)["a"], name="b")
    save(engine, tmp_path / "saved", Layout.FINAL)
    (found,) = told("inspect", tmp_path / "saved")
    assert found["layout"] == "final"
    assert found["ties"] == [{"names": ["a", "b"], "known_from": "one place in its file"}]
    assert [tensor["name"] for tensor in found["tensors"]] == ["a"]
    assert "saved by fake 1 for tp 1" in " ".join(found["notes"])
    (loaded,) = told("load", tmp_path / "saved", "--verify")
    assert loaded["tensors_written"] == 2


def test_several_axes_are_told_by_name(tmp_path):
    group = Group(4)

    def rank_main(rank):
        axes = {"pp": Axis(2, rank // 2), "tp": Axis(2, rank % 2)}
        engine = FakeEngine({f"w{rank // 2}": torch.ones(2)}, topology=Topology(Axis(4, rank), axes))
        engine.gather = group.gather(rank)
        return save(engine, tmp_path / "saved")

    for future in group.run(rank_main):
        future.result()
    assert ", rank 3 of 4 (pp 1 of 2, tp 1 of 2): " in succeeded("inspect", tmp_path / "saved")
    loaded = told("load", tmp_path / "saved", "--verify")
    assert [(one["rank"], one["tensors_written"]) for one in loaded] == [(rank, 1) for rank in range(4)]


@pytest.mark.parametrize("fault", ["journal", "truncated", "lost", "garbage", "vllm"])
def test_damage_is_a_fault_of_its_rank(llama, tmp_path, fault):
    folder = by_plan(llama, tmp_path, 2) if fault != "vllm" else by_vllm(llama, tmp_path, 2)
    file = folder / "rank-1-of-2" / "model-00001-of-00001.safetensors"
    says = {
        "journal": "what cut or saved it was interrupted",
        "truncated": "model-00001-of-00001.safetensors: has 100 bytes",
        "lost": "model-00001-of-00001.safetensors: manifest.json names this file: No such file",
        "garbage": "READY.json: is not valid JSON",
        "vllm": "model-rank-0-part-0.safetensors is missing",
    }[fault]
    if fault == "journal":
        (folder / READY).unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    elif fault == "lost":
        file.unlink()
    elif fault == "garbage":
        (folder / READY).write_text("{")
    else:
        (folder / "model-rank-0-part-0.safetensors").unlink()
    result = run("inspect", folder, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    faulty = [one for one in found if one["faults"]]
    assert len(faulty) == 1
    assert says in faulty[0]["faults"][0]
    if fault in ("truncated", "lost"):
        assert [one["rank"] for one in faulty] == [1]
        assert found[0]["tensor_count"] == NAMES
        assert len(told("load", folder, "--rank", 0)) == 1
    assert says in failed("load", folder)


def test_a_bit_that_flipped_is_found_by_a_load(llama, tmp_path):
    folder = by_plan(llama, tmp_path, 2)
    file = folder / "rank-0-of-2" / "model-00001-of-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert "its bytes are not those that were written" in failed("load", folder)


def test_a_chart_is_drawn_for_each_rank(folder, tmp_path):
    pytest.importorskip("matplotlib", reason="charts are drawn with it")
    succeeded("load", folder, "--chart", tmp_path / "load.svg")
    assert sorted(p.name for p in tmp_path.glob("load*")) == ["load-rank-0.svg", "load-rank-1.svg"]
