# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` through weights: the same model, by any format."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

import weights_core as w
from weights_core import PluginHost
from weights_core.checkpoint import CheckpointFiles
from weights_core.config import Settings
from weights_core.errors import EngineError
from weights_core.shards import open_shards
from weights_transformers import arguments as given
from weights_transformers.alone import ALONE
from weights_transformers.cut import find_whole
from weights_transformers.direct import DirectEngine
from weights_transformers.engine import TransformersEngine
from weights_transformers.ranks import opened_together, ranks_of
from weights_transformers.trace import UntraceableError, refused, trace

log = logging.getLogger("weights.transformers")


@attrs.frozen(eq=False)
class Loaded:
    """A model, and what its load did. The lease of the report ends with the model."""

    model: Any
    report: w.LoadReport


def from_pretrained(
    cls: Any,
    path: Path | str,
    *,
    format: str | Sequence[str] = "auto",
    config: Settings | None = None,
    model_config: Any = None,
    host: PluginHost | None = None,
    timeout: float = 600.0,
    map_files: bool = True,
    **kwargs: Any,
) -> Any:
    """Return the model that `cls.from_pretrained(path, **kwargs)` gives, its weights brought by `format`.

    Args:
        cls: a class of a Transformers model, or an Auto class of models.
        path: the model's folder.
        format: `"auto"`, a plugin's name, or several in the order they are to be asked.
        config: plugin name → setting → value.
        model_config: the model's configuration, instead of that in the folder.
        host: the plugins to choose from; by default all that are installed.
        timeout: seconds that a rank waits for the others.
        map_files: on the CPU, let parameters that are stored as they are needed lie in private pages of
            the files, as `cls.from_pretrained` does. The files must not be overwritten in place while
            the model lives; without, everything is copied.
        kwargs: as `cls.from_pretrained` takes them; what has no meaning here is refused.

    Raises:
        WeightsError: the load failed, and there is no model.

    Example:
        >>> model = from_pretrained(AutoModelForCausalLM, "path/to/llama", format="gms")
    """
    return load(
        cls,
        path,
        format=format,
        config=config,
        model_config=model_config,
        host=host,
        timeout=timeout,
        map_files=map_files,
        **kwargs,
    ).model


def load(
    cls: Any,
    path: Path | str,
    *,
    format: str | Sequence[str] = "auto",
    config: Settings | None = None,
    model_config: Any = None,
    host: PluginHost | None = None,
    timeout: float = 600.0,
    map_files: bool = True,
    **kwargs: Any,
) -> Loaded:
    """Do as `from_pretrained`, and return the report with its lease beside the model.

    Arguments and errors are those of `from_pretrained`.
    """
    check_settings(config)
    engine = open_engine(
        cls, path, model_config=model_config, map_files=map_files, timeout=timeout, host=host, **kwargs
    )
    report = w.load(engine, path, format, config, host=host, timeout=timeout)
    return Loaded(engine.model, report)


def open_engine(
    cls: Any,
    path: Path | str,
    *,
    model_config: Any = None,
    role: str = "main",
    component: str | None = None,
    map_files: bool = True,
    timeout: float = 600.0,
    host: PluginHost | None = None,
    **kwargs: Any,
) -> TransformersEngine | DirectEngine:
    """Return the engine that loads `cls` from `path`, for `weights_core.load` or a session.

    Args:
        cls: as `from_pretrained`.
        path: as `from_pretrained`; a pipeline's folder with `component`.
        model_config: as `from_pretrained`.
        role: `main`, or `draft` for a draft model.
        component: a component of a pipeline.
        map_files: as `from_pretrained`.
        timeout: seconds that a rank waits for the others to open it too.
        host: as `from_pretrained`; asked of nothing but what a folder is that holds no checkpoint.
        kwargs: as `from_pretrained`.

    Raises:
        EngineError: the class, an argument or the configuration cannot be served; nothing is loaded.
        CheckpointError: there is no valid checkpoint at `path`.
        RanksDisagreeError: another rank cannot open it, or sees another.
    """
    version = given.check_version("transformers")
    given.check_class(cls)
    given.check_arguments(kwargs)
    kwargs = given.with_ranks(kwargs)
    device = given.one_device(kwargs) or "cpu"
    ranks = ranks_of(kwargs, timeout)
    size = 1 if ranks is None else ranks.topology.world.size

    def opening() -> _Opened:
        found = find_whole(Path(path), component, host, size)
        return _opened(cls, found, model_config, kwargs)

    opened = opened_together(ranks, opening, str)
    finish = functools.partial(
        given.finish, folder=opened.root, arguments=kwargs, from_auto=given.is_auto(cls)
    )
    cls, settings, left = opened.cls, opened.settings, opened.arguments
    if ranks is not None:
        device = ranks.device
    if opened.quantization is None:
        try:
            traced = trace(cls, settings, opened.metas, left)
        except UntraceableError as exc:
            log.warning("%s cannot share its weights: %s", cls.__name__, exc.brief)
        else:
            finish(traced.model)
            return TransformersEngine(
                traced,
                version=version,
                device=device,
                role=role,
                component=component,
                map_files=map_files,
                ranks=ranks,
            )

    def build(values: dict[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        try:
            with ALONE:
                model, info = cls.from_pretrained(
                    None, config=settings, state_dict=values, output_loading_info=True, **left
                )
        except Exception as exc:  # Transformers may raise anything
            raise refused(cls, exc) from exc
        finish(model)
        return model, info

    info = w.EngineInfo(
        name="transformers",
        version=version,
        model=getattr(cls, "__name__", ""),
        quantization=opened.quantization,
        device=device,
        role=role,
        component=component,
    )
    return DirectEngine(build, info, ranks, opened.block)


@attrs.frozen(eq=False)
class _Opened:
    """A checkpoint and the class it is for; `arguments` are left for `from_pretrained`."""

    root: Path
    cls: Any
    settings: Any
    arguments: Mapping[str, Any]
    quantization: str | None
    block: Sequence[int] | None
    metas: Mapping[str, w.TensorMeta]

    def __str__(self) -> str:
        """Say what all ranks must see alike."""
        held = sorted((name, meta.dtype, tuple(meta.shape)) for name, meta in self.metas.items())
        digest = hashlib.sha256(repr(held).encode()).hexdigest()[:12]
        kind = (
            f"{self.cls.__name__}, quantised by {self.quantization}"
            if self.quantization
            else self.cls.__name__
        )
        return f"{kind}, of {len(held)} tensors ({digest})"


def _opened(cls: Any, found: CheckpointFiles, model_config: Any, arguments: Mapping[str, Any]) -> _Opened:
    settings, left = given.configuration(cls, found.root, model_config, arguments)
    trusted = bool(arguments.get("trust_remote_code"))
    cls, settings = given.model_class(cls, settings, found.root, trusted=trusted)
    return _Opened(
        root=found.root,
        cls=cls,
        settings=settings,
        arguments=left,
        quantization=given.quantization_of(settings, left),
        block=given.block_size(settings, left),
        metas=headers(found),
    )


def headers(found: CheckpointFiles) -> dict[str, w.TensorMeta]:
    """Return what a checkpoint holds, once it is validated; its files are closed again.

    Raises:
        CheckpointError: a file is malformed.
    """
    metas: dict[str, w.TensorMeta] = {}
    for shard in open_shards(found):
        metas |= shard.metas
        shard.close()
    return metas


def check_settings(config: object) -> None:
    """Refuse a model's configuration where plugins' settings are due.

    Raises:
        EngineError: saying where it belongs.
    """
    if config is not None and not isinstance(config, Mapping):
        raise EngineError(
            f"config is for the settings of plugins, not a {type(config).__name__}: "
            "give a model's configuration as model_config="
        )
