# SPDX-License-Identifier: Apache-2.0

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import attrs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import weights_core
from weights_core import Axis, EngineInfo, Fit, Layout, LoadRequest, Role, Topology
from weights_core.errors import (
    CheckpointError,
    CoverageError,
    FormatUnresolvedError,
    NoProviderError,
    PluginConfigError,
    WeightsError,
)
from weights_core.testing import Group, host_of, random_tensor, write_checkpoint
from weights_core.torch_engine import TorchEngine
from weights_parallel_shards import plugin
from weights_parallel_shards.plugin import ParallelShardsConfig, ParallelShardsPlugin

PATIENCE = 20
"""Seconds after which a test gives up on what should have happened at once."""


class Below:
    """What is handed to the plugin as the rest of the plan, which it must not ask."""

    def open(self):
        raise NoProviderError("nothing is below", reasons={})


def request_for(path, **info):
    return LoadRequest(checkpoint=path, engine=EngineInfo(name="test", version="1", **info))


def plugin_with(**settings):
    return ParallelShardsPlugin(ParallelShardsConfig(**settings))


def host(**settings):
    return host_of(parallel_shards=ParallelShardsPlugin, config={"parallel_shards": settings})


def tensors_of(count, seed=0):
    return {f"t{i:03d}": random_tensor(16, 8, seed=seed + i) for i in range(count)}


def model_for(tensors, device="meta"):
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(torch.empty_like(tensor, device=device), False))
    return model


def assert_holds(model, tensors):
    have = model.state_dict()
    assert have.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(have[name].view(torch.uint8), tensor.view(torch.uint8))


def threads():
    return set(threading.enumerate())


def open_files(folder):
    paths = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            paths.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [path for path in paths if path.startswith(str(folder))]


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(tmp_path):
    before = threads()
    yield
    assert threads() <= before
    assert open_files(tmp_path) == []


# Claims -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(("shards", "count"), [(2, 4), (7, 8), (5, 1)])
def test_claims_several_files_as_a_good_source(tmp_path, kind, shards, count):
    folder = write_checkpoint(tmp_path, tensors_of(7), shards=shards, kind=kind)
    claim = plugin_with(threads=count).resolve_format(request_for(folder))
    assert claim.roles == {Role.SOURCE}
    assert claim.fit is Fit.GOOD
    assert claim.layouts == {Layout.CHECKPOINT}
    assert claim.reason == f"reads {shards} files, up to {count} chunks at a time"


def test_claims_a_single_large_file_as_a_good_source(tmp_path, monkeypatch):
    request = request_for(write_checkpoint(tmp_path, tensors_of(2)))
    monkeypatch.setattr(plugin, "SMALL", (tmp_path / "model.safetensors").stat().st_size)
    claim = plugin_with().resolve_format(request)
    assert claim.roles == {Role.SOURCE}
    assert claim.fit is Fit.GOOD
    assert claim.reason == "reads 1 file, up to 8 chunks at a time"


def test_claims_more_readers_for_a_network_file_system_and_for_a_gpu(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, tensors_of(4), shards=2)
    assert "up to 15 chunks" in plugin_with().resolve_format(request_for(folder, device="cuda:0")).reason
    monkeypatch.setattr(plugin, "file_system", lambda path: "nfs4")
    assert "up to 16 chunks" in plugin_with().resolve_format(request_for(folder)).reason
    assert "up to 3 chunks" in plugin_with(threads=3).resolve_format(request_for(folder)).reason


def test_claims_a_single_small_file_only_when_named(tmp_path):
    request = request_for(write_checkpoint(tmp_path, tensors_of(2)))
    claim = plugin_with().resolve_format(request)
    assert claim.roles == set()
    assert "single small file" in claim.reason
    claim = plugin_with().resolve_format(attrs.evolve(request, format=("parallel_shards",)))
    assert claim.roles == {Role.SOURCE}
    assert claim.fit is Fit.POSSIBLE


def test_claims_an_index_and_a_file_given_by_their_paths(tmp_path):
    folder = write_checkpoint(tmp_path, tensors_of(4), shards=2)
    index = plugin_with().resolve_format(request_for(folder / "model.safetensors.index.json"))
    assert index.fit is Fit.GOOD
    one = plugin_with().resolve_format(request_for(folder / "model-00001-of-00002.safetensors"))
    assert one.fit is Fit.POSSIBLE


def test_refuses_a_folder_without_weights_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    claim = plugin_with().resolve_format(request_for(tmp_path))
    assert claim.roles == frozenset()
    assert "holds no weights" in claim.reason
    assert str(tmp_path) in claim.reason


def test_refuses_what_does_not_exist(tmp_path):
    claim = plugin_with().resolve_format(request_for(tmp_path / "nowhere"))
    assert claim.roles == frozenset()
    assert "no such file or folder" in claim.reason


def test_naming_the_plugin_for_a_folder_without_weights_says_why_it_cannot(tmp_path):
    model = nn.Linear(1, 1, device="meta")
    with pytest.raises(FormatUnresolvedError, match=r"'parallel_shards' cannot be served.*holds no weights"):
        weights_core.load(TorchEngine(model), tmp_path, "parallel_shards", host=host())
    assert model.weight.is_meta


def test_refuses_a_checkpoint_that_lacks_a_shard(tmp_path):
    folder = write_checkpoint(tmp_path, tensors_of(6), shards=3, index=False)
    (folder / "model-00002-of-00003.safetensors").unlink()
    claim = plugin_with().resolve_format(request_for(folder))
    assert claim.roles == frozenset()
    assert "1 of 3 shards" in claim.reason


def test_claiming_imports_no_torch_and_starts_no_thread(tmp_path):
    folder = write_checkpoint(tmp_path, tensors_of(4), shards=2)
    code = """
import sys, threading
from weights_core import EngineInfo, LoadRequest
from weights_parallel_shards import plugin
from weights_parallel_shards.plugin import ParallelShardsConfig, ParallelShardsPlugin
request = LoadRequest(checkpoint=sys.argv[1], engine=EngineInfo(name="test", version="1"))
claim = ParallelShardsPlugin(ParallelShardsConfig()).resolve_format(request)
print(claim.fit.name, "torch" in sys.modules, threading.active_count())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["GOOD", "False", "1"]


# Settings ---------------------------------------------------------------------------------------


def test_settings_by_default():
    config = ParallelShardsConfig()
    assert (config.threads, config.max_host_bytes, config.direct) == ("auto", "auto", "auto")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"threads": 0}, "threads"),
        ({"threads": -1}, "threads"),
        ({"threads": "4"}, "threads"),
        ({"threads": 2.0}, "threads"),
        ({"threads": True}, "threads"),
        ({"threads": "many"}, "threads"),
        ({"direct": "sometimes"}, "direct"),
        ({"max_host_bytes": 0}, "max_host_bytes"),
        (
            {"max_host_bytes": 1 << 19},
            "max_host_bytes' of 524288 is too little to read with: give at least 1048576",
        ),
        ({"max_host_bytes": "1 GB"}, "max_host_bytes"),
        ({"thread": 4}, "no setting 'thread' .did you mean 'threads'"),
        ({"threads": 4, "nonsense": 1}, "no setting 'nonsense'"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path, settings, why):
    folder = write_checkpoint(tmp_path, tensors_of(4), shards=2)
    model = model_for(tensors_of(4))
    with pytest.raises(PluginConfigError, match=f"(?s)parallel_shards.*{why}"):
        weights_core.load(TorchEngine(model), folder, host=host(**settings))
    assert model.t000.is_meta


@pytest.mark.parametrize(
    "settings", [{}, {"threads": 1}, {"threads": 64, "max_host_bytes": 64 << 20}, {"direct": "never"}]
)
def test_settings_reach_the_load(tmp_path, settings):
    tensors = tensors_of(9)
    model = model_for(tensors)
    report = weights_core.load(
        TorchEngine(model), write_checkpoint(tmp_path, tensors, shards=3), host=host(**settings)
    )
    assert report.provider == "parallel_shards"
    (decision,) = [d for d in report.plan.decisions if d.plugin == "parallel_shards"]
    assert decision.reason == f"reads 3 files, up to {settings.get('threads', 8)} chunks at a time"
    assert_holds(model, tensors)


# Loads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [2, 7])
def test_loads_a_model_as_the_oracle_has_it(tmp_path, kind, shards, device):
    folder = write_checkpoint(tmp_path, tensors_of(15), shards=shards, kind=kind)
    want = {}
    for file in folder.glob(f"*.{kind}"):
        want |= load_file(file) if kind == "safetensors" else torch.load(file, weights_only=True)
    model = model_for(want, device)
    report = weights_core.load(TorchEngine(model), folder, host=host())
    assert report.provider == "parallel_shards"
    assert report.nbytes == 15 * 16 * 8 * 4
    assert_holds(model, want)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_loads_what_must_be_cast(tmp_path, device):
    tensors = tensors_of(9)
    model = model_for({name: t.to(torch.bfloat16) for name, t in tensors.items()}, device)
    folder = write_checkpoint(tmp_path, tensors, shards=3)
    weights_core.load(TorchEngine(model, cast=True), folder, host=host(max_host_bytes=1 << 20))
    assert_holds(model, {name: t.to(torch.bfloat16) for name, t in tensors.items()})


def test_is_preferred_to_disk_for_several_files(tmp_path):
    tensors = tensors_of(4)
    folder = write_checkpoint(tmp_path, tensors, shards=2)
    report = weights_core.load(TorchEngine(model_for(tensors)), folder, host=host())
    assert report.plan.sources == ("parallel_shards", "disk")
    assert [attempt.plugin for attempt in report.attempts] == ["parallel_shards"]


def test_a_single_file_is_read_without_a_thread(tmp_path, monkeypatch):
    tensors = tensors_of(4)
    folder = write_checkpoint(tmp_path, tensors)
    started = []
    start = threading.Thread.start

    def recorded(thread):
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", recorded)
    before = threads()
    weights = plugin_with().load_weights(request_for(folder), TorchEngine(model_for(tensors)), Below())
    with contextlib.closing(weights):
        for name, tensor in weights.stream():
            assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8))
            assert threads() == before
    assert weights.provider == "parallel_shards"
    assert started == []


def test_a_single_file_loads_a_model(tmp_path):
    tensors = tensors_of(4)
    model = model_for(tensors)
    folder = write_checkpoint(tmp_path, tensors)
    report = weights_core.load(TorchEngine(model), folder, "parallel_shards", host=host())
    assert report.provider == "parallel_shards"
    assert_holds(model, tensors)


def test_notes_on_files_that_were_passed_over_reach_the_report(tmp_path):
    tensors = tensors_of(4)
    folder = write_checkpoint(tmp_path, tensors, shards=2)
    write_checkpoint(folder, {"x": torch.zeros(1)}, stem="adapter")
    report = weights_core.load(TorchEngine(model_for(tensors)), folder, host=host())
    assert report.provider == "parallel_shards"
    assert any("adapter.safetensors" in note for note in report.notes)


def test_loads_side_by_side_from_one_host(tmp_path):
    every = [tensors_of(24, seed=100 * number) for number in range(4)]
    folders = [
        write_checkpoint(tmp_path / str(number), tensors, shards=number + 2)
        for number, tensors in enumerate(every)
    ]
    models = [model_for(tensors) for tensors in every]
    shared = host(threads=3, max_host_bytes=1 << 20)
    begin = threading.Barrier(4)

    def one(number):
        begin.wait(PATIENCE)
        return weights_core.load(TorchEngine(models[number]), folders[number], host=shared)

    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(one, range(4), timeout=60))
    for number in range(4):
        assert reports[number].provider == "parallel_shards"
        assert reports[number].checkpoint == folders[number]
        assert_holds(models[number], every[number])


def test_loads_side_by_side_of_one_checkpoint(tmp_path):
    tensors = tensors_of(24)
    folder = write_checkpoint(tmp_path, tensors, shards=4)
    models = [model_for(tensors) for _ in range(4)]
    shared = host(threads=2)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(weights_core.load, TorchEngine(m), folder, host=shared) for m in models]
        wait(jobs, timeout=60)
    for job, model in zip(jobs, models, strict=True):
        assert job.result(timeout=0).provider == "parallel_shards"
        assert_holds(model, tensors)


# Checkpoints that are wrong ---------------------------------------------------------------------


@pytest.fixture
def four_shards(tmp_path):
    tensors = tensors_of(12)
    return write_checkpoint(tmp_path, tensors, shards=4), model_for(tensors)


def assert_nothing_was_applied(model):
    assert all(parameter.is_meta for parameter in model.parameters())


def fails(folder, model, match):
    """Load, which must fail; while the error is at hand no thread and no file may be left."""
    before = threads()
    with pytest.raises(CheckpointError, match=match) as caught:
        weights_core.load(TorchEngine(model), folder, host=host())
    assert threads() == before
    assert open_files(folder) == []
    assert_nothing_was_applied(model)
    return caught.value


def test_a_tensor_in_two_shards_is_one_error_and_nothing_is_applied(four_shards):
    folder, model = four_shards
    file = folder / "model-00003-of-00004.safetensors"
    write_checkpoint(folder, {**load_file(file), "t000": torch.zeros(16, 8)}, stem=file.stem)
    error = fails(folder, model, "is also in model-00001-of-00004.safetensors")
    assert error.tensor == "t000"
    assert error.file == file
    assert error.plugin == "parallel_shards"


def test_a_tensor_that_the_index_names_and_no_shard_holds_is_one_error(four_shards):
    folder, model = four_shards
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["ghost"] = "model-00002-of-00004.safetensors"
    index.write_text(json.dumps(listed))
    error = fails(folder, model, "places it here, and it is not")
    assert error.tensor == "ghost"
    assert error.file == folder / "model-00002-of-00004.safetensors"


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_malformed_shard_is_an_error_that_leaves_no_file_open(tmp_path, kind, number):
    tensors = tensors_of(12)
    folder = write_checkpoint(tmp_path, tensors, shards=4, kind=kind)
    file = sorted(folder.glob(f"*.{kind}"))[number - 1]
    file.write_bytes(file.read_bytes()[:-20])
    error = fails(folder, model_for(tensors), r"truncated|not a readable file")
    assert error.file == file


def test_several_malformed_shards_are_one_error_that_leaves_no_file_open(four_shards):
    folder, model = four_shards
    for number in (1, 2, 3, 4):
        (folder / f"model-0000{number}-of-00004.safetensors").write_bytes(b"short")
    fails(folder, model, "too short")


def test_a_missing_parameter_is_found_before_anything_is_read(four_shards):
    folder, model = four_shards
    model.register_parameter("more", nn.Parameter(torch.empty(1, device="meta")))
    session = weights_core.open_session(TorchEngine(model), folder, host=host())

    def steps():
        with session:
            session.resolve()
            session.load()
            session.apply()

    with pytest.raises(CoverageError, match="more"):
        steps()
    assert session.weights.bytes_read == 0
    assert_nothing_was_applied(model)


@pytest.mark.parametrize("change", ["truncate", "touch"])
@pytest.mark.parametrize("cast", [False, True])
def test_a_shard_changed_after_opening_fails_the_load_and_nothing_is_applied(four_shards, change, cast):
    folder, model = four_shards
    if cast:
        model.double()
    session = weights_core.open_session(TorchEngine(model, cast=cast), folder, host=host())

    def steps():
        with session:
            session.resolve()
            session.load()
            file = folder / "model-00002-of-00004.safetensors"
            if change == "truncate":
                os.truncate(file, file.stat().st_size - 4)
            else:
                os.utime(file, ns=(1, 1))
            session.apply()

    before = threads()
    with pytest.raises(CheckpointError, match=r"became shorter|was changed") as caught:
        steps()
    assert caught.value.file == folder / "model-00002-of-00004.safetensors"
    assert caught.value.plugin == "parallel_shards"
    assert caught.value.__notes__ == ["the engine is untouched"]
    assert threads() == before
    assert open_files(folder) == []
    assert_nothing_was_applied(model)


def test_an_interrupted_load_joins_its_threads_and_leaves_a_meta_model_untouched(four_shards):
    folder, model = four_shards
    before = threads()

    class Interrupted(TorchEngine):
        def apply(self, weights):
            for _ in weights.stream():
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        weights_core.load(Interrupted(model), folder, host=host(max_host_bytes=1 << 20))
    assert caught.value.__notes__ == ["the engine is untouched"]
    assert threads() == before
    assert open_files(folder) == []
    assert_nothing_was_applied(model)


def test_two_ranks_load_the_same_bytes(tmp_path):
    tensors = tensors_of(12)
    folder = write_checkpoint(tmp_path, tensors, shards=3)
    models = [model_for(tensors), model_for(tensors)]
    group = Group(2)

    def rank_main(rank):
        topology = Topology(world=Axis(2, rank))
        engine = TorchEngine(models[rank], topology=topology, gather=group.gather(rank))
        return weights_core.load(engine, folder, host=host())

    for rank, done in enumerate(group.run(rank_main)):
        assert done.result().provider == "parallel_shards"
        assert done.result().rank == rank
        assert_holds(models[rank], tensors)


# Components -------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path):
    every = {
        "transformer": tensors_of(8),
        "transformer_2": tensors_of(8, seed=50),
        "vae": tensors_of(2, seed=90),
    }
    for name, tensors in every.items():
        shards = 1 if name == "vae" else 3
        write_checkpoint(tmp_path / name, tensors, shards=shards, stem="diffusion_pytorch_model")
    listed = {name: ["diffusers", "Model"] for name in every}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **listed}))
    return tmp_path, every


def test_each_component_loads_its_own_folder_with_one_line_of_log(pipeline, caplog):
    path, every = pipeline
    models = {name: model_for(tensors) for name, tensors in every.items()}
    engines = {name: TorchEngine(model, component=name) for name, model in models.items()}
    with caplog.at_level(logging.INFO, logger="weights.parallel_shards"):
        reports = weights_core.load_pipeline(engines, path, "parallel_shards", host=host())
    for name, model in models.items():
        assert reports[name].provider == "parallel_shards"
        assert_holds(model, every[name])
    lines = [r.getMessage() for r in caplog.records if r.name == "weights.parallel_shards"]
    assert lines == [
        f"transformer: 3 files of {path / 'transformer'}",
        f"transformer_2: 3 files of {path / 'transformer_2'}",
        f"vae: 1 file of {path / 'vae'}",
    ]


def test_one_line_of_log_without_a_component(tmp_path, caplog):
    tensors = tensors_of(4)
    folder = write_checkpoint(tmp_path, tensors, shards=2)
    with caplog.at_level(logging.INFO, logger="weights.parallel_shards"):
        weights_core.load(TorchEngine(model_for(tensors)), folder, host=host())
    lines = [r.getMessage() for r in caplog.records if r.name == "weights.parallel_shards"]
    assert lines == [f"2 files of {folder}"]


def test_an_unknown_component_is_refused_naming_those_there_are(pipeline):
    path, every = pipeline
    claim = plugin_with().resolve_format(request_for(path, component="text_encoder"))
    assert claim.roles == frozenset()
    assert "no component 'text_encoder'" in claim.reason
    assert "'transformer', 'transformer_2', 'vae'" in claim.reason
    model = model_for(every["vae"])
    with pytest.raises(WeightsError, match="no component 'text_encoder'"):
        weights_core.load(TorchEngine(model, component="text_encoder"), path, host=host())
    assert_nothing_was_applied(model)


def test_a_pipeline_without_a_component_is_refused(pipeline):
    path, _ = pipeline
    claim = plugin_with().resolve_format(request_for(path))
    assert claim.roles == frozenset()
    assert "it is a pipeline of 'transformer', 'transformer_2', 'vae'" in claim.reason
