# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations

from weights_vllm.settings import NAME


def register() -> None:
    """Make the load format known to vLLM; may be called again."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader, register_model_loader

    from weights_vllm.loader import WeightsModelLoader

    try:
        known = get_model_loader(LoadConfig(load_format=NAME))
    except ValueError:  # not known yet
        known = None
    if not isinstance(known, WeightsModelLoader):  # to register again would warn
        register_model_loader(NAME)(WeightsModelLoader)
