# SPDX-License-Identifier: Apache-2.0
"""Which versions of vLLM this adapter was tested with."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

TESTED = SpecifierSet(">=0.32,<0.33")


def warning(version: str) -> str | None:
    """Return what to tell the operator of a vLLM of `version`, or None if it was tested."""
    try:
        known = Version(Version(version).base_version) in TESTED
    except InvalidVersion:
        known = False
    if known:
        return None
    return f"vLLM {version} is outside of the range that weights-vllm was tested with, {TESTED}: going on"
