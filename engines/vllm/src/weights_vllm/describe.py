# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""What vLLM's configuration says of a model that is to be loaded, in the words of weights-core."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import vllm
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import parallel_state
from vllm.model_executor.model_loader import get_architecture_class_name, get_model_cls

from weights_core import Axis, EngineInfo, Layout, Topology, dtypes

_SHARDED_STATE = "model-rank-*-part-*.safetensors"
_NOT_OF_THE_WEIGHTS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})


def describe(vllm_config: VllmConfig, model_config: ModelConfig) -> EngineInfo:
    """Return what is known of the engine before the model is made."""
    role = role_of(model_config)
    accepts, shareable = {Layout.CHECKPOINT}, {}
    if why_alone(vllm_config, model_config) is None:
        accepts.add(Layout.SHARDED)
        shareable[Layout.SHARDED] = "unquantised parameters before post-load are all that a load leaves"
    return EngineInfo(
        name="vllm",
        version=vllm.__version__,
        model=f"{get_architecture_class_name(model_config)}-{_fingerprint(model_config)}",
        dtype=dtypes.from_torch(model_config.dtype),
        quantization=model_config.quantization,
        device=_device(vllm_config),
        topology=_topology(vllm_config, role),
        role=role,
        accepts=accepts,
        shareable=shareable,
        mutates_after_load=_mutates(vllm_config),
        post_load_writes=_post_load_writes(model_config),
    )


def role_of(model_config: ModelConfig) -> str:
    """Return `draft` for the model that proposes tokens to another, else `main`."""
    return "draft" if model_config.runner_type == "draft" else "main"


def group_of(vllm_config: VllmConfig, role: str) -> parallel_state.GroupCoordinator:
    """Return the ranks that load a model together; a draft is loaded by the last stage alone."""
    if role == "draft" or vllm_config.parallel_config.pipeline_parallel_size == 1:
        return parallel_state.get_tp_group()
    return parallel_state.get_world_group()


def checkpoint_of(model_config: ModelConfig, load_config: LoadConfig) -> Path:
    """Return the folder of the checkpoint: a path, or what a hub id has in the local cache."""
    given = model_config.model
    if Path(given).exists():
        return Path(given)
    try:
        folder = snapshot_download(
            given, revision=model_config.revision, cache_dir=load_config.download_dir, local_files_only=True
        )
    except (LocalEntryNotFoundError, ValueError):  # nothing there, or no hub id: the core says what to do
        return Path(given)
    return Path(folder)


def tie_again(model_config: ModelConfig, folder: Path) -> None:
    """Tie the embeddings of a model that vLLM has saved its own way, if its configuration says they are.

    vLLM saves tied ones under the head's name alone. Where it is to load them itself it knows that;
    else it takes them for a checkpoint that has a head of its own, and expects an embedding beside it.
    """
    if not getattr(model_config, "word_embeddings_untied_by_checkpoint", False):
        return
    if next(folder.glob(_SHARDED_STATE), None) is not None:
        model_config.hf_config.tie_word_embeddings = True
        model_config.hf_config.get_text_config().tie_word_embeddings = True
        model_config.word_embeddings_untied_by_checkpoint = False


def why_alone(vllm_config: VllmConfig, model_config: ModelConfig) -> str | None:
    """Return why the parameters before post-load don't stand for the model, or None if they do."""
    if model_config.quantization is not None:
        return "what a quantised load leaves beside parameters was not looked into"
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        return "parameters are offloaded to the host"
    return None


def _mutates(vllm_config: VllmConfig) -> str | None:
    if vllm_config.parallel_config.enable_eplb:
        return "its load balancer moves experts"
    if vllm_config.model_config.enable_sleep_mode:
        return "its sleep mode discards weights and writes them anew"
    if vllm_config.weight_transfer_config is not None:
        return "weight transfer writes them anew"
    return None


def _post_load_writes(model_config: ModelConfig) -> str | None:
    """Say what post-load may write in place; what vLLM does with dense layers only reads, and makes anew."""
    if model_config.is_moe:
        return "vLLM's post-load may rearrange experts in place"
    if model_config.quantization is not None:
        return "vLLM's post-load may pack quantised weights in place"
    if hasattr(get_model_cls(model_config), "process_weights_after_loading"):
        return "the model has a post-load of its own, which may write in place"
    return None


def _topology(vllm_config: VllmConfig, role: str) -> Topology:
    group, tp = group_of(vllm_config, role), parallel_state.get_tp_group()
    axes = {"tp": Axis(tp.world_size, tp.rank_in_group)}
    if role != "draft" and vllm_config.parallel_config.pipeline_parallel_size > 1:
        pp = parallel_state.get_pp_group()
        axes["pp"] = Axis(pp.world_size, pp.rank_in_group)
    if vllm_config.parallel_config.enable_expert_parallel and vllm_config.model_config.is_moe:
        ep = parallel_state.get_ep_group()
        axes["ep"] = Axis(ep.world_size, ep.rank_in_group)
    return Topology(world=Axis(group.world_size, group.rank_in_group), axes=axes)


def _device(vllm_config: VllmConfig) -> str:
    device = torch.device(vllm_config.load_config.device or vllm_config.device_config.device)
    if device.type != "cpu" and device.index is None:
        return f"{device.type}:{torch.accelerator.current_device_index()}"
    return str(device)


def _fingerprint(model_config: ModelConfig) -> str:
    """Return a digest of what the model is built by: slices and renaming depend on it."""
    config: dict[str, Any] = model_config.hf_config.to_dict()
    plain = {name: value for name, value in config.items() if name not in _NOT_OF_THE_WEIGHTS}
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
