# SPDX-License-Identifier: Apache-2.0
"""Our plugins beside plugins of mocks, autospecced from the hooks: who is called, with what, and when."""

import pytest
import torch

import weights_core as w
from weights_consumable.plugin import ConsumablePlugin
from weights_core.testing import fixtures
from weights_core.types import Role
from weights_parallel_shards.plugin import ParallelShardsPlugin

weights_host = fixtures.weights_host
hook_recorder = fixtures.hook_recorder
mock_plugin = fixtures.mock_plugin
make_checkpoint = fixtures.make_checkpoint
fake_engine = fixtures.fake_engine

TENSORS = {f"layers.{i}.weight": torch.full((4, 4), float(i)) for i in range(6)}


@pytest.fixture
def engine(fake_engine):
    return fake_engine(TENSORS)


def test_a_source_before_parallel_shards_declines_and_is_told_how_it_ended(
    weights_host, hook_recorder, mock_plugin, make_checkpoint, engine
):
    tape = mock_plugin(load_weights=w.Declined("no tape is mounted"), cleanup=None)
    host = weights_host(tape=tape, parallel_shards=ParallelShardsPlugin)
    report = w.load(engine, make_checkpoint(TENSORS), ["tape", "parallel_shards"], host=host)
    assert report.provider == "parallel_shards"
    (asked,) = tape.mocks.load_weights.call_args_list
    assert asked.kwargs["engine"] is engine
    assert asked.kwargs["request"].format == ("tape", "parallel_shards")
    assert tape.mocks.cleanup.call_args.kwargs["outcome"].status == "ready"
    assert [call.plugin for call in hook_recorder.of(hook="load_weights")] == ["tape", "parallel_shards"]


@pytest.mark.parametrize("fault", ["cut_short", "garbage"])
def test_parallel_shards_names_the_bad_file_and_asks_nobody_else(
    weights_host, mock_plugin, make_checkpoint, engine, fault
):
    tape = mock_plugin(load_weights=w.Declined("no tape"), cleanup=None)
    host = weights_host(tape=tape, parallel_shards=ParallelShardsPlugin)
    with pytest.raises(w.WeightsError, match=r"model-0000\d-of-00003\.safetensors"):
        w.load(engine, make_checkpoint(TENSORS, fault=fault), ["parallel_shards", "tape"], host=host)
    tape.mocks.load_weights.assert_not_called()
    assert tape.mocks.cleanup.call_args.kwargs["outcome"].status == "failed"


def test_parallel_shards_serves_an_owner_that_asks_below(
    weights_host, hook_recorder, mock_plugin, make_checkpoint, engine
):
    owner = mock_plugin(Role.OWNER, load_weights=lambda request, engine, source: source.open())
    host = weights_host(owner=owner, parallel_shards=ParallelShardsPlugin, consumable=ConsumablePlugin)
    w.load(engine, make_checkpoint(TENSORS), ["owner", "parallel_shards"], host=host)
    below, above = hook_recorder.of(hook="load_weights")
    assert (below.plugin, below.around, below.depth) == ("parallel_shards", ("consumable",), 1)
    assert (above.plugin, above.around, above.depth) == ("owner", (), 0)


@pytest.mark.parametrize(
    "error", [w.Declined("no tape"), w.LoadFailed("torn", mutated=False)], ids=["declined", "failed"]
)
def test_consumable_passes_on_what_a_provider_raises(
    weights_host, hook_recorder, mock_plugin, make_checkpoint, engine, error
):
    host = weights_host(tape=mock_plugin(load_weights=error), consumable=ConsumablePlugin)
    report = w.load(engine, make_checkpoint(TENSORS), "tape", host=host)
    assert report.provider == "disk"
    assert hook_recorder.of("tape", "load_weights")[0].error is error


def test_publishers_and_others_see_a_set_that_was_consumed(
    weights_host, mock_plugin, make_checkpoint, engine
):
    seen = {}

    def look(request, weights, engine):
        seen.update(left=list(weights), known=list(weights.metas))

    publisher = mock_plugin(Role.PUBLISHER, before_post_load=look, publish=None)
    host = weights_host(consumable=ConsumablePlugin, publisher=publisher)
    w.load(engine, make_checkpoint(TENSORS), host=host)
    assert seen == {"left": [], "known": list(seen["known"])}
    assert sorted(seen["known"]) == sorted(TENSORS)
    publisher.mocks.publish.assert_called_once()


def test_what_a_plugin_of_mocks_gets_wrong_is_refused(weights_host, mock_plugin, make_checkpoint, engine):
    host = weights_host(tape=mock_plugin(load_weights=None), consumable=ConsumablePlugin)
    with pytest.raises(w.errors.PluginContractError, match="tape"):
        w.load(engine, make_checkpoint(TENSORS), "tape", host=host)
