# SPDX-License-Identifier: Apache-2.0
"""Settings of plugins: where they come from, and how they become typed values.

Precedence, the later wins: a plugin's defaults; the TOML file that `WEIGHTS_CONFIG` names, one
table per plugin; the `config` argument.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weights_core.errors import PluginConfigError

Settings = Mapping[str, Mapping[str, object]]
"""Plugin name → setting → value."""


def merged(
    argument: Settings | None, environ: Mapping[str, str] = os.environ
) -> dict[str, dict[str, object]]:
    """Return the settings of the `WEIGHTS_CONFIG` file with those of `argument` over them.

    Raises:
        PluginConfigError: the file cannot be read or is not TOML, or settings are not tables.
    """
    path = environ.get("WEIGHTS_CONFIG")
    layers = [("the config argument", argument or {})]
    if path:
        layers.insert(0, (path, _read_toml(Path(path))))
    result: dict[str, dict[str, object]] = {}
    for origin, layer in layers:
        for plugin, settings in layer.items():
            if not isinstance(settings, Mapping):
                raise PluginConfigError(f"{origin}: {plugin!r} must be a table of settings, not {settings!r}")
            result.setdefault(plugin, {}).update(settings)
    return result


def blocked(environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Return the plugin names in `WEIGHTS_BLOCK`, separated by commas."""
    return frozenset(name.strip() for name in environ.get("WEIGHTS_BLOCK", "").split(",") if name.strip())


def structure(plugin: str, cls: type | None, settings: Mapping[str, object]) -> Any:
    """Return an instance of the attrs class `cls` made from `settings`, strictly typed.

    Raises:
        PluginConfigError: an unknown setting, or a value of the wrong type or out of range; names
            the plugin, the setting and, for a misspelt one, the nearest that exists.
    """
    if cls is None:
        if settings:
            raise PluginConfigError(f"plugin {plugin!r} takes no settings, given {sorted(settings)}")
        return None
    if not settings:
        return cls()
    import attrs
    import cattrs

    known = [field.alias or field.name for field in attrs.fields(cls)]
    for name in settings:
        if name not in known:
            raise PluginConfigError(
                f"plugin {plugin!r} has no setting {name!r}{did_you_mean(name, known)}; "
                f"it has {', '.join(known) or 'none'}"
            )
    converter = cattrs.Converter(forbid_extra_keys=True)
    for scalar in (bool, int, float, str):
        converter.register_structure_hook(scalar, _exactly)
    try:
        return converter.structure(dict(settings), cls)
    except cattrs.BaseValidationError as exc:
        wrong = "; ".join(cattrs.transform_error(exc, path=plugin, format_exception=lambda e, _: str(e)))
        raise PluginConfigError(f"settings of plugin {plugin!r}: {wrong}") from exc


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


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise PluginConfigError(f"WEIGHTS_CONFIG names {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise PluginConfigError(f"WEIGHTS_CONFIG names {path}, which is not TOML: {exc}") from exc
