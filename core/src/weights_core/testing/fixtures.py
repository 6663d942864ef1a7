# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests of plugins and engines.

Opt in with `pytest_plugins = ["weights_core.testing.fixtures"]` in a `conftest.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from weights_core import discovery, host
from weights_core.testing.checkpoints import every_dtype, write_checkpoint, zoo
from weights_core.testing.engines import FakeEngine
from weights_core.testing.faults import FAULTS
from weights_core.testing.hosts import installed_as
from weights_core.testing.mocks import MockPlugin, make_mock_plugin
from weights_core.testing.parallel import TensorParallelEngine
from weights_core.testing.recorder import HookRecorder

if TYPE_CHECKING:
    from pytest_mock import MockerFixture


@pytest.fixture
def hook_recorder() -> HookRecorder:
    """Record every hook call of the hosts that `weights_host` makes."""
    return HookRecorder()


@pytest.fixture
def weights_host(
    monkeypatch: pytest.MonkeyPatch, hook_recorder: HookRecorder
) -> Callable[..., host.PluginHost]:
    """Return a function that makes a host of `name=class` plugins, sealed from the machine.

    While the fixture is in use nothing else is found: `PluginHost.discover()`, and so
    `weights_core.load`, see the plugins of the last host made, and no setting of the environment.
    """
    sealed: list[discovery.Installed] = []
    for variable in ("WEIGHTS_CONFIG", "WEIGHTS_BLOCK", "WEIGHTS_TRACE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(host, "installed", lambda: tuple(sealed))

    def make(
        *,
        config: Mapping[str, Mapping[str, object]] | None = None,
        enable: host.Enable = "installed",
        block: tuple[str, ...] = (),
        **plugins: Any,
    ) -> host.PluginHost:
        sealed[:] = [installed_as(name, plugin) for name, plugin in plugins.items()]
        return host.PluginHost(sealed, config=config, enable=enable, block=block, observer=hook_recorder)

    return make


@pytest.fixture
def mock_plugin(mocker: MockerFixture) -> Callable[..., type[MockPlugin]]:
    """Return a function that makes plugins of mocks; see `weights_core.testing.mocks`."""
    return partial(make_mock_plugin, mocker)


@pytest.fixture
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a checkpoint: any tensors, or every dtype and shape; with a fault.

    `make_checkpoint(tensors, shards=3, kind="bin", fault="cut_short")`: `tensors` are the zoo of
    every dtype by default, `fault` is one of `weights_core.testing.faults.FAULTS`.
    """

    def make(
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        shards: int = 3,
        kind: Literal["safetensors", "bin"] = "safetensors",
        fault: str | None = None,
    ) -> Path:
        if fault is not None and fault not in FAULTS:
            raise ValueError(f"no fault {fault!r}; they are {', '.join(FAULTS)}")
        given = zoo(every_dtype()) if tensors is None else tensors
        if kind == "safetensors":  # which holds neither strides nor shared memory
            given = {name: t.clone(memory_format=torch.contiguous_format) for name, t in given.items()}
        path = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), given, shards=shards, kind=kind)
        if fault is not None:
            FAULTS[fault](path)
        return path

    return make


@pytest.fixture
def fake_engine() -> type[FakeEngine]:
    """Return the class of an engine that takes any tensors and remembers what was done to it."""
    return FakeEngine


@pytest.fixture
def tensor_parallel_engine() -> type[TensorParallelEngine]:
    """Return the class of the reference engine that cuts, fuses and duplicates."""
    return TensorParallelEngine
