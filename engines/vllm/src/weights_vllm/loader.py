# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The load format: vLLM makes the model and runs its post-load, we bring the weights in between."""

from __future__ import annotations

import contextlib
import functools

import attrs
import vllm
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import parallel_state
from vllm.logger import init_logger
from vllm.model_executor.model_loader import BaseModelLoader

from weights_core import Layout, Session, explain, open_session
from weights_core.errors import CleanupError, EngineError, FormatError
from weights_vllm import ranks, version
from weights_vllm.describe import checkpoint_of, describe, group_of, role_of, tie_again, why_alone
from weights_vllm.engine import VllmEngine
from weights_vllm.parameters import without_memory
from weights_vllm.settings import NAME, LoaderSettings, settings_of

log = init_logger("vllm.plugins.weights")  # vLLM shows what is logged below its own name


@attrs.frozen
class _Begun:
    """A load that waits for vLLM to make the model."""

    session: Session
    engine: VllmEngine
    making: contextlib.ExitStack


class WeightsModelLoader(BaseModelLoader):  # type: ignore[misc]
    """`--load-format weights`."""

    def __init__(self, load_config: LoadConfig) -> None:
        """Read the settings.

        Raises:
            PluginConfigError: the extra config says what there is not.
        """
        super().__init__(load_config)
        self._settings = settings_of(load_config.model_loader_extra_config)
        self._begun: _Begun | None = None

    def get_external_weight_memory(self, vllm_config: VllmConfig) -> int:
        """Return the bytes of the weights that lie on the device already, held for other engines too."""
        total = self._held(vllm_config, vllm_config.model_config)
        speculative = vllm_config.speculative_config
        if speculative is None or not parallel_state.get_pp_group().is_last_rank:
            return total
        drafted, load_config = speculative.draft_model_config, speculative.draft_load_config
        load_config = load_config or self.load_config
        if (
            drafted is not None
            and role_of(drafted) == "draft"  # else a method without a model
            and load_config.load_format == NAME
        ):
            total += WeightsModelLoader(load_config)._held(vllm_config, drafted)
        return total

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing is downloaded: the folder of the checkpoint must be there."""
        checkpoint_of(model_config, self.load_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Plan the load, let vLLM make the model, fill it and transform it, and finish."""
        settings = self._settings
        engine = _engine(vllm_config, model_config, self.load_config, settings)
        info = engine.info
        told = version.warning(vllm.__version__)
        if told and info.topology.rank == 0:
            log.warning("%s", told)
        alone = why_alone(vllm_config, model_config)
        if alone:
            log.info("this model's weights cannot be shared: %s", alone)
        with open_session(
            engine,
            engine.checkpoint,
            settings.format_of(info.role),
            settings.config,
            timeout=settings.timeout,
        ) as session:
            try:
                plan = session.resolve()
            except FormatError as exc:
                if alone:
                    exc.add_note(f'this model cannot be shared, {alone}: let "format" name sources only')
                raise
            with contextlib.ExitStack() as making:
                if plan.owner is not None:  # it says where the parameters are to live
                    making.enter_context(without_memory())
                self._begun = _Begun(session, engine, making)
                try:
                    model: nn.Module = super().load_model(vllm_config, model_config, prefix)
                finally:
                    self._begun = None
            session.publish(Layout.FINAL)  # says that post-load is over; nobody offers these
            try:
                report = session.finish()
            except CleanupError as exc:
                if exc.report is None:
                    raise
                log.error("%s", exc)
                report = exc.report
        log.info("%s", report)
        model.weights_report = report  # type: ignore[assignment]
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill the model that vLLM has just made; called by it from `load_model`.

        Raises:
            EngineError: called by something else, for a model that has its weights.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            raise EngineError(
                f"the load format {NAME!r} fills new models only: restart to load other weights"
            )
        begun.making.close()
        begun.engine.model = model
        begun.session.load()
        begun.session.apply()
        begun.session.publish(Layout.SHARDED)
        begun.engine.transforms()

    def _held(self, vllm_config: VllmConfig, model_config: ModelConfig) -> int:
        engine = _engine(vllm_config, model_config, self.load_config, self._settings)
        format = self._settings.format_of(engine.info.role)
        held = explain(engine, engine.checkpoint, format, self._settings.config).held
        return held() if held is not None else 0


def _engine(
    vllm_config: VllmConfig, model_config: ModelConfig, load_config: LoadConfig, settings: LoaderSettings
) -> VllmEngine:
    checkpoint = checkpoint_of(model_config, load_config)
    tie_again(model_config, checkpoint)
    info = describe(vllm_config, model_config)
    group = group_of(vllm_config, info.role).cpu_group
    gather = functools.partial(ranks.gather, group)
    return VllmEngine(info, checkpoint, gather, map_files=settings.map_files)
