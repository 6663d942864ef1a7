# SPDX-License-Identifier: Apache-2.0
"""Pipelines of diffusers: each component with weights is a load of its own, the rest is diffusers'."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch

import weights_core as w
from weights_core.checkpoint import PIPELINE_INDEX, components, find, must_exist
from weights_core.config import Settings
from weights_core.errors import CheckpointError, EngineError
from weights_transformers import arguments as given
from weights_transformers.alone import ALONE
from weights_transformers.api import check_settings, open_engine
from weights_transformers.opening import headers

if TYPE_CHECKING:
    from weights_core import PluginHost

log = logging.getLogger("weights.transformers")


@attrs.frozen(eq=False)
class LoadedPipeline:
    """A pipeline, and what the load of each component did. Each lease ends with its component."""

    pipeline: Any
    reports: Mapping[str, w.LoadReport]


def pipeline_from_pretrained(cls: Any, path: Path | str, **kwargs: Any) -> Any:
    """Return the pipeline that `load_pipeline` loads, alone; arguments and errors are the same."""
    return load_pipeline(cls, path, **kwargs).pipeline


@torch.inference_mode(False)  # as `load`
def load_pipeline(
    cls: Any,
    path: Path | str,
    *,
    format: str | Sequence[str] = "auto",
    config: Settings | None = None,
    host: PluginHost | None = None,
    timeout: float = 600.0,
    device: str = "cpu",
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    map_files: bool = True,
    **kwargs: Any,
) -> LoadedPipeline:
    """Return the pipeline that `cls.from_pretrained(path, dtype=…, **kwargs)` gives, by `format`.

    Every component that is a model of diffusers or of Transformers is loaded by weights, unless `kwargs`
    gives it; diffusers does the rest. What a model keeps in float32 stays so. A component that is
    quantised as it is loaded is left to diffusers, with a warning.

    Args:
        cls: `DiffusionPipeline`, or a class derived from it.
        path: the pipeline's folder.
        format: as `from_pretrained`.
        config: as `from_pretrained`.
        host: as `from_pretrained`.
        timeout: as `from_pretrained`.
        device: where the weights are to live.
        dtype: of all components, or by component's name, with `default` for the others.
        map_files: as `from_pretrained`.
        kwargs: as `cls.from_pretrained` takes them: components that are there already, settings.

    Raises:
        WeightsError: a component cannot be loaded; the leases of the others are closed.
    """
    given.check_version("diffusers")
    given.check_version("transformers")
    check_settings(config)
    given.check_arguments({k: v for k, v in kwargs.items() if k not in ("token", "local_files_only")})
    for name in ("device_map", "quantization_config"):
        if kwargs.pop(name, None) is not None:
            raise EngineError(f"argument {name!r} is not served for pipelines; device= names one device")
    older = kwargs.pop("torch_dtype", None)  # diffusers' name of dtype until 1.0
    dtype = _checked(older if dtype is None else dtype)
    folder = Path(path)
    if not (isinstance(cls, type) and hasattr(cls, "load_config") and hasattr(cls, "components")):
        raise EngineError(f"{getattr(cls, '__name__', cls)} is no pipeline class of diffusers")
    must_exist(folder)
    have = components(folder)
    if not have:
        raise CheckpointError(
            f"is no pipeline: it has no {PIPELINE_INDEX} that names a folder with weights", file=folder
        )
    cls = _concrete(cls, folder)
    engines: dict[str, w.Engine] = {}
    for name, kind in _classes(cls, folder).items():
        if name in have and name not in kwargs:
            given.check_safetensors(folder / name, kwargs)
            engine = _engine(kind, folder, name, device, _dtype_of(dtype, name), map_files=map_files)
            if engine is not None:
                engines[name] = engine
    reports = w.load_pipeline(engines, folder, format, config, host=host, timeout=timeout)
    try:
        pipeline = _assembled(cls, path, engines, device, dtype, kwargs)
    except EngineError:
        for report in reports.values():
            report.lease.close()
        raise
    return LoadedPipeline(pipeline, reports)


def _assembled(
    cls: Any,
    path: Path | str,
    engines: Mapping[str, w.Engine],
    device: str,
    dtype: Any,
    kwargs: Mapping[str, Any],
) -> Any:
    """Have diffusers make the pipeline of the models that were loaded, and load what is left."""
    models = {name: cast(Any, engine).model for name, engine in engines.items()}
    for name, engine in engines.items():
        if engine.info.name == "diffusers":
            models[name].to(device)  # buffers that no checkpoint holds
    asked = dict(dtype) if isinstance(dtype, Mapping) else dtype
    try:
        with ALONE:
            pipeline = cls.from_pretrained(path, dtype=asked, **models, **kwargs)
    except Exception as exc:  # diffusers may raise anything
        raise EngineError(
            f"diffusers refuses to assemble {cls.__name__}: {type(exc).__name__}: {exc}"
        ) from exc
    ignored = [name for name, model in models.items() if getattr(pipeline, name, None) is not model]
    if ignored:
        raise EngineError(f"{cls.__name__} loaded {', '.join(ignored)} by itself, beside what it was given")
    return pipeline


def _concrete(cls: Any, folder: Path) -> Any:
    """Return the class that the pipeline's index names, in the place of `DiffusionPipeline`.

    That does not know which components are optional, and loads those again though they are given.
    """
    import diffusers

    named = cls.load_config(folder).get("_class_name")
    found = getattr(diffusers, named, None) if isinstance(named, str) else None
    return found if cls.__name__ == "DiffusionPipeline" and found is not None else cls


def _classes(cls: Any, folder: Path) -> dict[str, Any]:
    """Return the class of each component that the pipeline's index names and that can be found here."""
    import diffusers

    found: dict[str, Any] = {}
    for name, entry in cls.load_config(folder).items():
        if name.startswith("_") or not isinstance(entry, list | tuple) or len(entry) != 2 or not all(entry):
            continue
        library, kind = map(str, entry)
        if library in ("diffusers", "transformers"):
            found[name] = getattr(importlib.import_module(library), kind, None)
        else:
            found[name] = getattr(getattr(diffusers.pipelines, library, None), kind, None)
    return found


def _engine(
    kind: Any, folder: Path, name: str, device: str, dtype: torch.dtype | None, *, map_files: bool
) -> w.Engine | None:
    """Return the engine of a component, or None if it is for diffusers to load."""
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin
    from transformers import PreTrainedModel

    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        more: dict[str, Any] = {} if device == "cpu" else {"device_map": device}
        if dtype is not None:
            more["dtype"] = dtype
        return open_engine(kind, folder, component=name, map_files=map_files, **more)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        return None
    root = find(folder, name).root
    model: Any = kind
    try:
        settings = model.load_config(root, local_files_only=True)
    except Exception as exc:  # diffusers may raise anything
        raise EngineError(f"component {name!r}: diffusers cannot read {root}/config.json: {exc}") from exc
    if settings.get("quantization_config") is not None:
        log.warning("component %s is quantised: diffusers loads it by itself", name)
        return None
    from weights_transformers.diffusion import blueprint
    from weights_transformers.engine import TransformersEngine

    traced = blueprint(model, root, headers(find(folder, name)), dtype)
    return TransformersEngine(
        traced,
        engine="diffusers",
        version=diffusers.__version__,
        device=device,
        component=name,
        map_files=map_files,
    )


def _checked(given: Any) -> Any:
    """Return one dtype or a mapping of them as it is.

    Raises:
        EngineError: it is neither.
    """
    for one in given.values() if isinstance(given, Mapping) else (given,):
        if one is not None and not isinstance(one, torch.dtype):
            raise EngineError(f"dtype is to be a torch.dtype, or one by component's name, not {one!r}")
    return given


def _dtype_of(given: Any, name: str) -> torch.dtype | None:
    if not isinstance(given, Mapping):
        return given  # type: ignore[no-any-return]
    found: torch.dtype = given.get(name, given.get("default", torch.float32))
    return found
