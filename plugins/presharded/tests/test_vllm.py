# SPDX-License-Identifier: Apache-2.0
"""Folders of vLLM's `save_sharded_state`: the rank's parts, unquantised, of equal topology."""

import json

import pytest
import torch
from safetensors.torch import save_file

import weights_core as w
from weights_core.errors import CheckpointError, IdentityMismatchError
from weights_core.testing import host_of
from weights_core.testing.parallel import TensorParallelEngine, cut
from weights_presharded.plugin import PreshardedPlugin

ALONE = {"presharded": {"source": False, "target": False}}


@pytest.fixture
def saved(llama, tmp_path):
    """Return a function that writes such a folder for the small engine: `saved(size, parts)`."""

    def write(size, parts=2, config=None, extra=None):
        folder = tmp_path / f"vllm-{size}"
        folder.mkdir()
        whole = llama.SHAPE.checkpoint()
        for rank in range(size):
            tensors = cut(llama.SHAPE, whole, size, rank) | (extra or {})
            names = list(tensors)
            for part in range(parts):
                save_file(
                    {n: tensors[n].contiguous() for n in names[part::parts]},
                    folder / f"model-rank-{rank}-part-{part}.safetensors",
                )
        (folder / "config.json").write_text(json.dumps(config or {}))
        return folder

    return write


def load(llama, folder, size=1, rank=0, format="presharded"):
    engine = TensorParallelEngine(llama.SHAPE, size=size, rank=rank, gather=lambda value, _: [value] * size)
    host = host_of(presharded=PreshardedPlugin, config=ALONE)
    return engine, w.load(engine, folder, format, host=host)


@pytest.mark.parametrize("format", ["presharded", "auto"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_loads_its_parts(llama, saved, size, format):
    folder = saved(size)
    for rank in range(size):
        engine, report = load(llama, folder, size, rank, format)
        assert report.provider == "presharded"
        assert any("no digests to verify" in note for note in report.notes)
        due = cut(llama.SHAPE, llama.SHAPE.checkpoint(), size, rank)
        assert all(torch.equal(engine.params[name], tensor) for name, tensor in due.items())


@pytest.mark.parametrize(("there", "here"), [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_ranks_is_refused(llama, saved, there, here):
    with pytest.raises(
        IdentityMismatchError, match=r"was saved by vLLM for .*this engine needs .*never cut again"
    ):
        load(llama, saved(there), here)


@pytest.mark.parametrize("lost", ["model-rank-1-part-0.safetensors", "model-rank-0-part-1.safetensors"])
def test_a_missing_part_is_named(llama, saved, lost):
    folder = saved(2, parts=3)
    (folder / lost).unlink()
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        load(llama, folder, 2)


def test_what_post_load_may_have_rearranged_is_refused_with_the_reason(llama, saved):
    engine = TensorParallelEngine(llama.SHAPE, transforms=True)
    with pytest.raises(CheckpointError, match=r"doubled in place\. vLLM saves after its post-load"):
        w.load(engine, saved(1), "presharded", host=host_of(presharded=PreshardedPlugin, config=ALONE))


QUANTISED = {
    "says the configuration": (
        {"config": {"quantization_config": {"quant_method": "fp8"}}},
        "has a quantization_config",
    ),
    "by its dtype": ({"extra": {"w": torch.zeros(2).to(torch.float8_e4m3fn)}}, "tensor 'w'"),
    "by its name": ({"extra": {"layers.0.qweight": torch.zeros(2)}}, r"tensor 'layers\.0\.qweight'"),
    "by its scale": ({"extra": {"layers.0.weight_scale_inv": torch.zeros(2)}}, "weight_scale_inv"),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_weights_are_refused_with_the_reason(llama, saved, case):
    how, says = QUANTISED[case]
    with pytest.raises(
        CheckpointError,
        match=f"{says}.*of quantised weights.*vLLM saves after its post-load|of quantised.*{says}",
    ):
        load(llama, saved(1, **how))
