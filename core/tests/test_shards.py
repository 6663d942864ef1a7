# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from weights_core.checkpoint import find
from weights_core.errors import ArenaError, CheckpointError
from weights_core.header import read_header
from weights_core.shards import PickledShard, SafetensorsShard, open_shards
from weights_core.tensors import as_bytes
from weights_core.testing import every_dtype, random_tensor, write_checkpoint

KINDS = {"safetensors": SafetensorsShard, "bin": PickledShard}
DTYPES = sorted({*every_dtype(), "F4", "F8_E8M0"})
SLICES = [
    None,
    (),
    (slice(None),),
    (slice(1, 3),),
    (slice(-2, None),),
    (slice(2, 2),),
    (slice(4, 1),),
    (slice(-100, 100),),
    (slice(None), slice(1, 4)),
    (slice(None), slice(-3, -1)),
    (slice(1, 4), slice(2, 5)),
    (slice(0, 5, 1), slice(0, 0)),
    (slice(3, 3), slice(1, 2)),
    (slice(1, 2), slice(None), slice(1, 2)),
]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def open_one(folder, tensors, kind="safetensors"):
    write_checkpoint(folder, tensors, kind=kind)
    [shard] = open_shards(find(folder))
    assert type(shard) is KINDS[kind]
    return shard


def same(left, right):
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(as_bytes(left), as_bytes(right))
    )


def descriptors_in(folder):
    links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    return [link for link in links if link.startswith(str(folder))]


# Reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (3, 8), (2, 0), (0, 4), (0,), (2, 3, 4)])
def test_every_dtype_is_read_bit_for_bit_as_the_library_reads_it(tmp_path, dtype, shape):
    shard = open_one(
        tmp_path, {"before": random_tensor(3, dtype="U8"), "t": random_tensor(*shape, dtype=dtype)}
    )
    expected = load_file(tmp_path / "model.safetensors")
    assert shard.metas.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(shard.read(name), tensor)
        assert shard.metas[name].torch_shape == tuple(tensor.shape)
        out = torch.empty_like(tensor)
        shard.read_into(name, out)
        assert same(out, tensor)
    assert (shard.metas["t"].dtype, shard.metas["t"].shape) == (dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (3, 8), (0, 4)])
def test_every_dtype_of_a_pickled_file_is_read_bit_for_bit(tmp_path, dtype, shape):
    tensor = random_tensor(*shape, dtype=dtype)
    shard = open_one(tmp_path, {"t": tensor}, "bin")
    assert same(shard.read("t"), tensor)
    meta = shard.metas["t"]
    assert (meta.dtype, meta.shape, meta.torch_shape) == (dtype, shape, tuple(tensor.shape))
    assert meta.nbytes == as_bytes(tensor).numel()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "F4"])
def test_scalars(tmp_path, kind, dtype):
    tensor = random_tensor(dtype=dtype)
    shard = open_one(tmp_path, {"t": tensor}, kind)
    assert shard.metas["t"].shape == ()
    assert same(shard.read("t"), tensor)
    assert same(shard.read("t", ()), tensor)
    out = torch.empty_like(tensor)
    shard.read_into("t", out)
    assert same(out, tensor)


@pytest.mark.parametrize("slices", SLICES, ids=str)
@pytest.mark.parametrize("shape", [(5, 6, 2), (5, 6, 0), (0, 6, 3)], ids=str)
def test_slices_select_what_torch_selects(tmp_path, kind, shape, slices):
    tensor = random_tensor(*shape)
    shard = open_one(tmp_path, {"before": random_tensor(7), "t": tensor}, kind)
    expected = tensor[slices or ()]
    assert same(shard.read("t", slices), expected)
    out = torch.empty_like(expected, memory_format=torch.contiguous_format)
    shard.read_into("t", out, slices)
    assert same(out, expected)


def test_every_dtype_is_mapped_bit_for_bit(tmp_path):
    tensors = {
        f"{d}.{n}": random_tensor(*shape, dtype=d, seed=n)
        for d in every_dtype()
        for n, shape in enumerate([(4, 6), (70, 600)])
    }
    shard = open_one(tmp_path, tensors)
    for name, tensor in tensors.items():
        assert same(shard.mapped(name), tensor), name
        assert same(shard.mapped(name, (slice(1, 3),)), tensor[1:3]), name
    assert shard.mapped("F32.0", (slice(None), slice(0, 6))).shape == (4, 6)
    shard.close()


@pytest.mark.parametrize("slices", [(slice(None), slice(1, 4)), (slice(2, 2),), (slice(0, 2), slice(3))])
def test_what_is_not_in_one_piece_is_not_mapped(tmp_path, slices):
    shard = open_one(tmp_path, {"t": random_tensor(4, 6), "empty": random_tensor(0, 6)})
    assert shard.mapped("t", slices) is None
    assert shard.mapped("empty") is None
    shard.close()


def test_elements_at_odd_places_and_dtypes_that_torch_lacks_are_not_mapped(tmp_path):
    header = {
        "one": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [9, 12]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(range(12)))
    [shard] = open_shards(find(tmp_path))
    assert same(shard.mapped("one"), torch.zeros(1, dtype=torch.uint8))
    assert shard.mapped("odd") is None
    assert shard.mapped("six") is None
    shard.close()


def test_a_tensor_is_mapped_anew_once_it_was_lent(tmp_path):
    tensors = {"a": random_tensor(500), "b": random_tensor(500, seed=1)}
    shard = open_one(tmp_path, tensors)
    first = shard.mapped("a")
    first.zero_()
    assert same(shard.mapped("b"), tensors["b"])
    again = shard.mapped("a")
    assert same(again, tensors["a"])
    again.fill_(1)
    assert int(first.max()) == 0
    assert same(shard.read("a"), tensors["a"])
    shard.close()
    assert int(first.max()) == 0


@pytest.mark.parametrize("kind", ["safetensors", "bin"], indirect=True)
def test_damage_is_an_error_when_a_tensor_is_mapped(tmp_path, kind):
    shard = open_one(tmp_path, {"t": random_tensor(5000)}, kind)
    if kind == "bin":
        assert shard.mapped("t") is None
        return
    cut = shard.path.stat().st_size - 9000
    os.truncate(shard.path, cut)
    with pytest.raises(CheckpointError, match=rf"{shard.path}, tensor 't', byte {cut}: .*shorter"):
        shard.mapped("t")
    shard.close()
    with pytest.raises(CheckpointError, match=r"tensor 't'.*was closed"):
        shard.mapped("t")


def test_a_file_that_the_system_will_not_map_is_read_otherwise(tmp_path, mocker):
    shard = open_one(tmp_path, {"t": random_tensor(50)})
    mocker.patch("weights_core.mapping.Mapping", autospec=True, side_effect=ArenaError("no address space"))
    assert shard.mapped("t") is None
    shard.bring(shard.extent("t"))
    shard.close()


@pytest.mark.parametrize("slices", [(slice(1, 3),), (slice(None), slice(2, 3))], ids=str)
def test_slices_of_packed_elements_count_in_torch_elements(tmp_path, slices):
    tensor = random_tensor(4, 8, dtype="F4")
    shard = open_one(tmp_path, {"t": tensor})
    assert same(shard.read("t", slices), tensor[slices])


def test_slices_of_one_packed_dimension(tmp_path):
    tensor = random_tensor(8, dtype="F4")
    shard = open_one(tmp_path, {"t": tensor})
    assert same(shard.read("t", (slice(1, 3),)), tensor[1:3])


@pytest.mark.parametrize(
    ("slices", "why"),
    [
        ((slice(0, 4, 2),), "step 1"),
        ((slice(None), slice(None, None, -1)), "step 1"),
        ((slice(None),) * 3, "3 slices for 2 dimensions"),
    ],
    ids=str,
)
def test_slices_that_are_refused(tmp_path, kind, slices, why):
    shard = open_one(tmp_path, {"t": random_tensor(4, 4)}, kind)
    out = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=why):
        shard.read("t", slices)
    with pytest.raises(ValueError, match=why):
        shard.read_into("t", out, slices)
    assert not out.any()


def strided_rows():
    return torch.zeros(8, 6)[::2]


def transposed():
    return torch.zeros(6, 4).t()


def columns():
    return torch.zeros(4, 20)[:, 5:11]


def part_of_a_contiguous_one():
    return torch.zeros(9, 6)[2:6]


@pytest.mark.parametrize("make", [strided_rows, transposed, columns, part_of_a_contiguous_one])
def test_destinations_that_are_views_get_the_tensor_and_their_surroundings_stay(tmp_path, kind, make):
    tensor = random_tensor(4, 6).nan_to_num(1.0)
    shard = open_one(tmp_path, {"t": tensor}, kind)
    out = make()
    shard.read_into("t", out)
    assert same(out, tensor)
    out.zero_()
    shard.read_into("t", out[1:3, :4], (slice(2, 4), slice(2, 6)))
    assert same(out[1:3, :4], tensor[2:4, 2:6])
    out[1:3, :4] = 0
    assert not out._base.any()


@pytest.mark.parametrize("strided", [False, True])
def test_destinations_may_be_parameters(tmp_path, kind, strided):
    tensor = random_tensor(4, 6).nan_to_num(1.0)
    shard = open_one(tmp_path, {"t": tensor}, kind)
    out = torch.nn.Parameter(transposed() if strided else torch.zeros(4, 6))
    shard.read_into("t", out)
    assert same(out, tensor)
    assert out.is_leaf


@pytest.mark.parametrize(
    ("out", "slices"),
    [
        (torch.zeros(6, 4), None),
        (torch.zeros(24), None),
        (torch.zeros(1, 6), None),
        (torch.zeros(4, 6), (slice(0, 2),)),
        (torch.zeros(4, 6, dtype=torch.float64), None),
        (torch.zeros(4, 6, dtype=torch.int32), None),
        (torch.zeros(4, 6, dtype=torch.bfloat16), None),
    ],
)
def test_a_destination_of_another_shape_or_dtype_is_refused_unchanged(tmp_path, kind, out, slices):
    shard = open_one(tmp_path, {"t": random_tensor(4, 6)}, kind)
    with pytest.raises(ValueError, match=r"tensor 't' is torch.float32 .*, the destination is") as caught:
        shard.read_into("t", out, slices)
    assert f"{out.dtype} {list(out.shape)}" in str(caught.value)
    assert not out.any()


def test_tensors_have_memory_of_their_own(tmp_path):
    tensor = random_tensor(4, 6)
    shard = open_one(tmp_path, {"t": tensor})
    for slices in (None, (slice(0, 2),), (slice(None), slice(0, 2))):
        part = shard.read("t", slices)
        assert part.untyped_storage().nbytes() == part.numel() * 4
        part.zero_()
    assert same(shard.read("t"), tensor)


def test_threads_share_a_shard(tmp_path, kind):
    tensors = {f"t{number}": random_tensor(1000, seed=number) for number in range(50)}
    shard = open_one(tmp_path, tensors, kind)
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(tensors, pool.map(shard.read, tensors), strict=True))
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_a_dtype_that_torch_lacks_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "six.safetensors"
    header = json.dumps({"t": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    [shard] = open_shards(find(path))
    with pytest.raises(CheckpointError, match=f"{path}, tensor 't': .*no dtype for F6_E2M3"):
        shard.read("t")


def test_finding_and_validating_safetensors_does_not_import_torch(tmp_path):
    write_checkpoint(tmp_path, {"a": random_tensor(2), "b": random_tensor(3)}, shards=2)
    code = (
        "import pathlib, sys; import weights_core.disk as disk; from weights_core.checkpoint import find; "
        "disk.open_shards(find(pathlib.Path(sys.argv[1]))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


# Faults of the file or the device ---------------------------------------------------------------


def test_short_reads_are_continued(tmp_path, mocker):
    tensor = random_tensor(50)
    shard = open_one(tmp_path, {"t": tensor})
    real = os.preadv
    patched = mocker.patch("weights_core.files.os.preadv", autospec=True)
    patched.side_effect = lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset)
    assert same(shard.read("t"), tensor)
    out = torch.empty(50)
    shard.read_into("t", out)
    assert same(out, tensor)
    assert patched.call_count == 2 * -(-200 // 7)


@pytest.mark.parametrize("slices", [None, (slice(10, 20),)])
def test_an_io_error_names_file_tensor_and_byte(tmp_path, mocker, slices):
    shard = open_one(tmp_path, {"t": random_tensor(50)})
    failure = OSError(errno.EIO, os.strerror(errno.EIO))
    mocker.patch("weights_core.files.os.preadv", autospec=True, side_effect=failure)
    byte = shard.metas["t"].offset + (40 if slices else 0)
    place = f"{tmp_path}/model.safetensors, tensor 't', byte {byte}: {os.strerror(errno.EIO)}"
    with pytest.raises(CheckpointError, match=place):
        shard.read("t", slices)
    with pytest.raises(CheckpointError, match=place):
        shard.read_into("t", torch.empty(10 if slices else 50), slices)


def test_a_file_truncated_after_opening_is_an_error_and_never_wrong_bytes(tmp_path):
    shard = open_one(tmp_path, {"t": random_tensor(50)})
    path = tmp_path / "model.safetensors"
    cut = path.stat().st_size - 10
    os.truncate(path, cut)
    with pytest.raises(CheckpointError, match=f"{path}, tensor 't', byte {cut}: .*shorter"):
        shard.read("t")


def test_a_file_rewritten_after_opening_is_found(tmp_path, kind):
    shard = open_one(tmp_path, {"t": random_tensor(50)}, kind)
    shard.read("t")
    found = os.stat(shard.path)
    os.utime(shard.path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000))
    with pytest.raises(CheckpointError, match=f"{shard.path}.*changed while it was read"):
        shard.read("t")
    with pytest.raises(CheckpointError, match=f"{shard.path}.*changed while it was read"):
        shard.read_into("t", torch.empty(50))


def test_a_file_replaced_after_opening_is_read_as_it_was(tmp_path, kind):
    tensor = random_tensor(50)
    shard = open_one(tmp_path / "old", {"t": tensor}, kind)
    other = open_one(tmp_path / "new", {"t": random_tensor(50, seed=1)}, kind)
    os.rename(other.path, shard.path)
    assert same(shard.read("t"), tensor)


# Several files together -------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["one by one", "concurrently"])
def executor(request):
    with ThreadPoolExecutor(2) as pool:
        yield pool if request.param else None


def test_all_files_are_opened_in_order(tmp_path, kind, executor):
    tensors = {f"t{number}": random_tensor(3, seed=number) for number in range(7)}
    found = find(write_checkpoint(tmp_path, tensors, shards=3, kind=kind))
    shards = open_shards(found, executor)
    assert [shard.path for shard in shards] == list(found.files)
    assert all(same(shard.read(name), tensors[name]) for shard in shards for name in shard.metas)
    assert {name for shard in shards for name in shard.metas} == tensors.keys()


def test_a_tensor_in_two_files_names_both(tmp_path, kind, executor):
    for number in (1, 2):
        write_checkpoint(tmp_path, {"t": random_tensor(2)}, kind=kind, stem=f"model-{number}-of-2")
    with pytest.raises(CheckpointError) as caught:
        open_shards(find(tmp_path), executor)
    assert caught.value.file == tmp_path / f"model-2-of-2.{kind}"
    assert f", tensor 't': is also in model-1-of-2.{kind}" in str(caught.value)


def rewrite_index(folder, **changes):
    [path] = folder.glob("*.index.json")
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


def test_the_index_names_a_tensor_that_no_file_holds(tmp_path, kind):
    folder = write_checkpoint(tmp_path, {"a": random_tensor(2), "b": random_tensor(2)}, shards=2, kind=kind)
    [first, _] = sorted(folder.glob(f"*.{kind}"))
    rewrite_index(folder, ghost=first.name)
    with pytest.raises(
        CheckpointError, match=f"{first}, tensor 'ghost': the index .* places it here"
    ) as caught:
        open_shards(find(folder))
    assert "index.json" in str(caught.value)


def test_the_index_places_a_tensor_in_another_file(tmp_path, kind):
    folder = write_checkpoint(tmp_path, {"a": random_tensor(2), "b": random_tensor(2)}, shards=2, kind=kind)
    [first, second] = sorted(folder.glob(f"*.{kind}"))
    rewrite_index(folder, a=second.name, b=first.name)
    with pytest.raises(CheckpointError) as caught:
        open_shards(find(folder))
    assert f"{first}, tensor 'a': the index places it in {second.name}" == str(caught.value)


def test_files_without_a_tensor_are_no_checkpoint(tmp_path, kind):
    write_checkpoint(tmp_path, {}, kind=kind)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: holds no tensor"):
        open_shards(find(tmp_path))


def test_a_file_without_a_tensor_beside_others_is_fine(tmp_path):
    write_checkpoint(tmp_path, {"t": random_tensor(2)}, stem="model-1-of-2")
    write_checkpoint(tmp_path, {}, stem="model-2-of-2")
    assert [list(shard.metas) for shard in open_shards(find(tmp_path))] == [["t"], []]


def test_one_bad_file_is_named_and_all_others_are_closed(tmp_path, kind, executor):
    tensors = {f"t{number}": random_tensor(2) for number in range(3)}
    write_checkpoint(tmp_path, tensors, shards=3, kind=kind)
    [_, bad, _] = sorted(tmp_path.glob(f"*.{kind}"))
    bad.write_bytes(bad.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=str(bad)):
        open_shards(find(tmp_path), executor)
    assert descriptors_in(tmp_path) == []


def test_files_still_being_opened_when_another_fails_are_closed_too(tmp_path, mocker):
    tensors = {f"t{number}": random_tensor(2) for number in range(3)}
    found = find(write_checkpoint(tmp_path, tensors, shards=3))
    slow = found.files[-1]
    started = threading.Event()

    def header(file):
        if file.path == slow:
            started.set()
            time.sleep(0.2)
        elif file.path == found.files[0]:
            started.wait()
            raise CheckpointError("is bad", file=file.path)
        return read_header(file)

    mocker.patch("weights_core.shards.read_header", autospec=True, side_effect=header)
    with ThreadPoolExecutor(3) as pool:
        with pytest.raises(CheckpointError, match="is bad"):
            open_shards(found, pool)
        assert descriptors_in(tmp_path) == []


def test_close_frees_every_descriptor_and_may_be_repeated(tmp_path, kind):
    tensors = {f"t{number}": random_tensor(2) for number in range(3)}
    shards = open_shards(find(write_checkpoint(tmp_path, tensors, shards=3, kind=kind)))
    assert len(descriptors_in(tmp_path)) == 3
    for shard in shards * 2:
        shard.close()
    assert descriptors_in(tmp_path) == []


def test_a_closed_shard_is_an_error_to_read(tmp_path, kind):
    shard = open_one(tmp_path, {"t": random_tensor(2)}, kind)
    shard.close()
    with pytest.raises(CheckpointError, match=f"{shard.path}, tensor 't'"):
        shard.read("t")


# Pickled files ----------------------------------------------------------------------------------


def test_tied_and_strided_tensors_of_a_pickled_file(tmp_path):
    base = random_tensor(6, 4)
    tensors = {"a": base, "b": base, "c": base.t(), "d": base[1:3], "e": base[::2, 1]}
    shard = open_one(tmp_path, tensors, "bin")
    for name, tensor in tensors.items():
        assert same(shard.read(name), tensor)
        out = torch.zeros(tensor.shape)
        shard.read_into(name, out)
        assert same(out, tensor)
        assert shard.metas[name].nbytes == tensor.numel() * 4
    shard.release("a")
    assert same(shard.read("b"), base)


@pytest.mark.parametrize("name", ["old.bin", "old.pt", "old.pth"])
def test_the_format_before_torch_1_6(tmp_path, name):
    tensors = {"a": random_tensor(3, 4), "b": random_tensor(2, 2, dtype="BF16").t()}
    torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=False)
    [shard] = open_shards(find(tmp_path / name))
    assert all(same(shard.read(key), tensor) for key, tensor in tensors.items())


def test_the_old_format_is_not_mistaken_for_a_zip_file_by_the_bytes_of_a_tensor(tmp_path):
    tensor = torch.tensor(list(b"PK\5\6" + bytes(60)), dtype=torch.uint8)
    torch.save({"t": tensor}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    [shard] = open_shards(find(tmp_path))
    assert same(shard.read("t"), tensor)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["value", "key", "all"])
def test_pickled_code_is_refused_and_not_run(tmp_path, zipped, place):
    harm = tmp_path / "harm"
    code = RunsCode(harm)
    content = {"value": {"t": torch.ones(2), "x": code}, "key": {code: torch.ones(2)}, "all": code}[place]
    file = tmp_path / "evil.bin"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=f"{file}: refused: .*could run code"):
        open_shards(find(tmp_path))
    assert not harm.exists()
    torch.load(file, weights_only=False)
    assert harm.exists()  # so the file was indeed dangerous


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_a_truncated_pickled_file(tmp_path, zipped, keep):
    file = tmp_path / "cut.bin"
    torch.save({"t": random_tensor(1000)}, file, _use_new_zipfile_serialization=zipped)
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=f"{file}: (refused: it is truncated|is truncated, or no file)"):
        open_shards(find(tmp_path))


@pytest.mark.parametrize("raw", [b"text", b"\x80\x02.", b"PK\3\4" + bytes(100), bytes(100)])
def test_a_file_that_torch_did_not_write(tmp_path, raw):
    file = tmp_path / "odd.bin"
    file.write_bytes(raw)
    with pytest.raises(
        CheckpointError,
        match=f"{file}: (refused: .*no file of torch.save|is truncated, or no file of torch.save)",
    ):
        open_shards(find(tmp_path))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([torch.ones(1)], "holds a list, not a dict of tensors"),
        (torch.ones(1), "holds a Tensor, not a dict of tensors"),
        (None, "holds a NoneType, not a dict of tensors"),
        ({"state_dict": {"t": torch.ones(1)}}, "holds 'state_dict' → dict; .*save the inner dict"),
        ({"t": torch.ones(1), "epoch": 3}, "holds 'epoch' → int"),
        ({3: torch.ones(1)}, "holds 3 → Tensor; need names"),
    ],
    ids=["list", "tensor", "None", "nested", "number", "key"],
)
def test_content_other_than_named_tensors(tmp_path, content, why):
    file = tmp_path / "other.bin"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=f"{file}: {why}"):
        open_shards(find(tmp_path))


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.ones(2, dtype=torch.complex128), "dtype torch.complex128"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(2, device="meta"), "device meta"),
    ],
    ids=["dtype", "layout", "device"],
)
def test_tensors_that_cannot_be_served(tmp_path, tensor, why):
    torch.save({"good": torch.ones(1), "odd": tensor}, tmp_path / "odd.bin")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/odd.bin, tensor 'odd': cannot serve {why}"):
        open_shards(find(tmp_path))


def test_parameters_are_read_as_plain_data(tmp_path):
    shard = open_one(tmp_path, {"t": torch.nn.Parameter(torch.ones(2))}, "bin")
    assert not shard.read("t").requires_grad
    out = torch.zeros(2)
    shard.read_into("t", out)
    assert torch.equal(out, torch.ones(2))
    assert not out.requires_grad


def test_a_released_tensor_of_a_pickled_file_cannot_be_read_again(tmp_path):
    shard = open_one(tmp_path, {"a": random_tensor(2), "b": random_tensor(2)}, "bin")
    shard.release("a")
    shard.release("a")
    with pytest.raises(CheckpointError, match=f"{shard.path}, tensor 'a': was released"):
        shard.read("a")
    with pytest.raises(CheckpointError, match=f"{shard.path}, tensor 'a': was released"):
        shard.read_into("a", torch.empty(2))
    assert same(shard.read("b"), random_tensor(2))


def test_release_of_a_safetensors_tensor_changes_nothing(tmp_path):
    shard = open_one(tmp_path, {"a": random_tensor(2)})
    shard.release("a")
    assert same(shard.read("a"), random_tensor(2))


def test_writing_to_a_tensor_of_a_pickled_file_leaves_the_file_alone(tmp_path):
    shard = open_one(tmp_path, {"a": random_tensor(2000)}, "bin")
    before = shard.path.read_bytes()
    shard.read("a").zero_()
    assert shard.path.read_bytes() == before


def test_the_two_kinds_agree_on_names_shapes_and_sizes(tmp_path):
    tensors = {"a": random_tensor(2, 3), "b": random_tensor(dtype="F16"), "c": random_tensor(0, dtype="I64")}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.bin")
    [one], [two] = open_shards(find(tmp_path / "a.safetensors")), open_shards(find(tmp_path / "a.bin"))
    for name in tensors:
        left, right = one.metas[name], two.metas[name]
        assert (left.shape, left.dtype, left.nbytes) == (right.shape, right.dtype, right.nbytes)
