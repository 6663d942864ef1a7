# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is one clear error, before anything is loaded."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
)

from weights_core import PluginHost
from weights_core.errors import CheckpointError, CoverageError, EngineError, PluginConfigError
from weights_presharded import shard
from weights_transformers import arguments, from_pretrained


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"device": "cpu"}, "'device': name the device in device_map"),
        ({"device_map": "auto"}, "'device_map': 'auto' is not served; name one device"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "several devices"),
        ({"device_map": {"": "disk"}}, "'disk' is not served; name one device"),
        ({"device_map": torch.device("meta")}, "'meta' is not served; name one device"),
        ({"max_memory": {0: 1}}, "offloading"),
        ({"state_dict": {}}, "reads the checkpoint itself"),
        ({"gguf_file": "x.gguf"}, "reads the checkpoint itself"),
        ({"revision": "v2"}, "download it first"),
        ({"subfolder": "sub"}, "give that folder itself as the path"),
        ({"variant": "fp16"}, "the path of the variant's file"),
        ({"use_safetensors": False}, "give the path of the file or the index"),
        ({"adapter_name": "a"}, "adapters are not served"),
        ({"output_loading_info": True}, r"the report of load\(\)"),
        ({"distributed_config": {"fsdp_size": 2}}, "only tensor parallelism"),
        ({"distributed_config": {"dp_replicate_size": 2}}, "only tensor parallelism"),
        ({"distributed_config": {"tp_size": 0}}, "'distributed_config': Parallelism sizes must be >= 1"),
        ({"tp_plan": "auto", "distributed_config": {}}, "leave that out"),
        ({"model_config": "llama"}, "a configuration of Transformers"),
        ({"no_such_argument": 1}, "no_such_argument"),
        ({"quantization_config": "fp8"}, "'str' object has no attribute 'quant_method'"),
        ({"config": LlamaConfig()}, "give a model's configuration as model_config="),
    ],
)
def test_arguments(saved, given, why):
    with pytest.raises(EngineError, match=why):
        from_pretrained(AutoModelForCausalLM, saved("llama"), **given)


def test_arguments_that_ask_for_nothing(saved):
    """Who wraps `from_pretrained` hands on all of its arguments."""
    given = {
        "adapter_kwargs": {},
        "cache_dir": None,
        "device_map": None,
        "force_download": False,
        "output_loading_info": False,
        "revision": "main",
        "state_dict": None,
        "subfolder": "",
        "token": None,
        "use_safetensors": True,
        "variant": None,
        "weights_only": True,
    }
    ours = from_pretrained(AutoModelForCausalLM, saved("llama"), **given)
    theirs = AutoModelForCausalLM.from_pretrained(saved("llama"), **given)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_who_asks_for_safetensors_gets_no_others(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert from_pretrained(AutoModelForCausalLM, tmp_path) is not None
    with pytest.raises(EngineError, match=r"'use_safetensors': .* holds no \.safetensors file"):
        from_pretrained(AutoModelForCausalLM, tmp_path, use_safetensors=True)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (AutoTokenizer, "AutoTokenizer is no PyTorch model class of Transformers"),
        (torch.nn.Linear, "weights_core.TorchEngine"),
        (LlamaConfig, "LlamaConfig is no"),
        (PreTrainedModel, "PreTrainedModel is the class of no model"),
        ("llama", "'llama' is no"),
        (torch.nn.Linear(1, 1), "is no PyTorch model class of Transformers"),
    ],
)
def test_classes(saved, cls, why):
    with pytest.raises(EngineError, match=why):
        from_pretrained(cls, saved("llama"))


def test_a_model_in_place_of_its_class(saved):
    model = LlamaForCausalLM.from_pretrained(saved("llama"))
    with pytest.raises(EngineError, match="give the class LlamaForCausalLM, not a model of it"):
        from_pretrained(model, saved("llama"))


def test_a_class_for_other_models(saved):
    with pytest.raises(EngineError, match="AutoModelForCausalLM has no class for a ViTConfig"):
        from_pretrained(AutoModelForCausalLM, saved("llama"), model_config=ViTConfig())


def test_a_class_of_diffusers(saved):
    from diffusers import AutoencoderKL

    with pytest.raises(EngineError, match="load_pipeline"):
        from_pretrained(AutoencoderKL, saved("llama"))


def test_settings_of_plugins(saved):
    with pytest.raises(PluginConfigError, match=r"'thread'.*did you mean 'threads'"):
        from_pretrained(AutoModelForCausalLM, saved("llama"), config={"parallel_shards": {"thread": 1}})


def test_shapes_that_do_not_fit(saved):
    config = LlamaConfig.from_pretrained(saved("llama"))
    config.intermediate_size = 32
    with pytest.raises(CoverageError) as told:
        from_pretrained(LlamaForCausalLM, saved("llama"), model_config=config)
    assert "model.layers.0.mlp.down_proj.weight is [64, 96], need [64, 32], " in str(told.value)
    assert len(told.value.mismatched) == 9


@pytest.mark.parametrize("is_traced", [False, True])
def test_a_checkpoint_of_which_nothing_is_the_models(saved, tmp_path, is_traced):
    config = LlamaConfig.from_pretrained(saved("llama"))
    config.architectures = ["OtherForCausalLM" if is_traced else "LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CoverageError, match=r"takes nothing of the checkpoint, which has 1 tensor: a\.weight"
    ):
        from_pretrained(AutoModelForCausalLM, tmp_path)


def test_one_of_several_files(saved):
    first, *others = sorted(saved("llama").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match=rf"is one of {1 + len(others)} files: give their folder"):
        from_pretrained(AutoModelForCausalLM, first)


def test_shapes_that_are_to_be_ignored(saved):
    from transformers import LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(saved("llama"))
    config.intermediate_size = 32
    torch.manual_seed(1)
    theirs = LlamaForSequenceClassification.from_pretrained(
        saved("llama"), config=config, ignore_mismatched_sizes=True
    )
    torch.manual_seed(1)
    ours = from_pretrained(
        LlamaForSequenceClassification, saved("llama"), model_config=config, ignore_mismatched_sizes=True
    )
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_no_checkpoint_and_no_configuration(tmp_path):
    with pytest.raises(CheckpointError):
        from_pretrained(AutoModel, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(EngineError, match=r"has no config\.json: give model_config="):
        from_pretrained(AutoModel, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-like-it"}))
    with pytest.raises(EngineError, match="nothing-like-it"):
        from_pretrained(AutoModel, tmp_path)
    for name in ("org/name", "name"):
        with pytest.raises(CheckpointError, match=f"hf download {name} --local-dir"):
            from_pretrained(AutoModel, name)


def test_a_folder_that_was_cut_for_ranks(saved, tmp_path):
    shard(saved("llama-even"), tmp_path / "cut", size=2)
    for format in ("auto", "presharded", "disk"):
        with pytest.raises(CheckpointError) as told:
            from_pretrained(AutoModelForCausalLM, tmp_path / "cut", format=format)
        why = str(told.value)
        assert why.startswith(f"{tmp_path / 'cut'}: was cut for 2 ranks")
        assert "on 2 ranks and not one rank" in why
        assert "open_engine(…, 'ORIGINAL', tp_plan='auto')" in why
        assert f"weights_core.load(engine, '{tmp_path}/cut', 'presharded')" in why
    (tmp_path / "cut" / "READY.json").unlink()
    with pytest.raises(CheckpointError, match="was cut for ranks, and does not say"):
        from_pretrained(AutoModelForCausalLM, tmp_path / "cut")
    with pytest.raises(CheckpointError, match="holds no weights"):  # nobody here can say
        from_pretrained(AutoModelForCausalLM, tmp_path / "cut", host=PluginHost([]))


def test_a_folder_with_an_adapter(saved, tmp_path, monkeypatch):
    for file in saved("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_config.json").write_text("{}")
    assert from_pretrained(AutoModelForCausalLM, tmp_path) is not None  # as Transformers without peft
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(EngineError, match="holds an adapter"):
        from_pretrained(AutoModelForCausalLM, tmp_path)


def test_another_version_of_the_engine_is_named_and_goes_on(saved, monkeypatch, caplog):
    monkeypatch.setitem(arguments.TESTED, "transformers", ((3, 0), (4, 0)))
    with caplog.at_level(logging.WARNING, logger="weights"):
        assert from_pretrained(AutoModelForCausalLM, saved("llama")) is not None
    assert "is installed; weights-transformers is tested with 3.0 up to, not including, 4.0" in caplog.text


def test_the_tested_version_is_silent(saved, caplog):
    with caplog.at_level(logging.WARNING, logger="weights"):
        from_pretrained(AutoModelForCausalLM, saved("llama"))
    assert not [record for record in caplog.records if record.name.startswith("weights")]


@pytest.mark.parametrize("version", ["5.22.9", "5.24.0rc1", "5.23.2", "5.23+cpu"])
def test_versions(version, monkeypatch, caplog):
    monkeypatch.setattr(transformers, "__version__", version)
    with caplog.at_level(logging.WARNING, logger="weights"):
        assert arguments.check_version("transformers") == version
    assert bool(caplog.records) is not version.startswith("5.23")


def test_importing_the_package_imports_no_torch():
    code = "import sys, weights_transformers; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_transformers_takes_of_a_bert_is_no_llama():
    assert arguments.quantization_of(BertConfig(), {}) is None
    assert arguments.quantization_of(BertConfig(), {"quantization_config": {"quant_method": "fp8"}}) == "fp8"
