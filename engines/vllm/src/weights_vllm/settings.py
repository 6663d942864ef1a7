# SPDX-License-Identifier: Apache-2.0
"""What `--model-loader-extra-config` may say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from weights_core.config import structure
from weights_core.errors import PluginConfigError

NAME = "weights"
"""The load format."""

Format = str | list[str]


@attrs.frozen(kw_only=True)
class LoaderSettings:
    """Settings of the load format.

    `format` is as `weights_core.load` takes it; `draft_format` is that of a draft model, where it is to
    be another. `config` maps plugins to their settings, over what `WEIGHTS_CONFIG` says. `timeout`
    is how long a rank waits for the others, in seconds. With `map_files` a model on the host copies
    its weights out of the files' own pages.
    """

    format: Format = "auto"
    draft_format: Format | None = None
    config: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    timeout: float = attrs.field(default=600.0, validator=attrs.validators.gt(0))
    map_files: bool = True

    def format_of(self, role: str) -> Format:
        """Return the format for a model of this role."""
        return self.draft_format if role == "draft" and self.draft_format is not None else self.format


def settings_of(extra: object) -> LoaderSettings:
    """Return the settings in vLLM's extra config.

    Raises:
        PluginConfigError: an unknown setting, or a value of the wrong type; names it.
    """
    given = {} if extra is None else extra
    if not isinstance(given, Mapping):
        raise PluginConfigError(
            f"--model-loader-extra-config of the load format {NAME!r} is no mapping: {given!r}"
        )
    settings: LoaderSettings = structure(NAME, LoaderSettings, given)
    return settings
