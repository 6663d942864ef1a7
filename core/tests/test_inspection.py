# SPDX-License-Identifier: Apache-2.0
"""What `inspect` finds in checkpoints: tensors, layers, ties, and everything that is wrong."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model

from weights_core.errors import CheckpointError
from weights_core.inspection import inspect
from weights_core.testing import random_tensor, write_checkpoint


def rows(found):
    """Return the lines of the layer table of an inspection's text, without the titles."""
    lines = str(found).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    return lines[begin + 1 : lines.index("", begin)]


def a_checkpoint(folder, *names, shape=(2, 2), **options):
    return write_checkpoint(folder, {name: random_tensor(*shape) for name in names}, **options)


def write_by_hand(path, count):
    """Write a safetensors file of `count` one-byte tensors without a library."""
    header = {
        f"model.layers.{i // 10}.part{i % 10}.weight": {
            "dtype": "U8",
            "shape": [1],
            "data_offsets": [i, i + 1],
        }
        for i in range(count)
    }
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(count))


# Counts ---------------------------------------------------------------------------------------


def test_tensors_and_bytes_are_counted_over_all_files(tmp_path):
    folder = a_checkpoint(tmp_path, "a.w", "b.w", "c.w", shape=(4, 8), shards=2)
    found = inspect(folder)
    assert found.count == 3
    assert found.nbytes == 3 * 4 * 8 * 4
    assert sorted(meta.name for meta in found.metas) == ["a.w", "b.w", "c.w"]
    assert [(p.name, len(metas)) for p, metas in found.files.items()] == [
        ("model-00001-of-00002.safetensors", 2),
        ("model-00002-of-00002.safetensors", 1),
    ]
    assert found.index == folder / "model.safetensors.index.json"
    assert found.faults == ()


def test_dtypes_are_counted_and_the_most_bytes_come_first(tmp_path):
    write_checkpoint(
        tmp_path,
        {
            "a": random_tensor(2, dtype="I64"),
            "b": random_tensor(100, dtype="BF16"),
            "c": random_tensor(3, dtype="F32"),
            "d": random_tensor(3, dtype="F32"),
        },
    )
    found = inspect(tmp_path)
    assert list(found.dtypes.items()) == [("BF16", (1, 200)), ("F32", (2, 24)), ("I64", (1, 16))]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_both_kinds_of_file_are_inspected(tmp_path, kind):
    found = inspect(a_checkpoint(tmp_path, "a.w", "b.w", kind=kind))
    assert found.kind == {"safetensors": "safetensors", "bin": "torch"}[kind]
    assert (found.count, found.nbytes, found.faults) == (2, 32, ())


def test_what_was_passed_over_is_noted(tmp_path):
    a_checkpoint(tmp_path, "a.w")
    a_checkpoint(tmp_path, "a.w", kind="bin")
    found = inspect(tmp_path)
    assert "pytorch_model.bin" in found.notes[0]
    assert f"note: {found.notes[0]}" in str(found).splitlines()


def test_a_component_is_inspected_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet"]}')
    a_checkpoint(tmp_path / "unet", "a.w", stem="diffusion_pytorch_model")
    found = inspect(tmp_path, "unet")
    assert (found.root, found.count) == (tmp_path / "unet", 1)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        inspect(tmp_path)


# Layers ---------------------------------------------------------------------------------------


def test_layers_come_in_their_natural_order(tmp_path):
    names = [f"model.layers.{i}.w" for i in (10, 9, 2, 11, 1)]
    found = inspect(a_checkpoint(tmp_path, "model.norm.weight", *names))
    assert [layer.name for layer in found.layers] == [
        *(f"model.layers.{i}" for i in (1, 2, 9, 10, 11)),
        "model.norm",
    ]


def test_a_layer_has_its_tensors_bytes_and_dtypes(tmp_path):
    write_checkpoint(
        tmp_path,
        {
            "m.layers.0.a.weight": random_tensor(2, dtype="BF16"),
            "m.layers.0.b.weight": random_tensor(2, dtype="BF16"),
            "m.layers.0.b.bias": random_tensor(2, dtype="F32"),
        },
    )
    (layer,) = inspect(tmp_path).layers
    assert layer.name == "m.layers.0"
    assert sorted(layer.tensors) == ["a.weight", "b.bias", "b.weight"]
    assert (layer.nbytes, layer.dtypes) == (16, "BF16 F32")


def test_experts_belong_to_the_layer_that_holds_them(tmp_path):
    names = [f"m.layers.{i}.experts.{j}.w" for i in range(2) for j in range(3)]
    found = inspect(a_checkpoint(tmp_path, *names))
    assert [(layer.name, sorted(layer.tensors)) for layer in found.layers] == [
        (f"m.layers.{i}", [f"experts.{j}.w" for j in range(3)]) for i in range(2)
    ]


def test_alike_layers_are_one_row(tmp_path):
    names = [f"m.layers.{i}.{part}" for i in range(12) for part in ("up", "down")]
    found = inspect(a_checkpoint(tmp_path, "m.norm.weight", *names, shape=(500, 500)))
    assert [" ".join(row.split()) for row in rows(found)] == [
        "m.layers.0 … 11 (12 alike) 2 each 2.0 each F32",
        "m.norm 1 1.0 F32",
    ]


def test_layers_that_differ_are_not_folded(tmp_path):
    tensors = {f"layers.{i}.w": random_tensor(2) for i in range(5)}
    tensors["layers.1.w"] = random_tensor(3)
    tensors["layers.3.w"] = random_tensor(2, dtype="I32")
    tensors["layers.4.v"] = tensors.pop("layers.4.w")
    found = inspect(write_checkpoint(tmp_path, tensors))
    assert [row.split()[0] for row in rows(found)] == [f"layers.{i}" for i in range(5)]
    assert "alike" not in str(found)


def test_alike_layers_of_different_stacks_are_not_folded(tmp_path):
    names = [f"{stack}.{i}.w" for stack in ("decoder", "encoder") for i in range(2)]
    found = inspect(a_checkpoint(tmp_path, *names))
    assert [row.split("  ")[0] for row in rows(found)] == [
        "decoder.0 … 1 (2 alike)",
        "encoder.0 … 1 (2 alike)",
    ]


@pytest.mark.parametrize(
    ("name", "layer", "rest"),
    [
        ("weight", "weight", ""),
        ("norm.weight", "norm", "weight"),
        ("a.b.c", "a.b", "c"),
        ("0.weight", "0", "weight"),
        ("layers.0", "layers", "0"),
        ("conv1.weight", "conv1", "weight"),
        ("7", "7", ""),
        ("", "", ""),
        ("слой.3.вес", "слой.3", "вес"),
        ("²", "²", ""),
        ("a1²", "a1²", ""),
    ],
)
def test_names_of_any_form_have_a_layer(tmp_path, name, layer, rest):
    found = inspect(a_checkpoint(tmp_path, name))
    assert [(known.name, list(known.tensors)) for known in found.layers] == [(layer, [rest])]
    assert "no faults" in str(found)


def test_a_number_too_long_for_python_does_not_stop_the_inspection(tmp_path):
    found = inspect(a_checkpoint(tmp_path, f"layers.{'1' * 5000}.w"))
    assert len(found.layers) == 1


def test_layers_numbered_in_other_scripts_can_be_shown(tmp_path):
    found = inspect(a_checkpoint(tmp_path, "layers.٣.w", "layers.٤.w"))
    assert "layers.٣" in str(found)


# Ties -----------------------------------------------------------------------------------------


def tied_model():
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(4, 3)
    model.head = torch.nn.Linear(3, 4, bias=False)
    model.head.weight = model.embed.weight
    return model


def test_ties_are_known_from_safetensors_metadata(tmp_path):
    save_model(tied_model(), str(tmp_path / "model.safetensors"))
    found = inspect(tmp_path)
    ((names, how),) = found.ties
    assert set(names) == {"embed.weight", "head.weight"}
    assert how == "metadata of model.safetensors"
    assert found.count == 1
    assert f"tied ({how}): {' = '.join(names)}" in str(found).splitlines()


def test_metadata_that_names_no_tensor_is_no_tie(tmp_path):
    save_file({"a": random_tensor(2)}, tmp_path / "model.safetensors", metadata={"format": "pt", "x": "y"})
    assert inspect(tmp_path).ties == ()


def test_ties_are_known_from_the_config(tmp_path):
    a_checkpoint(tmp_path, "model.embed_tokens.weight", "model.norm.weight")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert inspect(tmp_path).ties == (
        (("model.embed_tokens.weight", "lm_head.weight"), "tie_word_embeddings in config.json"),
    )


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ('{"tie_word_embeddings": false}', ["model.embed_tokens.weight"]),
        ("{}", ["model.embed_tokens.weight"]),
        ('["tie_word_embeddings"]', ["model.embed_tokens.weight"]),
        ("{broken", ["model.embed_tokens.weight"]),
        ('{"tie_word_embeddings": true}', ["model.embed_tokens.weight", "lm_head.weight"]),
        ('{"tie_word_embeddings": true}', ["model.norm.weight"]),
    ],
)
def test_a_config_without_a_tie_ties_nothing(tmp_path, config, names):
    a_checkpoint(tmp_path, *names)
    (tmp_path / "config.json").write_text(config)
    assert inspect(tmp_path).ties == ()


def test_ties_are_known_from_the_storage_of_a_pickled_file(tmp_path):
    shared = random_tensor(4, 3)
    write_checkpoint(tmp_path, {"embed": shared, "head": shared, "norm": random_tensor(3)}, kind="bin")
    found = inspect(tmp_path)
    assert found.ties == ((("embed", "head"), "one storage"),)
    assert found.count == 3


def test_parts_of_one_storage_that_do_not_overlap_are_no_tie(tmp_path):
    fused = random_tensor(6, 4)
    write_checkpoint(tmp_path, {"q": fused[:3], "k": fused[3:]}, kind="bin")
    assert inspect(tmp_path).ties == ()


# Faults ---------------------------------------------------------------------------------------


def test_all_faults_are_found_and_good_files_are_shown(tmp_path):
    folder = a_checkpoint(tmp_path, *(f"layers.{i}.w" for i in range(5)), shape=(8,), shards=5)
    shards = [folder / f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)]
    for shard in shards[:2]:
        os.truncate(shard, shard.stat().st_size - 3)
    save_file({"layers.3.w": random_tensor(8), "layers.2.w": random_tensor(8)}, shards[3])
    save_file({"layers.4.other": random_tensor(8)}, shards[4])
    found = inspect(folder)
    assert list(found.files) == shards[2:]
    assert found.count == 4
    assert len(found.faults) == 4
    first, second, twice, index = found.faults
    assert str(shards[0]) in first
    assert "truncated" in first
    assert str(shards[1]) in second
    assert "truncated" in second
    assert str(shards[3]) in twice
    assert "is also in model-00003-of-00005.safetensors" in twice
    assert str(shards[4]) in index
    assert "'layers.4.w'" in index
    text = str(found)
    assert all(f"fault: {fault}" in text for fault in found.faults)
    assert all(shard.name in text for shard in shards[2:])
    assert "no faults" not in text


def test_an_index_that_places_a_tensor_elsewhere_is_a_fault(tmp_path):
    folder = a_checkpoint(tmp_path, "a", "b", shards=2)
    index = folder / "model.safetensors.index.json"
    swapped = json.loads(index.read_text())["weight_map"]
    swapped["a"] = swapped["b"]
    index.write_text(json.dumps({"weight_map": swapped}))
    # shard 1 is not named any more; only what shard 2 lacks can be told
    (fault,) = inspect(folder).faults
    assert "tensor 'a'" in fault
    assert "places it here, and it is not" in fault


def test_when_every_file_is_broken_there_are_only_faults(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"<!doctype html>")
    found = inspect(tmp_path)
    assert (found.count, found.nbytes, found.dtypes, found.layers) == (0, 0, {}, ())
    assert len(found.faults) == 2
    assert "too short" in found.faults[0]
    assert "web page" in found.faults[1]
    assert "0 tensors" in str(found)


def test_a_broken_pickled_file_is_a_fault(tmp_path):
    folder = a_checkpoint(tmp_path, "a", "b", kind="bin", shards=2)
    broken = folder / "pytorch_model-00001-of-00002.bin"
    os.truncate(broken, broken.stat().st_size // 2)
    found = inspect(folder)
    assert found.count == 1
    assert len(found.faults) == 1
    assert str(broken) in found.faults[0]


def test_the_text_of_very_many_faults_is_cut_and_the_values_are_not(tmp_path):
    for number in range(1, 31):
        (tmp_path / f"model-{number:05d}-of-00030.safetensors").write_bytes(b"")
    found = inspect(tmp_path)
    assert len(found.faults) == len(found.as_dict()["faults"]) == 30
    lines = [line for line in str(found).splitlines() if line.startswith("fault: ")]
    assert len(lines) == 21
    assert lines[-1] == "fault: … and 10 more"


# Text and values ------------------------------------------------------------------------------


def test_the_text_is_tables(tmp_path):
    tensors = {f"m.layers.{i}.w": random_tensor(1000, 1000, dtype="BF16") for i in range(2)}
    tensors["m.norm.weight"] = random_tensor(500_000, dtype="F32")
    found = inspect(write_checkpoint(tmp_path, tensors))
    assert str(found).splitlines() == [
        f"{tmp_path}: 3 tensors, 6.0 MB, 1 safetensors file",
        "",
        "file               tensors   MB",
        "model.safetensors        3  6.0",
        "",
        "dtype  tensors   MB",
        "BF16         2  4.0",
        "F32          1  2.0",
        "",
        "layer                     tensors        MB  dtypes",
        "m.layers.0 … 1 (2 alike)   1 each  2.0 each  BF16",
        "m.norm                          1       2.0  F32",
        "",
        "no faults",
    ]


def test_the_text_names_the_index_and_counts_files(tmp_path):
    text = str(inspect(a_checkpoint(tmp_path, "a", "b", shards=2)))
    assert "2 safetensors files, index model.safetensors.index.json" in text.splitlines()[0]


def test_the_values_are_complete_and_json(tmp_path):
    write_checkpoint(
        tmp_path,
        {"m.embed_tokens.weight": random_tensor(4, 3, dtype="BF16"), "s": random_tensor(dtype="F32")},
    )
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    found = inspect(tmp_path)
    values = found.as_dict()
    assert json.loads(json.dumps(values)) == values
    tensors = sorted(values.pop("tensors"), key=lambda tensor: tensor["name"])
    file = "model.safetensors"
    assert tensors == [
        {"name": "m.embed_tokens.weight", "dtype": "BF16", "shape": [4, 3], "bytes": 24, "file": file},
        {"name": "s", "dtype": "F32", "shape": [], "bytes": 4, "file": file},
    ]
    assert values == {
        "schema": "weights.inspection/1",
        "root": str(tmp_path),
        "kind": "safetensors",
        "layout": "checkpoint",
        "rank": 0,
        "axes": {},
        "index": None,
        "tensor_count": 2,
        "bytes": 28,
        "files": [{"name": file, "tensors": 2, "bytes": 28}],
        "dtypes": {"BF16": {"tensors": 1, "bytes": 24}, "F32": {"tensors": 1, "bytes": 4}},
        "ties": [
            {
                "names": ["m.embed_tokens.weight", "lm_head.weight"],
                "known_from": "tie_word_embeddings in config.json",
            }
        ],
        "faults": [],
        "notes": list(found.notes),
    }


def test_the_values_carry_index_and_faults(tmp_path):
    folder = a_checkpoint(tmp_path, "a", "b", shards=2)
    os.truncate(folder / "model-00001-of-00002.safetensors", 4)
    values = inspect(folder).as_dict()
    assert values["index"] == str(folder / "model.safetensors.index.json")
    assert [file["name"] for file in values["files"]] == ["model-00002-of-00002.safetensors"]
    assert [tensor["name"] for tensor in values["tensors"]] == ["b"]
    assert len(values["faults"]) == 1


# What it costs --------------------------------------------------------------------------------


def test_safetensors_are_inspected_without_torch(tmp_path):
    a_checkpoint(tmp_path, "a.w", "b.w", shards=2)
    code = (
        "import sys; from pathlib import Path; from weights_core.inspection import inspect\n"
        "found = inspect(Path(sys.argv[1])); str(found); found.as_dict()\n"
        "assert found.count == 2; assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def test_a_hundred_thousand_tensors_are_inspected_through_a_pipe(tmp_path):
    write_by_hand(tmp_path / "model.safetensors", 100_000)
    command = [str(Path(sys.executable).with_name("weights")), "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "100,000 tensors, 0.1 MB, 1 safetensors file" in done.stdout
    assert "model.layers.0 … 9999 (10000 alike)" in done.stdout
    assert "no faults" in done.stdout
