# SPDX-License-Identifier: Apache-2.0
"""Whatever is made of a checkpoint's tensors while they have no bytes is made again with them."""

import pytest
import torch
from torch.nn import functional

from weights_core import Target
from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.errors import EngineError
from weights_core.shards import open_shards
from weights_core.testing import write_checkpoint
from weights_transformers.mapped import ModelWeights
from weights_transformers.recipes import Pieces
from weights_transformers.traced import Tracer, slices_of, values

TENSORS = {
    "a": torch.arange(24.0).reshape(4, 6),
    "b": torch.arange(24.0, 48.0).reshape(4, 6),
    "c": torch.arange(7.0),
    "one": torch.tensor(3.5),
    "i": torch.arange(6).reshape(2, 3),
    "none": torch.empty(0, 3),
}

STRAIGHT = {
    "whole": lambda t: t["a"][...],
    "scalar": lambda t: t["one"][...],
    "nothing": lambda t: t["none"][...],
    "rows": lambda t: t["a"][1:3],
    "columns": lambda t: t["a"][:, 2:5],
    "negative": lambda t: t["a"][-3:-1],
    "part of a part": lambda t: t["a"][1:][:2, 3:],
    "stack": lambda t: torch.stack([t["a"][...], t["b"][...]]),
    "stack inside": lambda t: torch.stack([t["a"][...], t["b"][...]], dim=1),
    "stack last": lambda t: torch.stack((t["a"][...], t["b"][...]), -1),
    "cat": lambda t: torch.cat([t["a"][...], t["b"][1:]]),
    "cat columns": lambda t: torch.cat([t["a"][...], t["b"][:, :2]], dim=-1),
    "experts": lambda t: torch.cat(
        [torch.stack([t["a"][...], t["b"][...]]), torch.stack([t["b"][...], t["a"][...]])], dim=1
    ),
    "a stack of slices, converted": lambda t: torch.stack([t[n][1:3].to(torch.bfloat16) for n in "ab"]),
    "chunk": lambda t: torch.chunk(t["a"][...], 2, dim=0)[1],
    "split": lambda t: t["a"][...].split([1, 5], dim=1)[1],
    "chunk, converted": lambda t: t["a"][...].to(dtype=torch.float16).chunk(3, -1)[1],
    "to a device that is not there": lambda t: t["a"][...].to(device="cuda:7", dtype=torch.float64),
    "same": lambda t: t["a"][...].detach().contiguous().cpu().clone().requires_grad_(True),
    "padded by nothing, by keyword": lambda t: functional.pad(t["c"][...], pad=(0, 0)),
    "padded by nothing": lambda t: functional.pad(t["c"][...], (0, 0), "constant", 0),
    "a parameter": lambda t: torch.nn.Parameter(t["a"][...]),
    "integers": lambda t: t["i"][...].to(torch.int32),
}
COMPUTED = {
    "transposed": lambda t: t["a"][...].transpose(0, 1),
    "T": lambda t: t["a"][...].T,
    "permuted and stacked": lambda t: torch.stack([t["a"][...].t(), t["b"][...].t()]),
    "viewed": lambda t: t["a"][...].view(2, 2, 6).transpose(1, 2).reshape(4, 6),
    "shaped like another": lambda t: t["a"][...].reshape(TENSORS["i"].t().repeat(1, 4).shape),
    "added": lambda t: t["a"][...] + 1,
    "twice converted": lambda t: t["a"][...].to(torch.bfloat16).to(torch.float32),
    "steps": lambda t: t["a"][::2],
    "an index": lambda t: t["a"][2],
    "split of a stack": lambda t: torch.stack([t["a"][...], t["b"][...]]).chunk(2)[1],
    "unbound": lambda t: torch.unbind(t["a"][...])[2],
    "stacked by keyword": lambda t: torch.stack(tensors=[t["a"][...], t["b"][...]]),
    "inverted": lambda t: ~t["i"][...],
    "by keyword": lambda t: torch.where(t["a"][...] > 3, input=t["a"][...], other=t["b"][...]),
    "padded": lambda t: functional.pad(t["c"][...], (1, 2)),
    "cat of two dtypes": lambda t: torch.cat([t["a"][...], t["b"][...].to(torch.float64)]),
    "data": lambda t: t["a"][...].T.data,
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("traced") / "c", TENSORS, shards=2)
    weights = ShardSet(open_shards(find(path)), provider="disk")
    yield weights
    weights.close()


@pytest.mark.parametrize("way", [*STRAIGHT, *COMPUTED])
def test_made_again(opened, way):
    function = (STRAIGHT | COMPUTED)[way]
    eager = {name: _Anywhere(tensor) for name, tensor in TENSORS.items()}
    expected = function(eager)
    tracer = Tracer()
    traced = function(values(opened.metas, tracer))
    assert tracer.lost is None
    assert traced.is_meta
    assert (traced.shape, traced.dtype, traced.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )
    recipe = tracer.recipe_of(traced)
    assert isinstance(recipe, Pieces) == (way in STRAIGHT)
    weights = ModelWeights(opened, {"it": recipe}, {"it": traced})
    out = torch.full(expected.shape, 99, dtype=expected.dtype)
    done = list(weights.fill([Target("it", out)]))
    assert [target.name for target in done] == ["it"]
    assert torch.equal(out, expected)
    assert torch.equal(weights["it"], expected)
    if expected.dim():
        assert torch.equal(weights.read("it", (slice(0, 1),)), expected[0:1])


class _Anywhere:
    """A tensor that stays on the CPU wherever it is moved."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __getitem__(self, index):
        part = self._tensor[index]
        return _stay(part if slices_of(index) is None else part.contiguous())


class _Stay(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "to":
            kwargs.pop("device", None)
        return super().__torch_function__(func, types, args, kwargs)


def _stay(tensor):
    return tensor.as_subclass(_Stay)


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t["a"][...].add_(1),
        lambda t: t["a"][...].sum().item(),
        lambda t: bool(t["a"][...].eq(1).any()),
        lambda t: setattr(t["a"][...], "data", torch.zeros(4, 6)),
        lambda t: t["a"][...].nonzero(),
        lambda t: t["a"][...].numpy(),
        lambda t: torch.empty(4, 6).copy_(t["a"][...]),
        lambda t: t["a"][...].__setitem__(0, 1.0),
        lambda t: torch.empty(4, 6).__setitem__(0, t["a"][0]),
        lambda t: t["a"][...].__iadd__(1),
        lambda t: torch.add(t["a"][...], 1, out=torch.empty(4, 6)),
        lambda t: torch.cat([t["a"][...], torch.zeros(4, 6)]),
    ],
)
def test_what_needs_the_bytes_cannot_be_traced(opened, function):
    tracer = Tracer()
    with pytest.raises((EngineError, RuntimeError, TypeError)):
        function(values(opened.metas, tracer))
    assert tracer.lost is not None


def test_a_source_is_released_after_its_last_use(opened):
    released = []

    class Watched(ShardSet):
        def release(self, names):
            released.extend(names)
            return 0

    tracer = Tracer()
    t = values(opened.metas, tracer)
    first, second = torch.stack([t["a"][...], t["b"][...]]), t["a"][:2]
    third = t["b"][...].T
    made = {"first": first, "second": second, "third": third}
    recipes = {name: tracer.recipe_of(tensor) for name, tensor in made.items()}
    weights = ModelWeights(Watched(opened.shards, provider="disk"), recipes, made)
    for name, tensor in made.items():
        out = torch.empty(tensor.shape)
        list(weights.fill([Target(name, out)]))
        assert released == {"first": [], "second": ["a"], "third": ["a", "b"]}[name]
        assert weights.release([name]) == 0
