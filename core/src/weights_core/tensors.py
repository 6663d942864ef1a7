# SPDX-License-Identifier: Apache-2.0
"""Small helpers on torch tensors. Imports torch: only for modules that are imported when needed."""

from __future__ import annotations

import torch


def nbytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements as a flat uint8 tensor: a view if contiguous, else a copy."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # a single element may have any stride
