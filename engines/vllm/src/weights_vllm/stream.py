# SPDX-License-Identifier: Apache-2.0
"""Hand a set to a model's own loading code, and give back what that has consumed."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    import torch

    from weights_core import WeightSet

_WATCHED = 64


def consumed(weights: WeightSet, *, mapped: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor, and release each name once nothing refers to its memory any more.

    Those that can be are lent where they lie in the files, if they are to be `mapped`: a model that
    copies them to the host's memory then makes the only copy there is.

    Models may keep tensors for a while, to fuse them or to sort them first; a set may recycle memory
    that was released. So what is still referred to is released when the model asks for nothing more.
    """
    recent: deque[tuple[str, StorageWeakRef]] = deque()
    kept: list[str] = []
    given: set[str] = set()
    for name, tensor in chain(weights.mapped(), _rest(weights, given)) if mapped else weights.stream():
        given.add(name)
        recent.append((name, StorageWeakRef(tensor.untyped_storage())))  # type: ignore[no-untyped-call]
        item = [(name, tensor)]
        del tensor
        yield item.pop()
        dead = [known for known, ref in recent if ref.expired()]  # type: ignore[no-untyped-call]
        if dead:
            recent = deque((known, ref) for known, ref in recent if known not in dead)
            weights.release(dead)
        elif len(recent) > _WATCHED:
            kept.append(recent.popleft()[0])
    weights.release([*kept, *(name for name, _ in recent)])


def _rest(weights: WeightSet, given: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream what was not given otherwise, by the time that it is asked for."""
    yield from weights.stream([name for name in weights if name not in given])
