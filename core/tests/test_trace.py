# SPDX-License-Identifier: Apache-2.0
"""What is told of each hook call, and where it is written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weights_core as w
from weights_core.errors import CheckpointError, LoadFailed, NoProviderError, PluginConfigError
from weights_core.testing import FakeEngine, HookRecorder, host_of, random_tensor, write_checkpoint
from weights_core.testing.contract.material import Spy, source_of
from weights_core.trace import HookCall, from_environment, summary
from weights_core.types import (
    EngineInfo,
    FormatClaim,
    Layout,
    LoadRequest,
    Outcome,
    PublishReceipt,
    Role,
    Topology,
)

SCRIPT = Path(sys.executable).parent / "weights"
TENSORS = {"a": random_tensor(3, 4, seed=1), "b": random_tensor(250_000, seed=2)}
LINE = re.compile(
    r"rank (?P<rank>\d+): (?P<indent> *)(?P<plugin>\w+)\.(?P<hook>\w+)\((?P<given>.*?)\)"
    r"( inside (?P<around>[\w, ]+))? (?P<came>(→|raised) .*) \[(?P<ms>[\d.]+) ms\]$"
)


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", TENSORS)


class Base:
    weights_api = 1


class Wraps(Base):
    @w.hookimpl
    def resolve_format(self, request):
        return FormatClaim(roles={Role.WRAPPER}, reason="wraps")

    @w.hookimpl(wrapper=True)
    def load_weights(self):
        return (yield)


class Owns(Base):
    @w.hookimpl
    def resolve_format(self, request):
        return FormatClaim(roles={Role.OWNER}, reason="owns", layouts=frozenset(Layout))

    @w.hookimpl
    def load_weights(self, source):
        return source.open()


class Publishes(Base):
    @w.hookimpl
    def resolve_format(self, request):
        return FormatClaim(roles={Role.PUBLISHER}, reason="offers", publish_at=Layout.FINAL)

    @w.hookimpl
    def publish(self, layout):
        return PublishReceipt(layout=layout, nbytes=2_500_000, detail="on a board")

    @w.hookimpl
    def cleanup(self):
        pass


def observed(checkpoint, format="auto", engine=None, **plugins):
    """Return the recorder of one load."""
    recorder = HookRecorder()
    host = host_of(observer=recorder, **plugins)
    w.load(engine or FakeEngine(TENSORS), checkpoint, format=format, host=host).lease.close()
    return recorder


# Calls ----------------------------------------------------------------------------------------


def test_every_call_of_a_load_is_told_in_order(checkpoint):
    recorder = observed(checkpoint, publishes=Publishes)
    assert sorted(recorder.names()[:2]) == ["disk.resolve_format", "publishes.resolve_format"]
    assert recorder.names()[2:] == ["disk.load_weights", "publishes.publish", "publishes.cleanup"]
    assert [list(call.arguments) for call in recorder.of(hook="publish")] == [["request", "engine", "layout"]]
    assert all(call.seconds > 0 and call.depth == call.rank == 0 for call in recorder.calls)
    assert recorder.of(hook="publish")[0].result.detail == "on a board"


def test_a_line_says_who_what_and_how_long(checkpoint):
    lines = str(observed(checkpoint, publishes=Publishes)).splitlines()
    found = {f"{m['plugin']}.{m['hook']}": m for m in map(LINE.fullmatch, lines)}
    assert found["publishes.resolve_format"]["given"] == f"request={checkpoint} as auto"
    assert found["publishes.resolve_format"]["came"] == "→ publisher: offers"
    assert found["publishes.publish"]["given"] == (
        f"request={checkpoint} as auto, engine=<fake>, layout=final"
    )
    assert found["publishes.publish"]["came"] == "→ final, 2.5 MB: on a board"
    assert found["publishes.cleanup"]["came"] == "→ None"
    assert found["publishes.cleanup"]["given"].endswith("outcome=ready in ready")
    assert re.fullmatch(r"→ \w+ of 2 tensors, 1\.0 MB, checkpoint", found["disk.load_weights"]["came"])


def test_wrappers_are_named_from_the_outside_in(checkpoint):
    recorder = observed(checkpoint, format="outer,inner,disk", outer=Wraps, inner=Wraps)
    (call,) = recorder.of(hook="load_weights")
    assert sorted(call.around) == ["inner", "outer"]
    plan = w.explain(
        FakeEngine(TENSORS), checkpoint, "outer,inner,disk", host=host_of(outer=Wraps, inner=Wraps)
    )
    assert call.around == plan.wrappers
    assert f" inside {', '.join(call.around)} → " in str(call)


def test_what_an_owner_calls_is_told_first_and_indented(checkpoint):
    recorder = observed(checkpoint, format="owns", owns=Owns)
    inner, outer = recorder.of(hook="load_weights")
    assert (inner.plugin, inner.depth) == ("disk", 1)
    assert (outer.plugin, outer.depth) == ("owns", 0)
    assert inner.seconds <= outer.seconds
    assert str(inner).startswith("rank 0:   disk.load_weights(")
    assert str(outer).startswith("rank 0: owns.load_weights(")


def test_each_call_carries_the_rank(checkpoint):
    engine = FakeEngine(TENSORS, topology=Topology.tensor_parallel(2, 1))
    engine.gather = lambda value, timeout: [value, value]
    recorder = observed(checkpoint, engine=engine)
    assert {call.rank for call in recorder.calls} == {1}
    assert str(recorder).startswith("rank 1: ")


def test_an_error_is_shown_and_still_raised(checkpoint):
    recorder = HookRecorder()
    failing = source_of(LoadFailed("the tape\nis torn", mutated=False))
    host = host_of(observer=recorder, tape=failing, block=("disk",))
    with pytest.raises(NoProviderError):
        w.load(FakeEngine(TENSORS), checkpoint, format="tape", host=host)
    (call,) = recorder.of(hook="load_weights")
    assert isinstance(call.error, LoadFailed)
    assert call.result is None
    assert "raised LoadFailed: the tape" in str(call)
    assert "\n" not in str(call)


def test_an_error_of_no_kind_of_ours_is_shown_as_it_was_raised(checkpoint):
    recorder = HookRecorder()
    with pytest.raises(w.errors.PluginFailedError):
        w.load(
            FakeEngine(TENSORS),
            checkpoint,
            format="tape",
            host=host_of(observer=recorder, tape=source_of(ValueError("torn\n  tape"))),
        )
    assert "raised ValueError: torn tape [" in str(recorder.of("tape", "load_weights")[0])


def test_calls_nest_rightly_after_an_error_inside(checkpoint):
    class Retries(Owns):
        @w.hookimpl
        def load_weights(self, source):
            return source.open()

    recorder = observed(
        checkpoint, format="owns,tape,disk", owns=Retries, tape=source_of(LoadFailed("torn", mutated=False))
    )
    assert [(c.plugin, c.depth, c.error is None) for c in recorder.of(hook="load_weights")] == [
        ("tape", 1, False),
        ("disk", 1, True),
        ("owns", 0, True),
    ]


def test_a_hook_that_a_plugin_leaves_out_is_no_call(checkpoint):
    assert observed(checkpoint).names() == ["disk.resolve_format", "disk.load_weights"]


def test_a_host_without_an_observer_tells_nobody(checkpoint, capfd, monkeypatch):
    monkeypatch.setenv("WEIGHTS_TRACE", "1")
    w.load(FakeEngine(TENSORS), checkpoint, host=host_of()).lease.close()
    assert capfd.readouterr() == ("", "")


class Opaque(Spy):
    @property
    def metas(self):
        if self.hidden:
            raise OSError("not now")
        return super().metas

    hidden = True


def test_a_set_that_cannot_say_what_it_holds_does_not_break_the_load_that_is_watched(checkpoint):
    weights = Opaque(TENSORS)
    seen = []

    def observe(call):
        seen.append(str(call))
        weights.hidden = call.hook != "load_weights"

    engine = FakeEngine(TENSORS)
    report = w.load(
        engine, checkpoint, format="opaque", host=host_of(observer=observe, opaque=source_of(weights))
    )
    assert report.provider == "opaque"
    assert any("→ Opaque of unknown contents (OSError) [" in line for line in seen)
    assert torch.equal(engine.params["a"], TENSORS["a"])


class NoNumber(Publishes):
    @w.hookimpl
    def publish(self, layout):
        return PublishReceipt(layout=layout, nbytes=None, detail="of no size")


def test_a_plugin_that_is_wrong_fares_the_same_if_it_is_watched(checkpoint):
    came = []
    for observer in (None, lambda call: str(call)):
        try:
            host = host_of(observer=observer, wrong=NoNumber)
            came.append(w.load(FakeEngine(TENSORS), checkpoint, host=host).provider)
        except w.WeightsError as exc:
            came.append(str(exc))
    assert came[0] == came[1]


def test_a_summary_reads_no_tensor():
    weights = Spy(TENSORS)
    weights.error = AssertionError("was read")
    assert summary(weights) == "Spy of 2 tensors, 1.0 MB, sharded"


INFO = EngineInfo(name="vllm", version="1", model="llama", component="vae")


class WithInfo:
    info = INFO


class OtherInfo:
    info = "a string"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (LoadRequest(checkpoint="/m", engine=INFO, format="a,b"), "/m as a,b"),
        (FormatClaim.refuse("too old"), "no part: too old"),
        (FormatClaim(roles={Role.SOURCE, Role.OWNER}, reason="both"), "owner+source: both"),
        (
            PublishReceipt(layout=Layout.SHARDED, nbytes=3_456_700_000, detail="x"),
            "sharded, 3,456.7 MB: x",
        ),
        (Outcome(status="failed", phase="apply", error=OSError("x")), "failed in apply"),
        (CheckpointError("is torn", file=Path("/f")), "CheckpointError: /f: is torn"),
        (
            CheckpointError("is torn").stamp(plugin="p", distribution="d", hook="h", rank=0),
            "CheckpointError: is torn",
        ),
        (ValueError("a b"), "ValueError: a b"),
        (KeyboardInterrupt(), "KeyboardInterrupt:"),
        (None, "None"),
        ("text", "text"),
        (3, "3"),
        (2.5, "2.5"),
        (Layout.FINAL, "final"),
        (WithInfo(), "<vllm llama vae>"),
        (FakeEngine({}), "<fake>"),
        (OtherInfo(), "<OtherInfo>"),
        (object(), "<object>"),
        (torch.ones(3), "<Tensor>"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_a_summary_of_what_hooks_exchange(value, said):
    assert summary(value).strip() == said


def test_a_message_of_several_lines_is_one_line_of_trace():
    error = LoadFailed("first\nsecond", mutated=False)
    call = HookCall(plugin="p", hook="h", arguments={}, error=error)
    assert len(str(call).splitlines()) == 1


# WEIGHTS_TRACE --------------------------------------------------------------------------------


@pytest.mark.parametrize("environ", [{}, {"WEIGHTS_TRACE": ""}, {"WEIGHTS_TRACE": "0"}])
def test_nothing_is_traced_unless_asked(environ):
    assert from_environment(environ) is None


def only_disk(**environ):
    return w.PluginHost.discover(enable="disk", environ=environ)


def test_1_writes_to_standard_error(checkpoint, capfd):
    w.load(FakeEngine(TENSORS), checkpoint, host=only_disk(WEIGHTS_TRACE="1")).lease.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert [re.sub(r"\+\d+\.\d{3} s ", "", line).split("(")[0] for line in err.splitlines()] == [
        "weights: trace: rank 0: disk.resolve_format",
        "weights: trace: rank 0: disk.load_weights",
    ]


def test_a_path_is_appended_to_and_each_process_says_when_it_began(checkpoint, tmp_path, capfd):
    log = tmp_path / "trace.log"
    log.write_text("kept\n")
    for _ in range(2):
        w.load(FakeEngine(TENSORS), checkpoint, host=only_disk(WEIGHTS_TRACE=str(log))).lease.close()
    lines = log.read_text().splitlines()
    assert lines[0] == "kept"
    assert [bool(re.fullmatch(rf"--- \S+ \S+, process {os.getpid()}", line)) for line in lines[1:]] == [
        True,
        False,
        False,
    ] * 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["", "missing/trace.log"], ids=["a folder", "in no folder"])
def test_a_file_that_cannot_be_written_is_a_wrong_setting(tmp_path, where):
    path = tmp_path / where
    with pytest.raises(PluginConfigError, match=re.escape(f"WEIGHTS_TRACE names {path}: ")):
        only_disk(WEIGHTS_TRACE=str(path))


def script(*arguments, **environ):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHTS_")}
    return subprocess.run(
        [SCRIPT, *map(str, arguments)], env=kept | environ, capture_output=True, text=True, check=False
    )


def test_a_file_that_cannot_be_written_is_one_line_of_the_command(checkpoint, tmp_path):
    done = script("load", checkpoint, WEIGHTS_TRACE=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == f"weights: PluginConfigError: WEIGHTS_TRACE names {tmp_path}: Is a directory"


# weights trace --------------------------------------------------------------------------------


def test_the_command_traces_a_load_on_standard_error(checkpoint):
    done = script("trace", "--", SCRIPT, "load", checkpoint, "-f", "disk")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{checkpoint}: 2 tensors")
    traced = [line for line in done.stderr.splitlines() if line.startswith("weights: trace: +")]
    assert any("disk.load_weights(" in line for line in traced)
    assert len(traced) == len(done.stderr.splitlines())


def test_the_command_writes_to_the_file_that_it_is_given_from_wherever_it_runs(checkpoint, tmp_path):
    code = "import os, sys; os.chdir('/'); os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run(
        [SCRIPT, "trace", "-o", "calls.log", "--", sys.executable, "-c", code, SCRIPT, "load", checkpoint],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = (tmp_path / "calls.log").read_text().splitlines()
    assert first.startswith("--- ")
    assert any(".load_weights(" in line for line in lines)


@pytest.mark.parametrize("separator", [["--"], []], ids=["with --", "without --"])
def test_the_command_hands_on_options_and_the_exit_code(separator):
    code = "import os, sys; print(sys.argv[1:], os.environ['WEIGHTS_TRACE']); sys.exit(7)"
    done = script("trace", *separator, sys.executable, "-c", code, "-o", "--json", "--help")
    assert done.returncode == 7
    assert done.stdout == "['-o', '--json', '--help'] 1\n"
    assert done.stderr == ""


def test_a_command_that_there_is_not_is_wrong_use():
    done = script("trace", "--", "no-such-command")
    assert done.returncode == 2
    assert "Invalid value for COMMAND: no-such-command: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_command_at_all_is_wrong_use():
    done = script("trace")
    assert done.returncode == 2
    assert "Missing argument 'COMMAND...'" in done.stderr
