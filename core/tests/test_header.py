# SPDX-License-Identifier: Apache-2.0
import json
import os
import struct

import pytest
from safetensors.torch import save_file

from weights_core.errors import CheckpointError
from weights_core.files import File
from weights_core.header import MAX_HEADER, read_header
from weights_core.tensors import as_bytes
from weights_core.testing import random_tensor


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.safetensors"


def entry(dtype="U8", shape=(4,), begin=0, end=4, **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return 8 + len(raw)


def read(path):
    return read_header(File(path)).metas


def refusal(path, tensor=None):  # what the error says after it has named the file and the tensor
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert caught.value.file == path
    assert caught.value.tensor == tensor
    place = f"{path}" if tensor is None else f"{path}, tensor {tensor!r}"
    assert str(caught.value).startswith(place)
    return str(caught.value).removeprefix(place)


# What is valid ----------------------------------------------------------------------------------


def test_tensors_are_described_as_the_library_wrote_them(path):
    tensors = {"b": random_tensor(3, 5), "a": random_tensor(2, dtype="BF16"), "s": random_tensor(dtype="I64")}
    save_file(tensors, path, metadata={"format": "pt"})
    metas = read(path)
    assert metas.keys() == tensors.keys()
    raw = path.read_bytes()
    for name, tensor in tensors.items():
        meta = metas[name]
        assert (meta.name, meta.file, meta.shape) == (name, path, tuple(tensor.shape))
        assert raw[meta.offset : meta.offset + meta.nbytes] == as_bytes(tensor).numpy().tobytes()


def test_tensors_come_in_storage_order(path):
    start = write(path, {"z": entry(begin=4, end=8), "a": entry(begin=8, end=12), "m": entry()}, bytes(12))
    metas = read(path)
    assert list(metas) == ["m", "z", "a"]
    assert [meta.offset for meta in metas.values()] == [start, start + 4, start + 8]


def test_metadata_is_not_a_tensor(path):
    write(path, {"__metadata__": {"format": "pt", "dtype": "F32"}, "t": entry()}, bytes(4))
    assert list(read(path)) == ["t"]


@pytest.mark.parametrize("shape", [[0], [3, 0], [0, 3], [0, 2**62]])
@pytest.mark.parametrize("position", [0, 4])
def test_an_empty_tensor_may_stand_before_and_after_others(path, shape, position):
    write(path, {"empty": entry(shape=shape, begin=position, end=position), "t": entry()}, bytes(4))
    assert read(path)["empty"].shape == tuple(shape)
    assert read(path)["empty"].nbytes == 0


def test_a_scalar_has_the_shape_of_none(path):
    write(path, {"scalar": entry("F32", [])}, bytes(4))
    assert read(path)["scalar"].shape == ()


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_small_elements_that_fill_whole_bytes(path, dtype):
    size = 3 if dtype == "F6_E2M3" else 2
    write(path, {"small": entry(dtype, [2, 2], 0, size)}, bytes(size))
    assert read(path)["small"].nbytes == size


def test_a_file_without_tensors_is_valid(path):
    write(path, {})
    assert read(path) == {}


def test_padding_after_the_header_is_valid(path):
    write(path, json.dumps({"t": entry()}).encode() + b"   ", bytes(4))
    assert list(read(path)) == ["t"]


# The file as a whole ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7])
def test_too_short_for_a_length(path, size):
    path.write_bytes(bytes(size))
    assert f"{size} bytes is too short" in refusal(path)


def test_header_longer_than_the_file(path):
    path.write_bytes(struct.pack("<Q", 1000) + b"{}")
    assert "header of 1000 bytes, but the file has only 10: truncated" in refusal(path)


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**64 - 1])
def test_header_above_the_limit_even_where_the_file_is_that_long(path, length):
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, 8 + MAX_HEADER + 1)
    assert f"header of {length} bytes, the limit is 100000000" in refusal(path)


def test_truncated_in_the_last_tensor(path):
    save_file({"first": random_tensor(64), "last": random_tensor(64)}, path)
    full = path.stat().st_size
    os.truncate(path, full - 1)
    said = refusal(path, "last")
    assert f"ends at byte {full}, the file has {full - 1}: truncated" in said


def test_truncated_before_the_last_tensor(path):
    save_file({"first": random_tensor(64), "last": random_tensor(64)}, path)
    os.truncate(path, path.stat().st_size - 256 - 3)
    assert "truncated" in refusal(path, "first")


def test_bytes_after_the_last_tensor(path):
    start = write(path, {"t": entry()}, bytes(7))
    assert refusal(path) == f", byte {start + 4}: 3 bytes after the last tensor"


def test_bytes_in_a_file_without_tensors(path):
    write(path, {}, bytes(7))
    assert "7 bytes after the last tensor" in refusal(path)


# The header as JSON -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"t": NaN}',
        b'{"t": -Infinity}',
        b'{"__metadata__": {"a": Infinity}}',
        b'{"a\x01": {}}',
        b"{} {}",
        b"9" * 5000,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 50_000 + b"]" * 50_000,
    ],
    ids=lambda header: header[:12].decode("latin-1"),
)
def test_not_json(path, header):
    write(path, header)
    assert "the header is not valid JSON" in refusal(path)


@pytest.mark.parametrize("header", [b"[]", b"1", b"null", b'"text"'])
def test_not_an_object(path, header):
    write(path, header)
    assert "the header is not a JSON object" in refusal(path)


def test_a_name_twice(path):
    one, two = json.dumps(entry()), json.dumps(entry(begin=4, end=8))
    write(path, f'{{"a": {one}, "twice": {one}, "twice": {two}}}'.encode(), bytes(8))
    assert "the header names it twice" in refusal(path, "twice")


@pytest.mark.timeout(30)
def test_a_name_twice_among_very_many_is_found_without_hanging(path):
    names = ",".join(f'"{number}":0' for number in range(200_000))
    write(path, f'{{{names},"199999":0}}'.encode())
    assert "the header names it twice" in refusal(path, "199999")


@pytest.mark.parametrize("depth", [200, 900, 970, 980, 990, 1000, 2000])
def test_deep_nesting_inside_an_entry(path, depth):
    write(path, b'{"t": {"shape": ' + b"[" * depth + b"]" * depth + b"}}", bytes(4))
    with pytest.raises(CheckpointError, match=str(path)):
        read(path)


@pytest.mark.parametrize("metadata", [5, [], "text", {"a": 1}, {"a": None}, {"a": {"b": "c"}}])
def test_metadata_that_is_not_text_by_name_is_refused_as_by_the_library(path, metadata):
    write(path, {"__metadata__": metadata, "t": entry()}, bytes(4))
    with pytest.raises(CheckpointError, match=f"{path}.*__metadata__"):
        read(path)


# One tensor -------------------------------------------------------------------------------------


def test_a_name_that_is_not_unicode(path):
    write(path, {"\ud800": entry()}, bytes(4))
    assert "its name is not valid Unicode" in refusal(path, "\ud800")


@pytest.mark.parametrize("value", [None, 1, "text", [], [1]])
def test_an_entry_that_is_not_an_object(path, value):
    write(path, {"t": value}, bytes(4))
    assert "its header entry is not an object" in refusal(path, "t")


@pytest.mark.parametrize("dtype", ["F128", "f32", "", "\ud800", None, 3, ["F32"], {}])
def test_an_unknown_dtype(path, dtype):
    write(path, {"t": entry(dtype)}, bytes(4))
    said = refusal(path, "t")
    assert f"unknown dtype {dtype!r}; known are BOOL" in said


@pytest.mark.parametrize(
    "shape",
    [[-4], [-2, -2], [4.0], [True, 4], [2**63], [2**64], [10**400], ["4"], [None], [[4]], 4, "4", None, {}],
)
def test_a_bad_shape(path, shape):
    write(path, {"t": entry(shape=shape)}, bytes(4))
    assert f"its shape {shape!r} is not a list of sizes" in refusal(path, "t")


@pytest.mark.parametrize(
    "offsets",
    [[4, 0], [0], [], [0, 4, 8], [-4, 0], [0.0, 4.0], [False, 4], [0, 2**64], ["0", "4"], None, 4, {}],
)
def test_bad_offsets(path, offsets):
    write(path, {"t": {"dtype": "U8", "shape": [4], "data_offsets": offsets}}, bytes(4))
    assert f"its data_offsets {offsets!r} are not [begin, end]" in refusal(path, "t")


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_a_key_is_missing(path, key):
    incomplete = entry()
    del incomplete[key]
    write(path, {"t": incomplete}, bytes(4))
    assert f"{key} None" in refusal(path, "t")


def test_offsets_beyond_the_end_of_the_file(path):
    write(path, {"t": entry(shape=[2**40], end=2**40)}, bytes(4))
    assert "truncated" in refusal(path, "t")


@pytest.mark.parametrize(
    ("dtype", "shape", "due"),
    [("F32", [2], 8), ("U8", [3], 3), ("U8", [], 1), ("U8", [0], 0), ("F4", [4], 2)],
)
def test_a_size_that_contradicts_the_offsets(path, dtype, shape, due):
    write(path, {"t": entry(dtype, shape)}, bytes(4))
    assert f"{dtype} {shape} takes {due} bytes, its data_offsets span 4" in refusal(path, "t")


@pytest.mark.parametrize("dtype", ["U8", "F4"])
@pytest.mark.parametrize("dimensions", [2, 300])
def test_a_size_beyond_any_file(path, dtype, dimensions):
    write(path, {"t": entry(dtype, [2**62] * dimensions)}, bytes(4))
    assert f": {dtype} " in refusal(path, "t")


@pytest.mark.parametrize(("dtype", "shape"), [("U8", [2**62, 2**62, 0]), ("F4", [2**60, 31, 0])])
def test_a_size_that_overflows_before_it_is_multiplied_by_zero(path, dtype, shape):
    write(path, {"t": entry(dtype, shape, end=0)})
    assert "too large" in refusal(path, "t")


@pytest.mark.parametrize(("dtype", "shape"), [("F4", []), ("F4", [3]), ("F4", [1, 7]), ("F6_E2M3", [2])])
def test_small_elements_that_do_not_fill_whole_bytes(path, dtype, shape):
    write(path, {"small": entry(dtype, shape, 0, 1)}, bytes(1))
    assert f"{dtype} of shape {shape} does not fill whole bytes" in refusal(path, "small")


def test_f4_rows_that_do_not_fill_whole_bytes(path):
    # 6 elements fill 3 bytes, but torch packs pairs of the last dimension, so it has no such tensor
    write(path, {"small": entry("F4", [2, 3], 0, 3)}, bytes(3))
    assert "F4 of shape [2, 3]" in refusal(path, "small")


# Tensors together -------------------------------------------------------------------------------


def test_overlapping_tensors(path):
    start = write(path, {"a": entry(), "b": entry(begin=2, end=6)}, bytes(6))
    assert (
        refusal(path, "b") == f", byte {start + 2}: overlaps the tensor before it, which ends at {start + 4}"
    )


def test_the_same_bytes_for_two_tensors(path):
    write(path, {"a": entry(), "b": entry()}, bytes(4))
    assert "overlaps" in refusal(path, "b")


def test_an_empty_tensor_inside_another(path):
    write(path, {"a": entry(), "empty": entry(shape=[0], begin=2, end=2)}, bytes(4))
    assert "overlaps" in refusal(path, "empty")


@pytest.mark.parametrize(("name", "begin"), [("first", 3), ("second", 5)])
def test_a_gap_before_a_tensor(path, name, begin):
    header = {name: entry(begin=begin, end=begin + 4)}
    if name == "second":
        header["first"] = entry()
    start = write(path, header, bytes(begin + 4))
    gap = 3 if name == "first" else 1
    assert refusal(path, name) == f", byte {start + begin}: {gap} bytes before it belong to no tensor"
