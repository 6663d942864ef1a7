# SPDX-License-Identifier: Apache-2.0
"""An engine saves what it holds, each rank its own; equal engines load it, others are refused."""

import attrs
import pytest
import torch
from torch import nn

import weights_core as w
from weights_core import Layout
from weights_core.digest import checkpoint_digest
from weights_core.errors import CheckpointError, IdentityMismatchError, LoadError, PublishError
from weights_core.tensors import as_bytes
from weights_core.testing import FakeEngine, Group, host_of
from weights_core.testing.parallel import TensorParallelEngine, cut
from weights_presharded import read_plan, save, shard
from weights_presharded.manifest import MANIFEST, READY, Ready, digest_of
from weights_presharded.plugin import PreshardedPlugin

ALONE = {"source": False, "target": False}


def load(engine, folder, format="presharded"):
    return w.load(
        engine, folder, format, host=host_of(presharded=PreshardedPlugin, config={"presharded": ALONE})
    )


@pytest.mark.parametrize(("size", "kv_heads"), [(1, 2), (2, 2), (3, 1), (4, 2)])
def test_processes_save_their_shards_and_others_load_them(llama, on_ranks, tmp_path, size, kv_heads):
    shape = attrs.evolve(llama.SHAPE, kv_heads=kv_heads)
    source = llama.checkpoint(tmp_path / "source", shape)
    out = tmp_path / "saved"
    saved = on_ranks(folder=str(source), save=str(out), size=size, kv_heads=kv_heads)
    loaded = on_ranks(folder=str(out), size=size, kv_heads=kv_heads)
    for rank, (giver, taker) in enumerate(zip(saved, loaded, strict=True)):
        due = cut(shape, shape.checkpoint(), size, rank)
        assert (
            giver["params"] == taker["params"] == {n: digest_of(as_bytes(t).numpy()) for n, t in due.items()}
        )
        assert (giver["provider"], taker["provider"]) == ("disk", "presharded")
    assert checkpoint_digest(out).value == checkpoint_digest(source).value


def test_what_an_engine_saves_is_what_a_plan_cuts(llama, tmp_path):
    source = llama.checkpoint(tmp_path / "source")
    group = Group(2)

    def rank_main(rank):
        engine = TensorParallelEngine(llama.SHAPE, size=2, rank=rank, gather=group.gather(rank))
        load(engine, source, "disk")
        return save(engine, tmp_path / "saved")

    assert [future.result() for future in group.run(rank_main)] == [tmp_path / "saved"] * 2
    shard(source, tmp_path / "cut", size=2, plan=read_plan(llama.plan(tmp_path)))
    from safetensors.torch import load_file

    for rank in range(2):
        name = f"rank-{rank}-of-2/model-00001-of-00001.safetensors"
        saved, made = load_file(tmp_path / "saved" / name), load_file(tmp_path / "cut" / name)
        assert saved.keys() == made.keys()
        assert all(torch.equal(saved[key], made[key]) for key in saved)
    assert (
        Ready.read(tmp_path / "saved").digest != Ready.read(tmp_path / "cut").digest
    )  # of what it is, it was not told


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("none", torch.zeros(0, 2))


def test_ties_strides_buffers_and_empty_tensors(tmp_path):
    model = Net()
    save(w.TorchEngine(model), tmp_path / "saved")
    other = Net()
    report = load(w.TorchEngine(other), tmp_path / "saved")
    assert report.provider == "presharded"
    assert all(torch.equal(other.state_dict()[name], t) for name, t in model.state_dict().items())
    assert other.head.weight is other.embed.weight
    stored = {p.name: p.stat().st_size for p in (tmp_path / "saved/rank-0-of-1").iterdir()}
    assert stored.keys() == {MANIFEST, "model-00001-of-00001.safetensors"}


def test_final_weights_are_for_engines_that_share_them(llama, tmp_path):
    engine = TensorParallelEngine(llama.SHAPE, transforms=True)
    with pytest.raises(PublishError, match="does not share final weights"):
        save(engine, tmp_path / "saved", Layout.FINAL)
    with pytest.raises(PublishError, match="does not share checkpoint weights"):
        save(engine, tmp_path / "saved", Layout.CHECKPOINT)
    assert not (tmp_path / "saved" / READY).exists()
    save(TensorParallelEngine(llama.SHAPE), tmp_path / "saved", Layout.FINAL)
    assert Ready.read(tmp_path / "saved").layout is Layout.FINAL


@pytest.mark.parametrize("field", ["name", "version", "model", "dtype", "quantization"])
def test_another_engine_is_refused_naming_the_field(tmp_path, field):
    engine = FakeEngine({"w": torch.ones(2)})
    save(engine, tmp_path / "saved")
    other = FakeEngine({"w": torch.ones(2)})
    other._info = attrs.evolve(other.info, **{field: "another"})
    with pytest.raises(
        IdentityMismatchError, match=rf"saved by another engine.*{field}: need 'another'"
    ) as info:
        load(other, tmp_path / "saved")
    assert info.value.fields.keys() == {field}
    assert other.untouched()


def test_a_model_that_is_not_filled_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(PublishError, match="not filled: 2 tensors: weight, bias"):
        save(w.TorchEngine(model), tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())


@pytest.mark.parametrize(
    ("tensor", "says"),
    [(torch.eye(2).to_sparse(), "only strided ones"), (torch.zeros(2, dtype=torch.complex128), "complex128")],
)
def test_a_tensor_that_no_file_can_hold_is_named(tmp_path, tensor, says):
    engine = FakeEngine({"w": torch.ones(2)})
    engine.params["w"] = tensor
    with pytest.raises(PublishError, match=f"tensor 'w'.*{says}"):
        save(engine, tmp_path / "saved")
    assert not (tmp_path / "saved" / READY).exists()


@pytest.mark.parametrize("name", [READY, "sharding.journal"])
def test_a_folder_that_is_used_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(CheckpointError, match=f"has a {name}"):
        save(FakeEngine({"w": torch.ones(2)}), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_what_is_no_digest_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'new' is no digest"):
        save(FakeEngine({"w": torch.ones(2)}), tmp_path, digest="new")


def test_if_one_rank_fails_none_goes_on_and_there_is_no_ready(llama, tmp_path, mocker):
    group = Group(2)
    out = tmp_path / "saved"

    def rank_main(rank):
        engine = TensorParallelEngine(llama.SHAPE, size=2, rank=rank, gather=group.gather(rank))
        if rank == 1:
            engine.params = {name: t.to("meta") for name, t in engine.params.items()}
        return save(engine, out, timeout=20)

    first, second = group.run(rank_main)
    with pytest.raises(LoadError, match=r"rank 1 could not save its weights: refusing to save"):
        first.result()
    with pytest.raises(PublishError, match="not filled"):
        second.result()
    assert not (out / READY).exists()


def test_a_rank_that_stays_away_ends_it_for_the_others(llama, tmp_path):
    group = Group(2)
    engine = TensorParallelEngine(llama.SHAPE, size=2, rank=0, gather=group.gather(0))
    with pytest.raises(LoadError, match=r"rank 0 waited 0\.1 s for the other ranks"):
        save(engine, tmp_path / "saved", timeout=0.1)


def test_a_rank_that_crashes_does_not_keep_the_others_waiting(llama, tmp_path):
    group = Group(2)

    def rank_main(rank):
        engine = TensorParallelEngine(llama.SHAPE, size=2, rank=rank, gather=group.gather(rank))
        if rank == 0:
            engine.tensors = lambda layout: 1 / 0
        return save(engine, tmp_path / "saved", timeout=20)

    first, second = group.run(rank_main)
    with pytest.raises(ZeroDivisionError):
        first.result()
    with pytest.raises(LoadError, match="rank 0 could not save its weights: division by zero"):
        second.result()
