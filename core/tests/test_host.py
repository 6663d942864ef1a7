# SPDX-License-Identifier: Apache-2.0
"""Which plugins a host uses: enabled, blocked, broken; and that hosts and sessions don't meet."""

import logging

import attrs
import pytest

from weights_core import EngineInfo, FormatClaim, LoadRequest, Plugin, PluginHost, hookimpl
from weights_core.discovery import Installed
from weights_core.errors import (
    PluginConfigError,
    PluginConflictError,
    PluginContractError,
    PluginError,
    PluginLoadError,
    PluginNotFoundError,
    PluginVersionError,
)
from weights_core.testing import host_of, installed_as


@attrs.frozen
class Settings:
    speed: int = 1


class Tape(Plugin[Settings]):
    Config = Settings

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim.refuse(f"speed {self.config.speed}")


class Plain:
    """A plugin that uses no base class and has no settings."""

    weights_api = 1

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim.refuse(f"instance {id(self)}")


class Newer(Plain):
    weights_api = 2


class Unversioned:
    @hookimpl
    def resolve_format(self, request):
        return None


class Unbuildable(Plain):
    def __init__(self):
        raise OSError("no drive")


class Misnamed(Plain):
    @hookimpl
    def publish(self, request, engines):
        return None


def unimportable():
    raise ImportError("libtape.so.1: cannot open shared object file")


BROKEN_IMPORT = Installed(name="tape", distribution="weights-tape", version="1.0", load=unimportable)
BROKEN = {
    "import": (BROKEN_IMPORT, PluginLoadError, "libtape"),
    "newer": (
        installed_as("tape", Newer),
        PluginVersionError,
        "speaks 1: upgrade weights-core",
    ),
    "unversioned": (installed_as("tape", Unversioned), PluginVersionError, "weights_api = 1"),
    "constructor": (installed_as("tape", Unbuildable), PluginLoadError, "cannot be built: OSError: no drive"),
    "hook": (installed_as("tape", Misnamed), PluginContractError, "engines"),
}
broken = pytest.mark.parametrize(("plugin", "kind", "why"), BROKEN.values(), ids=BROKEN)


def asking(*format):
    engine = EngineInfo(name="e", version="1")
    return LoadRequest(checkpoint="nowhere", engine=engine, format=format or ("auto",))


def reasons(hooks):
    return {out.plugin.name: out.reason for out in hooks.left_out}


def test_by_default_every_installed_plugin_is_used():
    hooks = host_of(tape=Tape, plain=Plain).hooks(asking())
    assert set(hooks.plugins) == {"tape", "plain", "disk"}
    assert hooks.left_out == []


def test_an_explicit_list_replaces_the_default_and_keeps_the_built_in():
    hooks = host_of(tape=Tape, plain=Plain, enable=["plain"]).hooks(asking())
    assert set(hooks.plugins) == {"plain", "disk"}
    assert reasons(hooks) == {"tape": "not in the list of enabled plugins"}


def test_an_empty_list_leaves_the_built_in_alone():
    hooks = host_of(tape=Tape, enable=[]).hooks(asking())
    assert set(hooks.plugins) == {"disk"}


def test_plugins_that_are_not_enabled_are_not_imported():
    host = PluginHost([BROKEN_IMPORT, installed_as("plain", Plain)], enable=["plain"])
    assert reasons(host.hooks(asking())) == {"tape": "not in the list of enabled plugins"}


def test_enabling_what_is_not_installed_is_an_error_with_a_suggestion():
    with pytest.raises(
        PluginNotFoundError, match=r"'tpe' is enabled but not installed \(did you mean 'tape'"
    ):
        host_of(tape=Tape, enable=["tpe"])


def test_settings_for_what_is_not_installed_are_an_error_with_a_suggestion():
    with pytest.raises(PluginConfigError, match=r"'tpe', which is not installed \(did you mean 'tape'\?\)"):
        host_of(tape=Tape, config={"tpe": {"speed": 1}})


def test_a_blocked_plugin_is_left_out_though_enabled():
    hooks = host_of(tape=Tape, enable=["tape"], block=["tape"]).hooks(asking())
    assert set(hooks.plugins) == {"disk"}
    assert reasons(hooks) == {"tape": "blocked"}


def test_a_blocked_plugin_is_not_imported_and_may_keep_its_settings():
    hooks = PluginHost([BROKEN_IMPORT], block=["tape"], config={"tape": {"speed": 1}}).hooks(asking())
    assert reasons(hooks) == {"tape": "blocked"}


def test_the_built_in_can_be_blocked():
    hooks = host_of(tape=Tape, block=["disk"]).hooks(asking())
    assert set(hooks.plugins) == {"tape"}


def test_blocking_what_is_not_installed_changes_nothing():
    assert set(host_of(tape=Tape, block=["other"]).hooks(asking()).plugins) == {"tape", "disk"}


def test_two_plugins_of_one_name_are_a_conflict_unless_blocked():
    twins = [
        installed_as("tape", Tape, distribution="first"),
        installed_as("tape", Plain, distribution="second"),
    ]
    with pytest.raises(PluginConflictError, match=r"first 1\.0 and second 1\.0 both bring a plugin 'tape'"):
        PluginHost(twins)
    assert set(PluginHost(twins, block=["tape"]).hooks(asking()).plugins) == {"disk"}


@broken
def test_a_broken_plugin_that_is_merely_installed_is_left_out_with_a_warning(plugin, kind, why, caplog):
    with caplog.at_level(logging.WARNING, logger="weights"):
        hooks = PluginHost([plugin, installed_as("plain", Plain)]).hooks(asking())
    assert set(hooks.plugins) == {"plain", "disk"}
    assert reasons(hooks)["tape"].startswith("broken: plugin 'tape' of weights-tape 1.0")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "weights-tape 1.0" in record.getMessage()


@broken
def test_a_broken_plugin_that_the_format_names_is_an_error(plugin, kind, why):
    with pytest.raises(kind, match=why) as info:
        PluginHost([plugin]).hooks(asking("tape", "disk"))
    assert "plugin 'tape' of weights-tape 1.0" in str(info.value)


@broken
def test_a_broken_plugin_that_is_explicitly_enabled_is_an_error(plugin, kind, why):
    with pytest.raises(kind, match=why):
        PluginHost([plugin], enable=["tape"]).hooks(asking())


@broken
def test_a_broken_plugin_does_not_keep_others_from_being_named(plugin, kind, why):
    hooks = PluginHost([plugin, installed_as("plain", Plain)]).hooks(asking("plain"))
    assert set(hooks.plugins) == {"plain", "disk"}


@pytest.mark.parametrize("name", ["import", "constructor"])
def test_the_original_error_of_a_broken_plugin_is_its_cause(name):
    plugin = BROKEN[name][0]
    with pytest.raises(PluginLoadError) as info:
        PluginHost([plugin]).hooks(asking("tape"))
    assert isinstance(info.value.__cause__, ImportError if name == "import" else OSError)
    assert str(info.value.__cause__) in str(info.value)


def test_a_constructor_may_refuse_its_settings_with_an_error_of_its_own():
    class Picky(Tape):
        def __init__(self, config):
            raise PluginConfigError("speed and pitch exclude each other")

    with pytest.raises(PluginConfigError, match="exclude each other"):
        host_of(tape=Picky).hooks(asking("tape"))


@pytest.mark.parametrize(
    "config_class",
    [
        attrs.make_class("Required", {"token": attrs.field()}),
        attrs.make_class("BadDefault", {"n": attrs.field(default=0, validator=attrs.validators.ge(1))}),
    ],
    ids=["required setting", "default out of range"],
)
def test_a_config_class_that_cannot_be_made_from_its_defaults_breaks_only_its_plugin(config_class):
    class Needy(Plain):
        Config = config_class

        def __init__(self, config):
            self.config = config

    host = host_of(tape=Needy, plain=Plain)
    with pytest.raises(PluginError, match="tape"):
        host.hooks(asking("tape"))
    assert set(host.hooks(asking()).plugins) == {"plain", "disk"}


def test_a_config_class_that_is_no_attrs_class_is_reported_as_the_plugins_fault():
    class Odd(Plain):
        Config = dict

        def __init__(self, config):
            self.config = config

    with pytest.raises(PluginError, match="tape"):
        host_of(tape=Odd, config={"tape": {"speed": 1}}).hooks(asking("tape"))


def test_settings_reach_the_plugin_typed_and_defaults_fill_in():
    request = asking()
    given = host_of(tape=Tape, config={"tape": {"speed": 7}}).hooks(request)
    default = host_of(tape=Tape).hooks(request)
    assert given.resolve_format("tape", request).reason == "speed 7"
    assert default.resolve_format("tape", request).reason == "speed 1"


def test_wrong_settings_are_an_error_even_for_a_plugin_that_was_not_asked_for():
    with pytest.raises(PluginConfigError, match=r"tape\.speed"):
        host_of(tape=Tape, config={"tape": {"speed": "fast"}}).hooks(asking())


def test_settings_for_a_plugin_that_has_none_are_an_error():
    with pytest.raises(PluginConfigError, match="'plain' takes no settings"):
        host_of(plain=Plain, config={"plain": {"speed": 1}}).hooks(asking())


def test_every_session_gets_plugin_instances_of_its_own():
    host, request = host_of(plain=Plain), asking()
    first, second = host.hooks(request), host.hooks(request)
    assert first.resolve_format("plain", request).reason != second.resolve_format("plain", request).reason


def test_two_hosts_in_one_process_do_not_meet():
    request = asking()
    slow = host_of(tape=Tape, config={"tape": {"speed": 1}}).hooks(request)
    fast = host_of(tape=Tape, plain=Plain, config={"tape": {"speed": 9}}).hooks(request)
    assert slow.resolve_format("tape", request).reason == "speed 1"
    assert fast.resolve_format("tape", request).reason == "speed 9"
    assert "plain" not in slow.plugins


def test_changing_the_config_argument_later_does_not_reach_the_host():
    config = {"tape": {"speed": 2}}
    host, request = host_of(tape=Tape, config=config), asking()
    del config["tape"]
    assert host.hooks(request).resolve_format("tape", request).reason == "speed 2"


def test_a_plugin_is_imported_by_a_session_and_not_by_the_host():
    imports = []

    def load():
        imports.append("tape")
        return Tape

    host = PluginHost([Installed(name="tape", distribution="d", version="1", load=load)])
    assert imports == []
    host.hooks(asking())
    assert imports == ["tape"]


def test_plugins_are_ordered_by_name_or_by_the_explicit_list():
    classes = {"c": Plain, "a": Plain, "b": Plain}
    assert list(host_of(**classes).hooks(asking()).plugins) == ["a", "b", "c", "disk"]
    chosen = host_of(**classes, enable=["c", "a"]).hooks(asking())
    assert list(chosen.plugins) == ["c", "a", "disk"]


def test_check_lists_every_plugin_by_name_with_what_is_wrong_with_it():
    host = PluginHost(
        [
            installed_as("z_blocked", Plain),
            BROKEN_IMPORT,
            installed_as("new", Newer),
            installed_as("fine", Plain),
        ],
        block=["z_blocked"],
    )
    found = {plugin.name: problem for plugin, problem in host.check()}
    assert list(found) == ["disk", "fine", "new", "tape", "z_blocked"]
    assert found["disk"] is found["fine"] is None
    assert found["z_blocked"] == "blocked"
    assert found["new"].startswith("broken: ")
    assert "libtape" in found["tape"]


def test_check_reports_a_broken_plugin_though_it_is_explicitly_enabled():
    found = dict(PluginHost([BROKEN_IMPORT], enable=["tape"]).check())
    assert "libtape" in found[BROKEN_IMPORT]


def test_discover_applies_the_environment(tmp_path):
    (tmp_path / "w.toml").write_text("[disk]\nspeed = 1\n")
    host = PluginHost.discover(environ={"WEIGHTS_CONFIG": str(tmp_path / "w.toml"), "WEIGHTS_BLOCK": "disk"})
    assert "disk" in reasons(host.hooks(asking()))


def test_discover_refuses_a_file_with_settings_for_what_is_not_installed(tmp_path):
    (tmp_path / "w.toml").write_text("[dsk]\nspeed = 1\n")
    with pytest.raises(PluginConfigError, match=r"'dsk', which is not installed \(did you mean 'disk'\?\)"):
        PluginHost.discover(environ={"WEIGHTS_CONFIG": str(tmp_path / "w.toml")})
