# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from weights_core import dtypes
from weights_core.checkpoint import find
from weights_core.errors import CheckpointError
from weights_core.shards import open_shards
from weights_core.tensors import as_bytes
from weights_core.testing import random_tensor, write_checkpoint

# Whatever a file or an index holds, it is either refused with a CheckpointError, or the safetensors
# library accepts it as well and reads the same bits. Nothing else may come out.

fuzzed = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


def check(path):
    """Return whether the checkpoint was accepted, having compared it with the library."""
    shards, refusal = [], ""
    try:
        shards = open_shards(find(path))
    except CheckpointError as error:
        refusal = str(error)
    if not shards:
        assert refusal.startswith(str(path if path.is_dir() else path.parent))
        return False
    with contextlib.ExitStack() as stack:
        for shard in shards:
            stack.callback(shard.close)
        for shard in shards:
            compare(shard)
    return True


def compare(shard):
    with safe_open(shard.path, "pt") as library:
        assert set(library.keys()) == shard.metas.keys()
        for name, meta in shard.metas.items():
            if meta.dtype.startswith("F6_"):  # no torch has it
                with pytest.raises(CheckpointError, match=meta.dtype):
                    shard.read(name)
                continue
            ours, theirs = shard.read(name), library.get_tensor(name)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(as_bytes(ours), as_bytes(theirs))


@contextlib.contextmanager
def file_of(raw):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(raw)
        yield path


def joined(header, data):
    return struct.pack("<Q", len(header)) + header + data


# Random bytes -----------------------------------------------------------------------------------

json_like = st.binary(max_size=60) | st.text('{}[]",:0123456789.eE-+tfn\\u \n', max_size=60).map(str.encode)


@fuzzed
@given(st.binary(max_size=100) | st.builds(joined, json_like, st.binary(max_size=20)))
def test_random_bytes(raw):
    with file_of(raw) as path:
        assert not check(path)


# Damaged files ----------------------------------------------------------------------------------

VALID = {
    "a": random_tensor(3, 4, dtype="F32"),
    "b": random_tensor(2, 3, dtype="BF16"),
    "none": random_tensor(2, 0, dtype="I8"),
    "scalar": random_tensor(dtype="I64"),
    "u": random_tensor(5, dtype="U8"),
}
RAW = save(VALID, {"format": "pt"})
HEADER_END = 8 + struct.unpack("<Q", RAW[:8])[0]
HEADER, DATA = json.loads(RAW[8:HEADER_END]), RAW[HEADER_END:]

sizes = st.integers(-1, 20) | st.sampled_from([2**31, 2**61, 2**62, 2**63 - 1, 2**63, 2**64])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
fields = {
    "dtype": st.sampled_from([*dtypes.BITS, "F128", "f32"]) | anything,
    "shape": st.lists(sizes, max_size=4) | st.lists(sizes, min_size=200, max_size=400) | anything,
    "data_offsets": st.lists(sizes, min_size=2, max_size=2).map(sorted)
    | st.lists(sizes, max_size=3)
    | anything,
}
shapes_by_bytes = st.sampled_from([[6, 2], [1, 12], [2, 2, 3], [12], [4, 3], [0, 7], [24], [8, 3], [16, 3]])


def copy_of(header):
    return json.loads(json.dumps(header))


@st.composite
def damaged_headers(draw):
    header = copy_of(HEADER)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(VALID)))
        entry = header.get(name)
        damage = draw(
            st.sampled_from(["field", "reshape", "missing", "extra", "name", "remove", "entry", "metadata"])
        )
        if damage == "metadata":
            header["__metadata__"] = draw(anything)
        elif damage == "entry":
            header[name] = draw(anything)
        elif not isinstance(entry, dict):
            continue
        elif damage == "field":
            field = draw(st.sampled_from(sorted(fields)))
            entry[field] = draw(fields[field])
        elif damage == "reshape":
            entry["dtype"] = draw(st.sampled_from(list(dtypes.BITS)))
            entry["shape"] = draw(shapes_by_bytes)
        elif damage == "missing":
            entry.pop(draw(st.sampled_from(sorted(fields))), None)
        elif damage == "extra":
            entry[draw(st.text(max_size=5))] = draw(anything)
        elif damage == "name":
            header[draw(st.text(max_size=8) | st.sampled_from([*VALID, "\ud800", "\0", "__metadata__"]))] = (
                entry
            )
            del header[name]
        else:
            del header[name]
    return header


@fuzzed
@given(damaged_headers(), st.binary(max_size=2))
def test_headers_with_damaged_fields(header, rest):
    with file_of(joined(json.dumps(header).encode(), DATA + rest)) as path:
        check(path)


@st.composite
def laid_out(draw):
    header, end = {}, 0
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(list(dtypes.BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = dtypes.BITS[dtype]
        for dimension in shape:
            bits *= dimension
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
        end += bits // 8
    return header, draw(st.binary(min_size=end, max_size=end))


@fuzzed
@given(laid_out())
def test_headers_of_every_dtype_and_shape(layout):
    header, data = layout
    with file_of(joined(json.dumps(header).encode(), data)) as path:
        accepted = check(path)
    if not any(entry["dtype"].startswith(("F4", "F6_")) for entry in header.values()):
        assert accepted


# A "-" before a 0 makes a whole number to Python and none to the library, so it is not drawn.
bytes_drawn = st.sampled_from(b"0123456789aFU_ ") | st.integers(0, 255).filter(lambda byte: byte != ord("-"))
flips = st.tuples(st.integers(0, HEADER_END - 1), bytes_drawn)


@fuzzed
@given(st.lists(flips, min_size=1, max_size=3))
def test_flipped_bytes_in_the_header(changes):
    raw = bytearray(RAW)
    for position, byte in changes:
        raw[position] = byte
    with file_of(raw) as path:
        check(path)


@fuzzed
@given(st.integers(0, len(RAW) - 1))
def test_truncation_at_any_byte_is_refused(size):
    with file_of(RAW[:size]) as path:
        assert not check(path)


@fuzzed
@given(st.binary(min_size=1, max_size=20))
def test_bytes_after_the_end_are_refused(rest):
    with file_of(RAW + rest) as path:
        assert not check(path)


def test_the_undamaged_file_is_accepted():
    with file_of(RAW) as path:
        assert check(path)


# Random indexes ---------------------------------------------------------------------------------

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PLACES = {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0], "d": SHARDS[1]}
odd_files = st.sampled_from(
    [
        "../model.safetensors",
        "/etc/passwd",
        "..",
        "",
        "sub.safetensors",
        "gone.safetensors",
        "x\0.safetensors",
        "\ud800.safetensors",
        "x" * 300 + ".safetensors",
        "pytorch_model.bin",
    ]
)
maps = st.dictionaries(
    st.sampled_from([*PLACES, "ghost", "\ud800"]) | st.text(max_size=5),
    st.sampled_from(SHARDS) | odd_files | st.text(max_size=5),
    max_size=5,
) | st.dictionaries(st.sampled_from(sorted(PLACES)), st.sampled_from(SHARDS), max_size=4)
true_maps = st.sets(st.sampled_from(sorted(PLACES))).map(lambda names: {name: PLACES[name] for name in names})
documents = (
    st.builds(lambda weight_map: {"weight_map": weight_map}, maps | true_maps | anything)
    | st.dictionaries(st.sampled_from(["weight_map", "metadata"]), anything | maps)
    | anything
)


@contextlib.contextmanager
def folder_with_index(raw):
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), {name: random_tensor(2) for name in PLACES}, shards=2)
        (folder / "sub.safetensors").mkdir()
        (folder / "model.safetensors.index.json").write_bytes(raw)
        yield folder


@fuzzed
@given(documents.map(json.dumps).map(str.encode) | json_like)
def test_random_indexes(raw):
    with folder_with_index(raw) as folder:
        check(folder)


@fuzzed
@given(true_maps)
def test_indexes_that_tell_the_truth_are_accepted_unless_they_are_empty(weight_map):
    with folder_with_index(json.dumps({"weight_map": weight_map}).encode()) as folder:
        assert check(folder) == bool(weight_map)
