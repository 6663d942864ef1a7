# SPDX-License-Identifier: Apache-2.0
"""The `weights` command, in process and as the installed script."""

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import weights_core as w
from weights_core import cli
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


def failed(*arguments):
    """Return the one line that a failure prints."""
    result = run(*arguments)
    assert result.exit_code == 1
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
    for phase in ("resolve", "load", "apply", "cleanup"):
        assert f"\n{phase} " in out
    assert "asked disk (weights-core " in out
    assert "verified" not in out


def test_load_closes_the_lease(checkpoint, mocker):
    mocker.patch.object(w.Lease, "anchor", autospec=True)  # else the engine's end closes it, too
    closing = mocker.spy(w.Lease, "close")
    succeeded("load", checkpoint)
    assert closing.call_count == 1


def test_load_verify_says_how_many_bytes_were_compared(checkpoint, tensors):
    out = succeeded("load", checkpoint, "--verify")
    assert out.splitlines()[-1] == (
        f"verified: {size_of(tensors):,} bytes equal an independent read of the files"
    )


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
        f"{checkpoint}: 2 safetensors files, index model.safetensors.index.json",
        "owner: none",
        "sources, in order: disk",
        "wrappers, from the outside in: none",
        "publishers: none",
    ]
    assert lines[5].startswith("source           disk (weights-core ")
    assert lines[5].endswith(": reads any checkpoint, one tensor after the other")


def test_explain_of_a_single_file_has_no_index(tmp_path, tensors):
    write_checkpoint(tmp_path / "one", tensors)
    assert succeeded("explain", tmp_path / "one").startswith(f"{tmp_path / 'one'}: 1 safetensors file\n")


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
    out = succeeded("explain", checkpoint)
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


def test_explain_does_not_look_into_the_files(checkpoint):
    for file in checkpoint.glob("*.safetensors"):
        file.write_bytes(b"")
    assert "sources, in order: disk" in succeeded("explain", checkpoint)


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
            f"{pipeline / 'transformer'}: 1 safetensors file",
            f"{pipeline / 'vae'}: 1 safetensors file",
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
    assert line.split() == ["disk", "weights-core", version("weights-core"), "ok", "(built", "in)"]


def test_plugins_shows_which_work_which_are_broken_and_why(install, monkeypatch):
    install("tape", WRONG_BYTE)
    install("absent", "raise ImportError('no libtape')")
    install("newer", WRONG_BYTE.replace("weights_api = 1", "weights_api = 2"))
    install("blocked", "raise ImportError('must not be imported')")
    monkeypatch.setenv("WEIGHTS_BLOCK", os.environ["WEIGHTS_BLOCK"] + ",blocked")
    lines = {line.split()[0]: line for line in succeeded("plugins").splitlines()}
    assert lines["tape"].split() == ["tape", "weights-tape", "1.0", "ok"]
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
    line = failed(command, checkpoint, "-f", "gms")
    assert line == "weights: FormatNotFoundError: 'gms' is not installed; try: pip install weights-gms"


def test_a_truncated_file_is_one_line_that_names_it(checkpoint):
    file = sorted(checkpoint.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    line = failed("load", checkpoint)
    assert str(file) in line


def test_a_plugin_that_breaks_the_contract_is_one_line(checkpoint, install):
    install("tape", WRONG_PARAMETER)
    line = failed("load", checkpoint, "-f", "tape")
    assert line.startswith("weights: PluginContractError: plugin 'tape' of weights-tape 1.0: ")
    assert "requests" in line


@pytest.mark.parametrize("command", ["load", "explain"])
def test_a_failure_to_clean_up_is_one_line_that_names_the_plugin(checkpoint, install, command):
    install("stuck", BAD_CLEANUP)
    line = failed(command, checkpoint)
    assert line.startswith("weights: CleanupError: ")
    assert "the tape is stuck [plugin stuck of weights-stuck 1.0, hook cleanup, rank 0]" in line


@pytest.mark.parametrize("command", [["plugins"], ["explain", "."], ["load", "."]])
def test_a_broken_settings_file_is_one_line_that_names_it(tmp_path, monkeypatch, checkpoint, command):
    (tmp_path / "w.toml").write_text("[disk\n")
    monkeypatch.setenv("WEIGHTS_CONFIG", str(tmp_path / "w.toml"))
    monkeypatch.chdir(checkpoint)
    line = failed(*command)
    assert line.startswith(f"weights: PluginConfigError: WEIGHTS_CONFIG names {tmp_path / 'w.toml'}")


def test_any_error_of_this_project_is_one_line_with_its_class(checkpoint, mocker):
    mocker.patch.object(cli, "load_weights", autospec=True, side_effect=LifecycleError("out of order"))
    assert failed("load", checkpoint) == "weights: LifecycleError: out of order"


def test_other_errors_are_not_hidden(checkpoint, mocker):
    mocker.patch.object(cli, "load_weights", autospec=True, side_effect=ZeroDivisionError)
    assert isinstance(run("load", checkpoint).exception, ZeroDivisionError)


@pytest.mark.parametrize("arguments", [["load"], ["explain"], ["nonsense"], ["load", ".", "--nonsense"]])
def test_wrong_usage_exits_with_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


@pytest.mark.parametrize("command", ["load", "explain", "plugins"])
def test_every_command_has_help(command):
    assert command in succeeded("--help")
    assert succeeded(command, "--help").startswith(f"Usage: main {command} ")


def test_the_version_is_that_of_the_distribution():
    assert version("weights-core") in succeeded("--version")


def test_the_command_uses_the_same_discovery_as_the_library(mocker):
    hosts = mocker.patch.object(w.PluginHost, "discover", autospec=True, return_value=host_of())
    assert succeeded("plugins").count("\n") == 1
    assert hosts.call_count == 1


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
