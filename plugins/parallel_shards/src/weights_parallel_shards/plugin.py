# SPDX-License-Identifier: Apache-2.0
"""The plugin: when it takes part, and with which settings."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import attrs

from weights_core import FormatClaim, LoadRequest, ProviderPlugin, Role, hookimpl
from weights_core.checkpoint import CheckpointFiles, find
from weights_core.errors import CheckpointError
from weights_core.types import Fit

if TYPE_CHECKING:
    from weights_core import Engine, Source, WeightSet

log = logging.getLogger("weights.parallel_shards")


@attrs.frozen(kw_only=True)
class ParallelShardsConfig:
    """Settings.

    `threads` files are read at a time. A consumer that streams is kept ahead of by at most
    `max_host_bytes`.
    """

    threads: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    max_host_bytes: int = attrs.field(default=256 << 20, validator=attrs.validators.ge(1))


class ParallelShardsPlugin(ProviderPlugin[ParallelShardsConfig]):
    """Reads the files of a checkpoint concurrently; the idea is that of TensorRT-LLM's PR 14021."""

    Config = ParallelShardsConfig

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        """Claim a checkpoint of several files; of one file only if named."""
        try:
            found = self._find(request)
        except CheckpointError as exc:
            return FormatClaim.refuse(str(exc))
        files = len(found.files)
        if files < 2 and "parallel_shards" in request.format:
            return FormatClaim(roles={Role.SOURCE}, reason="a single file, read the plain way")
        if files < 2:
            return FormatClaim.refuse("a single file, which the disk source reads as well")
        return FormatClaim(
            roles={Role.SOURCE},
            fit=Fit.GOOD,
            reason=f"reads {files} files, {min(self.config.threads, files)} at a time",
        )

    @hookimpl
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        """Open and validate all files concurrently; the set reads them as it is consumed."""
        from weights_core.disk import ShardSet
        from weights_core.shards import open_shards
        from weights_parallel_shards.reader import ParallelSet

        found = self._find(request)
        threads = min(self.config.threads, len(found.files))
        if threads == 1:
            shards = open_shards(found)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="weights-open") as pool:
                shards = open_shards(found, pool)
        component = request.engine.component
        files = f"{len(shards)} file{'s' * (len(shards) != 1)}"
        log.info("%s%s of %s", f"{component}: " if component else "", files, found.root)
        if len(shards) < 2:
            return ShardSet(shards, provider="parallel_shards", notes=found.notes)
        return ParallelSet(
            shards,
            notes=found.notes,
            threads=threads,
            max_host_bytes=self.config.max_host_bytes,
        )

    def _find(self, request: LoadRequest) -> CheckpointFiles:
        return find(request.checkpoint, request.engine.component, request.is_pipeline)
