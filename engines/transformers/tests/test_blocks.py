# SPDX-License-Identifier: Apache-2.0
"""A rank's part of a tensor, and its part of the scales."""

import pytest
from transformers import BertConfig, FineGrainedFP8Config

from weights_core import TensorMeta
from weights_core.errors import EngineError
from weights_transformers.arguments import block_size
from weights_transformers.blocks import Blocks


def metas(shape, scales, name="a.weight", scaled="a.weight_scale_inv"):
    rows, columns = scales
    return {
        name: TensorMeta(name, shape, "F8_E4M3", 1),
        scaled: TensorMeta(scaled, (*shape[:-2], rows, columns), "F32", 4),
    }


def noted(blocks, name, *bounds):
    blocks.note(name, [range(*one) for one in bounds])


@pytest.mark.parametrize("scaled", ["a.weight_scale_inv", "a.scale", "a.qscale_weight"])
@pytest.mark.parametrize(
    ("rows", "scales"),
    [((0, 64), (0, 2)), ((64, 96), (2, 3)), ((96, 100), (3, 4)), ((0, 100), (0, 4)), ((0, 0), (0, 0))],
)
def test_parts_that_belong_together(rows, scales, scaled):
    blocks = Blocks((32, 32), metas((100, 64), (4, 2), scaled=scaled))
    noted(blocks, "a.weight", rows, (0, 64))
    noted(blocks, scaled, scales, (0, 2))
    assert blocks.fault() is None


def test_experts_are_cut_as_they_are():
    blocks = Blocks((32, 32), metas((4, 100, 64), (4, 2), "e.up", "e.up_scale_inv"))
    noted(blocks, "e.up", (2, 4), (0, 32), (0, 64))
    noted(blocks, "e.up_scale_inv", (2, 4), (0, 1), (0, 2))
    assert blocks.fault() is None


@pytest.mark.parametrize("rows", [(0, 50), (16, 64), (50, 100)])
def test_a_block_that_is_cut_in_two(rows):
    blocks = Blocks((32, 32), metas((100, 64), (4, 2)))
    with pytest.raises(EngineError, match=r"'a\.weight'.*no whole number of blocks of 32×32.*use fewer"):
        noted(blocks, "a.weight", rows, (0, 64))


@pytest.mark.parametrize("scales", [[], [(0, 1)], [(1, 2)]])
def test_scales_of_other_elements(scales):
    blocks = Blocks((32, 32), metas((100, 64), (4, 2)))
    noted(blocks, "a.weight", (0, 64), (0, 64))
    for one in scales:
        noted(blocks, "a.weight_scale_inv", one, (0, 2))
    assert "is not what was read of 'a.weight_scale_inv'" in str(blocks.fault())


@pytest.mark.parametrize(
    ("size", "given"),
    [(None, metas((100, 64), (4, 2))), ((128, 128), metas((100, 64), (4, 2))), ((32, 32), {})],
)
def test_what_has_no_blocks_is_not_looked_at(size, given):
    blocks = Blocks(size, given)
    noted(blocks, "a.weight", (0, 50), (0, 64))
    assert blocks.fault() is None


def test_the_size_of_a_block_is_the_checkpoints():
    asked = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    own = BertConfig(quantization_config={"quant_method": "fp8", "weight_block_size": [32, 64]})
    assert list(block_size(own, asked)) == [32, 64]
    assert list(block_size(BertConfig(), asked)) == [128, 128]
    assert block_size(BertConfig(), {}) is None
