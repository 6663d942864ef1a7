# SPDX-License-Identifier: Apache-2.0
import torch

from weights_core import TensorMeta, WeightSet
from weights_vllm.stream import consumed


class Recycling(WeightSet):
    """Lends pieces of its own memory, and overwrites what was released: what a set may do at worst."""

    def __init__(self, count):
        self._metas = {str(i): TensorMeta(str(i), (4,), "F32", 16) for i in range(count)}
        self.lent = {}
        self.released = []

    @property
    def metas(self):
        return self._metas

    def read(self, name, slices=None):
        tensor = torch.full((4,), float(name))
        self.lent[name] = tensor.data_ptr()
        return tensor

    def release(self, names):
        self.released += names
        return 0


def test_each_tensor_is_released_as_soon_as_the_model_has_let_go_of_it():
    weights, behind = Recycling(10), []
    for name, tensor in consumed(weights):
        assert tensor[0] == float(name)
        behind.append(int(name) - len(weights.released))
        del tensor
    assert weights.released == [str(i) for i in range(10)]
    assert max(behind) <= 1


def test_what_the_model_keeps_is_released_when_it_is_done():
    weights, kept = Recycling(200), []
    stream = consumed(weights)
    for name, tensor in stream:
        if int(name) % 2:
            kept.append(tensor[1:3])  # a view: the tensor itself dies
    held = {str(i) for i in range(1, 200, 2)}
    assert held <= set(weights.released)
    assert sorted(weights.released, key=int) == [str(i) for i in range(200)]
    assert all(torch.equal(view, torch.full((2,), 2.0 * i + 1)) for i, view in enumerate(kept))


def test_nothing_that_is_kept_is_released_while_the_model_asks_for_more():
    weights, kept = Recycling(200), []
    for name, tensor in consumed(weights):
        kept.append(tensor)
        assert not weights.released, name
    assert len(weights.released) == 200


def test_a_model_that_stops_early_leaves_the_rest_unread():
    weights = Recycling(10)
    stream = consumed(weights)
    next(stream)
    stream.close()
    assert set(weights.lent) == {"0"}


class PartlyMapped(Recycling):
    """Lends the even ones where they lie: no read of them is seen."""

    def mapped(self, names=None):
        for name in self._metas if names is None else names:
            if not int(name) % 2:
                yield name, torch.full((4,), float(name))


def test_what_is_lent_where_it_lies_is_not_read_and_all_the_rest_is():
    weights, got = PartlyMapped(200), {}
    for name, tensor in consumed(weights, mapped=True):
        got[name] = tensor[0].item()
        del tensor
    assert got == {str(i): float(i) for i in range(200)}
    assert set(weights.lent) == {str(i) for i in range(1, 200, 2)}
    assert sorted(weights.released, key=int) == [str(i) for i in range(200)]
    assert set(dict(consumed(PartlyMapped(200)))) == set(got)


def test_what_the_model_keeps_of_either_kind_is_released_when_it_is_done():
    weights, kept = PartlyMapped(200), []
    for name, tensor in consumed(weights, mapped=True):
        kept.append(tensor)
        assert not weights.released, name
    assert len(weights.released) == 200
