# SPDX-License-Identifier: Apache-2.0
"""Helpers for testing plugins and engines: checkpoints, hosts over given plugins, groups of ranks.

Not imported by the package itself, and not a pytest plugin: import what you need.
"""

from __future__ import annotations

from weights_core.testing.checkpoints import every_dtype, random_tensor, write_checkpoint
from weights_core.testing.hosts import host_of, installed_as
from weights_core.testing.ranks import Group

__all__ = ["Group", "every_dtype", "host_of", "installed_as", "random_tensor", "write_checkpoint"]
