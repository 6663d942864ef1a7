# SPDX-License-Identifier: Apache-2.0
"""The `weights` command as a process: pipes, signals, terminals; and whatever a file may hold."""

import contextlib
import json
import os
import pty
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weights_core as w
from weights_core import cli
from weights_core.testing import write_checkpoint

SCRIPT = Path(sys.executable).parent / "weights"

SLOW = """
import os
import pathlib
import time

from weights_core import Fit, FormatClaim, Role, WeightSetWrapper, hookimpl

class Slow(WeightSetWrapper):
    def _wait(self):
        pathlib.Path(os.environ["SLOW_MARKER"]).write_text("reading")
        time.sleep(60)

    def read(self, *args, **kwargs):
        self._wait()
        return self.inner.read(*args, **kwargs)

    def stream(self, names=None):
        self._wait()
        yield from self.inner.stream(names)

class Plugin:
    weights_api = 1

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim(roles={Role.SOURCE}, reason="is slow", fit=Fit.BEST)

    @hookimpl
    def load_weights(self, source):
        return Slow(source.open())

    @hookimpl
    def cleanup(self):
        pathlib.Path(os.environ["SLOW_MARKER"] + ".cleaned").write_text("")
"""


@pytest.fixture(scope="module")
def others():
    """The plugins that this environment has besides the disk."""
    return [plugin.name for plugin, _ in w.PluginHost.discover(environ={}).check() if plugin.name != "disk"]


@pytest.fixture
def environ(others):
    """An environment in which only the core takes part."""
    # unbuffered, Python takes the part that a pipe accepted before its reader left for the whole
    left_out = ("WEIGHTS_CONFIG", "PYTHONUNBUFFERED", "NO_COLOR")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"WEIGHTS_BLOCK": ",".join(others), "TERM": "xterm"}


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", {"a": torch.ones(8, 4), "b": torch.arange(6.0)}, shards=2)


@pytest.fixture
def slow(tmp_path, environ):
    """An environment with a plugin that reads for a minute, and the file it writes when it begins to."""
    site = tmp_path / "site"
    info = site / "weights_slow-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "weights_cli_test_slow.py").write_text(SLOW)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weights-slow\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[weights.plugins]\nslow = weights_cli_test_slow:Plugin\n")
    marker = tmp_path / "marker"
    return environ | {"PYTHONPATH": str(site), "SLOW_MARKER": str(marker)}, marker


def terminal():
    """Return both ends of a pseudo-terminal of the usual size; one of no width shows no bar."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    return ours, theirs


@contextlib.contextmanager
def started(*arguments, **options):
    process = subprocess.Popen([SCRIPT, *map(str, arguments)], stdin=subprocess.DEVNULL, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def wait_for(marker, process):
    while not (marker.exists() and marker.read_text()):
        assert process.poll() is None, "the process ended before it began to read"
        time.sleep(0.01)


def run(*arguments, env):
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )


def on_terminal(*arguments, env):
    """Run with standard output and error on a pseudo-terminal; return the exit code and what it got."""
    ours, theirs = terminal()
    try:
        with started(*arguments, env=env, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            theirs = -1
            shown = b""
            while True:
                select.select([ours], [], [])
                try:
                    part = os.read(ours, 1 << 16)
                except OSError:  # EIO: nobody has the other end open any more
                    break
                if not part:
                    break
                shown += part
            return process.wait(), shown.decode()
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


# Pipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [2, 5000])
def test_a_reader_that_stops_early_gets_no_traceback(tmp_path, environ, tensors):
    many = {f"model.layers.{i}.mlp.down_proj.weight": torch.ones(1) for i in range(tensors)}
    path = write_checkpoint(tmp_path / "many", many)
    line = f"set -o pipefail; {shlex.join([str(SCRIPT), 'inspect', str(path), '--json'])} | head -c 1"
    done = subprocess.run(["bash", "-c", line], env=environ, capture_output=True, check=False)
    assert done.stdout == b"["
    assert done.stderr == b""
    assert done.returncode in ((0, 141) if tensors == 2 else (141,))


@pytest.mark.parametrize("command", ["inspect", "explain", "load"])
def test_a_pipe_that_nobody_reads_is_no_error_message(checkpoint, environ, command):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with started(command, checkpoint, env=environ, stdout=writing, stderr=subprocess.PIPE) as process:
            told = process.stderr.read()
            assert (process.wait(), told) == (141, b"")
    finally:
        os.close(writing)


def test_json_on_standard_output_is_not_mixed_with_warnings(checkpoint, environ, tmp_path):
    site = tmp_path / "broken"
    info = site / "weights_absent-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weights-absent\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[weights.plugins]\nabsent = weights_no_such_module:Plugin\n")
    done = run("load", checkpoint, "--json", env=environ | {"PYTHONPATH": str(site)})
    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["schema"] == "weights.load-report/1"
    assert done.stderr.startswith(b"weights: WARNING: ")


# Signals --------------------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """Ctrl-C is heard also where tests run in the background of a shell, which has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_a_load_with_one_line_after_the_cleanup(checkpoint, slow, number, code, word):
    env, marker = slow
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started("load", checkpoint, env=env, text=True, **pipes) as process:
        wait_for(marker, process)
        process.send_signal(number)
        out, err = process.communicate()
        assert (process.returncode, out) == (code, "")
        (line,) = err.splitlines()
        assert line.startswith(f"weights: {word}")
    assert marker.with_name("marker.cleaned").exists()


# Terminals ------------------------------------------------------------------------------------


def test_a_terminal_shows_a_progress_bar(checkpoint, environ):
    code, shown = on_terminal("load", checkpoint, env=environ)
    assert code == 0
    assert "weights: " in shown
    assert "%|" in shown
    assert "2 tensors, " in shown


def test_a_pipe_shows_no_progress_bar(checkpoint, environ):
    done = run("load", checkpoint, env=environ)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command", [["inspect"], ["explain"], ["load"]])
@pytest.mark.parametrize("changed", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_plain_terminal_gets_no_colours(checkpoint, environ, command, changed):
    code, shown = on_terminal(*command, checkpoint, env=environ | changed)
    assert code == 0
    assert "\x1b[3" not in shown
    assert "\x1b[1m" not in shown


def test_an_error_on_a_terminal_is_one_line(tmp_path, environ):
    code, shown = on_terminal("load", tmp_path / "absent", env=environ)
    assert code == 1
    assert shown.count("\n") == 1
    assert shown.startswith("weights: CheckpointError: ")


def test_an_error_after_the_bar_began_is_on_a_line_of_its_own(checkpoint, slow):
    env, marker = slow
    ours, theirs = terminal()
    try:
        with started("load", checkpoint, env=env, stdout=subprocess.PIPE, stderr=theirs) as process:
            os.close(theirs)
            wait_for(marker, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 143
            shown = b""
            with contextlib.suppress(OSError):  # EIO at the end
                while part := os.read(ours, 1 << 16):
                    shown += part
        assert "\nweights: terminated" in shown.decode()
        assert "Traceback" not in shown.decode()
    finally:
        os.close(ours)


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
@pytest.mark.parametrize("command", ["inspect", "explain", "load"])
def test_a_machine_without_a_utf_8_locale_works(tmp_path, environ, command, locale):
    layers = {f"model.layers.{i}.w": torch.ones(2) for i in range(3)} | {"größe": torch.ones(1)}
    path = write_checkpoint(tmp_path / "umlaut", layers)
    extra = locale | {"PYTHONCOERCECLOCALE": "0"}
    done = run(command, path, env=environ | extra)
    assert (done.returncode, done.stderr) == (0, b"")


# What is imported -----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["plugins"], ["--help"], ["hooks"], ["completion", "bash"]])
def test_commands_that_read_no_tensor_import_no_torch(environ, arguments):
    code = (
        "import sys\n"
        "from weights_core.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


# Headers --------------------------------------------------------------------------------------


def file_of(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "name", [b'"\\ud800"', b'"a\xffb"', b'"\xed\xa0\x80"'], ids=["lone surrogate", "latin-1", "raw surrogate"]
)
@pytest.mark.parametrize("command", ["load", "inspect", "explain"])
def test_a_name_that_is_no_text_is_one_line(tmp_path, environ, command, name):
    (tmp_path / "model.safetensors").write_bytes(file_of(b"{" + name + b":" + ENTRY + b"}", bytes(4)))
    done = run(command, tmp_path, env=environ)
    assert done.returncode == 1
    if command == "load":
        assert done.stdout == b""
        assert done.stderr.count(b"\n") == 1
        assert done.stderr.startswith(b"weights: CheckpointError: ")
    else:
        assert done.stderr == b""
        assert sum(line.startswith(b"fault: ") for line in done.stdout.splitlines()) == 1


# Soak -----------------------------------------------------------------------------------------

VALID = file_of(
    json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "layers.0.w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "layers.1.w": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
            "lm_head.weight": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
        }
    ).encode(),
    bytes(25),
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "F8_E4M3", "C64", "X"]) | _json,
        "shape": st.lists(st.integers(-1, 1 << 70), max_size=4) | st.just([4]) | _json,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | st.just([0, 16]) | _json,
    },
)
_headers = st.builds(
    lambda header, data: file_of(json.dumps(header).encode(), data),
    st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), _entry | _json, max_size=3),
    st.binary(max_size=32),
)
_cut = st.integers(0, len(VALID)).map(lambda n: VALID[:n])


@st.composite
def _flipped(draw):
    changed = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


_files = st.binary(max_size=64) | _headers | _cut | _flipped() | st.just(VALID)
_index_of = st.dictionaries(
    st.sampled_from(["layers.0.w", "lm_head.weight", "other"]) | st.text(max_size=5),
    st.sampled_from(["model.safetensors", "absent.safetensors", "../model.safetensors"]) | _json,
    max_size=4,
)
_indexes = st.none() | st.builds(
    lambda shown: json.dumps(shown).encode(), st.builds(lambda m: {"weight_map": m}, _index_of) | _json
)
_indexes |= st.binary(max_size=32)


@pytest.fixture
def only_core(others, monkeypatch):
    monkeypatch.setenv("WEIGHTS_BLOCK", ",".join(others))
    monkeypatch.delenv("WEIGHTS_CONFIG", raising=False)


@settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    command=st.sampled_from(
        [["load"], ["load", "--verify"], ["load", "--json"], ["inspect"], ["inspect", "--json"], ["explain"]]
    ),
    held=_files,
    index=_indexes,
)
def test_whatever_a_checkpoint_holds_is_answered_with_an_exit_code_and_one_line(
    tmp_path, only_core, command, held, index
):
    (tmp_path / "model.safetensors").write_bytes(held)
    beside = tmp_path / "model.safetensors.index.json"
    beside.unlink(missing_ok=True)
    if index is not None:
        beside.write_bytes(index)
    result = CliRunner().invoke(cli.main, [*command, str(tmp_path)])
    assert result.exit_code in (0, 1, 2), result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    told = '"faults": [' in result.stdout if "--json" in command else "fault: " in result.stdout
    if result.exit_code and not told:
        assert result.stderr.startswith("weights: ")
        assert result.stderr.count("\n") == 1
    else:
        assert result.stderr == ""
    result.stdout.encode()
