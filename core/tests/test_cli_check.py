# SPDX-License-Identifier: Apache-2.0
"""`weights check`: an installed plugin on its contract, with a verdict for each clause."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from weights_core import cli
from weights_core.testing.contract import check, clauses
from weights_core.types import Role

SCRIPT = Path(sys.executable).parent / "weights"
CHEAP = ("resolving_twice_answers_the_same", "a_destination_that_does_not_fit_is_refused")

CONTRACTS = """
from weights_core.disk import DiskPlugin
from weights_core.testing import SourceContract
from weights_core.testing.broken.sources import SOUND, SourceCasts
from weights_core.testing.contract import clauses
from weights_core.types import Role

KEPT = ("resolving_twice_answers_the_same", "a_destination_that_does_not_fit_is_refused")

class Sound(SourceContract):
    name, plugin, dtypes = "sound", SOUND, ("F32", "U8")
    exclusions = {c.name: "is tried elsewhere at length" for c in clauses(Role.SOURCE) if c.name not in KEPT}

class Casts(Sound):
    name, plugin = "casts", SourceCasts

class NoName(SourceContract):
    plugin = SOUND

class NoOracle(Sound):
    def prepare(self, folder, tensors):
        return folder

class Unreadable(Sound):
    def prepare(self, folder, tensors):
        raise OSError("no tape")

    def oracle(self, path):
        return {}

def function():
    pass

NOTHING = None
"""
ENTRIES = """
[weights.plugins]
sound = weights_core.testing.broken.sources:SoundSource
casts = weights_core.testing.broken.sources:SourceCasts
absent = no_such_module_at_all:Plugin
refuses = weights_check_refuses:Refuses
tape = weights_check_refuses:Refuses
crashes = weights_check_refuses:Refuses

[weights.contracts]
tape = weights_check_refuses:subjects
crashes = weights_check_refuses:crash
"""
REFUSES = """
from weights_core import FormatClaim, hookimpl

class Refuses:
    weights_api = 1

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim.refuse("not a tape")

def subjects(settings):
    from my_contracts import Sound
    return [(Sound.subject(), {"resolving_twice_answers_the_same": f"for a test, with {settings}"})]

def crash(settings):
    raise OSError("no tape")
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Be in the project of an author whose plugins are installed."""
    site, folder = tmp_path / "site", tmp_path / "project"
    folder.mkdir()
    info = site / "weights_tried-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weights-tried\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    (site / "weights_check_refuses.py").write_text(REFUSES)
    (folder / "my_contracts.py").write_text(CONTRACTS)
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(folder)
    for variable in ("WEIGHTS_BLOCK", "WEIGHTS_CONFIG", "WEIGHTS_TRACE"):
        monkeypatch.delenv(variable, raising=False)
    yield folder
    for module in ("my_contracts", "weights_check_refuses"):
        sys.modules.pop(module, None)


@pytest.fixture
def few_clauses(monkeypatch):
    """All of them take ten seconds."""
    cheap = [clause for clause in clauses(Role.SOURCE) if clause.name in CHEAP]
    monkeypatch.setattr(check, "clauses", lambda role: cheap)


def run(*arguments):
    return CliRunner().invoke(cli.main, ["check", *map(str, arguments)])


def failed(*arguments, code):
    """Return the one line that a failure prints."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    return line


def test_what_a_distribution_brings_is_what_its_plugin_is_tried_on(few_clauses, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    config = tmp_path / "weights.toml"
    config.write_text("[tape]\nspeed = 3\n")
    result = run("tape", "--config", config)
    assert result.exit_code == 0, result.output
    heading, *lines, last = result.stdout.splitlines()
    assert heading == "weights-tried 1.0: tape as a source"
    assert any("for a test, with {'speed': 3}" in line for line in lines)
    assert last == "2 clauses: 1 excluded, 1 hold"


def test_a_brought_contract_that_crashes_is_the_distributions_fault():
    line = failed("crashes", code=3)
    assert "the contract that weights-tried 1.0 brings: OSError: no tape" in line


# The whole of it, as a command ----------------------------------------------------------------


def test_a_sound_plugin_honours_every_clause():
    done = subprocess.run([SCRIPT, "check", "disk"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    heading, *verdicts, last = done.stdout.splitlines()
    assert heading.startswith("weights-core ")
    assert heading.endswith(": disk as a source")
    assert [line.split() for line in verdicts] == [["holds", c.name] for c in clauses(Role.SOURCE)]
    assert last == f"{len(verdicts)} clauses: {len(verdicts)} hold"


def test_a_broken_plugin_ends_with_3_and_names_the_clause(tmp_path):
    done = subprocess.run(
        [SCRIPT, "check", "casts", "--json"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    assert [one["clause"] for one in found] == [clause.name for clause in clauses(Role.SOURCE)]
    (broken,) = [one for one in found if one["result"] != "holds"]
    assert (broken["clause"], broken["result"]) == ("a_destination_that_does_not_fit_is_refused", "broken")
    assert "Else " in broken["detail"]
    assert broken["contract"] == "weights-tried 1.0: casts as a source"


# The table and the JSON -----------------------------------------------------------------------


def test_the_table_tells_what_was_seen_under_a_clause_that_is_broken(few_clauses):
    result = run("casts")
    assert result.exit_code == 3
    heading, first, second, detail, last = result.stdout.splitlines()
    assert heading == "weights-tried 1.0: casts as a source"
    assert {tuple(first.split()), tuple(second.split())} == {
        ("holds", "resolving_twice_answers_the_same"),
        ("broken", "a_destination_that_does_not_fit_is_refused"),
    }
    assert detail.startswith(" " * 12)
    assert "Else " in detail
    assert last == "2 clauses: 1 hold, 1 broken"


def test_json_is_all_that_is_printed(few_clauses):
    result = run("sound", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(json.loads(result.stdout), key=lambda one: one["clause"]) == [
        {
            "clause": name,
            "result": "holds",
            "detail": "",
            "contract": "weights-tried 1.0: sound as a source",
        }
        for name in sorted(CHEAP)
    ]


def test_nothing_is_left_of_what_was_tried(few_clauses, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert run("casts").exit_code == 3
    assert list(temporary.iterdir()) == []


def test_settings_reach_the_plugin(few_clauses, tmp_path):
    (tmp_path / "settings.toml").write_text("[sound]\nvolume = 11\n")
    line = failed("sound", "--config", tmp_path / "settings.toml", code=2)
    assert line == "weights: PluginConfigError: plugin 'sound' takes no settings, given ['volume']"


# What cannot be tried -------------------------------------------------------------------------


def test_a_plugin_that_is_not_installed_is_wrong_use():
    line = failed("souned", code=2)
    assert line.startswith("weights: PluginNotFoundError: plugin 'souned' is not installed")
    assert "did you mean 'sound'?" in line


def test_a_plugin_that_cannot_be_imported_is_broken():
    line = failed("absent", code=3)
    assert line.startswith(
        "weights: PluginLoadError: plugin 'absent' of weights-tried 1.0 cannot be imported"
    )
    assert "no_such_module_at_all" in line


def test_a_plugin_that_takes_no_part_needs_a_contract_of_its_author():
    line = failed("refuses", code=3)
    assert "plugin 'refuses' takes no part in loading a safetensors checkpoint (not a tape)" in line
    assert "--contract module:Class" in line


def test_two_plugins_of_one_name_are_a_conflict(tmp_path):
    info = tmp_path / "site" / "weights_other-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weights-other\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[weights.plugins]\nsound = a:B\n")
    line = failed("sound", code=3)
    assert "PluginConflictError" in line
    assert "weights-other 2.0" in line


# An author's contract -------------------------------------------------------------------------


def test_a_contract_of_an_author_is_found_from_where_one_is():
    before = list(sys.path)
    result = run("sound", "--contract", "my_contracts:Sound")
    assert (result.exit_code, result.stderr) == (0, "")
    heading, *lines, last = result.stdout.splitlines()
    assert heading == "weights-tried 1.0: sound, by my_contracts:Sound"
    verdicts = [line.split() for line in lines]
    assert sorted(v[1] for v in verdicts if v[0] == "holds") == sorted(CHEAP)
    assert sum(v[0] == "excluded" for v in verdicts) == len(clauses(Role.SOURCE)) - len(CHEAP)
    assert lines.count(" " * 12 + "is tried elsewhere at length") == len(clauses(Role.SOURCE)) - len(CHEAP)
    assert last == f"{len(clauses(Role.SOURCE))} clauses: {len(clauses(Role.SOURCE)) - 2} excluded, 2 hold"
    assert sys.path == before


def test_a_contract_that_is_broken_ends_with_3():
    result = run("casts", "--contract", "my_contracts:Casts")
    assert result.exit_code == 3
    assert "broken      a_destination_that_does_not_fit_is_refused" in result.stdout


def test_the_contract_of_another_plugin_is_refused():
    line = failed("casts", "--contract", "my_contracts:Sound", code=3)
    assert "my_contracts:Sound is the contract of plugin 'sound', not of 'casts'" in line


@pytest.mark.parametrize(
    ("contract", "says"),
    [
        ("no_such_module:Sound", "--contract no_such_module:Sound: ModuleNotFoundError: "),
        ("my_contracts:Soud", "--contract my_contracts:Soud: AttributeError: "),
        ("my_contracts", "--contract my_contracts"),
        ("my_contracts:", "--contract my_contracts:"),
        (":Sound", "--contract :Sound"),
        (".my_contracts:Sound", "--contract .my_contracts:Sound"),
        ("my_contracts:function", "--contract my_contracts:function is no contract class"),
        ("my_contracts:NOTHING", "--contract my_contracts:NOTHING is no contract class"),
        ("my_contracts:DiskPlugin", "--contract my_contracts:DiskPlugin is no contract class"),
    ],
)
def test_what_is_no_contract_is_named(contract, says):
    before = list(sys.path)
    line = failed("sound", "--contract", contract, code=3)
    assert line.startswith(f"weights: PluginError: {says}")
    assert sys.path == before


@pytest.mark.parametrize(
    ("contract", "says"),
    [
        ("NoName", "NoName leaves out `name`"),
        ("NoOracle", "NoOracle gives `prepare` and leaves out `oracle`"),
    ],
)
def test_a_contract_that_is_not_fit_says_why(contract, says):
    result = run("sound", "--contract", f"my_contracts:{contract}")
    assert result.exit_code != 0
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_check_that_could_not_be_made_is_no_success():
    """Whoever reads the exit code alone must not take it for proof."""
    result = run("sound", "--contract", "my_contracts:Unreadable")
    assert "not tried   resolving_twice_answers_the_same" in result.stdout
    assert "failed: OSError: no tape" in result.stdout
    assert result.exit_code != 0


def test_without_pytest_an_authors_contract_says_what_to_install(monkeypatch):
    for module in ("pytest", "weights_core.testing.contracts"):
        monkeypatch.setitem(sys.modules, module, None)
    line = failed("sound", "--contract", "my_contracts:Sound", code=2)
    assert line.startswith("weights: ExtraNotInstalledError: --contract needs pytest (")
    assert line.endswith("pip install 'weights-core[testing]'")
