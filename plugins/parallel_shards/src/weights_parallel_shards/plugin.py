# SPDX-License-Identifier: Apache-2.0
"""The plugin: when it takes part, and with which settings."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import attrs

from weights_core import FormatClaim, LoadRequest, ProviderPlugin, Role, hookimpl
from weights_core.checkpoint import CheckpointFiles, find
from weights_core.errors import CheckpointError
from weights_core.machine import NETWORK, file_system
from weights_core.types import Fit
from weights_parallel_shards.tuning import LEAST, Tuning, tune

if TYPE_CHECKING:
    from weights_core import Engine, Source, WeightSet

log = logging.getLogger("weights.parallel_shards")

SMALL = 64 << 20
"""Bytes of a single file below which reading it in parallel gains nothing worth a word."""

_OPENERS = 8


def _positive(_config: object, _threads: object, value: object) -> None:
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError(f"'threads' must be a number from 1, or 'auto': {value!r}")


def _enough(_config: object, _max_host_bytes: object, value: object) -> None:
    if value != "auto" and (type(value) is not int or value < LEAST):
        raise ValueError(f"'max_host_bytes' of {value} is too little to read with: give at least {LEAST}")


@attrs.frozen(kw_only=True)
class ParallelShardsConfig:
    """Settings.

    `threads` chunks are read at a time; "auto" goes by the storage. `max_host_bytes` bounds staging
    memory and what is read ahead of a consumer that streams, together; "auto" is 256 MiB, and 80 MiB
    of pinned memory to feed a GPU. `direct` says whether to read
    past the page cache: "auto" where that works and the bytes are not cached; "always"; or "never".
    """

    threads: int | Literal["auto"] = attrs.field(default="auto", validator=_positive)
    max_host_bytes: int | Literal["auto"] = attrs.field(default="auto", validator=_enough)
    direct: Literal["auto", "always", "never"] = attrs.field(
        default="auto", validator=attrs.validators.in_(("auto", "always", "never"))
    )


class ParallelShardsPlugin(ProviderPlugin[ParallelShardsConfig]):
    """Reads the files of a checkpoint in parallel; the idea is that of TensorRT-LLM's PR 14021."""

    Config = ParallelShardsConfig

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        """Claim a checkpoint of several files or of a large one; a small one only if named."""
        try:
            found = self._find(request)
            size = sum(file.stat().st_size for file in found.files)
        except CheckpointError as exc:
            return FormatClaim.refuse(str(exc))
        except OSError as exc:
            return FormatClaim.refuse(f"{exc.filename}: {exc.strerror}")
        files = len(found.files)
        small = files < 2 and (size < SMALL or found.kind != "safetensors")
        if small and "parallel_shards" not in request.format:
            return FormatClaim.refuse("a single small file, which the disk source reads as well")
        readers = self._tuning(found, request).readers
        return FormatClaim(
            roles={Role.SOURCE},
            fit=Fit.POSSIBLE if small else Fit.GOOD,
            reason=f"reads {files} file{'s' * (files != 1)}, up to {readers} chunks at a time",
        )

    @hookimpl
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        """Open and validate all files concurrently; the set reads them as it is consumed."""
        from weights_core.shards import open_shards
        from weights_parallel_shards.reader import ParallelSet

        found = self._find(request)
        if len(found.files) == 1:
            shards = open_shards(found)
        else:
            openers = min(_OPENERS, len(found.files))
            with ThreadPoolExecutor(openers, thread_name_prefix="weights-open") as pool:
                shards = open_shards(found, pool)
        component = request.engine.component
        files = f"{len(shards)} file{'s' * (len(shards) != 1)}"
        log.info("%s%s of %s", f"{component}: " if component else "", files, found.root)
        return ParallelSet(
            shards,
            notes=found.notes,
            tuning=self._tuning(found, request, cuda=False),
            device_tuning=self._tuning(found, request, cuda=True),
        )

    def _find(self, request: LoadRequest) -> CheckpointFiles:
        return find(request.checkpoint, request.engine.component, request.is_pipeline)

    def _tuning(self, found: CheckpointFiles, request: LoadRequest, *, cuda: bool | None = None) -> Tuning:
        threads, limit = self.config.threads, self.config.max_host_bytes
        return tune(
            None if limit == "auto" else limit,
            threads=None if threads == "auto" else threads,
            direct=self.config.direct,
            remote=file_system(found.root) in NETWORK,
            cuda=request.engine.device.startswith("cuda") if cuda is None else cuda,
        )
