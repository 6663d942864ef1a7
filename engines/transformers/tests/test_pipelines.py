# SPDX-License-Identifier: Apache-2.0
"""Pipelines of several components by one call, the same as diffusers loads them."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, WanTransformer3DModel
from transformers import AutoModel

from weights_core.errors import CheckpointError, CoverageError, EngineError
from weights_transformers import load_pipeline, pipeline_from_pretrained

WEIGHTS = ["text_encoder", "transformer", "transformer_2", "vae"]


def assert_same(ours, theirs):
    assert set(ours.components) == set(theirs.components)
    assert ours.name_or_path == theirs.name_or_path
    for name in WEIGHTS:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert type(mine) is type(other)
        assert mine.training == other.training
        expected = dict(other.state_dict())
        assert mine.state_dict().keys() == expected.keys()
        for key, value in mine.state_dict().items():
            assert value.dtype == expected[key].dtype, f"{name} {key}"
            assert torch.equal(value, expected[key]), f"{name} {key}"
        buffers = dict(other.named_buffers())
        for key, value in mine.named_buffers():
            assert value.dtype == buffers[key].dtype, f"{name} {key}"
            assert torch.equal(value, buffers[key]), f"{name} {key}"


def video(pipeline):
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, 16, 32, generator=generator).to(pipeline.transformer.dtype)
    return pipeline(
        prompt_embeds=embeds, negative_prompt_embeds=embeds * 0.5, height=16, width=16, num_frames=5,
        num_inference_steps=2, generator=generator, output_type="pt",
    ).frames  # fmt: skip


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("format", ["disk", "auto"])
def test_a_pipeline_is_the_same(wan, format, dtype):
    theirs = DiffusionPipeline.from_pretrained(wan, dtype=dtype)
    ours = load_pipeline(DiffusionPipeline, wan, format=format, dtype=dtype)
    assert sorted(ours.reports) == WEIGHTS
    assert_same(ours.pipeline, theirs)
    kept = {p.dtype for n, p in ours.pipeline.transformer.named_parameters() if "scale_shift_table" in n}
    assert kept == {torch.float32}
    assert (dtype or torch.float32) == ours.pipeline.transformer_2.patch_embedding.weight.dtype
    assert torch.equal(video(ours.pipeline), video(theirs))


def test_dtypes_by_component(wan):
    dtypes = {"transformer": torch.bfloat16, "vae": torch.float16, "default": torch.float32}
    theirs = DiffusionPipeline.from_pretrained(wan, dtype=dtypes)
    assert_same(pipeline_from_pretrained(DiffusionPipeline, wan, dtype=dtypes), theirs)


@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
def test_the_older_name_of_dtype(wan):
    theirs = DiffusionPipeline.from_pretrained(str(wan), torch_dtype=torch.bfloat16)
    ours = pipeline_from_pretrained(DiffusionPipeline, str(wan), torch_dtype=torch.bfloat16, device_map=None)
    assert ours.vae.dtype == torch.bfloat16
    assert_same(ours, theirs)


def test_a_component_that_is_given_is_not_loaded(wan):
    own = WanTransformer3DModel.from_pretrained(wan / "transformer")
    ours = load_pipeline(DiffusionPipeline, wan, transformer_2=own)
    assert ours.pipeline.transformer_2 is own
    assert sorted(ours.reports) == ["text_encoder", "transformer", "vae"]


def test_components_are_shared_in_slots_of_their_own(wan, vault):
    theirs = DiffusionPipeline.from_pretrained(wan, dtype=torch.bfloat16)
    writer = load_pipeline(DiffusionPipeline, wan, format="gms", config=vault, dtype=torch.bfloat16)
    reader = load_pipeline(DiffusionPipeline, wan, format="gms", config=vault, dtype=torch.bfloat16)
    assert all(report.receipts for report in writer.reports.values())
    assert {(r.provider, r.nbytes) for r in reader.reports.values()} == {("gms", 0)}
    assert_same(reader.pipeline, theirs)
    assert torch.equal(video(reader.pipeline), video(theirs))
    for report in (*reader.reports.values(), *writer.reports.values()):
        report.lease.close()


def test_an_old_vae_with_other_names(tmp_path):
    """Attention had other names once; diffusers renames them as it loads."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(32,), norm_num_groups=8, layers_per_block=1, latent_channels=4
    ).save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(file).items():
        for now, before in old.items():
            name = name.replace(f".{now}.", f".{before}.")
        tensors[name] = value
    save_file(tensors, file)
    from weights_core.checkpoint import find
    from weights_transformers.diffusion import blueprint
    from weights_transformers.opening import headers

    found = find(tmp_path / "vae")
    traced = blueprint(AutoencoderKL, found.root, headers(found), None)
    assert any("query" in name for name in traced.sources)
    assert not [name for name in traced.recipes if "query" in name]
    assert len(traced.recipes) == len(tensors)


def test_what_is_missing_is_an_error(wan, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(wan, tmp_path / "wan")
    file = tmp_path / "wan" / "transformer_2" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("proj_out.weight")
    save_file(tensors, file)
    with pytest.raises(CoverageError, match=r"proj_out\.weight"):
        load_pipeline(DiffusionPipeline, tmp_path / "wan")


@pytest.mark.parametrize("map_files", [True, False])
def test_shapes_that_do_not_fit_are_an_error(wan, tmp_path, map_files):
    """What is not the whole of a tensor would be served with what memory happens to hold."""
    shutil.copytree(wan, tmp_path / "wan")
    config = tmp_path / "wan" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"z_dim": 32}))
    with pytest.raises(CoverageError, match=r"wan/vae does not fit its config\.json: .*weight is \[") as told:
        load_pipeline(DiffusionPipeline, tmp_path / "wan", map_files=map_files)
    assert "post_quant_conv.bias" in told.value.mismatched


def test_a_component_without_a_configuration(wan, tmp_path):
    shutil.copytree(wan, tmp_path / "wan")
    (tmp_path / "wan" / "vae" / "config.json").unlink()
    with pytest.raises(EngineError, match=r"component 'vae': diffusers cannot read .*wan/vae/config\.json"):
        load_pipeline(DiffusionPipeline, tmp_path / "wan")


def test_refusals(wan, saved, tmp_path):
    with pytest.raises(EngineError, match="'device_map' is not served"):
        load_pipeline(DiffusionPipeline, wan, device_map="balanced")
    with pytest.raises(EngineError, match=r"dtype is to be a torch\.dtype, .* not 'bfloat16'"):
        load_pipeline(DiffusionPipeline, wan, dtype="bfloat16")
    with pytest.raises(EngineError, match="AutoModel is no pipeline class"):
        load_pipeline(AutoModel, wan)
    with pytest.raises(CheckpointError, match=r"is no pipeline: it has no model_index\.json"):
        load_pipeline(DiffusionPipeline, saved("llama"))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_pipeline(DiffusionPipeline, tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="hf download org/name"):
        load_pipeline(DiffusionPipeline, "org/name")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(CheckpointError, match="is no pipeline"):
        load_pipeline(DiffusionPipeline, tmp_path)
