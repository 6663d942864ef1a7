# SPDX-License-Identifier: Apache-2.0
"""The plugin: when it takes part, with which settings. Imports neither torch nor numpy."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import attrs

from weights_core import FormatClaim, LoadRequest, ProviderPlugin, Role, hookimpl
from weights_core.types import Fit

if TYPE_CHECKING:
    from weights_core import Engine, Source, WeightSet


@attrs.frozen(kw_only=True)
class HelloConfig:
    """Settings.

    `verify` compares each array with the checksum that the archive keeps, which costs a pass over
    its bytes.
    """

    verify: bool = False


class HelloPlugin(ProviderPlugin[HelloConfig]):
    """Reads checkpoints that are one `.npz` archive, as `numpy.savez` writes it."""

    Config = HelloConfig

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        """Claim a file that is a zip archive by its name and its first bytes."""
        path = request.checkpoint
        if path.suffix != ".npz":
            return FormatClaim.refuse("not an .npz archive")
        if not zipfile.is_zipfile(path):
            return FormatClaim.refuse(f"{path} is missing, damaged, or no archive")
        return FormatClaim(roles={Role.SOURCE}, fit=Fit.BEST, reason="reads NumPy's archives")

    @hookimpl
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        """Look at the headers of all arrays; the set reads them as it is asked."""
        from weights_hello.weightset import NpzSet

        return NpzSet(request.checkpoint, verify=self.config.verify)
