# SPDX-License-Identifier: Apache-2.0
"""The tools of the contract kit: fake engine, leftovers, faults, fixtures, mocks."""

import json
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

import weights_core as w
from weights_core import hookspecs
from weights_core.errors import (
    CheckpointError,
    CoverageError,
    EngineError,
    LoadFailed,
    PluginFailedError,
    PluginVersionError,
    WeightsError,
)
from weights_core.hookspecs import API_VERSION
from weights_core.testing import (
    FakeEngine,
    Held,
    HookRecorder,
    fixtures,
    host_of,
    random_tensor,
    write_checkpoint,
)
from weights_core.testing.engines import UNTOUCHED
from weights_core.testing.faults import FAULTS
from weights_core.testing.parallel import TensorParallelEngine
from weights_core.types import EngineInfo, FormatClaim, Layout, LoadRequest, Outcome, PublishReceipt, Role

hook_recorder = fixtures.hook_recorder
weights_host = fixtures.weights_host
mock_plugin = fixtures.mock_plugin
make_checkpoint = fixtures.make_checkpoint
fake_engine = fixtures.fake_engine
tensor_parallel_engine = fixtures.tensor_parallel_engine

TENSORS = {
    "a": random_tensor(3, 4, dtype="F32", seed=1),
    "b": random_tensor(5, dtype="BF16", seed=2),
    "c": random_tensor(2, 2, dtype="U8", seed=3),
}


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", TENSORS, shards=2)


def raw(tensors):
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


# FakeEngine -----------------------------------------------------------------------------------


def test_a_fake_engine_is_untouched_memory_until_it_is_loaded(checkpoint):
    engine = FakeEngine(TENSORS)
    blank = {name: bytes([UNTOUCHED]) * tensor.nbytes for name, tensor in TENSORS.items()}
    assert (engine.contents(), engine.untouched(), engine.events) == (blank, True, [])
    w.load(engine, checkpoint, host=host_of())
    assert engine.contents() == engine.at_post_load == raw(TENSORS)
    assert not engine.untouched()
    assert engine.events == ["apply", "post_load checkpoint", "loaded"]


def test_a_fake_engine_has_a_pattern_for_truth_values_too():
    assert FakeEngine({"t": torch.ones(3, dtype=torch.bool)}).contents() == {"t": bytes(3)}


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3)])
def test_a_fake_engine_expects_every_shape(shape):
    like = torch.zeros(shape, dtype=torch.float16)
    engine = FakeEngine({"t": like})
    meta = engine.expected(Layout.CHECKPOINT)["t"]
    assert (meta.torch_shape, meta.dtype, meta.nbytes) == (shape, "F16", like.nbytes)
    assert engine.params["t"].shape == like.shape


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_apply_fails_after_half_of_its_work_if_told_to(tmp_path, monkeypatch, count):
    tensors = {f"t{i}": random_tensor(4, seed=i) for i in range(count)}
    write_checkpoint(tmp_path / "some", tensors)
    engine = FakeEngine(tensors, fail_at={"apply"})
    blank = engine.contents()
    seen = []
    reinit = engine.reinit
    monkeypatch.setattr(engine, "reinit", lambda: (seen.append(engine.contents()), reinit()))
    with pytest.raises(EngineError, match="told to fail at apply") as info:
        w.load(engine, tmp_path / "some", host=host_of())
    assert sum(seen[0][name] != blank[name] for name in blank) == (count + 1) // 2
    assert engine.events == ["apply", "reinit"]
    assert "the engine was re-initialised" in info.value.__notes__
    assert (engine.untouched(), engine.contents()) == (True, blank)


def test_post_load_fails_with_the_weights_in_place_if_told_to(checkpoint):
    engine = FakeEngine(TENSORS, fail_at={"post_load"})
    blank = engine.contents()
    with pytest.raises(EngineError, match="told to fail at post_load"):
        w.load(engine, checkpoint, host=host_of())
    assert engine.at_post_load == raw(TENSORS)
    assert engine.events == ["apply", "post_load checkpoint", "reinit"]
    assert (engine.untouched(), engine.contents()) == (True, blank)


def test_a_fake_engine_that_fails_to_reinit_is_said_to_be_dirty(checkpoint):
    engine = FakeEngine(TENSORS, fail_at={"post_load", "reinit"})
    with pytest.raises(EngineError, match="post_load") as info:
        w.load(engine, checkpoint, host=host_of())
    assert any("do not use it" in note for note in info.value.__notes__)
    assert engine.events[-1] == "reinit"


class InMemory(w.WeightSet):
    provider = "memory"
    layout = Layout.SHARDED

    def __init__(self, tensors):
        self.tensors = tensors

    @property
    def metas(self):
        return FakeEngine(self.tensors).expected(self.layout)

    def read(self, name, slices=None):
        return self.tensors[name] if slices is None else self.tensors[name][slices]


def test_bind_takes_the_tensors_themselves():
    engine = FakeEngine(TENSORS)
    given = {**TENSORS, "stranger": torch.ones(1)}
    applied = engine.bind(InMemory(given))
    assert all(engine.params[name] is tensor for name, tensor in TENSORS.items())
    assert (applied.written, applied.unused) == (TENSORS.keys(), ("stranger",))
    assert (engine.events, engine.untouched()) == (["bind"], False)


def test_bind_fills_the_memory_that_is_there_if_the_set_says_so():
    engine = FakeEngine(TENSORS)
    before = {name: tensor.data_ptr() for name, tensor in engine.params.items()}
    weights = InMemory(TENSORS)
    weights.fills = True
    applied = engine.bind(weights)
    assert before == {name: tensor.data_ptr() for name, tensor in engine.params.items()}
    assert engine.contents() == FakeEngine.contents(SimpleNamespace(params=TENSORS))
    assert (applied.written, engine.events) == (TENSORS.keys(), ["bind"])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_bind_fails_after_half_of_its_work_if_told_to(count):
    tensors = {f"t{i}": random_tensor(4, seed=i) for i in range(count)}
    engine = FakeEngine(tensors, fail_at={"bind"})
    with pytest.raises(EngineError, match="told to fail at bind"):
        engine.bind(InMemory(tensors))
    assert sum(engine.params[name] is tensors[name] for name in tensors) == (count + 1) // 2


def test_materialize_moves_every_tensor_and_keeps_its_bytes(checkpoint):
    engine = FakeEngine(TENSORS)
    w.load(engine, checkpoint, host=host_of()).lease.close()
    given = []

    def alloc(meta):
        given.append(torch.empty_like(engine.params[meta.name]))
        return given[-1]

    assert engine.materialize(alloc) == sum(tensor.nbytes for tensor in TENSORS.values())
    assert [id(tensor) for tensor in engine.params.values()] == [id(tensor) for tensor in given]
    assert engine.contents() == raw(TENSORS)
    assert engine.events[-1] == "materialize"


def test_the_tensors_of_a_fake_engine_are_its_own_and_looking_is_an_event():
    engine = FakeEngine(TENSORS)
    assert engine.tensors(Layout.SHARDED)["a"] is engine.params["a"]
    assert engine.events == ["tensors sharded"]


def test_a_fake_engine_names_no_tensor_that_was_not_delivered(tmp_path):
    part = {name: TENSORS[name] for name in ("a", "b")}
    write_checkpoint(tmp_path / "part", part)
    with pytest.raises(CoverageError, match="missing 1 tensor: c"):
        w.load(FakeEngine(TENSORS), tmp_path / "part", host=host_of())


# Held -----------------------------------------------------------------------------------------


def file(tmp_path):
    opened = (tmp_path / "opened").open("wb")
    return opened.close, "opened"


def memfd(tmp_path):
    number = os.memfd_create("weights-test")
    return lambda: os.close(number), "memfd:weights-test"


def open_socket(tmp_path):
    one, other = socket.socketpair()
    return lambda: (one.close(), other.close()), "socket:["


def thread(tmp_path):
    end = threading.Event()
    running = threading.Thread(target=end.wait, name="left-over")
    running.start()
    return lambda: (end.set(), running.join()), "thread left-over ("


def child(tmp_path):
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    return lambda: running.communicate(b"\n"), f"process {running.pid}"


def child_of_a_thread(tmp_path):
    """Linux lists children by the thread that made them."""
    made, end = threading.Event(), threading.Event()
    pids = []

    def main():
        running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        pids.append(running.pid)
        made.set()
        end.wait()
        running.communicate(b"\n")

    parent = threading.Thread(target=main)
    parent.start()
    made.wait()
    return lambda: (end.set(), parent.join()), f"process {pids[0]}"


def segment(tmp_path):
    path = Path(f"/dev/shm/weights-test-{os.getpid()}")
    path.write_bytes(b"left over")
    return path.unlink, str(path)


def mapped_segment(tmp_path):
    """Also what a child of ours has open is ours to remove."""
    path = Path(f"/dev/shm/weights-test-mapped-{os.getpid()}")
    code = f"held = open({str(path)!r}, 'w'); print(flush=True); input()"
    running = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    running.stdout.readline()
    return lambda: (running.communicate(b"\n"), path.unlink()), str(path)


def temporary_file(tmp_path):
    number, path = tempfile.mkstemp(prefix="weights-test-")
    os.close(number)
    return lambda: os.unlink(path), path


LEAKS = (
    file,
    memfd,
    open_socket,
    thread,
    child,
    child_of_a_thread,
    segment,
    mapped_segment,
    temporary_file,
)


@pytest.fixture
def own_tempdir(tmp_path, monkeypatch):
    """Other programs make temporary files, too."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.__name__)
def test_what_is_left_over_is_named_until_it_is_gone(leak, tmp_path, own_tempdir):
    before = Held.now()
    end, named = leak(tmp_path)
    try:
        left = before.left_over(settle=0)
        assert any(named in thing for thing in left), left
    finally:
        end()
    assert before.left_over() == []


def test_nothing_is_left_over_where_nothing_happened(own_tempdir):
    assert Held.now().left_over(settle=0) == []


def test_what_goes_away_while_it_settles_is_not_left_over(own_tempdir):
    before = Held.now()
    ending = threading.Thread(target=time.sleep, args=(0.2,))
    ending.start()
    assert before.left_over(settle=30) == []
    assert not ending.is_alive()


def test_what_only_the_collector_frees_is_not_left_over(tmp_path, own_tempdir):
    class Cycle:
        def __init__(self):
            self.itself = self
            self.number, self.other = os.pipe()

        def __del__(self):
            os.close(self.number)
            os.close(self.other)

    before = Held.now()
    Cycle()
    assert before.left_over() == []


def test_what_was_there_before_is_not_left_over(tmp_path, own_tempdir):
    with (tmp_path / "open").open("wb"):
        assert Held.now().left_over(settle=0) == []


def test_a_segment_that_a_stranger_has_open_is_not_ours(own_tempdir):
    """A process that is not our child: a grandchild whose parent has ended."""
    path = Path(f"/dev/shm/weights-test-stranger-{os.getpid()}")
    begin, end = multiprocessing.Pipe()
    number = end.fileno()
    inner = f"import os; held = open({str(path)!r}, 'w'); os.write({number}, b'x'); os.read({number}, 1)"
    outer = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}], pass_fds=[{number}])"
    )
    before = Held.now()
    subprocess.run([sys.executable, "-c", outer], pass_fds=[number], check=True)
    try:
        os.read(begin.fileno(), 1)
        assert path.exists()
        assert before.left_over(settle=0) == []
    finally:
        os.write(begin.fileno(), b"x")
        begin.close()
        end.close()
        path.unlink(missing_ok=True)


# Faults ---------------------------------------------------------------------------------------


def told(error):
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_load_refuses_every_fault_and_names_the_file(checkpoint, fault):
    file = fault(checkpoint)
    engine = FakeEngine(TENSORS)
    with pytest.raises(WeightsError) as info:
        w.load(engine, checkpoint, host=host_of())
    assert file.name in told(info.value)
    assert engine.untouched()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_index_of_small_files_is_not_taken_for_one_of_them(tmp_path, fault):
    """Three files of two tensors each are smaller than their index."""
    named = {f"a.name.that.is.as.long.as.those.of.models.{i}.weight": torch.zeros(1) for i in range(6)}
    write_checkpoint(tmp_path / "small", named, shards=3)
    file = fault(tmp_path / "small")
    assert (file.suffix == ".json") == fault.__name__.endswith("in_the_index")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_returns_the_one_file_that_it_changed(checkpoint, fault):
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    file = fault(checkpoint)
    after = {path: path.read_bytes() for path in checkpoint.iterdir()}
    assert {path for path in before if after.get(path) != before[path]} == {file}
    assert after.keys() <= before.keys()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("fault", ["cut_short", "removed", "garbage"])
def test_faults_of_any_file_also_damage_one_of_torch(tmp_path, kind, fault):
    write_checkpoint(tmp_path / "one", {"large": torch.ones(1 << 16)}, shards=2, kind=kind)
    file = FAULTS[fault](tmp_path / "one")
    with pytest.raises(WeightsError) as info:
        w.load(FakeEngine({"large": torch.ones(1 << 16)}), tmp_path / "one", host=host_of())
    assert file.name in told(info.value)


def test_a_fault_may_be_given_a_single_file(tmp_path):
    write_checkpoint(tmp_path / "one", TENSORS)
    single = tmp_path / "one" / "model.safetensors"
    assert FAULTS["cut_short"](single) == single
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        w.load(FakeEngine(TENSORS), single, host=host_of())


def test_overlapping_tensors_are_at_fault_for_that_alone(checkpoint):
    """Else it is the wrong length of an entry that is refused, and an overlap is never tried."""
    sizes = {name: tensor.nbytes for name, tensor in TENSORS.items()}
    raw = FAULTS["overlapping"](checkpoint).read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    assert any(end > begin for (_, end, _), (begin, _, _) in pairwise(spans))
    assert {name: end - begin for begin, end, name in spans} == {name: sizes[name] for *_, name in spans}


# Fixtures -------------------------------------------------------------------------------------


def test_a_checkpoint_of_every_dtype_can_be_loaded(make_checkpoint, fake_engine, weights_host):
    path = make_checkpoint()
    stored = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    assert {"large", "transposed", "tied.one", "F32.scalar"} <= stored.keys()
    assert len(list(path.glob("*.safetensors"))) == 3
    engine = fake_engine(stored)
    w.load(engine, path, host=weights_host()).lease.close()
    assert engine.contents() == raw({name: t.reshape(-1) for name, t in stored.items()})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_of_given_tensors_as_either_kind(make_checkpoint, kind):
    tied = {"one": TENSORS["a"], "other": TENSORS["a"], "strided": TENSORS["a"].t()}
    path = make_checkpoint(tied, shards=1, kind=kind)
    (written,) = path.glob(f"*.{kind}")
    found = load_file(written) if kind == "safetensors" else torch.load(written, weights_only=True)
    assert raw({n: t.contiguous() for n, t in found.items()}) == raw(
        {n: t.contiguous() for n, t in tied.items()}
    )


def test_each_checkpoint_has_a_folder_of_its_own(make_checkpoint):
    assert make_checkpoint(TENSORS) != make_checkpoint(TENSORS)


def test_a_checkpoint_with_a_fault_is_refused(make_checkpoint, weights_host):
    path = make_checkpoint(fault="cut_short")
    with pytest.raises(CheckpointError, match="truncated"):
        w.load(FakeEngine({}), path, host=weights_host())


def test_an_unknown_fault_is_refused(make_checkpoint):
    with pytest.raises(ValueError, match="no fault 'rust'; they are cut_short, "):
        make_checkpoint(TENSORS, fault="rust")


def test_the_engines_are_given_as_classes(fake_engine, tensor_parallel_engine):
    assert (fake_engine, tensor_parallel_engine) == (FakeEngine, TensorParallelEngine)


class Other:
    weights_api = API_VERSION

    @w.hookimpl
    def resolve_format(self, request):
        return FormatClaim.refuse("only here to be found")


@pytest.fixture
def a_machine_full_of_plugins(tmp_path, monkeypatch):
    """Settings in the environment and an installed plugin, as a developer's machine has them."""
    site = tmp_path / "site"
    (site / "weights_noise-1.0.dist-info").mkdir(parents=True)
    (site / "weights_noise-1.0.dist-info" / "METADATA").write_text("Name: weights-noise\nVersion: 1.0\n")
    (site / "weights_noise-1.0.dist-info" / "entry_points.txt").write_text(
        "[weights.plugins]\nnoise = no_such_module:Noise\n"
    )
    (tmp_path / "settings.toml").write_text("[noise]\nvolume = 11\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("WEIGHTS_BLOCK", "other")
    monkeypatch.setenv("WEIGHTS_CONFIG", str(tmp_path / "settings.toml"))
    monkeypatch.setenv("WEIGHTS_TRACE", str(tmp_path / "trace.log"))
    assert "noise" in [plugin.name for plugin, _ in w.PluginHost.discover().check()]
    (tmp_path / "trace.log").unlink()
    return tmp_path


def test_a_host_is_sealed_from_the_machine(a_machine_full_of_plugins, request, caplog):
    weights_host = request.getfixturevalue("weights_host")
    assert [(p.name, why) for p, why in w.PluginHost.discover().check()] == [("disk", None)]
    due = [("disk", None), ("other", None)]
    assert [(p.name, why) for p, why in weights_host(other=Other).check()] == due
    assert [(p.name, why) for p, why in w.PluginHost.discover().check()] == due
    weights_host()
    assert [p.name for p, _ in w.PluginHost.discover().check()] == ["disk"]
    assert caplog.text == ""
    assert not (a_machine_full_of_plugins / "trace.log").exists()


def test_a_plain_load_sees_the_sealed_plugins_alone(
    a_machine_full_of_plugins, request, checkpoint, mock_plugin
):
    weights_host = request.getfixturevalue("weights_host")
    source = mock_plugin(load_weights=lambda **_: InMemory(TENSORS))
    weights_host(memory=source)
    engine = FakeEngine(TENSORS)
    report = w.load(engine, checkpoint, format="memory")
    assert (report.provider, engine.contents()) == ("memory", raw(TENSORS))


OF_AN_AUTHOR = """
import weights_core as w

def names():
    return [plugin.name for plugin, _ in w.PluginHost.discover(environ={}).check()]

def test_sealed(weights_host, hook_recorder):
    assert names() == ["disk"]
    assert hook_recorder.calls == []

def test_open_again():
    assert "noise" in names()

def test_the_others(mock_plugin, make_checkpoint, fake_engine, tensor_parallel_engine):
    assert mock_plugin(cleanup=None).weights_api == 1
    assert make_checkpoint().is_dir()
    assert fake_engine({}).untouched()
    assert tensor_parallel_engine.__name__ == "TensorParallelEngine"
"""


def test_an_author_gets_the_fixtures_with_a_line_and_the_seal_ends_with_the_test(a_machine_full_of_plugins):
    project = a_machine_full_of_plugins / "project"
    project.mkdir()
    (project / "conftest.py").write_text('pytest_plugins = ["weights_core.testing.fixtures"]\n')
    (project / "test_it.py").write_text(OF_AN_AUTHOR)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, project],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project.parent / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_settings_enabling_and_blocking_reach_the_host(weights_host, checkpoint):
    import attrs

    class Configured(Other):
        @attrs.frozen
        class Config:
            volume: int = 1

        def __init__(self, config):
            pass

    host = weights_host(config={"loud": {"volume": 3}}, loud=Configured, other=Other, block=("other",))
    found = {one.name: one for one in host.overview()}
    assert found["loud"].settings == {"volume": 3}
    assert found["other"].why_not == "blocked"
    assert [
        p.name for p, why in weights_host(enable="loud", loud=Configured, other=Other).check() if why
    ] == ["other"]


def test_a_recorder_keeps_the_calls_of_the_sealed_hosts(weights_host, hook_recorder, checkpoint):
    w.load(FakeEngine(TENSORS), checkpoint, host=weights_host(other=Other)).lease.close()
    assert hook_recorder.names("disk") == ["resolve_format", "load_weights"]
    assert hook_recorder.names()[-1] == "disk.load_weights"
    assert sorted(call.plugin for call in hook_recorder.of(hook="resolve_format")) == ["disk", "other"]
    assert [call.hook for call in hook_recorder.of("other", "resolve_format")] == ["resolve_format"]
    assert str(hook_recorder).count("\n") == len(hook_recorder.calls) - 1
    assert "disk.load_weights(" in str(hook_recorder)
    hook_recorder.clear()
    assert (hook_recorder.calls, str(hook_recorder)) == ([], "")


def test_two_recorders_do_not_meet(checkpoint):
    one, other = HookRecorder(), HookRecorder()
    w.load(FakeEngine(TENSORS), checkpoint, host=host_of(observer=one)).lease.close()
    assert (len(one.calls) > 0, other.calls) == (True, [])


# Mock plugins ---------------------------------------------------------------------------------


def test_a_mock_plugin_records_each_call_with_the_parameters_of_the_hook(
    mock_plugin, weights_host, checkpoint
):
    receipt = PublishReceipt(layout=Layout.SHARDED, nbytes=1, detail="a mock's")
    mocked = mock_plugin(Role.PUBLISHER, before_post_load=None, publish=receipt, cleanup=None)
    engine = FakeEngine(TENSORS)
    report = w.load(engine, checkpoint, host=weights_host(mocked=mocked))
    asked = mocked.mocks.resolve_format.call_args.kwargs["request"]
    assert asked.checkpoint == checkpoint
    mocked.mocks.resolve_format.assert_called_once_with(request=asked)
    mocked.mocks.publish.assert_called_once_with(request=asked, engine=engine, layout=Layout.SHARDED)
    (before,) = mocked.mocks.before_post_load.call_args_list
    assert before.kwargs.keys() == {"request", "weights", "engine"}
    assert isinstance(before.kwargs["weights"], w.WeightSet)
    mocked.mocks.cleanup.assert_called_once_with(
        request=asked, outcome=Outcome(status="ready", phase="ready")
    )
    assert report.receipts == (receipt,)


def test_a_mock_source_provides_what_its_function_makes(mock_plugin, weights_host, checkpoint):
    given = []

    def load_weights(request, engine, source):
        given.append((request.checkpoint, engine, source))
        return InMemory(TENSORS)

    engine = FakeEngine(TENSORS)
    host = weights_host(memory=mock_plugin(load_weights=load_weights))
    assert w.load(engine, checkpoint, format="memory", host=host).provider == "memory"
    ((path, asked_for, source),) = given
    assert (path, asked_for) == (checkpoint, engine)
    assert hasattr(source, "open")


def test_a_mock_plugin_claims_what_it_is_told(mock_plugin):
    host = host_of(mocked=mock_plugin(resolve_format=FormatClaim.refuse("not today")))
    request = LoadRequest(checkpoint="nowhere", engine=EngineInfo(name="e", version="1"))
    assert host.hooks(request).resolve_format("mocked", request).reason == "not today"


@pytest.mark.parametrize("error", [LoadFailed("no tape", mutated=False), OSError("stuck")])
def test_a_mock_raises_what_it_is_given(mock_plugin, weights_host, checkpoint, error):
    host = weights_host(mocked=mock_plugin(load_weights=error), hook_recorder=Other)
    expected = type(error) if isinstance(error, WeightsError) else PluginFailedError
    with host.session(
        LoadRequest(checkpoint=checkpoint, engine=FakeEngine(TENSORS).info, format="mocked"),
        FakeEngine(TENSORS),
    ) as session:
        session.resolve()
        if expected is PluginFailedError:
            with pytest.raises(PluginFailedError, match="stuck") as info:
                session.load()
            assert info.value.__cause__ is error
        else:
            assert session.load().provider == "disk"
    mocks = [plugin for plugin in host.check() if plugin[0].name == "mocked"]
    assert mocks[0][0].load().mocks.load_weights.call_count == 1


def test_a_hook_that_there_is_not_cannot_be_mocked(mock_plugin):
    with pytest.raises(TypeError, match="'load_weight' is no hook; they are resolve_format, load_weights, "):
        mock_plugin(load_weight=None)


def test_a_mock_plugin_has_the_hooks_that_were_given_and_no_others(mock_plugin):
    hooks = host_of(mocked=mock_plugin(cleanup=None)).hooks(
        LoadRequest(checkpoint="nowhere", engine=EngineInfo(name="e", version="1"))
    )
    assert [h for h in hookspecs.HOOKS if hooks.implements("mocked", h)] == ["resolve_format", "cleanup"]


@pytest.mark.parametrize("arguments", [{}, {"requests": 1}, {"request": 1, "engine": 2}])
def test_a_mock_refuses_arguments_that_the_hook_does_not_have(mock_plugin, arguments):
    mocked = mock_plugin()
    with pytest.raises(TypeError):
        mocked.mocks.resolve_format(**arguments)
    mocked.mocks.resolve_format(request=1)
    mocked.mocks.resolve_format.assert_called_once_with(request=1)
    with pytest.raises(AttributeError):
        mocked.mocks.resolve_format.assert_called_onec_with(request=1)


def test_two_mock_plugins_share_no_mock(mock_plugin):
    one, other = mock_plugin(), mock_plugin()
    one.mocks.resolve_format(request=1)
    assert other.mocks.resolve_format.call_count == 0


def test_a_bare_mock_is_no_plugin():
    """It speaks no version of the API; told to, it has no hook: nothing of it would ever be called."""
    request = LoadRequest(checkpoint="nowhere", engine=EngineInfo(name="e", version="1"))
    with pytest.raises(PluginVersionError, match="weights_api = 1"):
        host_of(bare=MagicMock()).hooks(
            LoadRequest(checkpoint="nowhere", engine=request.engine, format="bare")
        )

    bare = MagicMock()
    hooks = w.hooks.Hooks()
    hooks._manager.register(bare, name="bare")
    assert not any(
        implementation.plugin is bare
        for hook in hookspecs.HOOKS
        for implementation in getattr(hooks._manager.hook, hook).get_hookimpls()
    )
    bare.resolve_format.assert_not_called()
