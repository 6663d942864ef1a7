# SPDX-License-Identifier: Apache-2.0
"""Arenas: memory handed out or moved into, sealed, described, and read by another mapping."""

import gc
import json
import os
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import weights_core as w
from weights_core import arena
from weights_core.arena import ArenaSet, ArenaWriter, Manifest, Place
from weights_core.errors import ArenaError, CoverageError
from weights_core.memory import HostSegment
from weights_core.tensors import as_bytes
from weights_core.testing import every_dtype, random_tensor
from weights_core.types import Layout, TensorMeta


def attached(writer, manifest):
    """Read the arena as another process would: the manifest as bytes, the descriptors passed on."""
    manifest = Manifest.loads(manifest.dumps())
    segments = [
        HostSegment.attach(os.dup(s.descriptor), size)
        for s, size in zip(writer.segments, manifest.sizes, strict=True)
    ]
    return ArenaSet(manifest, segments, provider="test")


def shared(tensors, expected=0):
    """Move tensors into an arena, seal it, and return the writer and a reader's set."""
    writer = ArenaWriter(HostSegment.create, expected)
    writer.move(tensors)
    manifest = writer.manifest(tensors, Layout.SHARDED)
    writer.seal()
    return writer, attached(writer, manifest)


@pytest.mark.parametrize("dtype", every_dtype())
def test_every_dtype_comes_through(dtype):
    tensors = {"t": random_tensor(4, 6, dtype=dtype), "u": random_tensor(2, dtype=dtype, seed=1)}
    copies = {name: t.clone() for name, t in tensors.items()}
    _, read = shared(tensors)
    for name, copy in copies.items():
        assert read[name].dtype == copy.dtype
        assert torch.equal(as_bytes(read[name]), as_bytes(copy))
        assert torch.equal(as_bytes(tensors[name]), as_bytes(copy))
        assert read.meta(name) == TensorMeta(
            name,
            w.TorchEngine(nn.Module()).expected(Layout.SHARDED).get(name, read.meta(name)).shape,
            dtype,
            copy.nbytes,
        )


def test_meta_parameters_are_given_memory_and_written_straight():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5))
    model[1].weight.mark = "kept"
    engine = w.TorchEngine(model)
    writer = ArenaWriter(HostSegment.create, 1000)
    size = engine.materialize(writer.alloc)
    assert size == sum(p.nbytes for p in model.parameters())
    for p in model.parameters():
        p.data.normal_()
        assert p.data_ptr() % arena.ALIGNMENT == 0
    assert writer.move(engine.tensors(Layout.SHARDED)) == 0
    manifest = writer.manifest(engine.tensors(Layout.SHARDED), Layout.SHARDED)
    writer.seal()
    assert manifest.nbytes == writer.nbytes
    reader = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5))
    w.TorchEngine(reader).bind(attached(writer, manifest))
    x = torch.randn(2, 5)
    assert torch.equal(reader(x), model(x))
    assert model[1].weight.mark == "kept"


def test_moving_keeps_objects_ties_views_strides_and_attributes():
    base = torch.arange(60.0).reshape(6, 10)
    tied = nn.Parameter(torch.randn(3, 3))
    tensors = {
        "first": base[:2],
        "overlapping": base[1:4, 2:5],
        "transposed": base.t(),
        "tied": tied,
        "twin": tied,
        "scalar": torch.tensor(4.0),
        "empty": torch.empty(0, 3),
    }
    copies = {name: t.detach().clone() for name, t in tensors.items()}
    identities = {name: id(t) for name, t in tensors.items()}
    writer, read = shared(tensors)
    for name, copy in copies.items():
        assert id(tensors[name]) == identities[name]
        assert torch.equal(tensors[name], copy), name
        assert torch.equal(read[name], copy), name
        assert tensors[name].stride() == read[name].stride()
    assert read["twin"].data_ptr() == read["tied"].data_ptr()
    assert read["overlapping"].data_ptr() == read["transposed"].data_ptr() + 12 * 4
    assert writer.nbytes < base.nbytes + 4 * arena.ALIGNMENT
    assert Manifest.loads(writer.manifest(tensors, Layout.FINAL).dumps()).aliases() == [("tied", "twin")]


def test_moving_frees_each_original_as_it_goes():
    class Watched:
        pass

    tensors = {str(i): torch.full((100,), float(i)) for i in range(5)}
    alive = []
    for t in tensors.values():
        t.untyped_storage().mark = Watched()
    refs = [weakref.ref(t.untyped_storage()) for t in tensors.values()]

    def create(nbytes):
        gc.collect()
        alive.append(sum(r() is not None for r in refs))
        return HostSegment.create(nbytes)

    writer = ArenaWriter(create, 0)  # each tensor gets a segment of its own
    writer.move(tensors)
    assert alive == [5, 4, 3, 2, 1]


def test_a_tensor_larger_than_a_segment_and_many_segments(monkeypatch):
    monkeypatch.setattr(arena, "SEGMENT", 4096)
    made = []

    def create(nbytes):
        made.append(nbytes)
        return HostSegment.create(nbytes)

    tensors = {
        str(i): torch.full((n,), i, dtype=torch.uint8) for i, n in enumerate([3000, 3000, 9000, 10, 3000])
    }
    writer = ArenaWriter(create, 18_500)
    writer.move(dict(tensors))
    manifest = writer.manifest(tensors, Layout.SHARDED)
    writer.seal()
    assert len(made) == len(manifest.sizes) == 4
    assert max(made) == 9216
    read = attached(writer, manifest)
    assert all(torch.equal(read[n], t) for n, t in tensors.items())


def test_slices_and_a_closed_set():
    tensors = {"t": torch.arange(24.0).reshape(4, 6)}
    _, read = shared(tensors)
    part = read.read("t", (slice(1, 3), slice(2, 5)))
    assert torch.equal(part, tensors["t"][1:3, 2:5])
    closed = []
    read._on_close = lambda: closed.append(1)
    read.close()
    read.close()
    assert closed == [1]
    assert part[0, 0] == 8
    with pytest.raises(ArenaError, match="was closed"):
        read["t"]
    with pytest.raises(KeyError):
        read["x"]
    assert read.release(["t"]) == 0


def test_what_cannot_be_shared_is_refused_by_name():
    writer = ArenaWriter(HostSegment.create, 0)
    with pytest.raises(ArenaError, match=r"refusing to share .* 1 tensors have no memory, e.g. 'm'"):
        writer.move({"t": torch.zeros(1), "m": torch.zeros(1, device="meta")})
    with pytest.raises(ArenaError, match=r"tensor 's' is torch.sparse_coo"):
        writer.move({"s": torch.eye(2).to_sparse()})
    with pytest.raises(ArenaError, match=r"tensor 't' is not in the memory to be shared"):
        writer.manifest({"t": torch.zeros(1)}, Layout.FINAL)
    odd = {"c": torch.zeros(2, dtype=torch.complex128)}
    writer.move(odd)
    with pytest.raises(ArenaError, match=r"tensor 'c' has dtype torch.complex128"):
        writer.manifest(odd, Layout.FINAL)


def test_a_bound_model_compares_no_ties_byte_by_byte(monkeypatch):
    tied = nn.Parameter(torch.randn(4, 4))
    _, read = shared({"0.weight": tied, "1.weight": tied})
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("read every byte"))
    w.TorchEngine(model).bind(read)
    assert model[0].weight is model[1].weight


def test_a_reader_of_another_shape_is_refused():
    _, read = shared({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    with pytest.raises(CoverageError, match="shape"):
        w.TorchEngine(nn.Linear(4, 2)).bind(read)


GOOD = json.loads(
    Manifest(
        Layout.FINAL, (4096,), {"t": Place("t", "F32", (2, 3), (3, 1), 0, 256, 24)}, {"t": "xxh3:1"}
    ).dumps()
)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "other"}, "schema 'other'"),
        ({"layout": "none"}, "no manifest"),
        ({"sizes": [-1]}, "not a count"),
        ({"sizes": [True]}, "not a count"),
        ({"sizes": []}, "'t' does not lie within"),
        ({"sizes": [276]}, "'t' does not lie within"),
        ({"tensors": [["t", "F32", [2], [1], 1, 0]]}, "does not lie within"),
        ({"tensors": [["t", "F32", [2], [1 << 61], 0, 0]]}, "does not lie within"),
        ({"tensors": [["t", "F32", [2], [-1], 0, 0]]}, "not a count"),
        ({"tensors": [["t", "F32", [2], [], 0, 0]]}, "is no tensor"),
        ({"tensors": [["t", "F32", [2], [1], 0, 2]]}, "is not aligned"),
        ({"tensors": [["t", "Q4", [2], [1], 0, 0]]}, "is no tensor"),
        ({"tensors": [[["t"], "F32", [2], [1], 0, 0]]}, "manifest"),
        ({"tensors": [["t", "F32", [2], [1], 0, 0]] * 2}, "twice"),
        ({"tensors": 5}, "no manifest"),
        ({"digests": []}, "no manifest"),
    ],
)
def test_a_hostile_manifest_is_refused(change, says):
    with pytest.raises(ArenaError, match=says):
        Manifest.loads(json.dumps(GOOD | change).encode())


def test_a_manifest_comes_through():
    made = Manifest.loads(json.dumps(GOOD).encode())
    assert made.places["t"].span == 24
    assert made.digests == {"t": "xxh3:1"}
    assert json.loads(made.dumps()) == GOOD
    for raw in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"schema": 1}'):
        with pytest.raises(ArenaError):
            Manifest.loads(raw)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64"]), st.integers(0, 900)), max_size=12))
def test_any_mix_of_tensors_comes_through(shapes):
    tensors = {str(i): random_tensor(n, dtype=d, seed=i) for i, (d, n) in enumerate(shapes)}
    copies = {name: t.clone() for name, t in tensors.items()}
    _, read = shared(tensors)
    assert all(torch.equal(as_bytes(read[n]), as_bytes(c)) for n, c in copies.items())
    assert list(read) == list(copies)
