# SPDX-License-Identifier: Apache-2.0
"""Plugins found through real distribution metadata on `sys.path`."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weights_core import EngineInfo, LoadRequest, PluginHost, discovery
from weights_core.discovery import BUILT_IN, check_names, installed
from weights_core.errors import PluginConflictError, PluginLoadError
from weights_core.testing import installed_as

GOOD = """
from weights_core import FormatClaim, hookimpl

class Plugin:
    weights_api = 1

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim.refuse("only here to be found")
"""


def write_distribution(site, distribution, plugins, *, modules=None, version="1.0", group="weights.plugins"):
    """Lay out what `pip install` would: metadata, entry points and modules."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = "".join(f"{name} = {target}\n" for name, target in plugins.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    for name, source in (modules or {}).items():
        (site / f"{name}.py").write_text(source)


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def named(*names):
    return [plugin for plugin in installed() if plugin.name in names]


def request():
    return LoadRequest(checkpoint="nowhere", engine=EngineInfo(name="e", version="1"))


def test_a_plugin_is_found_with_its_distribution_and_version(site):
    write_distribution(site, "weights-tape", {"tape": "tape_mod:Plugin"}, version="2.5")
    (plugin,) = named("tape")
    assert (plugin.distribution, plugin.version, plugin.origin) == (
        "weights-tape",
        "2.5",
        "weights-tape 2.5",
    )


def test_one_distribution_may_bring_several_plugins_and_all_come_by_name(site):
    write_distribution(site, "weights-many", {"zeta": "m:Z", "alpha": "m:A"})
    write_distribution(site, "weights-mid", {"mid": "m:M"})
    assert [p.name for p in named("zeta", "alpha", "mid")] == ["alpha", "mid", "zeta"]
    assert [p.name for p in installed()] == sorted(p.name for p in installed())


def test_other_entry_point_groups_are_not_plugins(site):
    write_distribution(site, "weights-script", {"scripted": "m:main"}, group="console_scripts")
    assert named("scripted") == []


def test_names_are_read_without_importing_the_module(site):
    write_distribution(
        site,
        "weights-bomb",
        {"bomb": "weights_bomb_mod:Plugin"},
        modules={"weights_bomb_mod": "raise RuntimeError('imported')"},
    )
    (plugin,) = named("bomb")
    assert "weights_bomb_mod" not in sys.modules
    with pytest.raises(RuntimeError, match="imported"):
        plugin.load()


def test_building_a_host_imports_no_plugin_and_no_torch(site):
    write_distribution(
        site,
        "weights-bomb",
        {"bomb": "weights_bomb_mod:Plugin"},
        modules={"weights_bomb_mod": "raise SystemExit('imported')"},
    )
    code = "import sys, weights_core as w; w.PluginHost.discover(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_loading_returns_the_class_that_the_entry_point_names(site):
    write_distribution(
        site, "weights-tape", {"tape": "tape_good_mod:Plugin"}, modules={"tape_good_mod": GOOD}
    )
    (plugin,) = named("tape")
    cls = plugin.load()
    assert cls.__name__ == "Plugin"
    assert Path(sys.modules["tape_good_mod"].__file__).parent == site


def test_a_discovered_plugin_takes_part_in_a_session(site):
    write_distribution(
        site, "weights-tape", {"tape": "tape_good_mod:Plugin"}, modules={"tape_good_mod": GOOD}
    )
    hooks = PluginHost.discover(environ={}).hooks(request())
    assert hooks.resolve_format("tape", request()).reason == "only here to be found"


@pytest.mark.parametrize("target", ["no_such_module_at_all:Plugin", "tape_good_mod:Absent"])
def test_an_entry_point_that_leads_nowhere_is_a_load_error_when_asked_for(site, target):
    write_distribution(site, "weights-tape", {"tape": target}, modules={"tape_good_mod": GOOD})
    host = PluginHost.discover(environ={}, enable=["tape"])
    with pytest.raises(PluginLoadError, match=r"'tape' of weights-tape 1\.0 cannot be imported"):
        host.hooks(request())


def test_two_distributions_with_one_plugin_name_are_a_conflict_naming_both(site):
    write_distribution(site, "weights-tape", {"tape": "a:A"})
    write_distribution(site, "weights-other-tape", {"tape": "b:B"}, version="3")
    with pytest.raises(PluginConflictError) as info:
        PluginHost.discover(environ={})
    for part in ("weights-tape 1.0", "weights-other-tape 3", "'tape'", "WEIGHTS_BLOCK=tape"):
        assert part in str(info.value)


def test_blocking_the_name_lifts_the_conflict_and_uses_neither(site):
    write_distribution(
        site, "weights-tape", {"tape": "tape_good_mod:Plugin"}, modules={"tape_good_mod": GOOD}
    )
    write_distribution(site, "weights-other-tape", {"tape": "tape_good_mod:Plugin"})
    hooks = PluginHost.discover(environ={"WEIGHTS_BLOCK": "tape"}).hooks(request())
    assert "tape" not in hooks.plugins
    assert [out.reason for out in hooks.left_out if out.plugin.name == "tape"] == ["blocked"]
    assert "tape_good_mod" not in sys.modules


def test_blocking_another_name_does_not_lift_the_conflict(site):
    write_distribution(site, "weights-tape", {"tape": "a:A"})
    write_distribution(site, "weights-other-tape", {"tape": "b:B"})
    with pytest.raises(PluginConflictError):
        PluginHost.discover(environ={"WEIGHTS_BLOCK": "tap"})


def test_a_third_party_plugin_named_disk_conflicts_with_the_built_in(site):
    write_distribution(site, "weights-floppy", {"disk": "floppy:Disk"})
    with pytest.raises(PluginConflictError) as info:
        PluginHost.discover(environ={})
    assert "weights-floppy 1.0" in str(info.value)
    assert "weights-core" in str(info.value)


def test_the_built_in_has_no_entry_point_and_is_always_known():
    assert BUILT_IN not in [plugin.name for plugin in installed()]
    assert BUILT_IN in [plugin.name for plugin, _ in PluginHost([]).check()]


@pytest.mark.parametrize("spelling", ["weights-tape", "weights_tape", "Weights.Tape"])
def test_two_copies_of_one_distribution_are_no_conflict_and_the_first_on_the_path_counts(
    site, tmp_path, monkeypatch, spelling
):
    later = tmp_path / "later"
    write_distribution(site, "weights-tape", {"tape": "m:New"}, version="2")
    write_distribution(later, spelling, {"tape": "m:Old"}, version="1")
    monkeypatch.setattr(sys, "path", [*sys.path, str(later)])
    assert [plugin.origin for plugin in named("tape")] == ["weights-tape 2"]


def test_a_copy_that_is_shadowed_by_another_version_brings_no_plugin_of_its_own(site, tmp_path, monkeypatch):
    later = tmp_path / "later"
    write_distribution(site, "weights-tape", {"tape": "m:New"}, version="2")
    write_distribution(later, "weights-tape", {"cassette": "m:Old"}, version="1")
    monkeypatch.setattr(sys, "path", [*sys.path, str(later)])
    assert [plugin.name for plugin in named("tape", "cassette")] == ["tape"]


def test_distinct_names_do_not_conflict():
    check_names([installed_as("a", object), installed_as("b", object)])


def test_a_plugin_does_not_depend_on_how_it_is_loaded_to_be_equal():
    assert installed_as("a", object) == installed_as("a", int)
    assert installed_as("a", object) != installed_as("a", object, version="2")
    assert discovery.GROUP == "weights.plugins"
