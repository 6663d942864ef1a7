# SPDX-License-Identifier: Apache-2.0
import threading

import pytest
import torch
from torch import nn

from weights_core.errors import EngineError
from weights_core.tensors import meta_of
from weights_vllm import parameters
from weights_vllm.parameters import SMALL, give_memory, has_memory, move, without_memory

LARGE = SMALL // 4 + 1  # elements of float32


class Marked(nn.Parameter):
    """As vLLM's own: a subclass with attributes that its loading code reads."""


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        large = Marked(torch.empty(LARGE), requires_grad=False)
        self.register_parameter("large", large)
        large.weight_loader = "mine"  # vLLM does so after it has registered it
        self.small = nn.Parameter(torch.full((3,), -1.0), requires_grad=False)
        self.tied = self.large


def test_large_parameters_are_made_without_memory_and_stay_the_objects_they_are():
    with without_memory(spared=()):
        layer = Layer()
    assert not has_memory(layer.large)
    assert layer.large.shape == (LARGE,)
    assert type(layer.large) is Marked
    assert layer.large.weight_loader == "mine"
    assert layer.tied is layer.large
    assert torch.equal(layer.small, torch.full((3,), -1.0))


def test_the_hosts_memory_is_left_alone_and_so_is_what_is_made_afterwards_or_elsewhere():
    with without_memory():
        assert has_memory(Layer().large)
    made = []
    with without_memory(spared=()):
        thread = threading.Thread(target=lambda: made.append(Layer()))
        thread.start()
        thread.join()
    assert has_memory(made[0].large)
    assert has_memory(Layer().large)


def test_parameters_that_share_their_memory_keep_it():
    with without_memory(spared=()):
        whole = torch.zeros(2 * LARGE)
        layer = nn.Module()
        layer.first_half = nn.Parameter(whole[:LARGE], requires_grad=False)
    assert has_memory(layer.first_half)
    assert torch.equal(layer.first_half, torch.zeros(LARGE))


def test_memory_is_given_to_those_without():
    with without_memory(spared=()):
        layer = Layer()
    given = dict(layer.named_parameters())
    give_memory(given)
    layer.large.data.fill_(2)
    assert torch.equal(layer.large, torch.full((LARGE,), 2.0))
    assert torch.equal(layer.small, torch.full((3,), -1.0))


def test_moving_places_parameters_and_takes_defaults_along():
    with without_memory(spared=()):
        layer = Layer()
    layer.across = nn.Parameter(torch.ones(2, 3).t(), requires_grad=False)
    places = {}

    def alloc(meta):
        places[meta.name] = torch.zeros(meta.torch_shape)
        return places[meta.name]

    large = layer.large
    moved = move(dict(layer.named_parameters()), alloc)
    assert set(places) == {"large", "small"}
    assert moved == 4 * (LARGE + 3)
    assert layer.large is large
    assert large.data_ptr() == places["large"].data_ptr()
    assert torch.equal(places["small"], torch.full((3,), -1.0))
    assert layer.across.stride() == (1, 3)


def test_a_dtype_that_no_checkpoint_has_is_named():
    with pytest.raises(EngineError, match=r"'w' has dtype torch.complex128"):
        meta_of("w", torch.empty(1, dtype=torch.complex128))


def test_a_parameter_without_a_shape_yet_is_left_alone():
    parameters.leave_out(nn.UninitializedParameter())
