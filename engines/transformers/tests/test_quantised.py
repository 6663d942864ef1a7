# SPDX-License-Identifier: Apache-2.0
"""A model that Transformers converts by itself as it loads: the set is read value by value."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, LlamaForCausalLM

import weights_core as w
from weights_core.errors import EngineError, FormatUnresolvedError
from weights_transformers import load
from weights_transformers.direct import DirectEngine

BLOCK = 32
HOW = {"dequantize": True, "weight_block_size": (BLOCK, BLOCK), "modules_to_not_convert": ["lm_head"]}


@pytest.fixture
def fp8(in_fp8):
    return in_fp8("llama", BLOCK)


@pytest.mark.parametrize("format", ["disk", "parallel_shards"])
def test_a_model_in_8_bit_floats(fp8, logits, format):
    theirs = AutoModelForCausalLM.from_pretrained(fp8, quantization_config=FineGrainedFP8Config(**HOW))
    ours = load(
        AutoModelForCausalLM,
        fp8,
        format=format,
        quantization_config=FineGrainedFP8Config(**HOW),
        dtype="auto",
    )
    assert ours.report.provider == format
    assert ours.report.applied.unused == ()
    assert not [note for note in ours.report.notes if "consumed" in note]  # all were released
    assert torch.equal(logits(ours.model), logits(theirs))
    for (name, mine), other in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_it_shares_nothing(fp8, vault):
    with pytest.raises(FormatUnresolvedError, match="shares nothing"):
        load(
            AutoModelForCausalLM,
            fp8,
            format="gms",
            config=vault,
            quantization_config=FineGrainedFP8Config(**HOW),
        )


def test_an_error_of_the_source_is_not_told_in_other_words(fp8, monkeypatch):
    from weights_core.disk import ShardSet

    def broken(self, name, out, slices=None):
        raise w.errors.CheckpointError("changed while it was read", file=fp8)

    monkeypatch.setattr(ShardSet, "read_into", broken)
    with pytest.raises(w.errors.CheckpointError, match="changed while it was read"):
        load(AutoModelForCausalLM, fp8, format="disk", quantization_config=FineGrainedFP8Config(**HOW))


def test_a_model_that_is_left_without_memory_is_refused(saved):
    """As where two threads call `from_pretrained` at once: a tied head stays on meta."""

    def build(values, bring):
        model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=values)
        model.lm_head.to("meta")
        return model, {"missing_keys": ()}

    path = saved("llama")
    config = AutoConfig.from_pretrained(path)
    engine = DirectEngine(build, w.EngineInfo(name="transformers", version="5"))
    with pytest.raises(EngineError, match=r"lm_head\.weight without memory"):
        w.load(engine, path)
    assert engine.untouched()
