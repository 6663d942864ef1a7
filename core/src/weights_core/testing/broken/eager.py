# SPDX-License-Identifier: Apache-2.0
"""A source whose module imports torch, as no plugin's may."""

from __future__ import annotations

import torch

from weights_core.testing.broken.sources import SoundSource


class Eager(SoundSource):
    """Sound, and costs a second to import."""

    threads = torch.get_num_threads()


BROKEN = {"importing_it_loads_no_torch": Eager}
