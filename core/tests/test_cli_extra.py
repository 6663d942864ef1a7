# SPDX-License-Identifier: Apache-2.0
"""Commands that other distributions bring: found by metadata, imported when they are invoked."""

import importlib
import sys

import pytest
from click.testing import CliRunner

from weights_core.cli import main

GOOD = """
import click

@click.group()
def extra():
    "Things of its own."

@extra.command()
def hello():
    click.echo("hello")
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def write(site, distribution, name, target, module=""):
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[weights.commands]\n{name} = {target}\n")
    if module:
        (site / f"{target.partition(':')[0]}.py").write_text(module)
    importlib.invalidate_caches()


def run(*arguments):
    return CliRunner().invoke(main, arguments)


def test_a_command_is_listed_without_importing_it_and_runs(site):
    write(site, "weights-extra", "extra", "extra_commands:extra", GOOD)
    listed = run("--help").output
    assert "  extra       Of weights-extra.\n" in listed
    assert "  hooks       Show the hooks that a plugin may implement" in listed
    assert "extra_commands" not in sys.modules
    assert run("extra", "hello").output == "hello\n"
    assert "Things of its own." in run("extra", "--help").output


@pytest.mark.parametrize(
    ("target", "module", "says"),
    [
        ("gone_commands:x", "", "cannot be imported: ModuleNotFoundError: No module named 'gone_commands'"),
        ("bad_commands:x", "1 / 0", "cannot be imported: ZeroDivisionError"),
        ("odd_commands:x", "x = 3", "is no click command: 3"),
    ],
)
def test_a_broken_command_is_named_and_breaks_nothing_else(site, target, module, says):
    write(site, "weights-broken", "broken", target, module)
    done = run("broken")
    assert done.exit_code == 3
    assert "Error: command 'broken' of weights-broken 1.0 " in done.output
    assert says in done.output
    assert "broken" in run("--help").output
    assert run("hooks").exit_code == 0


def test_two_of_one_name_are_refused_and_our_own_come_first(site):
    write(site, "weights-one", "twice", "one_commands:extra", GOOD)
    write(site, "weights-two", "twice", "two_commands:extra", GOOD)
    write(site, "weights-thief", "hooks", "thief_commands:extra", GOOD)
    done = run("twice")
    assert done.exit_code == 3
    assert "weights-one 1.0 and weights-two 1.0 both bring a command 'twice': uninstall one" in done.output
    assert run("hooks").output.startswith("resolve_format(request)")
    assert "weights-thief" not in run("--help").output


def test_an_unknown_command_is_wrong_use():
    done = run("nonsense")
    assert done.exit_code == 2
    assert "No such command 'nonsense'" in done.output
