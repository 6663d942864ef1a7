# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from weights_core.checkpoint import CheckpointFiles, components, find
from weights_core.errors import CheckpointError
from weights_core.shards import open_shards
from weights_core.testing import random_tensor, write_checkpoint

INDEX = "model.safetensors.index.json"


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_index(folder, weight_map, name=INDEX):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / name


def names(found):
    return [file.name for file in found.files]


def refusal(path, *args, about=None, **kwargs):  # what the error says after it has named the file
    with pytest.raises(CheckpointError) as caught:
        find(path, *args, **kwargs)
    file = path if about is None else about
    assert caught.value.file == file
    assert str(caught.value).startswith(str(file))
    return str(caught.value).removeprefix(str(file))


@contextlib.contextmanager
def without_privileges():
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(65534)
    try:
        yield
    finally:
        if privileged:
            os.seteuid(0)


@pytest.fixture
def public():  # a folder that a user without privileges can reach; tmp_path is not
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for inner in folder.iterdir():
        inner.chmod(0o700)
    shutil.rmtree(folder)


# What is found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("index", [True, False])
def test_a_folder_as_written(tmp_path, kind, shards, index):
    tensors = {f"t{number}": random_tensor(2, seed=number) for number in range(4)}
    write_checkpoint(tmp_path, tensors, shards=shards, kind=kind, index=index)
    found = find(tmp_path)
    assert found.root == tmp_path
    assert found.kind == ("safetensors" if kind == "safetensors" else "torch")
    assert list(found.files) == sorted(tmp_path.glob(f"*.{kind}"))
    assert len(found.files) == shards
    assert found.notes == ()
    if shards > 1 and index:
        assert found.index == next(tmp_path.glob("*.index.json"))
        assert found.weight_map.keys() == tensors.keys()
    else:
        assert (found.index, found.weight_map) == (None, None)


@pytest.mark.parametrize("name", ["any.safetensors", "any.bin", "any.pt", "any.pth"])
def test_a_single_file_is_taken_whatever_lies_beside_it(tmp_path, name):
    touch(tmp_path, name, "model.safetensors", "pytorch_model.bin", INDEX)
    kind = "safetensors" if name.endswith(".safetensors") else "torch"
    expected = CheckpointFiles(root=tmp_path, kind=kind, files=(tmp_path / name,))
    assert find(tmp_path / name) == expected


def test_the_path_of_an_index(tmp_path):
    touch(tmp_path, "a.safetensors", "b.safetensors", "other.safetensors")
    index = write_index(tmp_path, {"x": "b.safetensors", "y": "a.safetensors"}, "odd.safetensors.index.json")
    found = find(index)
    assert names(found) == ["a.safetensors", "b.safetensors"]
    assert (found.root, found.index) == (tmp_path, index)


def test_a_link_to_a_folder_and_links_inside_it(tmp_path):
    touch(tmp_path, "blobs/1234")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.safetensors").symlink_to(tmp_path / "blobs/1234")
    (tmp_path / "link").symlink_to(tmp_path / "snapshot")
    assert find(tmp_path / "link").files == (tmp_path / "link/model.safetensors",)


def test_safetensors_are_preferred_to_pickled_files(tmp_path):
    touch(tmp_path, "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")
    assert names(find(tmp_path)) == ["model.safetensors"]


def test_files_outside_the_index_are_passed_over_with_a_note(tmp_path):
    touch(tmp_path, "a.safetensors", "consolidated.safetensors")
    write_index(tmp_path, {"x": "a.safetensors"})
    found = find(tmp_path)
    assert names(found) == ["a.safetensors"]
    assert len(found.notes) == 1
    assert "passed over 'consolidated.safetensors'" in found.notes[0]


def test_an_index_of_a_known_name_decides_among_several(tmp_path):
    touch(tmp_path, "a.safetensors", "b.safetensors")
    write_index(tmp_path, {"x": "a.safetensors"}, "adapter.safetensors.index.json")
    write_index(tmp_path, {"x": "b.safetensors"})
    assert names(find(tmp_path)) == ["b.safetensors"]


def test_consolidated_alone_is_loaded(tmp_path):
    touch(tmp_path, "consolidated.safetensors")
    found = find(tmp_path)
    assert (names(found), found.notes) == (["consolidated.safetensors"], ())


def test_consolidated_beside_shards_is_passed_over_with_a_note(tmp_path):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    touch(tmp_path, "consolidated.safetensors", *shards)
    found = find(tmp_path)
    assert names(found) == shards
    assert len(found.notes) == 1
    assert "passed over 'consolidated.safetensors'" in found.notes[0]


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("plain", "variants"),
    [
        (["model.safetensors"], ["model.fp16.safetensors", "model.non_ema.safetensors"]),
        (SHARDS, ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]),
        (SHARDS, ["model-00001-of-00001.fp16.safetensors"]),
        (["diffusion_pytorch_model.safetensors"], ["diffusion_pytorch_model.bf16.safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.fp16.bin"]),
    ],
)
def test_a_variant_is_passed_over_with_a_note_and_taken_alone(tmp_path, plain, variants):
    touch(tmp_path, *variants)
    assert (names(find(tmp_path)), find(tmp_path).notes) == (variants, ())
    touch(tmp_path, *plain)
    assert names(find(tmp_path)) == plain
    assert find(tmp_path).notes[0].startswith(f"passed over {variants[0]!r}")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_path_of_an_index_of_a_variant(tmp_path, kind):
    touch(tmp_path, f"model.fp16.{kind}", f"model.{kind}")
    index = write_index(tmp_path, {"x": f"model.fp16.{kind}"}, f"model.{kind}.index.fp16.json")
    assert names(find(index)) == [f"model.fp16.{kind}"]
    assert names(find(tmp_path)) == [f"model.{kind}"]


def test_what_only_looks_like_a_variant_is_taken(tmp_path):
    files = ["model.0.safetensors", "model.safetensors", "other.fp16.safetensors", "other.safetensors"]
    touch(tmp_path, *files)
    assert names(find(tmp_path)) == files


def test_one_file_beside_an_index_of_others_is_ambiguous(tmp_path):
    """Transformers takes the file, diffusers and vLLM the index."""
    touch(tmp_path, "model.safetensors", "model.fp16.safetensors", *SHARDS)
    index = write_index(tmp_path, {"x": SHARDS[0], "y": SHARDS[1]})
    assert "'model.safetensors' and an index of other files" in refusal(tmp_path)
    assert names(find(tmp_path / "model.safetensors")) == ["model.safetensors"]
    assert names(find(index)) == SHARDS
    write_index(tmp_path, {"x": "model.safetensors"})
    assert names(find(tmp_path)) == ["model.safetensors"]


def test_training_args_beside_a_model_are_passed_over_with_a_note(tmp_path):
    touch(tmp_path, "pytorch_model.bin", "training_args.bin", "optimizer.pt")
    found = find(tmp_path)
    assert names(found) == ["pytorch_model.bin"]
    assert "'optimizer.pt', 'training_args.bin'" in found.notes[0]


def test_pickled_files_of_any_name_where_there_is_nothing_else(tmp_path):
    touch(tmp_path, "adapter.bin")
    assert names(find(tmp_path)) == ["adapter.bin"]


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_may_start_at_zero_or_one(tmp_path, first):
    touch(tmp_path, *(f"model-{number}-of-3.safetensors" for number in range(first, first + 3)))
    assert len(find(tmp_path).files) == 3


# What is missing --------------------------------------------------------------------------------


def test_a_missing_number_without_an_index(tmp_path):
    touch(tmp_path, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    assert refusal(tmp_path) == ": 1 of 3 shards of 'model' are missing: number 2"


def test_many_missing_numbers_are_counted_and_not_all_listed(tmp_path):
    touch(tmp_path, "model-00002-of-00009.bin")
    assert refusal(tmp_path) == ": 8 of 9 shards of 'model' are missing: number 1, 3, 4, 5, 6, …"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("total", ["999999999", "9" * 19, "9" * 20, "9" * 200])
def test_a_huge_number_of_shards_neither_hangs_nor_overflows(tmp_path, total):
    touch(tmp_path, f"model-00001-of-{total}.safetensors")
    assert f"of {total} shards of 'model' are missing: number 2, 3" in refusal(tmp_path)


def test_an_empty_folder(tmp_path):
    assert "holds no weights: no .safetensors, .bin, .pt or .pth file" in refusal(tmp_path)


def test_a_folder_without_weights(tmp_path):
    touch(tmp_path, "config.json", "README.md")
    assert "holds no weights" in refusal(tmp_path)


def test_a_file_of_another_kind(tmp_path):
    touch(tmp_path, "model.gguf")
    assert "is not a weights file: need .safetensors" in refusal(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["no", "no.safetensors", "a/b/c"])
def test_a_missing_path(tmp_path, name):
    assert refusal(tmp_path / name) == ": no such file or folder"


def test_a_path_below_a_file(tmp_path):
    touch(tmp_path, "file")
    assert "cannot be read: Not a directory" in refusal(tmp_path / "file/model")


def test_an_overlong_path(tmp_path):
    assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 300))


def test_a_hub_id_says_how_to_download_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/model-1.5", "model"):
        with pytest.raises(CheckpointError, match=f"'{name}' is not here.*hf download {name} --local-dir"):
            find(Path(name))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file or folder"):
        find(Path("model.safetensors"))


# The index --------------------------------------------------------------------------------------


def test_an_index_names_a_missing_file(tmp_path):
    touch(tmp_path, "a.safetensors")
    write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    said = refusal(tmp_path, about=tmp_path / "b.safetensors")
    assert said == f", tensor 'y': the index {INDEX} names this file, and it is missing; download it again"


def test_an_index_names_a_dangling_link(tmp_path):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "gone")
    write_index(tmp_path, {"x": "a.safetensors"})
    assert "it is missing" in refusal(tmp_path, about=tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "sub/x.safetensors",
        "/etc/x.safetensors",
        "..",
        ".",
        "",
        "x.bin",
        "x\0.safetensors/",
    ],
)
def test_an_index_names_what_is_no_file_beside_it(tmp_path, name):
    folder = tmp_path / "model"
    touch(tmp_path, "x.safetensors", "model/sub/x.safetensors", "model/x.bin")
    index = write_index(folder, {"x": name})
    assert f"the index names {name!r}, which is no weights file beside it" in refusal(folder, about=index)


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "x\0.safetensors", "\ud800.safetensors"])
def test_an_index_names_a_file_that_cannot_exist(tmp_path, name):
    write_index(tmp_path, {"x": name})
    with pytest.raises(CheckpointError, match=str(tmp_path)) as caught:
        find(tmp_path)
    assert "missing" in str(caught.value) or "no weights file" in str(caught.value)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.timeout(30)
def test_an_index_names_what_is_not_a_regular_file(tmp_path, make):
    make(tmp_path / "a.safetensors")
    write_index(tmp_path, {"x": "a.safetensors"})
    assert "tensor 'x'" in refusal(tmp_path, about=tmp_path / "a.safetensors")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_an_index_that_is_not_json(tmp_path, raw):
    (tmp_path / INDEX).write_bytes(raw)
    assert "is not valid JSON" in refusal(tmp_path, about=tmp_path / INDEX)


@pytest.mark.parametrize("raw", [b"[]", b"1", b"null", b'"weight_map"'])
def test_an_index_that_is_not_an_object(tmp_path, raw):
    (tmp_path / INDEX).write_bytes(raw)
    assert "is not a JSON object" in refusal(tmp_path, about=tmp_path / INDEX)


@pytest.mark.parametrize(
    "document", [{}, {"metadata": {}}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"x": 1}}]
)
def test_an_index_without_a_weight_map(tmp_path, document):
    (tmp_path / INDEX).write_text(json.dumps(document))
    assert "has no weight_map of names to file names" in refusal(tmp_path, about=tmp_path / INDEX)


def test_an_index_with_an_empty_weight_map(tmp_path):
    touch(tmp_path, "model.safetensors")
    index = write_index(tmp_path, {})
    assert "names no tensor" in refusal(tmp_path, about=index)


def test_several_unknown_indexes_are_ambiguous(tmp_path):
    touch(tmp_path, "a.safetensors")
    for name in ("one.safetensors.index.json", "two.safetensors.index.json"):
        write_index(tmp_path, {"x": "a.safetensors"}, name)
    said = refusal(tmp_path)
    assert "several indexes ('one.safetensors.index.json', 'two.safetensors.index.json')" in said
    assert "give the path of one" in said


# Permissions and odd files ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_folder_without_permission(public, mode):
    folder = public / "model"
    touch(folder, "model.safetensors")
    folder.chmod(mode)
    with without_privileges(), pytest.raises(CheckpointError, match=f"{folder}.*Permission denied"):
        open_shards(find(folder))


@pytest.mark.parametrize("mode", [0o000, 0o444])
@pytest.mark.parametrize("is_pipeline", [None, True])
def test_a_pipeline_without_permission(public, mode, is_pipeline):
    folder = public / "model"
    touch(folder, "model_index.json", "unet/model.safetensors")
    folder.chmod(mode)
    with without_privileges(), pytest.raises(CheckpointError, match=f"{folder}.*Permission denied"):
        open_shards(find(folder, "unet", is_pipeline))


def test_a_file_in_a_folder_without_permission(public):
    folder = public / "model"
    touch(folder, "model.safetensors")
    folder.chmod(0)
    with without_privileges():
        assert "cannot be read: Permission denied" in refusal(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_weights_file_without_permission(public, kind):
    write_checkpoint(public, {"t": random_tensor(2)}, kind=kind)
    [file] = find(public).files
    file.chmod(0)
    with without_privileges(), pytest.raises(CheckpointError, match=f"{file}: no permission to read it"):
        open_shards(find(public))


def test_an_index_without_permission(public):
    touch(public, "a.safetensors")
    index = write_index(public, {"x": "a.safetensors"})
    index.chmod(0)
    with without_privileges():
        assert "cannot be read: Permission denied" in refusal(public, about=index)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_fifo_among_the_files_does_not_hang(tmp_path, kind):
    fifo = tmp_path / f"model.{kind}"
    os.mkfifo(fifo)
    with pytest.raises(CheckpointError, match=f"{fifo}: is not a regular file"):
        open_shards(find(tmp_path))


@pytest.mark.timeout(30)
def test_a_fifo_as_the_path_does_not_hang(tmp_path):
    fifo = tmp_path / "model.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(CheckpointError, match=str(fifo)):
        open_shards(find(fifo))


def test_a_folder_named_like_a_file_is_not_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "holds no weights" in refusal(tmp_path)
    assert "holds no weights" in refusal(tmp_path / "model.safetensors")


# Pipelines --------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path):
    folder = tmp_path / "pipeline"
    weights = ["unet/diffusion_pytorch_model.safetensors", "vae/model.safetensors"]
    touch(folder, "scheduler/config.json", *weights)
    listed = {
        "_class_name": "P",
        "vae": ["x", "Y"],
        "unet": ["x", "Y"],
        "scheduler": ["x", "Y"],
        "gone": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(listed))
    return folder


def test_components_are_those_with_weights(pipeline):
    assert components(pipeline) == ("unet", "vae")


def test_a_flat_checkpoint_has_no_components(tmp_path):
    touch(tmp_path, "model.safetensors", "unet/model.safetensors")
    assert components(tmp_path) == ()


@pytest.mark.parametrize("raw", [b"{", b"[]", b"[" * 100_000])
def test_a_broken_pipeline_index_is_named(pipeline, raw):
    index = pipeline / "model_index.json"
    index.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{index}: is not"):
        components(pipeline)


@pytest.mark.parametrize("key", ["..", "/", "x" * 300, "a\0b", ""])
def test_a_pipeline_index_cannot_name_folders_outside_or_impossible_ones(pipeline, key):
    touch(pipeline.parent, "model.safetensors")
    (pipeline / "model_index.json").write_text(json.dumps({"unet": [], key: []}))
    assert components(pipeline) == ("unet",)


@pytest.mark.parametrize("is_pipeline", [None, True])
def test_a_component_is_found_in_its_folder(pipeline, is_pipeline):
    found = find(pipeline, "unet", is_pipeline)
    assert found.files == (pipeline / "unet/diffusion_pytorch_model.safetensors",)
    assert found.root == pipeline / "unet"


def test_an_unknown_component_lists_those_there_are(pipeline):
    assert "no component 'text_encoder'; it has 'unet', 'vae'" in refusal(pipeline, "text_encoder")


def test_a_component_without_weights_is_named(pipeline):
    assert "holds no weights" in refusal(pipeline, "scheduler", about=pipeline / "scheduler")


@pytest.mark.parametrize("component", ["..", ".", "unet/../vae", "/unet", "unet/"])
def test_a_component_is_never_a_path(pipeline, component):
    touch(pipeline.parent, "model.safetensors")
    assert "not the name of a component" in refusal(pipeline, component)


def test_an_overlong_component_is_unknown(pipeline):
    assert "is not the name of a component" in refusal(pipeline, "x" * 300)


def test_a_pipeline_without_a_component_lists_those_there_are(pipeline):
    assert "it is a pipeline of 'unet', 'vae'" in refusal(pipeline)


def test_is_pipeline_false_ignores_the_component(pipeline):
    touch(pipeline, "model.safetensors")
    assert find(pipeline, "unet", is_pipeline=False).files == (pipeline / "model.safetensors",)


def test_a_component_of_a_flat_checkpoint_is_ignored(tmp_path):
    touch(tmp_path, "model.safetensors", "unet/model.safetensors")
    assert find(tmp_path, "unet").files == (tmp_path / "model.safetensors",)


def test_is_pipeline_true_needs_no_pipeline_index(tmp_path):
    touch(tmp_path, "unet/model.safetensors", "vae/model.safetensors")
    assert find(tmp_path, "unet", is_pipeline=True).files == (tmp_path / "unet/model.safetensors",)
    assert "no component 'x'; it has 'unet', 'vae'" in refusal(tmp_path, "x", is_pipeline=True)
