# SPDX-License-Identifier: Apache-2.0
"""What may be asked of `from_pretrained`, and what is refused with a reason."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from weights_core.errors import EngineError

log = logging.getLogger("weights.transformers")

TESTED = {"transformers": ((5, 23), (5, 24)), "diffusers": ((0, 42), (0, 43))}
"""The versions this adapter is tested with: from the first on, below the second."""

_LOCAL = "weights reads a local folder: download it first, and leave this out"
_OWN = "weights reads the checkpoint itself: leave this out"
REFUSED = {
    **dict.fromkeys(
        ("cache_dir", "force_download", "proxies", "token", "revision", "code_revision"),
        _LOCAL,
    ),
    **dict.fromkeys(
        (
            "state_dict",
            "gguf_file",
            "weights_only",
        ),
        _OWN,
    ),
    "device": "name the device in device_map",
    "subfolder": "give that folder itself as the path",
    "use_safetensors": "safetensors files come first: to read others, give the path of the file or the index",
    "variant": "give the path of the variant's file or index, or a folder where no other weights are",
    "disable_mmap": "give map_files=False, which copies everything",
    **dict.fromkeys(
        ("max_memory", "offload_folder", "offload_buffers"), "offloading is not served: load to one device"
    ),
    "adapter_kwargs": "adapters are not served: load the model, then the adapter into it",
    "adapter_name": "adapters are not served: load the model, then the adapter into it",
    "output_loading_info": "the report of load() says what was missing and what was unused",
}
DEFAULTS: dict[str, tuple[object, ...]] = {
    "adapter_kwargs": ({},),
    "adapter_name": ("default",),
    "disable_mmap": (False,),
    "force_download": (False,),
    "offload_buffers": (False,),
    "output_loading_info": (False,),
    "revision": ("main",),
    "subfolder": ("",),
    "use_safetensors": (True,),  # checked by `check_safetensors`
    "weights_only": (True,),
}
"""Values that ask for nothing, or for what is done in any case, as None does: many hand on all arguments."""

_OF_LOADING = (
    "attn_implementation",
    "device_map",
    "device_mesh",
    "distributed_config",
    "dtype",
    "experts_implementation",
    "ignore_mismatched_sizes",
    "kernel_config",
    "key_mapping",
    "quantization_config",
    "torch_dtype",
    "tp_plan",
    "tp_size",
    "use_kernels",
)
"""What is `from_pretrained`'s own, and nothing of the model's configuration."""


_ELSEWHERE = ("local_files_only", *REFUSED)
"""What says where to look, and is answered already."""


def check_version(package: str) -> str:
    """Return the installed version; warn if this adapter was not tested with it."""
    version = _version(package)
    if not is_tested(package):
        names = [".".join(map(str, one)) for one in TESTED[package]]
        log.warning(
            "%s %s is installed; weights-transformers is tested with %s up to, not including, %s",
            package,
            version,
            *names,
        )
    return version


def is_tested(package: str) -> bool:
    """Whether this adapter was tested with the installed version."""
    first, end = TESTED[package]
    return first <= tuple(map(int, re.findall(r"\d+", _version(package))[:2])) < end


def _version(package: str) -> str:
    version: str = importlib.import_module(package).__version__  # its metadata takes longer to read
    return version


def is_auto(cls: type) -> bool:
    """Whether `cls` is one of Transformers' Auto classes of models, or derived from one."""
    return hasattr(cls, "from_config") and any(
        base.__module__.startswith("transformers.models.auto") for base in cls.__mro__
    )


def check_class(cls: object) -> None:
    """Refuse what is no class of a Transformers model.

    Raises:
        EngineError: saying what to use instead.
    """
    from transformers import PreTrainedModel

    if isinstance(cls, type) and (issubclass(cls, PreTrainedModel) or is_auto(cls)):
        if not is_auto(cls) and getattr(cls, "config_class", None) is None:
            raise EngineError(
                f"{cls.__name__} is the class of no model: give one of its own, or an Auto class"
            )
        return
    if isinstance(cls, PreTrainedModel):
        raise EngineError(f"give the class {type(cls).__name__}, not a model of it")
    name = cls.__name__ if isinstance(cls, type) else repr(cls)
    base = cls.__module__.partition(".")[0] if isinstance(cls, type) else ""
    hint = {
        "diffusers": "; weights_transformers.load_pipeline loads pipelines of diffusers",
        "torch": "; load it with weights_core.TorchEngine",
    }.get(base, "")
    raise EngineError(f"{name} is no PyTorch model class of Transformers, nor an Auto class of models{hint}")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of `from_pretrained` that have no meaning here, unless they have their default.

    Raises:
        EngineError: naming the argument, and what to do.
    """
    for name, value in arguments.items():
        if name in REFUSED and value is not None and value not in DEFAULTS.get(name, ()):
            raise EngineError(f"argument {name!r}: {REFUSED[name]}")


def check_safetensors(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Refuse a folder without safetensors files to those who ask for them.

    Raises:
        EngineError: there are none.
    """
    if arguments.get("use_safetensors") and not any(folder.glob("*.safetensors")):
        raise EngineError(f"argument 'use_safetensors': {folder} holds no .safetensors file")


def one_device(arguments: Mapping[str, Any]) -> str | None:
    """Return the device of a `device_map`, or None without one.

    Raises:
        EngineError: it names several devices, or leaves the choice to Transformers.
    """
    given = arguments.get("device_map")
    if isinstance(given, Mapping):
        if len({str(device) for device in given.values()}) > 1:
            raise EngineError("argument 'device_map': several devices are not served; name one")
        given = next(iter(given.values()), None)
    if given is None:
        return None
    if isinstance(given, int):
        return f"cuda:{given}"
    if str(given) in ("auto", "balanced", "balanced_low_0", "disk", "meta", "sequential"):
        raise EngineError(f"argument 'device_map': {str(given)!r} is not served; name one device")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if str(given) == "cuda" else str(given)


def asked_dtype(arguments: Mapping[str, Any]) -> Any:
    """Return what is asked for as `dtype`, or by its older name; None if nothing is."""
    dtype = arguments.get("dtype")
    return arguments.get("torch_dtype") if dtype is None else dtype


def configuration(
    cls: Any, folder: Path, given: object, arguments: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the model's configuration, and the arguments that are left for `from_pretrained`.

    Raises:
        EngineError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if (folder / "adapter_config.json").is_file() and importlib.util.find_spec("peft") is not None:
        raise EngineError(f"{folder} holds an adapter, which is not served: load the model without it")
    check_safetensors(folder, arguments)
    left = {name: value for name, value in arguments.items() if name not in _ELSEWHERE}
    if isinstance(given, PreTrainedConfig):
        return given, left
    if given is not None:
        raise EngineError(f"model_config is to be a configuration of Transformers, not {given!r}")
    if not (folder / "config.json").is_file():
        raise EngineError(f"{folder} has no config.json: give model_config=")
    kept = {name: left.pop(name) for name in _OF_LOADING if name in left}
    kind = AutoConfig if is_auto(cls) else cls.config_class
    try:
        config, unused = cast(Any, kind).from_pretrained(
            folder, return_unused_kwargs=True, local_files_only=True, **left
        )
    except Exception as exc:  # a third party's configuration class may raise anything
        raise EngineError(f"{folder}/config.json: {type(exc).__name__}: {exc}") from exc
    unused.pop("local_files_only", None)
    return config, {**unused, **kept}


def model_class(cls: Any, config: Any, folder: Path, *, trusted: bool) -> tuple[Any, Any]:
    """Return the class that an Auto class stands for, and the configuration that it takes.

    Auto classes themselves insist on a name or path. This does as they do, with their mapping.

    Raises:
        EngineError: there is none for this configuration.
    """
    if not is_auto(cls):
        return cls, config
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import _get_model_class

    own_code = (getattr(config, "auto_map", None) or {}).get(cls.__name__)
    if own_code is not None and trusted:
        return get_class_from_dynamic_module(own_code, folder, local_files_only=True), config
    if type(config) not in cls._model_mapping:
        hint = ": it is code of the checkpoint's own, give trust_remote_code=True" if own_code else ""
        raise EngineError(f"{cls.__name__} has no class for a {type(config).__name__}{hint}")
    found = _get_model_class(config, cls._model_mapping)
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(found, "config_class", None) == text:
        whole, config = config, config.get_text_config()
        if getattr(whole, "quantization_config", None) is not None:
            config.quantization_config = whole.quantization_config
    return found, config


def quantization_of(config: Any, arguments: Mapping[str, Any]) -> str | None:
    """Return the name of the quantisation, or None."""
    for found in (arguments.get("quantization_config"), *_quantizations(config)):
        if found is not None:
            method = (
                found.get("quant_method")
                if isinstance(found, Mapping)
                else getattr(found, "quant_method", None)
            )
            return str(getattr(method, "value", method))
    return None


def block_size(config: Any, arguments: Mapping[str, Any]) -> Sequence[int] | None:
    """Return the size of the blocks that have a scale each: the checkpoint's, else as asked for, or None."""
    for given in (*_quantizations(config), arguments.get("quantization_config")):
        name = "weight_block_size"
        found = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
        if isinstance(found, list | tuple) and all(isinstance(one, int) and one > 0 for one in found):
            return found
    return None


def _quantizations(config: Any) -> tuple[Any, Any]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "quantization_config", None), getattr(text, "quantization_config", None)


def finish(model: Any, folder: Path, arguments: Mapping[str, Any], *, from_auto: bool) -> None:
    """Give a model what `from_pretrained` finds in the folder beside the weights, and its name."""
    model.name_or_path = model.config.name_or_path = str(folder)
    for module in model.modules():  # the parts and their configurations are built with the name "None"
        own = vars(module)  # asking a module for what it has not takes a while
        if own.get("name_or_path") == "None":
            module.name_or_path = str(folder)
        config: Any = own.get("config")
        if getattr(config, "name_or_path", "") == "None":
            config.name_or_path = str(folder)
    if not model.can_generate() or arguments.get("generation_config") is not None:
        return
    others = {k: v for k, v in arguments.items() if k not in (*_OF_LOADING, *_ELSEWHERE, "generation_config")}
    trusted = others.pop("trust_remote_code", None)
    model.adjust_generation_fn(
        None,
        from_auto,
        None,
        str(folder),
        cache_dir=None,
        force_download=False,
        proxies=None,
        local_files_only=True,
        token=None,
        revision="main",
        subfolder="",
        trust_remote_code=trusted,
        **({} if from_auto else others),
    )


def with_ranks(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with tensor parallelism as Transformers wants it now.

    Raises:
        EngineError: another kind of parallelism is asked for, or what there is not.
    """
    left = dict(arguments)
    plan, size = left.pop("tp_plan", None), left.pop("tp_size", None)
    asked = left.pop("distributed_config", None)
    if plan is None and size is None and asked is None:
        return left
    from transformers.distributed.configuration_utils import DistributedConfig

    if asked is not None and (plan is not None or size is not None):
        raise EngineError("argument 'tp_plan': give it in 'distributed_config', or leave that out")
    try:
        if asked is None:
            asked = DistributedConfig(tp_plan=plan, tp_size=size)
        elif isinstance(asked, Mapping):
            asked = DistributedConfig.from_dict(dict(asked))
    except (TypeError, ValueError) as exc:
        raise EngineError(f"argument 'distributed_config': {exc}") from exc
    for name in ("pp_size", "dp_size", "fsdp_size"):
        found = getattr(asked, name, None)
        if found is not None and found > 1:
            raise EngineError(
                f"argument 'distributed_config': {name}={found}; only tensor parallelism is served"
            )
    return {**left, "distributed_config": asked}
