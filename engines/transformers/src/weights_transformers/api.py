# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` through weights: the same model, by any format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

import weights_core as w
from weights_core import PluginHost
from weights_core.config import Settings
from weights_core.errors import EngineError
from weights_transformers.direct import DirectEngine
from weights_transformers.engine import TransformersEngine
from weights_transformers.opening import opening
from weights_transformers.plain import Undecided


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


@torch.inference_mode(False)  # what is made in it could never be trained
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
    found = opening(
        cls,
        path,
        model_config=model_config,
        map_files=map_files,
        timeout=timeout,
        host=host,
        arguments=kwargs,
    )
    dtype = found.dtype
    engine = found.engine() if dtype is None else Undecided(found, dtype)
    report = w.load(engine, path, format, config, host=host, timeout=timeout)
    return Loaded(engine.model, report)


@torch.inference_mode(False)
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
    return opening(
        cls,
        path,
        model_config=model_config,
        role=role,
        component=component,
        map_files=map_files,
        timeout=timeout,
        host=host,
        arguments=kwargs,
    ).engine()


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
