# SPDX-License-Identifier: Apache-2.0
"""Settings of plugins: where they come from, and how they become typed values.

Precedence, the later wins: a plugin's defaults; the TOML file that `WEIGHTS_CONFIG` names, one
table per plugin; the `config` argument.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from weights_core.errors import PluginConfigError, PluginLoadError

if TYPE_CHECKING:
    import cattrs

Settings = Mapping[str, Mapping[str, object]]
"""Plugin name → setting → value."""


def merged(
    argument: Settings | None, environ: Mapping[str, str] = os.environ
) -> dict[str, dict[str, object]]:
    """Return the settings of the `WEIGHTS_CONFIG` file with those of `argument` over them.

    Raises:
        PluginConfigError: the file cannot be read or is not TOML, or settings are not tables.
    """
    result: dict[str, dict[str, object]] = {}
    for origin, layer in layers(argument, environ):
        if not isinstance(layer, Mapping):
            raise PluginConfigError(f"{origin}: is plugin's name → setting → value, not {layer!r}")
        for plugin, settings in layer.items():
            if not isinstance(settings, Mapping):
                raise PluginConfigError(f"{origin}: {plugin!r} must be a table of settings, not {settings!r}")
            result.setdefault(plugin, {}).update(settings)
    return result


def layers(
    argument: Settings | None, environ: Mapping[str, str], *, argument_name: str = "the config argument"
) -> list[tuple[str, Settings]]:
    """Return where settings come from, and which each place gives; the later over the earlier.

    Raises:
        PluginConfigError: the file that `WEIGHTS_CONFIG` names cannot be read or is not TOML.
    """
    path = environ.get("WEIGHTS_CONFIG")
    found = [(path, read_toml(Path(path), "WEIGHTS_CONFIG"))] if path else []
    return [*found, (argument_name, argument or {})]


def blocked(environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Return the plugin names in `WEIGHTS_BLOCK`, separated by commas."""
    return frozenset(name.strip() for name in environ.get("WEIGHTS_BLOCK", "").split(",") if name.strip())


def structure(plugin: str, cls: type | None, settings: Mapping[str, object]) -> Any:
    """Return an instance of the attrs class `cls` made from `settings`, strictly typed.

    Raises:
        PluginConfigError: an unknown setting, or a value of the wrong type or out of range; names
            the plugin, the setting and, for a misspelt one, the nearest that exists.
        PluginLoadError: `cls` is no attrs class, or its own defaults don't make an instance.
    """
    if cls is None:
        if settings:
            raise PluginConfigError(f"plugin {plugin!r} takes no settings, given {sorted(settings)}")
        return None
    if not settings:
        try:
            return cls()
        except Exception as exc:  # a third party's validators may raise anything
            raise PluginLoadError(f"plugin {plugin!r} cannot do without settings: {exc}") from exc
    import attrs

    if not attrs.has(cls):
        raise PluginLoadError(f"plugin {plugin!r}: its Config is no attrs class, so it cannot take settings")
    kinds = {field.alias: field.type for field in attrs.fields(attrs.resolve_types(cls)) if field.init}
    for name, value in settings.items():
        if name not in kinds:
            raise PluginConfigError(
                f"plugin {plugin!r} has no setting {name!r}{did_you_mean(name, kinds)}; "
                f"it has {', '.join(kinds) or 'none'}"
            )
        if isinstance(value, str) and _is_only_a_collection(kinds[name]):
            raise PluginConfigError(
                f"settings of plugin {plugin!r}: need a list, got {value!r} @ {plugin}.{name}"
            )
    return _structured(plugin, cls, settings)


def _structured(plugin: str, cls: type, settings: Mapping[str, object]) -> Any:
    import cattrs

    try:
        return _converter().structure(dict(settings), cls)
    except cattrs.BaseValidationError as exc:
        wrong = "; ".join(cattrs.transform_error(exc, path=plugin, format_exception=lambda e, _: str(e)))
        raise PluginConfigError(f"settings of plugin {plugin!r}: {wrong}") from exc
    except cattrs.StructureHandlerNotFoundError as exc:
        raise PluginLoadError(f"plugin {plugin!r}: its Config has a type no setting can have: {exc}") from exc


@functools.cache
def _converter() -> cattrs.Converter:
    """Return the converter of settings; making one takes longer than using it."""
    import cattrs
    from cattrs.strategies import configure_union_passthrough

    converter = cattrs.Converter(forbid_extra_keys=True, use_alias=True)
    for scalar in (bool, int, float, str):
        converter.register_structure_hook(scalar, _exactly)
    configure_union_passthrough(bool | int | float | str | None, converter)
    return converter


def _is_only_a_collection(kind: type | None) -> bool:
    """Whether a string can only be a mistake: a list of its letters is what nobody means."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    origins = [get_origin(k) or k for k in kinds if k is not NoneType]
    return all(isinstance(o, type) and issubclass(o, Collection) and o not in (str, bytes) for o in origins)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _exactly(value: object, expected: type) -> object:
    if type(value) is expected:
        return value
    if expected is float and type(value) is int:
        return float(value)
    raise TypeError(f"need {expected.__name__}, got {value!r}")


def read_toml(path: Path, named_by: str) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        PluginConfigError: it cannot be read, or is not TOML; says in which line.
    """
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise PluginConfigError(f"{named_by} names {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise PluginConfigError(f"{named_by} names {path}, which is not TOML: {exc}") from exc
