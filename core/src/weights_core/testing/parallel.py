# SPDX-License-Identifier: Apache-2.0
"""A small tensor-parallel engine that does what real ones do: cut, fuse, duplicate, tie, transform."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch

from weights_core.engine import Alloc, Engine
from weights_core.errors import CoverageError, EngineError
from weights_core.tensors import meta_of
from weights_core.types import Applied, EngineInfo, Layout, TensorMeta, Topology
from weights_core.weightset import Slices, Target, WeightSet


@attrs.frozen(kw_only=True)
class LlamaShape:
    """The sizes of a decoder of Llama's kind; its checkpoint has Transformers' names."""

    layers: int = 2
    hidden: int = 32
    heads: int = 12
    kv_heads: int = 2
    head_dim: int = 8
    ffn: int = 48
    vocab: int = 48
    tied: bool = True
    dtype: torch.dtype = torch.bfloat16

    def checkpoint(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return random weights under the names of a checkpoint."""
        generator = torch.Generator().manual_seed(seed)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            sizes |= {
                f"{attention}.q_proj.weight": (q, self.hidden),
                f"{attention}.k_proj.weight": (kv, self.hidden),
                f"{attention}.v_proj.weight": (kv, self.hidden),
                f"{attention}.o_proj.weight": (self.hidden, q),
                f"{mlp}.gate_proj.weight": (self.ffn, self.hidden),
                f"{mlp}.up_proj.weight": (self.ffn, self.hidden),
                f"{mlp}.down_proj.weight": (self.hidden, self.ffn),
                f"model.layers.{i}.input_layernorm.weight": (self.hidden,),
                f"model.layers.{i}.post_attention_layernorm.weight": (self.hidden,),
            }
        sizes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            sizes["lm_head.weight"] = (self.vocab, self.hidden)
        return {n: torch.randn(s, generator=generator).to(self.dtype) for n, s in sizes.items()}


@attrs.frozen
class Piece:
    """A part of a checkpoint's tensor, and the rows of a parameter that it becomes."""

    source: str
    slices: Slices
    parameter: str
    begin: int
    rows: int


class TensorParallelEngine(Engine):
    """One rank of a decoder: q, k and v fused, gate and up fused, KV heads duplicated where they must be.

    Column-parallel parts are cut along dim 0, row-parallel ones (`o`, `down`) along dim 1, norms are
    whole, `lm_head` is the embedding if tied. `params` holds the parameters by their own names.
    """

    def __init__(
        self,
        shape: LlamaShape,
        *,
        size: int = 1,
        rank: int = 0,
        transforms: bool = False,
        gather: Callable[[object, float], Sequence[object]] | None = None,
    ) -> None:
        """Allocate one rank of `size`; with `transforms`, post-load rewrites parameters in place.

        Raises:
            EngineError: the sizes can't be cut by `size`.
        """
        if size < 1:
            raise EngineError(f"a world of size {size} has no ranks")
        for what, number in (("heads", shape.heads), ("ffn", shape.ffn), ("vocab", shape.vocab)):
            if number % size:
                raise EngineError(f"{number} {what} can't be cut into {size} parts")
        if max(shape.kv_heads, size) % min(shape.kv_heads, size):
            raise EngineError(f"{shape.kv_heads} KV heads are neither cut nor duplicated by {size}")
        self.shape, self.size, self.rank = shape, size, rank
        self._transforms = transforms
        self._gather = gather
        self._pieces = list(self._plan())
        rows: Counter[str] = Counter()
        widths: dict[str, tuple[int, ...]] = {}
        for piece, width in self._pieces:
            rows[piece.parameter] += piece.rows
            widths[piece.parameter] = width
        self._expected = {
            name: meta_of(name, torch.empty((count, *widths[name]), dtype=shape.dtype, device="meta"))
            for name, count in rows.items()
        }
        self.params = self._blank()
        self._touched = False
        self._info = EngineInfo(
            name="tensor-parallel",
            version="1",
            model="llama",
            dtype=meta_of("", torch.empty(0, dtype=shape.dtype)).dtype,
            topology=Topology.tensor_parallel(size, rank),
            accepts={Layout.CHECKPOINT, Layout.SHARDED},
            shareable={Layout.SHARDED: "post-load has not run"}
            if transforms
            else {Layout.SHARDED: "post-load changes nothing", Layout.FINAL: "post-load changes nothing"},
            post_load_writes="the norms are doubled in place" if transforms else None,
        )

    @property
    def info(self) -> EngineInfo:
        """Name `tensor-parallel`; the axis `tp` has the given size and rank."""
        return self._info

    @property
    def share(self) -> int:
        """The bytes of the checkpoint that this rank takes."""
        return sum(meta.nbytes for meta in self._expected.values())

    def expected(self, layout: Layout) -> Mapping[str, TensorMeta]:
        """Return this rank's parameters; the names are the same before and after post-load."""
        del layout
        return self._expected

    def apply(self, weights: WeightSet) -> Applied:
        """Read this rank's slices straight into its parameters; release each source when it is done."""
        missing = sorted({piece.source for piece, _ in self._pieces} - weights.keys())
        if missing:
            raise CoverageError(f"missing {', '.join(missing)}", missing=missing)
        self._touched = True
        targets, due = [], Counter(piece.source for piece, _ in self._pieces)
        unused = [name for name in weights if name not in due]  # while the set has it all
        for piece, _ in self._pieces:
            out = self.params[piece.parameter].narrow(0, piece.begin, piece.rows)
            targets.append(Target(piece.source, out, piece.slices))
        for target in weights.fill(targets):
            due[target.name] -= 1
            if not due[target.name]:
                weights.release([target.name])
        return Applied(written=self.params.keys(), unused=unused)

    def bind(self, weights: WeightSet) -> Applied:
        """Take this rank's parameters as they are, or fill those that are there, if the set says so."""
        wrong = {
            name: f"{weights.meta(name).torch_shape}, need {meta.torch_shape}"
            for name, meta in self._expected.items()
            if name in weights and weights.meta(name).torch_shape != meta.torch_shape
        }
        if wrong:
            raise CoverageError(f"shapes differ: {wrong}", mismatched=wrong)
        self._touched = True
        written = [name for name in self._expected if name in weights]
        unused = [name for name in weights if name not in self._expected]  # while the set has it all
        if weights.fills:
            for target in weights.fill(Target(name, self.params[name]) for name in written):
                weights.release([target.name])
        else:
            self.params |= {name: weights[name] for name in written}
        return Applied(written=written, unused=unused)

    def materialize(self, alloc: Alloc) -> int:
        """Move the parameters to memory from `alloc`."""
        self.params = {name: alloc(meta) for name, meta in self._expected.items()}
        return self.share

    def post_load(self, layout: Layout) -> None:
        """With `transforms`, double every norm in place, unless the weights are FINAL."""
        if self._transforms and layout is not Layout.FINAL:
            for name, tensor in self.params.items():
                if "norm" in name:
                    tensor.mul_(2)

    def tensors(self, layout: Layout) -> Mapping[str, torch.Tensor]:
        """Return the parameters."""
        del layout
        return dict(self.params)

    def untouched(self) -> bool:
        """Whether no weights were taken since the last `reinit`."""
        return not self._touched

    def reinit(self) -> None:
        """Return to blank parameters."""
        self.params = self._blank()
        self._touched = False

    def gather(self, value: object, timeout: float) -> Sequence[object]:
        """Ask the other ranks by the function given to the constructor."""
        return [value] if self._gather is None else self._gather(value, timeout)

    def _blank(self) -> dict[str, torch.Tensor]:
        return {n: torch.zeros(m.torch_shape, dtype=self.shape.dtype) for n, m in self._expected.items()}

    def _plan(self) -> Iterator[tuple[Piece, tuple[int, ...]]]:
        """Yield every piece, and the shape of one row of its parameter."""
        s, heads = self.shape, self.shape.heads // self.size
        kv_heads = max(1, s.kv_heads // self.size)
        first_kv = self.rank * s.kv_heads // self.size
        hidden = (s.hidden,)

        def rows(source: str, parameter: str, begin: int, count: int, at: int = 0) -> Iterator[Piece]:
            yield Piece(source, (slice(begin, begin + count),), parameter, at, count)

        def share(source: str, parameter: str, total: int, at: int = 0) -> Iterator[Piece]:
            yield from rows(source, parameter, self.rank * total // self.size, total // self.size, at)

        for piece in share("model.embed_tokens.weight", "embed", s.vocab):
            yield piece, hidden
        for i in range(s.layers):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            q, kv = heads * s.head_dim, kv_heads * s.head_dim
            attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
            fused = [
                *rows(f"{attention}.q_proj.weight", f"{ours}.qkv", self.rank * q, q),
                *rows(f"{attention}.k_proj.weight", f"{ours}.qkv", first_kv * s.head_dim, kv, q),
                *rows(f"{attention}.v_proj.weight", f"{ours}.qkv", first_kv * s.head_dim, kv, q + kv),
                *share(f"{mlp}.gate_proj.weight", f"{ours}.gate_up", s.ffn),
                *share(f"{mlp}.up_proj.weight", f"{ours}.gate_up", s.ffn, s.ffn // self.size),
            ]
            yield from ((piece, hidden) for piece in fused)
            for source, name, total in (
                ("self_attn.o_proj", "o", q * self.size),
                ("mlp.down_proj", "down", s.ffn),
            ):
                width = total // self.size
                cut = (slice(None), slice(self.rank * width, (self.rank + 1) * width))
                yield Piece(f"{theirs}.{source}.weight", cut, f"{ours}.{name}", 0, s.hidden), (width,)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield Piece(f"{theirs}.{norm}.weight", (), f"{ours}.{norm}", 0, s.hidden), ()
        yield Piece("model.norm.weight", (), "norm", 0, s.hidden), ()
        if not s.tied:
            for piece in share("lm_head.weight", "lm_head", s.vocab):
                yield piece, hidden


def cut(
    shape: LlamaShape, weights: Mapping[str, torch.Tensor], size: int, rank: int
) -> dict[str, torch.Tensor]:
    """Return what rank `rank` of `size` must hold, cut from whole tensors: the oracle of the engine above."""

    def part(name: str, dim: int) -> torch.Tensor:
        return weights[name].chunk(size, dim)[rank]

    def kv(name: str) -> torch.Tensor:
        heads = weights[name].reshape(shape.kv_heads, shape.head_dim, -1)
        if size > shape.kv_heads:
            heads = heads.repeat_interleave(size // shape.kv_heads, 0)
        return heads.chunk(size, 0)[rank].flatten(0, 1)

    found = {"embed": part("model.embed_tokens.weight", 0), "norm": weights["model.norm.weight"]}
    for i in range(shape.layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        found |= {
            f"layers.{i}.qkv": torch.cat(
                [
                    part(f"{attention}.q_proj.weight", 0),
                    kv(f"{attention}.k_proj.weight"),
                    kv(f"{attention}.v_proj.weight"),
                ]
            ),
            f"layers.{i}.gate_up": torch.cat(
                [part(f"{mlp}.gate_proj.weight", 0), part(f"{mlp}.up_proj.weight", 0)]
            ),
            f"layers.{i}.o": part(f"{attention}.o_proj.weight", 1),
            f"layers.{i}.down": part(f"{mlp}.down_proj.weight", 1),
            f"layers.{i}.input_layernorm": weights[f"model.layers.{i}.input_layernorm.weight"],
            f"layers.{i}.post_attention_layernorm": weights[
                f"model.layers.{i}.post_attention_layernorm.weight"
            ],
        }
    if not shape.tied:
        found["lm_head"] = part("lm_head.weight", 0)
    return found
