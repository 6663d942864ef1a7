# SPDX-License-Identifier: Apache-2.0
"""The `weights` command, in process and as the installed script."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import weights_core as w
from weights_core import cli, hookspecs
from weights_core.cli import commands
from weights_core.errors import LifecycleError
from weights_core.scan import ScanEngine
from weights_core.testing import host_of, random_tensor, write_checkpoint

SCRIPT = Path(sys.executable).parent / "weights"

WRONG_BYTE = """
from weights_core import Fit, FormatClaim, Role, WeightSetWrapper, hookimpl

class Wrong(WeightSetWrapper):
    def stream(self, names=None):
        for name, tensor in self.inner.stream(names):
            if name == "b":
                tensor.view(-1)[-1] += 1
            yield name, tensor

class Plugin:
    weights_api = 1

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim(roles={Role.SOURCE}, reason="reads tapes", fit=Fit.BEST)

    @hookimpl
    def load_weights(self, source):
        return Wrong(source.open())
"""
WRONG_PARAMETER = """
from weights_core import FormatClaim, hookimpl

class Plugin:
    weights_api = 1

    @hookimpl
    def resolve_format(self, requests):
        return FormatClaim.refuse("never asked")
"""
CONFIGURED = """
import attrs
from weights_core import FormatClaim, hookimpl

class Plugin:
    weights_api = 1

    @attrs.frozen
    class Config:
        speed: int = 1
        heads: int = 2
        label: str = "x"

    def __init__(self, config):
        self.config = config

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim.refuse("never asked")
"""
BAD_CLEANUP = """
from weights_core import FormatClaim, Role, hookimpl

class Plugin:
    weights_api = 1

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim(roles={Role.WRAPPER}, reason="wraps")

    @hookimpl(wrapper=True)
    def load_weights(self):
        return (yield)

    @hookimpl
    def cleanup(self):
        raise OSError("the tape is stuck")
"""


@pytest.fixture(autouse=True)
def only_core(monkeypatch):
    """Whatever else this environment has installed takes no part."""
    others = [plugin.name for plugin, _ in w.PluginHost.discover(environ={}).check() if plugin.name != "disk"]
    monkeypatch.setenv("WEIGHTS_BLOCK", ",".join(others))
    monkeypatch.delenv("WEIGHTS_CONFIG", raising=False)


@pytest.fixture
def tensors():
    return {"a": random_tensor(8, 4, dtype="I32", seed=1), "b": torch.arange(6.0), "c": torch.ones(3)}


@pytest.fixture
def checkpoint(tmp_path, tensors):
    return write_checkpoint(tmp_path / "ckpt", tensors, shards=2)


@pytest.fixture
def pipeline(tmp_path):
    root = tmp_path / "pipe"
    write_checkpoint(root / "transformer", {"t": torch.ones(4)})
    write_checkpoint(root / "vae", {"v": torch.ones(2)})
    (root / "scheduler").mkdir()
    names = ("transformer", "vae", "scheduler")
    index = {"_class_name": "Toy"} | {name: ["diffusers", "X"] for name in names}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a plugin's source as a real distribution on `sys.path`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    modules = []

    def installing(name, source):
        module = f"weights_cli_test_{name}"
        modules.append(module)
        (site / f"{module}.py").write_text(source)
        info = site / f"weights_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: weights-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[weights.plugins]\n{name} = {module}:Plugin\n")
        importlib.invalidate_caches()
        return site

    yield installing
    for module in modules:
        sys.modules.pop(module, None)


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def succeeded(*arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stderr, result.exception) == (0, "", None)
    return result.stdout


def failed(*arguments, code=1):
    """Return the one line that a failure prints."""
    result = run(*arguments)
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    assert "Traceback" not in line
    return line


def script(*arguments, **environ):
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def size_of(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


# load -----------------------------------------------------------------------------------------


def test_load_reads_everything_and_prints_the_report(checkpoint):
    out = succeeded("load", checkpoint)
    assert out.startswith(f"{checkpoint}: 3 tensors, ")
    assert " by disk\n" in out
    phases = out.split("\n\n")[1]
    for phase in ("resolve", "load", "apply", "post_load", "cleanup"):
        assert re.search(rf"^{phase} |^the rest .*\b{phase}\b", phases, re.MULTILINE)
    assert "asked disk (weights-core " in out
    assert "verified" not in out


def test_load_folds_phases_that_took_no_time_into_one_line(checkpoint, mocker):
    mocker.patch("weights_core.report._BRIEF", float("inf"))
    lines = succeeded("load", checkpoint).split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["phase", "apply", "the"]
    assert lines[-1].startswith("the rest ")
    assert "(resolve, load, " in lines[-1]
    assert lines[-1].endswith(", cleanup)")


def test_load_closes_the_lease(checkpoint, mocker):
    mocker.patch.object(w.Lease, "anchor", autospec=True)  # else the engine's end closes it, too
    closing = mocker.spy(w.Lease, "close")
    succeeded("load", checkpoint)
    assert closing.call_count == 1


def test_load_verify_says_how_many_bytes_were_compared(checkpoint, tensors):
    last = succeeded("load", checkpoint, "--verify").splitlines()[-1]
    assert last.startswith(f"verified: {size_of(tensors):,} bytes equal an independent read")
    assert "memory" in last


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_load_verify_takes_every_kind_of_file(tmp_path, tensors, kind):
    write_checkpoint(tmp_path / "other", tensors, kind=kind, shards=2)
    assert f"verified: {size_of(tensors)} bytes" in succeeded("load", tmp_path / "other", "--verify")


def test_load_verify_fails_when_a_provider_returns_a_wrong_byte(checkpoint, install):
    install("tape", WRONG_BYTE)
    line = failed("load", checkpoint, "--verify", "-f", "tape")
    assert line.startswith("weights: CoverageError: ")
    assert "tensor 'b' is not what an independent read of the file gives" in line
    assert ".safetensors" in line


def test_load_without_verify_does_not_notice_a_wrong_byte(checkpoint, install):
    install("tape", WRONG_BYTE)
    assert " by tape\n" in succeeded("load", checkpoint)


def test_load_takes_a_single_file(tmp_path, tensors):
    write_checkpoint(tmp_path / "one", tensors)
    assert "3 tensors" in succeeded("load", tmp_path / "one" / "model.safetensors", "--verify")


@pytest.mark.parametrize("formats", ["disk", "auto", "tape,disk", " tape , disk ", ""])
def test_load_asks_the_formats_it_is_given(checkpoint, install, formats):
    install("tape", WRONG_BYTE)
    provider = "disk" if formats == "disk" else "tape"
    assert f" by {provider}\n" in succeeded("load", checkpoint, "--format", formats)


# explain --------------------------------------------------------------------------------------


def test_explain_names_the_index_the_plan_and_the_reasons(checkpoint):
    lines = succeeded("explain", checkpoint).splitlines()
    assert lines[:5] == [
        f"{checkpoint}: 3 tensors, 0.0 MB, 2 safetensors files, index model.safetensors.index.json",
        "owner: none",
        "sources, in order: disk",
        "wrappers, from the outside in: none",
        "publishers: none",
    ]
    assert lines[5].startswith("source           disk (weights-core ")
    assert lines[5].endswith(": reads any checkpoint, one tensor after the other")


def test_explain_of_a_single_file_has_no_index(tmp_path, tensors):
    write_checkpoint(tmp_path / "one", tensors)
    first = succeeded("explain", tmp_path / "one").splitlines()[0]
    assert first == f"{tmp_path / 'one'}: 3 tensors, 0.0 MB, 1 safetensors file"


def test_explain_shows_what_was_passed_over(tmp_path, tensors):
    write_checkpoint(tmp_path / "one", tensors)
    write_checkpoint(tmp_path / "one", tensors, stem="consolidated")
    lines = succeeded("explain", tmp_path / "one").splitlines()
    assert lines[1] == "note: passed over 'consolidated.safetensors': not part of this checkpoint"


def test_explain_shows_other_plugins_and_those_that_take_no_part(checkpoint, install, monkeypatch):
    install("tape", WRONG_BYTE)
    install("stuck", BAD_CLEANUP.replace("raise OSError", "print"))
    install("absent", "raise ImportError('no libtape')")
    monkeypatch.setenv("WEIGHTS_BLOCK", os.environ["WEIGHTS_BLOCK"] + ",blocked")
    install("blocked", "raise ImportError('must not be imported')")
    result = run("explain", checkpoint)
    out = result.stdout
    assert result.exit_code == 0
    assert result.stderr.startswith(
        "weights: WARNING: plugin 'absent' of weights-absent 1.0 cannot be imported"
    )
    assert "Traceback" not in result.stderr
    assert "sources, in order: tape, disk" in out
    assert "wrappers, from the outside in: stuck" in out
    assert "source           tape (weights-tape 1.0): reads tapes" in out
    assert "not used         blocked (weights-blocked 1.0): blocked" in out
    assert "not used         absent (weights-absent 1.0): broken: " in out
    assert "no libtape" in out


def test_explain_reads_no_tensor(checkpoint, mocker):
    applied = mocker.patch.object(ScanEngine, "apply", autospec=True)
    asked = mocker.spy(w.Session, "load")
    succeeded("explain", checkpoint)
    assert (applied.call_count, asked.call_count) == (0, 0)


def test_explain_prints_faults_and_the_plan_and_exits_with_1(checkpoint):
    files = sorted(checkpoint.glob("*.safetensors"))
    for file in files:
        file.write_bytes(b"")
    result = run("explain", checkpoint)
    assert (result.exit_code, result.stderr) == (1, "")
    faults = [line for line in result.stdout.splitlines() if line.startswith("fault: ")]
    for file in files:
        assert any(str(file) in fault and "too short" in fault for fault in faults)
    assert "sources, in order: disk" in result.stdout


def test_explain_opens_no_session_so_nothing_cleans_up(checkpoint, install):
    install("stuck", BAD_CLEANUP)
    assert "wrappers, from the outside in: stuck" in succeeded("explain", checkpoint)


def test_explain_shows_the_named_order(checkpoint, install):
    install("tape", WRONG_BYTE)
    assert "sources, in order: disk\n" in succeeded("explain", checkpoint, "-f", "disk")


# Pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["load", "explain"])
def test_without_component_all_components_with_weights_are_taken(pipeline, command):
    out = succeeded(command, pipeline)
    assert out.count("disk (weights-core") >= 2
    if command == "explain":
        assert [line for line in out.splitlines() if line.startswith(str(pipeline))] == [
            f"{pipeline / 'transformer'}: 1 tensor, 0.0 MB, 1 safetensors file",
            f"{pipeline / 'vae'}: 1 tensor, 0.0 MB, 1 safetensors file",
        ]
    else:
        assert out.count("1 tensors, ") == 2


def test_each_component_is_verified(pipeline):
    out = succeeded("load", pipeline, "--verify")
    assert "verified: 16 bytes" in out
    assert "verified: 8 bytes" in out


def test_one_component_can_be_picked(pipeline):
    assert succeeded("explain", pipeline, "--component", "vae").startswith(f"{pipeline / 'vae'}: 1 ")
    assert "verified: 8 bytes" in succeeded("load", pipeline, "--component", "vae", "--verify")


@pytest.mark.parametrize("command", ["load", "explain"])
def test_an_unknown_component_is_an_error_that_lists_them(pipeline, command):
    line = failed(command, pipeline, "--component", "unet")
    assert "has no component 'unet'; it has 'transformer', 'vae'" in line


# plugins --------------------------------------------------------------------------------------


def test_plugins_lists_the_built_in_with_its_distribution_and_state():
    (line,) = [line for line in succeeded("plugins").splitlines() if line.startswith("disk ")]
    assert line.split() == [
        "disk",
        "weights-core",
        version("weights-core"),
        "provider",
        "ok",
        "(built",
        "in)",
    ]


def test_plugins_shows_which_work_which_are_broken_and_why(install, monkeypatch):
    install("tape", WRONG_BYTE)
    install("absent", "raise ImportError('no libtape')")
    install("newer", WRONG_BYTE.replace("weights_api = 1", "weights_api = 2"))
    install("blocked", "raise ImportError('must not be imported')")
    monkeypatch.setenv("WEIGHTS_BLOCK", os.environ["WEIGHTS_BLOCK"] + ",blocked")
    lines = {line.split()[0]: line for line in run("plugins").stdout.splitlines()}
    assert lines["tape"].split() == ["tape", "weights-tape", "1.0", "provider", "ok"]
    assert "broken: plugin 'absent' of weights-absent 1.0 cannot be imported" in lines["absent"]
    assert "no libtape" in lines["absent"]
    assert "upgrade weights-core" in lines["newer"]
    assert lines["blocked"].split()[-1] == "blocked"


def test_plugins_gives_each_plugin_one_line_though_its_mistake_takes_several_to_tell(install):
    install("tape", WRONG_PARAMETER)
    names = [plugin.name for plugin, _ in w.PluginHost.discover().check()]
    lines = succeeded("plugins").splitlines()
    assert [line.split()[0] for line in lines] == names


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["load", "explain"])
def test_a_missing_checkpoint_is_one_line(tmp_path, command):
    line = failed(command, tmp_path / "absent")
    assert line.startswith(f"weights: CheckpointError: {tmp_path / 'absent'}: no such file or folder")


@pytest.mark.parametrize("command", ["load", "explain"])
def test_a_folder_without_weights_is_one_line(tmp_path, command):
    assert "holds no weights" in failed(command, tmp_path)


@pytest.mark.parametrize("command", ["load", "explain"])
def test_a_path_that_the_system_refuses_is_one_line(command):
    line = failed(command, "a" * 300)
    assert "File name too long" in line


@pytest.mark.parametrize("command", ["load", "explain"])
def test_a_hub_id_is_answered_with_how_to_download_it(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "hf download some/model" in failed(command, "some/model")


@pytest.mark.parametrize("command", ["load", "explain"])
def test_an_unknown_format_is_one_line_with_the_command_that_installs_it(checkpoint, command):
    line = failed(command, checkpoint, "-f", "tape", code=2)
    assert line == "weights: FormatNotFoundError: 'tape' is not installed; try: pip install weights-tape"


def test_a_truncated_file_is_one_line_that_names_it(checkpoint):
    file = sorted(checkpoint.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    line = failed("load", checkpoint)
    assert str(file) in line


def test_a_plugin_that_breaks_the_contract_is_one_line(checkpoint, install):
    install("tape", WRONG_PARAMETER)
    line = failed("load", checkpoint, "-f", "tape", code=3)
    assert line.startswith("weights: PluginContractError: plugin 'tape' of weights-tape 1.0: ")
    assert "requests" in line


def test_a_failure_to_clean_up_is_one_line_that_names_the_plugin(checkpoint, install):
    install("stuck", BAD_CLEANUP)
    line = failed("load", checkpoint)
    assert line.startswith("weights: CleanupError: ")
    assert "the tape is stuck [plugin stuck of weights-stuck 1.0, hook cleanup, rank 0]" in line


@pytest.mark.parametrize("command", [["plugins"], ["explain", "."], ["load", "."]])
def test_a_broken_settings_file_is_one_line_that_names_it(tmp_path, monkeypatch, checkpoint, command):
    (tmp_path / "w.toml").write_text("[disk\n")
    monkeypatch.setenv("WEIGHTS_CONFIG", str(tmp_path / "w.toml"))
    monkeypatch.chdir(checkpoint)
    line = failed(*command, code=2)
    assert line.startswith(f"weights: PluginConfigError: WEIGHTS_CONFIG names {tmp_path / 'w.toml'}")


def test_any_error_of_this_project_is_one_line_with_its_class(checkpoint, mocker):
    mocker.patch.object(commands, "load_weights", autospec=True, side_effect=LifecycleError("out of order"))
    assert failed("load", checkpoint) == "weights: LifecycleError: out of order"


def test_a_fault_of_the_program_is_one_line_and_exits_with_70(checkpoint, mocker):
    mocker.patch.object(commands, "load_weights", autospec=True, side_effect=ZeroDivisionError("by\nzero"))
    line = failed("load", checkpoint, code=70)
    assert line == "weights: a fault of this program, see --debug: ZeroDivisionError: by zero"


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), LifecycleError("out of order")])
def test_debug_lets_the_traceback_through(checkpoint, mocker, error):
    mocker.patch.object(commands, "load_weights", autospec=True, side_effect=error)
    assert run("load", checkpoint, "--debug").exception is error


def test_an_interrupt_is_one_line_and_exits_with_130(checkpoint, mocker):
    mocker.patch.object(commands, "load_weights", autospec=True, side_effect=KeyboardInterrupt)
    assert failed("load", checkpoint, code=130) == "weights: interrupted"


@pytest.mark.parametrize("arguments", [["load"], ["explain"], ["nonsense"], ["load", ".", "--nonsense"]])
def test_wrong_usage_exits_with_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


@pytest.mark.parametrize("command", sorted(cli.main.commands))
def test_every_command_has_help_with_an_example(command):
    assert command in succeeded("--help")
    text = succeeded(command, "--help")
    assert text.startswith(f"Usage: main {command} ")
    assert re.search(rf"^  Examples?:\n(.*\n)*?    .*weights {command}\b", text, re.MULTILINE)


def test_these_are_all_commands():
    assert set(cli.main.commands) == {
        "load", "explain", "inspect", "plugins", "hooks", "doctor", "check", "trace", "completion"
    }  # fmt: skip


def test_help_tells_the_exit_codes():
    text = succeeded("--help")
    for code in ("0", "1", "2", "3", "70", "130, 143, 141"):
        assert re.search(rf"^ *{code}  ", text, re.MULTILINE)


def test_the_version_is_that_of_the_distribution():
    assert version("weights-core") in succeeded("--version")


def test_the_command_uses_the_same_discovery_as_the_library(mocker):
    hosts = mocker.patch.object(w.PluginHost, "discover", autospec=True, return_value=host_of())
    assert succeeded("plugins").count("\n") == 1
    assert hosts.call_count == 1


# Machine-readable output -----------------------------------------------------------------------


def test_plugins_json_has_every_plugin_and_why_one_is_left_out(install, monkeypatch):
    install("tape", WRONG_BYTE)
    install("blocked", "raise ImportError('must not be imported')")
    monkeypatch.setenv("WEIGHTS_BLOCK", os.environ["WEIGHTS_BLOCK"] + ",blocked")
    found = {one["name"]: one for one in json.loads(succeeded("plugins", "--json"))}
    assert found["tape"] == {
        "name": "tape",
        "distribution": "weights-tape",
        "version": "1.0",
        "roles": ["provider"],
        "active": True,
        "why_not": None,
    }
    assert (found["disk"]["version"], found["disk"]["active"]) == (version("weights-core"), True)
    blocked = found["blocked"]
    assert (blocked["active"], blocked["why_not"], blocked["roles"]) == (False, "blocked", [])


def test_load_json_is_an_array_of_reports_and_nothing_else(checkpoint, tensors):
    (report,) = json.loads(succeeded("load", checkpoint, "--json"))
    assert report["schema"] == "weights.load-report/1"
    assert (report["checkpoint"], report["provider"]) == (str(checkpoint), "disk")
    assert (report["tensors_written"], report["bytes"]) == (len(tensors), size_of(tensors))
    assert [phase["name"] for phase in report["phases"]][:3] == ["resolve", "load", "apply"]
    assert "verified_bytes" not in report


def test_load_json_has_one_report_per_component_with_the_verified_bytes(pipeline):
    reports = json.loads(succeeded("load", pipeline, "--json", "--verify"))
    assert [one["verified_bytes"] for one in reports] == [16, 8]


def test_load_json_says_which_component_a_report_is_of(pipeline):
    reports = json.loads(succeeded("load", pipeline, "--json"))
    for report, component in zip(reports, ["transformer", "vae"], strict=True):
        told = {name: value for name, value in report.items() if name not in ("decisions", "attempts")}
        assert component in json.dumps(told)


def test_load_json_prints_nothing_when_it_fails(checkpoint):
    for file in checkpoint.glob("*.safetensors"):
        file.write_bytes(b"")
    result = run("load", checkpoint, "--json")
    assert (result.exit_code, result.stdout) == (1, "")


def test_inspect_json_describes_every_tensor(checkpoint, tensors):
    (found,) = json.loads(succeeded("inspect", checkpoint, "--json"))
    assert found["schema"] == "weights.inspection/1"
    assert (found["root"], found["kind"]) == (str(checkpoint), "safetensors")
    assert Path(found["index"]).name == "model.safetensors.index.json"
    assert (found["tensor_count"], found["bytes"]) == (len(tensors), size_of(tensors))
    assert {t["name"]: t["shape"] for t in found["tensors"]} == {n: list(t.shape) for n, t in tensors.items()}
    assert (found["faults"], found["ties"]) == ([], [])


def test_inspect_json_still_prints_when_there_are_faults(checkpoint):
    sorted(checkpoint.glob("*.safetensors"))[0].write_bytes(b"")
    result = run("inspect", checkpoint, "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    (found,) = json.loads(result.stdout)
    assert "too short" in found["faults"][0]


# inspect --------------------------------------------------------------------------------------


def test_inspect_shows_files_dtypes_and_layers(checkpoint):
    out = succeeded("inspect", checkpoint)
    first = f"{checkpoint}: 3 tensors, 0.0 MB, 2 safetensors files, index model.safetensors.index.json\n"
    assert out.startswith(first)
    for part in ("\nfile ", "\ndtype ", "\nlayer ", "\nI32 ", "\nF32 "):
        assert part in out
    assert out.endswith("\nno faults\n")


def test_inspect_folds_layers_that_are_alike_in_their_natural_order(tmp_path):
    layers = {f"model.layers.{i}.mlp.weight": torch.ones(2) for i in range(12)}
    write_checkpoint(tmp_path / "deep", layers)
    assert "model.layers.0 … 11 (12 alike)" in succeeded("inspect", tmp_path / "deep")


def test_inspect_shows_the_tie_that_config_json_declares(tmp_path):
    write_checkpoint(tmp_path / "tied", {"model.embed_tokens.weight": torch.ones(2, 2)})
    (tmp_path / "tied" / "config.json").write_text('{"tie_word_embeddings": true}')
    out = succeeded("inspect", tmp_path / "tied")
    assert "tied (tie_word_embeddings in config.json): model.embed_tokens.weight = lm_head.weight" in out


def test_inspect_shows_what_it_can_and_every_fault(checkpoint):
    first, second = sorted(checkpoint.glob("*.safetensors"))
    first.write_bytes(b"")
    result = run("inspect", checkpoint)
    assert (result.exit_code, result.stderr) == (1, "")
    assert f"fault: {first}: 0 bytes is too short" in result.stdout
    assert f"\n{second.name} " in result.stdout
    assert "no faults" not in result.stdout


def test_inspect_of_nothing_is_one_line(tmp_path):
    assert "no such file or folder" in failed("inspect", tmp_path / "absent")


# hooks ----------------------------------------------------------------------------------------


def test_hooks_lists_every_hook_with_its_parameters_and_one_line():
    lines = succeeded("hooks").splitlines()
    assert len(lines) == 2 * len(hookspecs.HOOKS)
    assert [line.split("(")[0] for line in lines[::2]] == list(hookspecs.HOOKS)
    assert all(line.startswith("    ") for line in lines[1::2])


@pytest.mark.parametrize("name", hookspecs.HOOKS)
def test_one_hook_is_shown_in_full(name):
    lines = succeeded("hooks", name).splitlines()
    assert lines[0].startswith(f"{name}(")
    assert len(lines) > 2


def test_an_unknown_hook_is_wrong_use_and_the_nearest_is_named():
    result = run("hooks", "load_weight")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'load_weight' is no hook (did you mean 'load_weights'?)" in result.stderr


# load --chart ---------------------------------------------------------------------------------


def test_load_draws_a_chart(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    succeeded("load", checkpoint, "--chart", tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_each_component_gets_a_chart_of_its_own(pipeline, tmp_path):
    pytest.importorskip("matplotlib")
    succeeded("load", pipeline, "--chart", tmp_path / "load.svg")
    assert sorted(p.name for p in tmp_path.glob("*.svg")) == ["load-transformer.svg", "load-vae.svg"]


@pytest.mark.parametrize("name", ["missing/load.png", "load.gif", "load"])
def test_a_chart_that_could_not_be_written_is_refused_before_the_load(checkpoint, tmp_path, mocker, name):
    loading = mocker.patch.object(commands, "load_weights", autospec=True)
    line = failed("load", checkpoint, "--chart", tmp_path / name, code=2)
    assert line.startswith(f"weights: ChartError: {tmp_path / name}: ")
    assert loading.call_count == 0


def test_a_chart_without_matplotlib_is_refused_with_the_command_that_installs_it(
    checkpoint, tmp_path, monkeypatch, mocker
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    loading = mocker.patch.object(commands, "load_weights", autospec=True)
    line = failed("load", checkpoint, "--chart", tmp_path / "load.png", code=2)
    assert "pip install 'weights-core[plot]'" in line
    assert loading.call_count == 0


# doctor ---------------------------------------------------------------------------------------


def test_doctor_has_a_line_for_versions_plugins_extras_and_the_machine(tmp_path):
    result = run("doctor", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    topics = [line[8:32].strip() for line in result.stdout.splitlines()]
    for topic in ("Python", "weights-core", "torch", "plugin disk", "extra [plot]", "memory", "cores"):
        assert topic in topics


def test_doctor_json_has_the_same_findings(tmp_path):
    found = json.loads(succeeded("doctor", tmp_path, "--json"))
    assert all(set(one) == {"topic", "value", "meaning", "verdict"} for one in found)
    assert {one["verdict"] for one in found} <= {"ok", "note"}
    assert {"weights-core", "plugin disk"} <= {one["topic"] for one in found}


def test_doctor_calls_a_broken_plugin_a_problem_and_a_blocked_one_a_note(install, monkeypatch, tmp_path):
    install("absent", "raise ImportError('no libtape')")
    install("blocked", "raise ImportError('must not be imported')")
    monkeypatch.setenv("WEIGHTS_BLOCK", os.environ["WEIGHTS_BLOCK"] + ",blocked")
    result = run("doctor", tmp_path, "--json")
    assert result.exit_code == 1
    verdicts = {one["topic"]: one["verdict"] for one in json.loads(result.stdout)}
    assert verdicts["plugin absent"] == "problem"
    assert verdicts["plugin blocked"] == "note"


def test_doctor_shows_broken_settings_as_a_problem(monkeypatch, tmp_path):
    (tmp_path / "w.toml").write_text("[disk\n")
    monkeypatch.setenv("WEIGHTS_CONFIG", str(tmp_path / "w.toml"))
    result = run("doctor", tmp_path)
    assert result.exit_code == 1
    assert re.search(r"^problem +settings .*w\.toml", result.stdout, re.MULTILINE)


def test_doctor_of_a_missing_path_is_wrong_use(tmp_path):
    assert run("doctor", tmp_path / "absent").exit_code == 2


def test_doctor_without_matplotlib_notes_what_is_lost(monkeypatch, tmp_path, mocker):
    mocker.patch("importlib.util.find_spec", return_value=None)
    assert "note    extra [plot]            missing: " in succeeded("doctor", tmp_path)


# completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(shell):
    out = succeeded("completion", shell)
    assert "_WEIGHTS_COMPLETE" in out
    assert f"{shell}_complete" in out


def test_completion_of_another_shell_is_wrong_use():
    assert run("completion", "tcsh").exit_code == 2


# Settings -------------------------------------------------------------------------------------


def test_config_is_over_the_environment_and_explain_says_where_each_setting_is_from(
    checkpoint, install, monkeypatch, tmp_path
):
    install("tape", CONFIGURED)
    (tmp_path / "env.toml").write_text("[tape]\nspeed = 5\nheads = 7\n")
    (tmp_path / "arg.toml").write_text("[tape]\nspeed = 9\n")
    monkeypatch.setenv("WEIGHTS_CONFIG", str(tmp_path / "env.toml"))
    out = succeeded("explain", checkpoint, "--config", tmp_path / "arg.toml")
    assert out.splitlines()[-1] == (
        f"settings of tape: speed = 9 (--config {tmp_path / 'arg.toml'}), "
        f"heads = 7 ({tmp_path / 'env.toml'}), label = 'x' (default)"
    )


@pytest.mark.parametrize("command", ["load", "explain"])
def test_broken_toml_names_the_file_and_the_line(checkpoint, tmp_path, command):
    (tmp_path / "w.toml").write_text("[disk]\nspeed = \n")
    line = failed(command, checkpoint, "--config", tmp_path / "w.toml", code=2)
    assert line.startswith(f"weights: PluginConfigError: --config names {tmp_path / 'w.toml'}, ")
    assert "line 2" in line


@pytest.mark.parametrize("command", ["load", "explain"])
def test_a_missing_settings_file_is_one_line(checkpoint, tmp_path, command):
    line = failed(command, checkpoint, "--config", tmp_path / "absent.toml", code=2)
    assert "No such file" in line


@pytest.mark.parametrize("command", ["load", "explain"])
def test_a_misspelt_setting_is_wrong_use_and_the_nearest_is_named(checkpoint, install, tmp_path, command):
    install("tape", CONFIGURED)
    (tmp_path / "w.toml").write_text("[tape]\nspede = 5\n")
    line = failed(command, checkpoint, "--config", tmp_path / "w.toml", code=2)
    assert "plugin 'tape' has no setting 'spede' (did you mean 'speed'?)" in line


@pytest.mark.parametrize("command", ["load", "explain"])
def test_settings_that_are_no_table_are_one_line(checkpoint, tmp_path, command):
    (tmp_path / "w.toml").write_text("disk = 1\n")
    assert "'disk' must be a table" in failed(command, checkpoint, "--config", tmp_path / "w.toml", code=2)


# The installed script -------------------------------------------------------------------------


def test_the_script_loads_and_verifies(checkpoint, tensors):
    done = script("load", checkpoint, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{checkpoint}: 3 tensors, ")
    assert f"verified: {size_of(tensors)} bytes" in done.stdout


def test_the_script_finds_an_installed_plugin_and_verify_catches_it(checkpoint, install):
    site = install("tape", WRONG_BYTE)
    done = script("load", checkpoint, "--verify", PYTHONPATH=str(site))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("weights: CoverageError: ")
    assert "tensor 'b'" in line


def test_the_script_shows_a_broken_plugin_and_warns_on_stderr_without_a_traceback(install):
    site = install("absent", "raise ImportError('no libtape')")
    done = script("plugins", PYTHONPATH=str(site))
    assert done.returncode == 0
    assert "broken: plugin 'absent' of weights-absent 1.0 cannot be imported" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
