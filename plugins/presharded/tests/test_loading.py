# SPDX-License-Identifier: Apache-2.0
"""Each rank loads its own shard, bit for bit what it would cut from the whole checkpoint."""

import json
import shutil

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weights_core as w
from weights_core import Axis, Layout, Topology
from weights_core.errors import CheckpointError, CoverageError, IdentityMismatchError
from weights_core.tensors import as_bytes
from weights_core.testing import FakeEngine, host_of
from weights_core.testing.parallel import TensorParallelEngine, cut
from weights_presharded import read_plan, shard
from weights_presharded.manifest import MANIFEST, READY, digest_of
from weights_presharded.plugin import PreshardedPlugin

ALONE = {"source": False, "target": False}
SIZES = [(1, 2), (2, 2), (3, 1), (4, 2)]


def load(engine, folder, format="presharded", **settings):
    config = {"presharded": {**ALONE, **settings}}
    return w.load(engine, folder, format, host=host_of(presharded=PreshardedPlugin, config=config))


@pytest.fixture
def made(llama, tmp_path):
    """Return a function that cuts the small engine's checkpoint: `made(size, kv_heads)`."""

    def make(size, kv_heads=2, **how):
        shape = attrs.evolve(llama.SHAPE, kv_heads=kv_heads)
        source = tmp_path / f"source-{size}-{kv_heads}"
        if not source.exists():
            llama.checkpoint(source, shape, shards=3)
        out = tmp_path / f"tp-{size}-{kv_heads}"
        shard(source, out, size=size, plan=read_plan(llama.plan(tmp_path)), **how)
        return shape, source, out

    return make


@pytest.mark.parametrize(("size", "kv_heads"), SIZES)
def test_every_rank_is_a_process_and_reads_its_own_files_only(made, on_ranks, size, kv_heads):
    shape, _, out = made(size, kv_heads)
    told = on_ranks(folder=str(out), size=size, kv_heads=kv_heads)
    for rank, one in enumerate(told):
        due = cut(shape, shape.checkpoint(), size, rank)
        assert one["params"] == {n: digest_of(as_bytes(t).numpy()) for n, t in due.items()}
        assert one["provider"] == "presharded"
        folders = {name for name in one["opened"] if name.startswith("rank-")}
        assert folders == {f"rank-{rank}-of-{size}"}


@pytest.mark.parametrize("how", [{}, {"max_file": 20_000}, {"threads": 1}])
def test_the_files_are_plain_safetensors(made, how):
    shape, _, out = made(2, **how)
    for rank in range(2):
        folder = out / f"rank-{rank}-of-2"
        read = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        due = cut(shape, shape.checkpoint(), 2, rank)
        assert read.keys() == due.keys()
        assert all(torch.equal(read[name], due[name]) for name in due)
        assert len(list(folder.glob("*.safetensors"))) == (2 if "max_file" in how else 1)


def test_format_auto_takes_a_folder_that_was_cut(made):
    shape, _, out = made(1)
    report = load(TensorParallelEngine(shape), out, format="auto")
    assert report.provider == "presharded"
    assert any("every tensor is verified as it is read" in note for note in report.notes)


def test_wrappers_act_on_it_and_its_tensors_are_released(made, weights_host):
    class Counting(w.WeightSetWrapper):
        def release(self, names):
            released.extend(names)
            return super().release(names)

    class Counter:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(roles={w.Role.WRAPPER}, reason="counts")

        @w.hookimpl(wrapper=True)
        def load_weights(self):
            return Counting((yield))

    released = []
    shape, _, out = made(1)
    engine = TensorParallelEngine(shape)
    host = weights_host(presharded=PreshardedPlugin, counter=Counter, config={"presharded": ALONE})
    report = w.load(engine, out, "presharded", host=host)
    assert report.provider == "presharded"
    assert set(released) == set(engine.params)


# Into a module ----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def tied(tmp_path):
    """A module with a tie, and a folder in which the checkpoint of it is whole on the one rank."""
    model = Tied()
    (tmp_path / "source").mkdir()
    torch.save(model.state_dict(), tmp_path / "source/pytorch_model.bin")
    plan = tmp_path / "whole.toml"
    plan.write_text('schema = "weights.plan/1"\n[[rule]]\nmatch = "**"\n')
    shard(tmp_path / "source", tmp_path / "out", size=1, plan=read_plan(plan))
    return model, tmp_path / "out"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_parameters_are_filled_in_memory_of_their_own_and_ties_stay(tied, device, verify):
    due, out = tied
    with torch.device(device):
        model = Tied()
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    report = load(w.TorchEngine(model), out, verify=verify)
    assert report.provider == "presharded"
    assert all(torch.equal(model.state_dict()[n], t) for n, t in due.state_dict().items())
    assert model.head.weight is model.embed.weight
    if device == "cpu":
        assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == before


def test_a_tie_is_stored_once_and_told_by_both_names(tied):
    due, out = tied
    stored = load_file(out / "rank-0-of-1/model-00001-of-00001.safetensors")
    assert stored.keys() == {"embed.weight", "body.weight", "body.bias"}
    manifest = json.loads((out / "rank-0-of-1" / MANIFEST).read_bytes())
    assert manifest["ties"] == {"head.weight": "embed.weight"}
    engine = FakeEngine(due.state_dict())
    load(engine, out)
    assert engine.contents()["head.weight"] == engine.contents()["embed.weight"]


def test_a_load_that_fails_leaves_a_model_on_meta_as_it_was(tied):
    _, out = tied
    flip(out / "rank-0-of-1/model-00001-of-00001.safetensors", -1)
    with torch.device("meta"):
        model = Tied()
    with pytest.raises(CheckpointError, match="its bytes are not those that were written"):
        load(w.TorchEngine(model), out)
    assert all(parameter.is_meta for parameter in model.parameters())


# Refused ------------------------------------------------------------------------------------------


def engine_of(shape, size, rank=0):
    return TensorParallelEngine(shape, size=size, rank=rank, gather=lambda value, _: [value] * size)


@pytest.mark.parametrize(("there", "here"), [(2, 1), (1, 2), (2, 4), (4, 2)])
def test_another_topology_is_refused_by_name(made, there, here):
    shape, _, out = made(there)
    engine = engine_of(shape, here)
    names = {1: "one rank (tp 1)", 2: "tp 2", 4: "tp 4"}
    with pytest.raises(IdentityMismatchError) as info:
        load(engine, out)
    text = str(info.value)
    assert f"was cut for {names[there]}, this engine needs {names[here]}" in text
    assert "never cut again" in text
    assert f"--tp {here}" in text
    assert engine.untouched()


def test_another_axis_is_refused(made):
    _, _, out = made(2)
    topology = Topology(world=Axis(2, 0), axes={"pp": Axis(2, 0)})
    engine = FakeEngine({}, topology=topology)
    engine.gather = lambda value, _: [value] * 2
    with pytest.raises(IdentityMismatchError, match="cut for tp 2, this engine needs pp 2"):
        load(engine, out)


def test_an_engine_of_other_parameters_is_refused(made):
    shape, _, out = made(1)
    engine = TensorParallelEngine(attrs.evolve(shape, vocab=96))
    with pytest.raises(CoverageError, match=r"shapes differ.*embed"):
        load(engine, out)
    with pytest.raises(CoverageError, match="stranger"):
        load(FakeEngine({"stranger": torch.ones(1)}), out)


def flip(file, at):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def one_file(out):
    return out / "rank-0-of-2/model-00001-of-00001.safetensors"


def truncated(out):
    raw = one_file(out).read_bytes()
    one_file(out).write_bytes(raw[:-1])


def other_files(out):
    raw = one_file(out).read_bytes()
    one_file(out).write_bytes(raw + b"\0")


def other_header(out):
    file = one_file(out)
    size = file.stat().st_size
    save_file({"a": torch.zeros(1)}, file)
    with file.open("ab") as added:
        added.truncate(size)


def renamed_tensor(out):
    raw = one_file(out).read_bytes()
    one_file(out).write_bytes(raw.replace(b'"norm"', b'"morn"', 1))


def manifest_of_another(out):
    shutil.copy(out / "rank-1-of-2" / MANIFEST, out / "rank-0-of-2" / MANIFEST)


def edited(out, path, edit):
    told = json.loads((out / path).read_bytes())
    edit(told)
    (out / path).write_text(json.dumps(told))


FAULTS = {
    "a bit of a tensor": (lambda out: flip(one_file(out), -1), r"model-00001.*tensor '.*: its bytes are not"),
    "cut short": (truncated, r"model-00001-of-00001.safetensors: has .* bytes.*says.*: truncated"),
    "too long": (other_files, "model-00001.*not the file that was written"),
    "missing": (lambda out: one_file(out).unlink(), "model-00001.*No such file"),
    "another header": (other_header, r"model-00001"),
    "a tensor renamed": (renamed_tensor, "tensor 'norm': .*names it, and it is not there"),
    "a bit of the manifest": (
        lambda out: flip(out / "rank-0-of-2" / MANIFEST, 9),
        f"{MANIFEST}.*digest differs",
    ),
    "another rank's manifest": (manifest_of_another, f"{MANIFEST}.*digest differs"),
    "no manifest": (lambda out: (out / "rank-0-of-2" / MANIFEST).unlink(), f"{MANIFEST}: cannot be read"),
    "no such rank": (
        lambda out: edited(out, READY, lambda told: told["ranks"].pop(0)),
        "has no rank tp 0 of 2",
    ),
    "a torn READY": (lambda out: (out / READY).write_text('{"schema": "wei'), f"{READY}.*not valid JSON"),
    "another schema": (
        lambda out: edited(out, READY, lambda told: told.update(schema="x")),
        "is of the schema 'x'",
    ),
    "a rank twice": (
        lambda out: edited(out, READY, lambda told: told["ranks"].append(told["ranks"][0])),
        "or one twice",
    ),
    "a folder outside": (
        lambda out: edited(out, READY, lambda told: told["ranks"][0].update(folder="../elsewhere")),
        "is not the plain name of a file",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused_naming_the_file_and_tensor(made, fault):
    shape, _, out = made(2)
    damage, says = FAULTS[fault]
    damage(out)
    engine = engine_of(shape, 2)
    with pytest.raises(CheckpointError, match=says):
        load(engine, out)
    if fault != "a bit of a tensor":
        assert engine.untouched()


def test_what_is_not_verified_is_said(made):
    shape, _, out = made(1)
    flip(out / "rank-0-of-1/model-00001-of-00001.safetensors", -1)
    report = load(TensorParallelEngine(shape), out, verify=False)
    assert any("is not verified (verify = false)" in note for note in report.notes)


@pytest.mark.parametrize("journal", [True, False])
def test_what_was_interrupted_is_no_checkpoint(made, journal):
    shape, _, out = made(1)
    (out / READY).unlink()
    if journal:
        (out / "sharding.journal").touch()
    with pytest.raises(CheckpointError, match=r"has no READY\.json.*--resume` completes"):
        load(TensorParallelEngine(shape), out, format="auto")


def test_a_plain_checkpoint_falls_to_the_disk(llama, tmp_path):
    source = llama.checkpoint(tmp_path / "source")
    report = load(TensorParallelEngine(llama.SHAPE), source)
    assert report.provider == "disk"
    assert any("was not cut for ranks" in attempt.reason for attempt in report.attempts)


def test_a_component_has_a_folder_of_its_own(tmp_path):
    tensors = {"w": torch.arange(6.0).reshape(2, 3)}
    (tmp_path / "pipe/vae").mkdir(parents=True)
    (tmp_path / "pipe/model_index.json").write_text('{"vae": ["x", "y"]}')
    save_file(tensors, tmp_path / "pipe/vae/model.safetensors")
    plan = tmp_path / "plan.toml"
    plan.write_text('schema = "weights.plan/1"\n[[rule]]\nmatch = "**"\n')
    out = tmp_path / "out"
    for where in (out / "vae", tmp_path / "flat"):
        shard(tmp_path / "pipe", where, size=1, plan=read_plan(plan), component="vae")
        engine = FakeEngine(tensors, component="vae")
        assert load(engine, where if where != out / "vae" else out).provider == "presharded"
    with pytest.raises(IdentityMismatchError, match="holds component 'vae', the engine is for 'unet'"):
        load(FakeEngine(tensors, component="unet"), out / "vae")


def test_final_weights_are_delivered_as_such(tmp_path, llama):
    from weights_presharded import save

    shape = llama.SHAPE
    giver = TensorParallelEngine(shape)
    load(giver, llama.checkpoint(tmp_path / "source"), format="disk")
    save(giver, tmp_path / "final", Layout.FINAL)
    taker = FakeEngine(giver.params)
    taker._info = attrs.evolve(giver.info, accepts=frozenset(Layout))
    report = load(taker, tmp_path / "final")
    assert report.provider == "presharded"
    assert taker.events[0] == "bind"
