# SPDX-License-Identifier: Apache-2.0
"""A model of vLLM's making, small and without vLLM: parameters with loaders, and `load_weights`."""

import torch
from torch import nn

Q, KV, HIDDEN, VOCAB = 16, 8, 16, 32


def fused(parameter, loaded, shard):
    begin, rows = {"q": (0, Q), "k": (Q, KV), "v": (Q + KV, KV)}[shard]
    parameter.data[begin : begin + rows].copy_(loaded)


def plain(parameter, loaded, shard=None):
    parameter.data.copy_(loaded)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.empty(Q + 2 * KV, HIDDEN), requires_grad=False)
        self.qkv.weight_loader = fused
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("cache", torch.arange(4.0), persistent=False)


class Model(nn.Module):
    """Fuses q, k and v, ties its head, and reports what it loaded, as vLLM's models do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.empty(VOCAB, HIDDEN), requires_grad=False)
        self.attention = Attention()
        self.norm = nn.Parameter(torch.ones(HIDDEN), requires_grad=False)
        self.head = self.embed

    def load_weights(self, weights):
        params, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            ours, shard = name, None
            if name.startswith("attention."):
                ours, shard = "attention.qkv", name[-1]
            loader = getattr(params[ours], "weight_loader", plain)
            loader(params[ours], tensor, shard)
            loaded.add(ours)
        return loaded


def checkpoint(seed=0):
    torch.manual_seed(seed)
    return {
        "embed": torch.randn(VOCAB, HIDDEN),
        "attention.q": torch.randn(Q, HIDDEN),
        "attention.k": torch.randn(KV, HIDDEN),
        "attention.v": torch.randn(KV, HIDDEN),
        "norm": torch.randn(HIDDEN),
    }


def due(tensors):
    """What the model must hold, made without it."""
    qkv = torch.cat([tensors[f"attention.{part}"] for part in "qkv"])
    return {"embed": tensors["embed"], "attention.qkv": qkv, "norm": tensors["norm"]}
