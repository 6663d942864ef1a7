# SPDX-License-Identifier: Apache-2.0
"""Ranks tell one another how they fare, over a process group that the engine has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def gather(group: dist.ProcessGroup, value: object, timeout: float) -> Sequence[object]:
    """Return every rank's `value`, by rank; `group` is one on the host (gloo).

    Raises:
        TimeoutError: a rank stayed away for `timeout` seconds; says which, where that is known.
        RuntimeError: a rank is gone.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return [value]
    began = time.monotonic()
    try:  # a collective call waits as long as its group was made to; this waits as long as it is told
        dist.monitored_barrier(group, timeout=timedelta(seconds=timeout), wait_all_ranks=True)
    except RuntimeError as exc:
        if time.monotonic() - began < timeout:
            raise
        raise TimeoutError(f"a rank stayed away for {timeout:g} s: {exc}") from exc
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group)
    return gathered
