# SPDX-License-Identifier: Apache-2.0
"""The reference engine: every rank gets its own bits, and asks for no more than its share."""

from collections import Counter

import pytest
import torch

import weights_core as w
from weights_core.errors import CoverageError, EngineError
from weights_core.testing import Group, host_of, write_checkpoint
from weights_core.testing.contract.material import Spy, source_of
from weights_core.testing.parallel import LlamaShape, TensorParallelEngine, cut
from weights_core.types import Layout
from weights_core.weightset import WeightSetWrapper

CUTS = [(size, kv) for size in (1, 2, 3, 4) for kv in (1, 2, 4) if max(size, kv) % min(size, kv) == 0]


def load_on_every_rank(shape, checkpoint, size, **kwargs):
    """Load through the disk source on `size` ranks at once; return engines and reports by rank."""
    group = Group(size)
    engines = [
        TensorParallelEngine(shape, size=size, rank=rank, gather=group.gather(rank), **kwargs)
        for rank in range(size)
    ]
    futures = group.run(lambda rank: w.load(engines[rank], checkpoint, host=host_of(), timeout=60))
    return engines, [future.result() for future in futures]


def same(got, due):
    """Compare bit for bit."""
    assert got.keys() == due.keys()
    for name in due:
        assert got[name].dtype == due[name].dtype
        assert got[name].shape == due[name].shape, name
        assert torch.equal(got[name].view(torch.uint8), due[name].contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("size", "kv_heads"), CUTS)
def test_every_rank_gets_its_own_bits_and_no_more_than_its_share(tmp_path, size, kv_heads, tied):
    shape = LlamaShape(kv_heads=kv_heads, tied=tied)
    whole = shape.checkpoint(seed=size)
    write_checkpoint(tmp_path / "model", whole, shards=3)
    engines, reports = load_on_every_rank(shape, tmp_path / "model", size)
    for rank, (engine, report) in enumerate(zip(engines, reports, strict=True)):
        same(engine.params, cut(shape, whole, size, rank))
        assert ("lm_head" in engine.params) == (not tied)
        assert engine.share == sum(tensor.nbytes for tensor in engine.params.values())
        delivered = next(phase.nbytes for phase in report.phases if phase.name == "apply")
        assert delivered == pytest.approx(engine.share, rel=0.02)
        assert report.applied.unused == ()
        assert report.rank == rank


def test_kv_heads_are_duplicated_and_the_rest_is_not():
    shape = LlamaShape(kv_heads=2)
    share = {size: TensorParallelEngine(shape, size=size).share for size in (1, 2, 4)}
    norms = (2 * shape.layers + 1) * shape.hidden * 2
    kv = shape.layers * 2 * shape.head_dim * shape.hidden * 2  # of one head, k and v
    cuttable = share[1] - norms - 2 * kv
    assert share[2] == cuttable // 2 + norms + kv
    assert share[4] == cuttable // 4 + norms + kv


@pytest.mark.parametrize(
    ("size", "kv_heads"), [(size, kv) for size in (1, 2, 3, 4) for kv in (1, 2, 4) if (size, kv) in CUTS]
)
def test_the_oracle_and_the_checkpoint_put_together_again(size, kv_heads):
    """The cuts of all ranks, heads counted once, are the checkpoint: the oracle loses nothing."""
    shape = LlamaShape(kv_heads=kv_heads, tied=False)
    whole = shape.checkpoint()
    parts = [cut(shape, whole, size, rank) for rank in range(size)]
    for name, dim in (("embed", 0), ("lm_head", 0), ("layers.0.o", 1), ("layers.1.down", 1)):
        full = {
            "embed": "model.embed_tokens.weight",
            "lm_head": "lm_head.weight",
            "layers.0.o": "model.layers.0.self_attn.o_proj.weight",
            "layers.1.down": "model.layers.1.mlp.down_proj.weight",
        }[name]
        assert torch.equal(torch.cat([part[name] for part in parts], dim), whole[full])
    q = shape.heads * shape.head_dim // size
    kv = max(1, kv_heads // size) * shape.head_dim
    for kind, begin, end in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv)):
        rows = [part["layers.0.qkv"][begin:end] for part in parts]
        once = rows if kind == "q" else rows[:: max(1, size // kv_heads)]
        assert torch.equal(torch.cat(once), whole[f"model.layers.0.self_attn.{kind}_proj.weight"])
        assert parts[0]["layers.0.qkv"].shape[0] == q + 2 * kv


def test_a_checkpoint_depends_on_its_seed_alone():
    one, again, other = (LlamaShape().checkpoint(seed) for seed in (1, 1, 2))
    same(one, again)
    assert not torch.equal(one["model.norm.weight"], other["model.norm.weight"])


# Sharded weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
def test_sharded_weights_of_an_equal_rank_are_bound_as_they_are(tmp_path, size):
    shape = LlamaShape()
    whole = shape.checkpoint()
    write_checkpoint(tmp_path / "model", whole)
    givers, _ = load_on_every_rank(shape, tmp_path / "model", size)
    for rank, giver in enumerate(givers):
        tensors = giver.tensors(Layout.SHARDED)
        taker = TensorParallelEngine(
            shape, size=size, rank=rank, transforms=True, gather=lambda v, _: [v] * size
        )
        host = host_of(spy=source_of(Spy(tensors)))
        w.load(taker, tmp_path / "model", format="spy", host=host)
        due = cut(shape, whole, size, rank)
        same(taker.params, {n: t * 2 if "norm" in n else t for n, t in due.items()})
        assert all(taker.params[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())


def test_sharded_weights_are_filled_in_where_the_set_says_so():
    shape = LlamaShape()
    given = Spy(cut(shape, shape.checkpoint(), 4, 1))
    given.fills = True
    taker = TensorParallelEngine(shape, size=4, rank=1)
    before = {name: tensor.data_ptr() for name, tensor in taker.params.items()}
    applied = taker.bind(given)
    same(taker.params, given.tensors)
    assert before == {name: tensor.data_ptr() for name, tensor in taker.params.items()}
    assert applied.written == given.tensors.keys() == set(given.released)


def test_shards_of_another_size_are_refused_and_named():
    shape = LlamaShape()
    half = TensorParallelEngine(shape, size=2).tensors(Layout.SHARDED)
    whole = TensorParallelEngine(shape)
    before = dict(whole.params)
    with pytest.raises(CoverageError, match=r"shapes differ: .*layers\.0\.qkv") as info:
        whole.bind(Spy(half))
    assert "embed" in info.value.mismatched
    assert "norm" not in info.value.mismatched
    assert whole.params.items() == before.items()
    assert whole.untouched()


def test_what_bind_does_not_get_or_need_is_told():
    shape = LlamaShape()
    tensors = TensorParallelEngine(shape).tensors(Layout.SHARDED)
    given = {name: t for name, t in tensors.items() if name != "norm"} | {"stranger": torch.ones(1)}
    applied = TensorParallelEngine(shape).bind(Spy(given))
    assert applied.written == tensors.keys() - {"norm"}
    assert applied.unused == ("stranger",)


# Post-load ------------------------------------------------------------------------------------


def test_post_load_transforms_in_place_and_only_if_told_to(tmp_path):
    shape = LlamaShape()
    whole = shape.checkpoint()
    write_checkpoint(tmp_path / "model", whole)
    due = cut(shape, whole, 1, 0)
    plain = TensorParallelEngine(shape)
    changing = TensorParallelEngine(shape, transforms=True)
    addresses = {name: tensor.data_ptr() for name, tensor in changing.params.items()}
    for engine in (plain, changing):
        w.load(engine, tmp_path / "model", host=host_of())
    same(plain.params, due)
    same(changing.params, {n: t * 2 if "norm" in n else t for n, t in due.items()})
    assert {name: tensor.data_ptr() for name, tensor in changing.params.items()} == addresses
    assert set(plain.info.shareable) == {Layout.SHARDED, Layout.FINAL}
    assert set(changing.info.shareable) == {Layout.SHARDED}


def test_final_weights_are_not_transformed_again():
    engine = TensorParallelEngine(LlamaShape(), transforms=True)
    for tensor in engine.params.values():
        tensor.fill_(3)
    engine.post_load(Layout.FINAL)
    assert all((tensor == 3).all() for tensor in engine.params.values())


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "size", "says"),
    [
        ({"heads": 10}, 4, "10 heads can't be cut into 4 parts"),
        ({"ffn": 46}, 4, "46 ffn can't be cut into 4 parts"),
        ({"vocab": 50}, 4, "50 vocab can't be cut into 4 parts"),
        ({"kv_heads": 2}, 3, "2 KV heads are neither cut nor duplicated by 3"),
        ({"kv_heads": 4}, 3, "4 KV heads are neither cut nor duplicated by 3"),
        ({}, 0, "size"),
        ({}, -1, "size"),
    ],
)
def test_sizes_that_cannot_be_cut_are_refused(sizes, size, says):
    with pytest.raises(EngineError, match=says):
        TensorParallelEngine(LlamaShape(**sizes), size=size)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_there_is_not_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not in an axis of size 2"):
        TensorParallelEngine(LlamaShape(), size=2, rank=rank)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_tensor_that_is_missing_is_named_and_nothing_is_written(tmp_path, name):
    shape = LlamaShape()
    whole = shape.checkpoint()
    del whole[name]
    write_checkpoint(tmp_path / "model", whole)
    engine = TensorParallelEngine(shape)
    with pytest.raises(CoverageError, match=f"missing {name}") as info:
        w.load(engine, tmp_path / "model", host=host_of())
    assert info.value.missing == (name,)
    assert engine.untouched()
    assert not any(tensor.any() for tensor in engine.params.values())


def test_a_missing_head_is_only_missed_by_an_engine_that_is_not_tied(tmp_path):
    write_checkpoint(tmp_path / "model", LlamaShape(tied=True).checkpoint())
    with pytest.raises(CoverageError, match=r"missing lm_head\.weight"):
        w.load(TensorParallelEngine(LlamaShape(tied=False)), tmp_path / "model", host=host_of())


def test_what_the_engine_does_not_take_is_reported(tmp_path):
    shape = LlamaShape()
    write_checkpoint(tmp_path / "model", shape.checkpoint() | {"rotary.inv_freq": torch.ones(4)})
    report = w.load(TensorParallelEngine(shape), tmp_path / "model", host=host_of())
    assert report.applied.unused == ("rotary.inv_freq",)


# Release, reinit, memory ----------------------------------------------------------------------


class Watched(WeightSetWrapper):
    """Counts, for each source, the targets that were filled before it was released."""

    def __init__(self, inner):
        super().__init__(inner)
        self.filled, self.at_release, self.released = Counter(), {}, Counter()

    def fill(self, targets):
        for target in self.inner.fill(targets):
            assert not self.released[target.name], f"{target.name} was read after it was released"
            self.filled[target.name] += 1
            yield target

    def release(self, names):
        for name in names:
            self.released[name] += 1
            self.at_release[name] = self.filled[name]
        return 0


@pytest.mark.parametrize("size", [1, 2])
def test_each_source_is_released_once_and_when_it_is_done(size):
    shape = LlamaShape()
    whole = shape.checkpoint()
    watched = Watched(Spy(whole | {"stranger": torch.ones(1)}))
    TensorParallelEngine(shape, size=size).apply(watched)
    assert watched.released == dict.fromkeys(whole, 1)
    assert watched.at_release == watched.filled


def test_reinit_returns_to_blank_memory(tmp_path):
    shape = LlamaShape()
    write_checkpoint(tmp_path / "model", shape.checkpoint())
    engine = TensorParallelEngine(shape)
    w.load(engine, tmp_path / "model", host=host_of())
    assert not engine.untouched()
    engine.reinit()
    assert engine.untouched()
    assert not any(tensor.any() for tensor in engine.params.values())


def test_materialize_takes_its_memory_from_the_allocator():
    engine = TensorParallelEngine(LlamaShape(), size=2, rank=1)
    given = {}

    def alloc(meta):
        given[meta.name] = torch.ones(meta.torch_shape, dtype=torch.bfloat16)
        return given[meta.name]

    assert engine.materialize(alloc) == engine.share
    assert all(engine.params[name] is tensor for name, tensor in given.items())
    assert given.keys() == engine.expected(Layout.SHARDED).keys()


def test_the_engine_says_who_it_is():
    info = TensorParallelEngine(LlamaShape(), size=4, rank=3).info
    assert (info.name, info.dtype, info.topology.rank) == ("tensor-parallel", "BF16", 3)
    assert {name: (axis.size, axis.rank) for name, axis in info.topology.axes.items()} == {"tp": (4, 3)}


def test_a_rank_alone_gathers_its_own_value():
    assert TensorParallelEngine(LlamaShape()).gather("value", 1.0) == ["value"]
