# SPDX-License-Identifier: Apache-2.0
import json
import struct

import pytest
import safetensors
import torch

from weights_core import dtypes

IN_TORCH = [name for name in dtypes.BITS if not name.startswith("F6")]


@pytest.mark.parametrize("dtype", dtypes.BITS)
def test_every_dtype_is_as_wide_as_the_safetensors_library_says(dtype):
    shape = [3, 8]
    size = dtypes.nbytes(dtype, tuple(shape))
    header = json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    file = struct.pack("<Q", len(header)) + header + bytes(size)
    [(_, found)] = safetensors.deserialize(file)
    assert found["shape"] == shape
    assert len(found["data"]) == size


@pytest.mark.parametrize("dtype", IN_TORCH)
def test_a_torch_dtype_has_one_safetensors_name_and_the_same_size(dtype):
    kind = dtypes.to_torch(dtype)
    assert dtypes.from_torch(kind) == dtype
    tensor = torch.empty(dtypes.torch_shape(dtype, (6, 4)), dtype=kind)
    assert tensor.numel() * tensor.element_size() == dtypes.nbytes(dtype, (6, 4))


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2", "F128", "", "float32"])
def test_names_without_a_torch_dtype_are_key_errors(dtype):
    with pytest.raises(KeyError, match=repr(dtype)):
        dtypes.to_torch(dtype)


@pytest.mark.parametrize("kind", [torch.complex128, torch.complex32, torch.qint8])
def test_torch_dtypes_that_safetensors_lacks_are_key_errors(kind):
    with pytest.raises(KeyError, match=str(kind).removeprefix("torch.")):
        dtypes.from_torch(kind)


def test_nbytes_of_an_unknown_dtype_is_a_key_error():
    with pytest.raises(KeyError, match="F128"):
        dtypes.nbytes("F128", (1,))


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("F32", (), 4),
        ("F32", (3, 5), 60),
        ("F32", (3, 0), 0),
        ("C64", (2,), 16),
        ("F4", (6,), 3),
        ("F4", (0,), 0),
        ("F6_E2M3", (4,), 3),
    ],
)
def test_nbytes(dtype, shape, expected):
    assert dtypes.nbytes(dtype, shape) == expected


@pytest.mark.parametrize(
    ("dtype", "shape"), [("F4", ()), ("F4", (3,)), ("F4", (3, 5)), ("F6_E2M3", (2,)), ("F6_E3M2", (1, 3))]
)
def test_elements_that_do_not_fill_whole_bytes_are_refused(dtype, shape):
    with pytest.raises(ValueError, match=f"{dtype}.*whole bytes"):
        dtypes.nbytes(dtype, shape)


@pytest.mark.parametrize("dtype", ["F4", "F32", "F6_E2M3"])
@pytest.mark.parametrize("shape", [(), (0,), (4,), (3, 2), (2, 0, 8)])
def test_stored_shape_undoes_torch_shape(dtype, shape):
    assert dtypes.stored_shape(dtype, dtypes.torch_shape(dtype, shape)) == shape


def test_torch_packs_two_f4_elements_into_one_of_the_last_dimension():
    assert dtypes.torch_shape("F4", (4, 6)) == (4, 3)
    assert dtypes.torch_shape("U8", (4, 6)) == (4, 6)
