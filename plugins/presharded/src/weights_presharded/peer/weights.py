# SPDX-License-Identifier: Apache-2.0
"""What was pulled, as a set: tensors that are here, or parameters that are filled already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from weights_core.errors import ArenaError
from weights_core.types import TensorMeta
from weights_core.weightset import Slices, WeightSet, normalise

if TYPE_CHECKING:
    import torch

    from weights_core.arena import ArenaWriter, Manifest
    from weights_presharded.peer.landing import Landing


class PulledSet(WeightSet):
    """Tensors whose bytes have all come, and were verified."""

    provider = "presharded"

    def __init__(self, manifest: Manifest, landing: Landing, notes: tuple[str, ...], seconds: float) -> None:
        self.layout = manifest.layout
        self.in_place = landing.in_place
        self.writer: ArenaWriter | None = landing.writer
        """The memory of the tensors, if it can be served from again."""
        self._metas = MappingProxyType({name: place.meta for name, place in manifest.places.items()})
        self._tensors: dict[str, torch.Tensor] | None = dict(landing.tensors)
        self._nbytes = landing.nbytes
        self._notes = notes
        self.seconds = seconds
        """What the transfer took, verification included."""

    @property
    def closed(self) -> bool:
        """Whether the load has ended, or went on without this set."""
        return self._tensors is None

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """In the order of the source."""
        return self._metas

    @property
    def bytes_read(self) -> int:
        """All that came."""
        return self._nbytes

    @property
    def notes(self) -> tuple[str, ...]:
        """From whom it came, how fast, and who was passed over."""
        return self._notes

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Return a tensor, or a part of it, as it lies."""
        if self._tensors is None:
            raise ArenaError("the set was closed: the load it was opened for has ended")
        tensor = self._tensors[name].detach()
        for dim, r in enumerate(normalise(slices, tuple(tensor.shape))):
            tensor = tensor.narrow(dim, r.start, len(r))
        return tensor

    def keep_writer(self) -> ArenaWriter | None:
        """Return the memory for whoever serves from it, and closes it, from now on."""
        writer, self.writer = self.writer, None
        return writer

    def release(self, names: Iterable[str]) -> int:
        """Nothing is freed: the tensors are the engine's memory."""
        del names
        return 0

    def close(self) -> None:
        """Let go of the tensors; whoever has one keeps its memory."""
        self._tensors = None
        writer = self.keep_writer()
        if writer is not None:
            writer.close()
