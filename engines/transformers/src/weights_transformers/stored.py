# SPDX-License-Identifier: Apache-2.0
"""Weights that are used as they are stored, brought shortly before Transformers takes them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from weights_core import Target, WeightSet, dtypes
from weights_core.tensors import empty

WINDOW = 256 << 20
"""Bytes that are brought at a time. So much more than the model takes may be read, where it skips some."""


class Stored:
    """The tensors of a set that have one dtype: where they lie in the files, else in memory of their own.

    They are brought a window at a time, in the order in which Transformers takes them, by as many threads as
    the source has. What it passes over goes with its window.
    """

    def __init__(self, weights: WeightSet, dtype: str, *, map_files: bool) -> None:
        """Prepare to bring those of `weights` that are stored as `dtype`, mapped if they may be."""
        names = [name for name, meta in weights.metas.items() if meta.dtype == dtype]
        self._names = sorted(names, key=natural)
        self._position = {name: index for index, name in enumerate(self._names)}
        self._weights = weights
        self._map_files = map_files
        self._here: dict[str, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._position

    def take(self, name: str) -> torch.Tensor:
        """Return a tensor, which is the caller's, and release it in the set.

        Raises:
            WeightsError: it cannot be had.
        """
        if name not in self._here:
            self._here = {}
            self._here = self._brought(self._window(name))
        self._weights.release([name])
        return self._here.pop(name)

    def _window(self, first: str) -> list[str]:
        size, names = 0, []
        for name in self._names[self._position[first] :]:
            names.append(name)
            size += self._weights.metas[name].nbytes
            if size >= WINDOW:
                break
        return names

    def _brought(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        weights, metas = self._weights, self._weights.metas
        found = dict(weights.mapped(names)) if self._map_files else {}
        targets = [
            Target(
                name,
                empty(metas[name].torch_shape, dtypes.to_torch(metas[name].dtype), offset=metas[name].offset),
            )
            for name in names
            if name not in found
        ]
        for target in weights.fill(targets) if targets else ():
            found[target.name] = target.out
        return found


def natural(name: str) -> list[str | int]:
    """Return a key that sorts numbers in names by their value, as Transformers does."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
