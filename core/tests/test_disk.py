# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import pytest
import torch

from weights_core.checkpoint import find
from weights_core.disk import DiskPlugin, ShardSet
from weights_core.errors import CheckpointError
from weights_core.shards import open_shards
from weights_core.tensors import as_bytes, nbytes
from weights_core.testing import host_of, random_tensor, write_checkpoint
from weights_core.types import EngineInfo, Layout, LoadRequest, Role
from weights_core.weightset import Target

TENSORS = {f"t{number}": random_tensor(3, 40 + number, seed=number) for number in range(7)}


def open_set(folder):
    found = find(folder)
    return ShardSet(open_shards(found), provider="disk", notes=found.notes)


@pytest.fixture(params=["safetensors", "bin"])
def folder(tmp_path, request):
    return write_checkpoint(tmp_path / "model", TENSORS, shards=3, kind=request.param)


@pytest.fixture
def weights(folder):
    weights = open_set(folder)
    yield weights
    weights.close()


def same(left, right):
    return left.shape == right.shape and torch.equal(as_bytes(left), as_bytes(right))


def descriptors_in(folder):
    links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    return [link for link in links if link.startswith(str(folder))]


def storage_order(weights):
    return [name for shard in weights.shards for name in shard.metas]


def request_for(path, component=None, is_pipeline=None):
    engine = EngineInfo(name="test", version="1", component=component)
    return LoadRequest(checkpoint=path, engine=engine, is_pipeline=is_pipeline)


# The set ----------------------------------------------------------------------------------------


def test_the_set_is_a_mapping_of_the_whole_checkpoint(weights):
    assert weights.keys() == TENSORS.keys()
    assert all(same(weights[name], TENSORS[name]) for name in TENSORS)
    assert "t0" in weights
    assert "ghost" not in weights
    assert weights.get("ghost") is None
    assert repr(weights) == "<ShardSet of 7 tensors, checkpoint, by 'disk'>"


@pytest.mark.parametrize(
    "use",
    [
        lambda weights: weights["ghost"],
        lambda weights: weights.read("ghost"),
        lambda weights: weights.meta("ghost"),
        lambda weights: weights.read_into("ghost", torch.empty(1)),
        lambda weights: weights.shard_of("ghost"),
        lambda weights: list(weights.fill([Target("ghost", torch.empty(1))])),
        lambda weights: weights.lazy()["ghost"],
    ],
)
def test_a_name_the_set_lacks_is_a_key_error(weights, use):
    with pytest.raises(KeyError, match="ghost"):
        use(weights)


def test_metas_say_which_file_holds_a_tensor(weights):
    for name, meta in weights.metas.items():
        assert meta.file == weights.shard_of(name).path
        assert meta.nbytes == nbytes(TENSORS[name])
    assert {meta.file for meta in weights.metas.values()} == {shard.path for shard in weights.shards}


def test_metas_cannot_be_changed(weights):
    with pytest.raises(TypeError):
        weights.metas["t0"] = None


def test_stream_yields_everything_by_file_and_offset(weights):
    found = list(weights.stream())
    assert [name for name, _ in found] == storage_order(weights) == list(weights)
    assert all(same(tensor, TENSORS[name]) for name, tensor in found)


def test_stream_yields_what_is_asked_for_in_storage_order(weights):
    found = dict(weights.stream(["t6", "t0", "t3"]))
    assert list(found) == [name for name in storage_order(weights) if name in {"t0", "t3", "t6"}]
    assert all(same(tensor, TENSORS[name]) for name, tensor in found.items())


def test_fill_fills_by_file_and_offset(weights):
    targets = [Target(name, torch.zeros_like(TENSORS[name])) for name in reversed(TENSORS)]
    targets.append(Target("t3", torch.zeros(1, 43), (slice(1, 2),)))
    done = list(weights.fill(iter(targets)))
    assert {id(target) for target in done} == {id(target) for target in targets}
    positions = [storage_order(weights).index(target.name) for target in done]
    assert positions == sorted(positions)
    for target in done:
        assert same(target.out, TENSORS[target.name][target.slices or ()])


def test_fill_reads_nothing_before_it_is_iterated(weights):
    target = Target("t0", torch.zeros_like(TENSORS["t0"]))
    filling = weights.fill([target])
    assert not target.out.any()
    assert next(filling) is target
    assert same(target.out, TENSORS["t0"])


def test_the_bytes_of_what_was_read_are_counted(weights):
    assert weights.bytes_read == 0
    weights.read("t0")
    assert weights.bytes_read == 3 * 40 * 4
    weights.read("t0", (slice(0, 1),))
    assert weights.bytes_read == 4 * 40 * 4
    weights.read_into("t1", torch.empty(2, 41), (slice(1, 3),))
    assert weights.bytes_read == (4 * 40 + 2 * 41) * 4
    with pytest.raises(ValueError, match="t1"):
        weights.read_into("t1", torch.empty(5))
    assert weights.bytes_read == (4 * 40 + 2 * 41) * 4


def test_kept_tensors_never_change(folder):
    weights = open_set(folder)
    whole = dict(weights.stream())
    parts = {name: weights.read(name, (slice(1, 3), slice(5, 30))) for name in TENSORS}
    for _ in range(3):
        for _ in weights.stream():
            pass
    list(weights.fill([Target(name, torch.empty_like(tensor)) for name, tensor in TENSORS.items()]))
    weights.release(TENSORS)
    weights.close()
    del weights
    _ = [torch.full((3, 46), 7.0) for _ in range(100)]  # would be written over memory that was given back
    assert all(same(whole[name], TENSORS[name]) for name in TENSORS)
    assert all(same(parts[name], TENSORS[name][1:3, 5:30]) for name in TENSORS)


def test_release_claims_no_bytes_and_refuses_unknown_names(weights):
    assert weights.release(["t0", "t1", "t0"]) == 0
    with pytest.raises(KeyError, match="ghost"):
        weights.release(["ghost"])


def test_a_released_tensor_of_a_pickled_file_is_not_read_again(tmp_path):
    weights = open_set(write_checkpoint(tmp_path, TENSORS, kind="bin"))
    weights.release(["t0"])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, tensor 't0': was released"):
        weights.read("t0")
    assert "t0" in weights
    assert same(weights["t1"], TENSORS["t1"])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tensors_are_made_where_one_asks_for_it(tmp_path, kind):
    made = {}

    def allocate(count, offset):
        memory = torch.empty(count, dtype=torch.uint8)
        made[memory.data_ptr()] = memory
        return memory

    tensors = {
        "a": torch.randn(6, 4),
        "t": torch.randn(5, 3),
        "h": torch.randn(4).half(),
        "e": torch.empty(0, 2),
    }
    if kind == "bin":
        tensors["t"] = tensors["t"].t()
    weights = ShardSet(open_shards(find(write_checkpoint(tmp_path, tensors, kind=kind))), provider="disk")
    weights.allocate_from(allocate)
    read = [*weights.stream(), *((name, weights[name]) for name in tensors)]
    for name, tensor in read:
        assert torch.equal(tensor, tensors[name])
        assert tensor.stride() == tensors[name].stride()
        assert not tensor.numel() or tensor.data_ptr() in made
    part = weights.read("a", (slice(1, 5), slice(1, 3)))
    assert torch.equal(part, tensors["a"][1:5, 1:3])
    assert part.data_ptr() in made
    out = torch.empty(6, 4)
    before = len(made)
    weights.read_into("a", out)
    assert len(made) == before
    weights.close()


def test_close_frees_all_descriptors(folder):
    weights = open_set(folder)
    assert len(descriptors_in(folder)) == 3
    weights.close()
    weights.close()
    assert descriptors_in(folder) == []


# Files that change while they are read ----------------------------------------------------------


def touch_later(path):
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000))


def stream(weights):
    return weights.stream(["t0"])


def fill(weights):
    return weights.fill([Target("t0", torch.empty_like(TENSORS["t0"]))])


@pytest.mark.parametrize("use", [stream, fill])
def test_a_file_changed_meanwhile_is_found_when_it_is_read(weights, use):
    changed = weights.shard_of("t0").path
    touch_later(changed)
    with pytest.raises(CheckpointError, match=f"{changed}.*changed while it was read"):
        list(use(weights))


@pytest.mark.parametrize("use", [stream, fill])
def test_a_file_replaced_meanwhile_is_no_fault(weights, tmp_path, use):
    reading = use(weights)
    next(reading)
    path = weights.shards[0].path
    other = tmp_path / "other"
    other.write_bytes(b"other")
    os.rename(other, path)
    assert list(reading) == []
    assert same(weights.read("t3"), TENSORS["t3"])


def test_a_file_truncated_meanwhile_ends_the_stream(tmp_path):
    weights = open_set(write_checkpoint(tmp_path, TENSORS))
    reading = weights.stream()
    next(reading)
    os.truncate(weights.shards[0].path, weights.metas["t2"].offset + 1)
    with pytest.raises(CheckpointError, match=r"model.safetensors, tensor 't1'.*changed"):
        next(reading)


# The plugin -------------------------------------------------------------------------------------


def load(request):
    return DiskPlugin(None).load_weights(request, engine=None, source=None)


def test_the_plugin_claims_every_checkpoint_as_a_source(tmp_path):
    claim = DiskPlugin(None).resolve_format(request_for(tmp_path / "anything"))
    assert claim.roles == {Role.SOURCE}
    assert claim.layouts == {Layout.CHECKPOINT}


def test_the_plugin_loads_a_folder(folder):
    weights = load(request_for(folder))
    assert (weights.provider, weights.layout, weights.in_place) == ("disk", Layout.CHECKPOINT, False)
    assert all(same(tensor, TENSORS[name]) for name, tensor in weights.items())
    assert weights.notes == ()


def test_the_plugin_notes_what_was_passed_over(tmp_path):
    write_checkpoint(tmp_path, TENSORS, shards=3)
    (tmp_path / "consolidated.safetensors").touch()
    [note] = load(request_for(tmp_path)).notes
    assert "passed over 'consolidated.safetensors'" in note


@pytest.mark.parametrize("is_pipeline", [None, True])
def test_the_plugin_loads_the_component_of_the_engine(tmp_path, is_pipeline):
    for name in ("unet", "vae"):
        write_checkpoint(tmp_path / name, {f"{name}.weight": random_tensor(2)})
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": [], "vae": []}))
    weights = load(request_for(tmp_path, "vae", is_pipeline))
    assert list(weights) == ["vae.weight"]


def test_the_plugin_refuses_a_broken_checkpoint_before_a_tensor_is_read(folder):
    last = find(folder).files[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=str(last)):
        load(request_for(folder))


def test_disk_is_part_of_every_host_and_its_claim_does_not_import_torch():
    assert [(plugin.name, reason) for plugin, reason in host_of().check()] == [("disk", None)]
    code = (
        "import sys; from weights_core.disk import DiskPlugin; from weights_core import types; "
        "engine = types.EngineInfo(name='e', version='1'); "
        "DiskPlugin(None).resolve_format(types.LoadRequest(checkpoint='x', engine=engine)); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_note_says_what_is_used_where_it_lies_as_long_as_it_is(tmp_path):
    weights = open_set(write_checkpoint(tmp_path / "model", TENSORS))
    lent = dict(weights.mapped())
    if not lent:
        pytest.skip("this kernel cannot bring in the pages of a mapping")
    kept = lent.pop("t3").view(-1)[1:]  # a view: the tensor itself dies
    del lent
    (note,) = weights.notes
    assert note.startswith(f"{TENSORS['t3'].nbytes / 1e6:,.1f} MB are used where they lie")
    del kept
    assert not weights.notes
    weights.close()
