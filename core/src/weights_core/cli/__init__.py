# SPDX-License-Identifier: Apache-2.0
"""The `weights` command."""

from __future__ import annotations

from weights_core.cli.commands import main

__all__ = ["main"]
