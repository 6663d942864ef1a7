# SPDX-License-Identifier: Apache-2.0
"""Copies to a CUDA device on a stream of their own."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch


@attrs.frozen(eq=False)
class CudaMark:
    """An event on a channel's stream."""

    event: torch.cuda.Event
    device: torch.device

    def synchronize(self) -> None:
        """Wait for it."""
        self.event.synchronize()

    def join(self) -> None:
        """Make the caller's current stream wait for it."""
        torch.cuda.current_stream(self.device).wait_event(self.event)


class CudaChannel:
    """A stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> CudaMark:
        """Copy from pinned memory, asynchronously; what is spread out there is put together first."""
        with torch.cuda.stream(self._stream):
            for out, source in parts:  # what is put together is pageable: torch waits for its copy
                out.copy_(source.contiguous(), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return CudaMark(event, self._device)

    def follow(self) -> None:
        """Wait for the caller's current stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))


class CudaDevice:
    """One CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """Return pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def channel(self) -> CudaChannel:
        """Return a channel with a stream of its own."""
        return CudaChannel(self._device)
