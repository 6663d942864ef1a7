# SPDX-License-Identifier: Apache-2.0
"""A third party's way: the example distribution and the page on writing a plugin, done as a user would."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HELLO = ROOT / "examples/weights-hello"
PAGE = ROOT / "docs/writing-a-plugin.md"
FILE = re.compile(r"^`([\w./-]+)`\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HERE = {  # how a command of the page is run in an environment that has no index and few scripts
    "pip install": "pip install --quiet --no-index --no-deps --no-build-isolation",
    "python -m build": "python -m build --no-isolation",
    "pytest": "python -m pytest",
}


def run(command, where, bin, **options):
    environ = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=where, env=environ, capture_output=True, text=True, timeout=280, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_installs_and_honours_its_contract(clean, tmp_path):
    copied = tmp_path / "weights-hello"
    copied.mkdir()
    run(["cp", "-r", *HELLO.iterdir(), copied], tmp_path, clean)
    run(shlex.split(f"{HERE['pip install']} ."), copied, clean)
    try:
        assert "hello" in run(["weights", "plugins"], tmp_path, clean)
        out = run(["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], copied, clean)
        assert re.search(r"^\d\d passed", out, re.MULTILINE), out
    finally:
        run(["python", "-m", "pip", "uninstall", "--quiet", "--yes", "weights-hello"], tmp_path, clean)


def test_the_page_leads_to_a_plugin_that_works(clean, tmp_path):
    """Every block is used: files are written as named, commands are run, in the order of the page."""
    try:
        follow(PAGE.read_text(), tmp_path, clean)
    finally:
        run(["python", "-m", "pip", "uninstall", "--quiet", "--yes", "weights-tally"], tmp_path, clean)
    assert len(list((tmp_path / "dist").iterdir())) == 2


def follow(page, folder, bin):
    done = 0
    named = {match.end(): match for match in FILE.finditer(page)}
    for block in BLOCK.finditer(page):
        kind, text = block.groups()
        if block.end() in named:
            path = folder / named[block.end()].group(1)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif kind == "console":
            for line in text.splitlines():
                for written, offline in HERE.items():
                    line = offline + line.removeprefix(written) if line.startswith(written) else line
                run(shlex.split(line), folder, bin)
        else:
            assert "exclusions" in text
            (folder / "tests/test_contract.py").write_text(text)
        done += 1
    assert done == len(re.findall(r"^```\w", page, re.MULTILINE)) == 10


@pytest.mark.parametrize("hook", ["resolve_format", "load_weights"])
def test_a_renamed_parameter_of_a_hook_is_seen_by_a_type_checker(tmp_path, hook):
    plugin = (HELLO / "src/weights_hello/plugin.py").read_text()
    (tmp_path / "plugin.py").write_text(plugin)
    checked = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "plugin.py"]
    environ = {**os.environ, "PYTHONPATH": str(HELLO / "src")}
    sound = subprocess.run(checked, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=280)
    assert "incompatible" not in sound.stdout, sound.stdout
    signature = re.search(rf"def {hook}\(self, request.*", plugin).group()
    renamed = plugin.replace(signature, signature.replace("request", "asked", 1))
    (tmp_path / "plugin.py").write_text(renamed)
    told = subprocess.run(checked, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=280)
    assert told.returncode == 1
    assert f'"{hook}"' in told.stdout
    assert "name mismatch" in told.stdout
