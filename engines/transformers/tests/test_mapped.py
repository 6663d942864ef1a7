# SPDX-License-Identifier: Apache-2.0
"""On the CPU parameters lie in the files where they can, as `from_pretrained`'s do."""

import json
import os

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import weights_core as w
from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.errors import WeightsError
from weights_core.shards import open_shards
from weights_transformers import from_pretrained, load, load_pipeline, open_engine
from weights_transformers.mapped import ModelWeights


def mapped(model, path):
    """The names of parameters whose memory is a private mapping of a file in a folder."""
    with open("/proc/self/maps") as maps:
        rows = [line.split(maxsplit=5) for line in maps if str(path) in line]
    ranges = [[int(one, 16) for one in row[0].split("-")] for row in rows]
    assert {row[1] for row in rows} <= {"rw-p"}
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(begin <= parameter.data_ptr() < end for begin, end in ranges)
    }


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("format", ["disk", "parallel_shards", "auto"])
@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_parameters_lie_in_the_files_and_without_map_files_they_do_not(saved, name, format):
    path = saved(name)
    loaded = load(AutoModelForCausalLM, path, format=format)
    names = {name for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
    assert mapped(loaded.model, path) == names
    size = sum(parameter.nbytes for parameter in loaded.model.parameters())
    assert loaded.report.nbytes == size
    assert loaded.report.applied.host_bytes == size
    assert any("must not be overwritten in place" in note for note in loaded.report.notes)
    copied = load(AutoModelForCausalLM, path, format=format, map_files=False)
    assert mapped(copied.model, path) == set()
    assert not any("overwritten in place" in note for note in copied.report.notes)
    for name, parameter in copied.model.named_parameters():
        assert torch.equal(parameter, loaded.model.get_parameter(name))


def test_what_is_fused_or_converted_is_made_and_the_rest_is_mapped(saved):
    path = saved("mixtral")
    model = from_pretrained(AutoModelForCausalLM, path)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if ".experts." in name} == names - mapped(model, path)
    converted = load(AutoModelForCausalLM, path, dtype="float32")
    assert mapped(converted.model, path) == set()
    assert not any("overwritten in place" in note for note in converted.report.notes)


def test_what_is_used_twice_is_nobodys_to_share(saved):
    """Two parameters of one source must not lie in the same pages: training would change both."""
    path = saved("llama")
    engine = open_engine(AutoModelForCausalLM, path)
    recipes = dict(engine._trace.recipes)
    one, other = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    recipes[other] = recipes[one]
    weights = ShardSet(open_shards(find(path)), provider="disk")
    given = dict(ModelWeights(weights, recipes, dict(engine.model.named_parameters())).mapped())
    weights.close()
    assert recipes.keys() - given.keys() == {one, other}


def test_a_step_of_training_changes_no_byte_of_a_file(saved):
    path = saved("llama")
    before = contents(path)
    model, other = (from_pretrained(AutoModelForCausalLM, path) for _ in range(2))
    model.train()
    ids = torch.arange(2 * 9).reshape(2, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    theirs = LlamaForCausalLM.from_pretrained(path)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter)
        assert not torch.equal(model.get_parameter(name), parameter)
    assert contents(path) == before


def test_the_model_outlives_its_files(saved, tmp_path, logits):
    theirs = LlamaForCausalLM.from_pretrained(saved("llama"))
    path = tmp_path / "model"
    theirs.save_pretrained(path, max_shard_size="80KB")
    model = from_pretrained(AutoModelForCausalLM, path)
    expected = logits(theirs)
    for file in path.glob("*.safetensors"):
        file.unlink()
        file.write_bytes(b"another file")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(path, max_shard_size="80KB")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(path)), expected)


def test_a_model_may_be_saved_to_where_it_was_loaded_from(saved, tmp_path, logits):
    path = tmp_path / "model"
    LlamaForCausalLM.from_pretrained(saved("llama")).save_pretrained(path)
    model = from_pretrained(AutoModelForCausalLM, path)
    expected = logits(model)
    model.save_pretrained(path)
    assert torch.equal(logits(from_pretrained(AutoModelForCausalLM, path)), expected)


def test_a_shared_model_lies_in_shared_memory(saved, vault):
    path = saved("llama")
    loaded = load(AutoModelForCausalLM, path, format="gms", config=vault)
    assert mapped(loaded.model, path) == set()
    loaded.report.lease.close()


def test_components_of_a_pipeline(wan):
    loaded = load_pipeline(DiffusionPipeline, wan)
    model = loaded.pipeline.transformer
    assert mapped(model, wan) == {name for name, _ in model.named_parameters()}
    copied = load_pipeline(DiffusionPipeline, wan, map_files=False)
    assert mapped(copied.pipeline.transformer, wan) == set()
    assert mapped(copied.pipeline.text_encoder, wan) == set()


def test_a_file_that_is_cut_short_before_it_is_mapped_is_an_error(saved, tmp_path):
    path = tmp_path / "model"
    LlamaForCausalLM.from_pretrained(saved("llama")).save_pretrained(path)
    engine = open_engine(AutoModelForCausalLM, path)
    session = w.open_session(engine, path, "disk")

    def steps():
        with session:
            session.resolve()
            session.load()
            os.truncate(path / "model.safetensors", 4096)
            session.apply()

    with pytest.raises(WeightsError, match=r"model\.safetensors, tensor '.*(shorter|changed)"):
        steps()
    assert engine.untouched()
    assert all(parameter.is_meta for parameter in engine.model.parameters())


def test_unaligned_tensors_are_copied(saved, tmp_path, logits):
    """A file whose elements lie at odd places, as others than the safetensors library may write them."""
    path = tmp_path / "model"
    theirs = LlamaForCausalLM.from_pretrained(saved("llama"))
    theirs.save_pretrained(path)
    file = path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + length])).encode()
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    model = from_pretrained(AutoModelForCausalLM, path)
    assert mapped(model, path) == set()
    assert torch.equal(logits(model), logits(theirs))
