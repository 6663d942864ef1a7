# SPDX-License-Identifier: Apache-2.0
"""What the doctor finds wrong with plugins, versions, settings and extras."""

import importlib
import importlib.util
import json
import sys

import pytest

from weights_core.doctor import Finding, examine
from weights_core.machine import facts

GOOD = """
import attrs
from weights_core import FormatClaim, hookimpl

@attrs.frozen
class Config:
    size: int = 1

class Plugin:
    weights_api = 1
    Config = Config

    def __init__(self, config):
        pass

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim.refuse("only here to be found")
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return a folder on `sys.path` to lay out distributions in."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def install(site, plugin, source=GOOD, *, distribution=None, requires=()):
    """Lay out what `pip install` would for a distribution with one plugin."""
    distribution = distribution or f"weights-{plugin}"
    module = distribution.replace("-", "_") + "_module"
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{needs}")
    (info / "entry_points.txt").write_text(f"[weights.plugins]\n{plugin} = {module}:Plugin\n")
    (site / f"{module}.py").write_text(source)


def about(findings, topic):
    return [finding for finding in findings if finding.topic == topic]


def problems(findings):
    return [finding for finding in findings if finding.verdict == "problem"]


# All is well ----------------------------------------------------------------------------------


def test_everything_is_well_here(tmp_path):
    found = examine(tmp_path, None, {})
    assert problems(found) == []
    assert [finding.topic for finding in found[:4]] == ["Python", "weights-core", "torch", "safetensors"]
    assert [finding.topic for finding in found[-9:]] == [fact.topic for fact in facts(tmp_path)]
    assert len(about(found, "plugin disk")) == 1
    assert all(finding.value for finding in found)


def test_a_good_plugin_is_well(site, tmp_path):
    install(site, "vault", requires=["weights-core>=0.1", "attrs"])
    found = examine(tmp_path, {"vault": {"size": 3}}, {})
    assert about(found, "plugin vault") == [Finding("plugin vault", "weights-vault 1.0", "")]
    assert problems(found) == []


# Plugins --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        ("raise RuntimeError('no such driver')", "no such driver"),
        ("x = 1", "Plugin"),
        ("def broken(:", "syntax"),
        (GOOD.replace("weights_api = 1", "weights_api = 99"), "99"),
    ],
)
def test_a_broken_plugin_is_a_problem_and_the_others_are_well(site, tmp_path, source, why):
    install(site, "vault", source)
    found = examine(tmp_path, None, {})
    (problem,) = problems(found)
    assert (problem.topic, problem.value) == ("plugin vault", "weights-vault 1.0")
    assert problem.meaning.startswith("broken: ")
    assert why in problem.meaning
    assert about(found, "plugin disk")[0].verdict == "ok"


def test_two_plugins_of_one_name_are_a_problem(site, tmp_path):
    install(site, "vault", distribution="weights-vault-a")
    install(site, "vault", distribution="weights-vault-b")
    found = examine(tmp_path, None, {})
    (problem,) = problems(found)
    assert problem.topic == "plugin vault"
    assert problem.value == "weights-vault-a 1.0 and weights-vault-b 1.0"
    assert "uninstall one" in problem.meaning
    assert about(found, "plugin disk")[0].verdict == "ok"


def test_settings_for_two_plugins_of_one_name_do_not_make_them_not_installed(site, tmp_path):
    install(site, "vault", distribution="weights-vault-a")
    install(site, "vault", distribution="weights-vault-b")
    found = examine(tmp_path, {"vault": {"size": 3}}, {})
    assert [problem.topic for problem in problems(found)] == ["plugin vault"]


def test_a_plugin_named_disk_is_a_problem(site, tmp_path):
    install(site, "disk", distribution="weights-other")
    found = examine(tmp_path, None, {})
    (problem,) = problems(found)
    assert problem.topic == "plugin disk"
    assert "weights-other 1.0" in problem.value
    assert "weights-core " in problem.value


def test_a_blocked_plugin_is_a_note_even_if_it_is_broken(site, tmp_path):
    install(site, "vault", "import no_such_module_anywhere")
    found = examine(tmp_path, None, {"WEIGHTS_BLOCK": "vault"})
    assert about(found, "plugin vault") == [Finding("plugin vault", "weights-vault 1.0", "blocked", "note")]
    assert problems(found) == []


def test_blocking_a_name_that_two_plugins_have_leaves_no_problem(site, tmp_path):
    install(site, "vault", distribution="weights-vault-a")
    install(site, "vault", distribution="weights-vault-b")
    found = examine(tmp_path, None, {"WEIGHTS_BLOCK": "vault"})
    assert problems(found) == []
    assert {finding.verdict for finding in about(found, "plugin vault")} == {"note"}


# Versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights-core", "weights_core", "Weights.Core"])
def test_a_plugin_for_another_version_is_a_problem(site, tmp_path, name):
    install(site, "vault", requires=["attrs", f"{name}>=9"])
    found = examine(tmp_path, None, {})
    (problem,) = problems(found)
    assert (problem.topic, problem.value) == ("weights-vault", "needs weights-core >=9")
    assert "install versions that go together" in problem.meaning


@pytest.mark.parametrize("marker", ['python_version < "3"', 'extra == "future"'])
def test_a_requirement_that_does_not_hold_here_is_no_problem(site, tmp_path, marker):
    install(site, "vault", requires=[f"weights-core>=9; {marker}"])
    assert problems(examine(tmp_path, None, {})) == []


def test_a_requirement_nobody_can_read_does_not_stop_the_doctor(site, tmp_path):
    install(site, "vault", requires=["weights-core (>=>1"])
    assert about(examine(tmp_path, None, {}), "plugin vault")


# Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"), [("[vault", "not TOML"), ("vault = 1", "must be a table"), ("[nobody]", "not installed")]
)
def test_settings_no_load_can_start_with_are_a_problem(tmp_path, text, why):
    file = tmp_path / "weights.toml"
    file.write_text(text)
    (problem,) = problems(examine(tmp_path, None, {"WEIGHTS_CONFIG": str(file)}))
    assert problem.topic == "settings"
    assert why in problem.value
    assert problem.meaning == "no load can start"


def test_a_missing_settings_file_is_a_problem(tmp_path):
    (problem,) = problems(examine(tmp_path, None, {"WEIGHTS_CONFIG": str(tmp_path / "missing.toml")}))
    assert problem.topic == "settings"
    assert "missing.toml" in problem.value


@pytest.mark.parametrize("settings", [{"size": "big"}, {"sise": 1}])
def test_wrong_settings_of_a_plugin_are_its_problem(site, tmp_path, settings):
    install(site, "vault")
    (problem,) = problems(examine(tmp_path, {"vault": settings}, {}))
    assert problem.topic == "plugin vault"
    assert "size" in problem.meaning


# Extras ---------------------------------------------------------------------------------------


def test_a_missing_extra_is_a_note(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "matplotlib" else find(name, *args),
    )
    found = examine(tmp_path, None, {})
    (note,) = about(found, "extra [plot]")
    assert (note.value, note.verdict) == ("missing", "note")
    assert "pip install 'weights-core[plot]'" in note.meaning
    assert problems(found) == []


def test_an_extra_that_is_there_is_well(tmp_path):
    pytest.importorskip("matplotlib")
    (finding,) = about(examine(tmp_path, None, {}), "extra [plot]")
    assert finding.verdict == "ok"
    assert finding.value.startswith("matplotlib ")


# Text and values ------------------------------------------------------------------------------


def test_findings_are_values_for_json(tmp_path):
    values = [finding.as_dict() for finding in examine(tmp_path, None, {})]
    assert json.loads(json.dumps(values)) == values
    assert all(set(value) == {"topic", "value", "meaning", "verdict"} for value in values)


def test_a_finding_reads_as_a_line():
    finding = Finding("plugin vault", "weights-vault 1.0", "broken: no driver", "problem")
    assert str(finding) == "problem plugin vault            weights-vault 1.0: broken: no driver"
    assert str(Finding("Python", "3.12", "")) == "ok      Python                  3.12"
