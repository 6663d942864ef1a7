# SPDX-License-Identifier: Apache-2.0
"""Settings: where they come from, and that they become typed values or errors that help."""

import enum
from pathlib import Path
from typing import Literal

import attrs
import pytest

from weights_core import config
from weights_core.errors import PluginConfigError


class Mode(enum.Enum):
    FAST = "fast"


@attrs.frozen
class Inner:
    size: int = 1


@attrs.frozen(kw_only=True)
class Settings:
    threads: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    limit: float = 1.5
    progress: bool = True
    label: str = "x"
    maybe: int | None = None
    folder: Path = Path("/default")
    socket: Path | None = None
    names: list[str] = attrs.field(factory=list)
    sizes: tuple[int, ...] = ()
    weights: dict[str, float] = attrs.field(factory=dict)
    inner: Inner = Inner()
    inner_or_none: Inner | None = None
    kind: Literal["a", "b"] = "a"
    mode: Mode = Mode.FAST


def toml(tmp_path, text):
    path = tmp_path / "weights.toml"
    path.write_text(text, encoding="utf-8")
    return {"WEIGHTS_CONFIG": str(path)}


def test_without_file_or_argument_there_are_no_settings():
    assert config.merged(None, {}) == {}
    assert config.merged(None, {"WEIGHTS_CONFIG": ""}) == {}


def test_the_file_gives_one_table_per_plugin(tmp_path):
    environ = toml(tmp_path, "[disk]\n[tape]\nspeed = 3\nname = 'ü'\n[tape.inner]\nsize = 2\n")
    assert config.merged(None, environ) == {
        "disk": {},
        "tape": {"speed": 3, "name": "ü", "inner": {"size": 2}},
    }


def test_the_argument_wins_setting_by_setting(tmp_path):
    environ = toml(tmp_path, "[tape]\nspeed = 3\nname = 'file'\n[other]\nx = 1\n")
    argument = {"tape": {"name": "argument"}, "third": {"y": 2}}
    assert config.merged(argument, environ) == {
        "tape": {"speed": 3, "name": "argument"},
        "other": {"x": 1},
        "third": {"y": 2},
    }


def test_merging_leaves_the_argument_as_it_is(tmp_path):
    argument = {"tape": {"name": "argument"}}
    result = config.merged(argument, toml(tmp_path, "[tape]\nspeed = 3\n"))
    result["tape"]["more"] = 1
    assert argument == {"tape": {"name": "argument"}}


def test_the_environment_is_read_when_called(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS_CONFIG", toml(tmp_path, "[tape]\nspeed = 3\n")["WEIGHTS_CONFIG"])
    monkeypatch.setenv("WEIGHTS_BLOCK", "tape")
    assert config.merged(None) == {"tape": {"speed": 3}}
    assert config.blocked() == {"tape"}


@pytest.mark.parametrize("text", ["[tape", "speed = ", "[tape]\nspeed = 1\nspeed = 2\n"])
def test_a_file_that_is_not_toml_is_named(tmp_path, text):
    environ = toml(tmp_path, text)
    with pytest.raises(PluginConfigError, match="not TOML") as info:
        config.merged(None, environ)
    assert environ["WEIGHTS_CONFIG"] in str(info.value)
    assert info.value.__cause__ is not None


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes(b"[tape]\nname = '\xfc'\n")
    with pytest.raises(PluginConfigError, match=r"latin\.toml, which is not TOML"):
        config.merged(None, {"WEIGHTS_CONFIG": str(path)})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PluginConfigError, match=r"absent\.toml: No such file"):
        config.merged(None, {"WEIGHTS_CONFIG": str(tmp_path / "absent.toml")})


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    with pytest.raises(PluginConfigError, match="Is a directory"):
        config.merged(None, {"WEIGHTS_CONFIG": str(tmp_path)})


def test_settings_outside_of_a_table_are_refused_and_the_file_named(tmp_path):
    environ = toml(tmp_path, "speed = 3\n")
    with pytest.raises(PluginConfigError, match="'speed' must be a table of settings, not 3") as info:
        config.merged(None, environ)
    assert environ["WEIGHTS_CONFIG"] in str(info.value)


def test_an_argument_that_is_not_a_table_is_refused():
    with pytest.raises(PluginConfigError, match=r"config argument: .* not \['tape'\]"):
        config.merged(["tape"], {})
    with pytest.raises(PluginConfigError, match="config argument: 'tape' must be a table"):
        config.merged({"tape": True}, {})


@pytest.mark.parametrize(
    ("value", "names"),
    [("", set()), (",", set()), ("a", {"a"}), (" a , b,", {"a", "b"}), ("a,a", {"a"})],
)
def test_blocked_names_are_separated_by_commas(value, names):
    assert config.blocked({"WEIGHTS_BLOCK": value}) == names


def test_nothing_is_blocked_by_default():
    assert config.blocked({}) == frozenset()


def test_without_settings_the_defaults_hold():
    assert config.structure("tape", Settings, {}) == Settings()


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("threads", 2, 2),
        ("limit", 2.5, 2.5),
        ("limit", 2, 2.0),
        ("progress", False, False),
        ("label", "", ""),
        ("maybe", 3, 3),
        ("maybe", None, None),
        ("folder", "/tmp", Path("/tmp")),
        ("folder", Path("/tmp"), Path("/tmp")),
        ("socket", "/run/s", Path("/run/s")),
        ("socket", None, None),
        ("names", ["a", "b"], ["a", "b"]),
        ("sizes", [1, 2], (1, 2)),
        ("weights", {"a": 1}, {"a": 1.0}),
        ("inner", {"size": 2}, Inner(2)),
        ("inner_or_none", {"size": 2}, Inner(2)),
        ("inner_or_none", None, None),
        ("kind", "b", "b"),
        ("mode", "fast", Mode.FAST),
    ],
)
def test_a_setting_becomes_a_value_of_its_type_and_the_others_keep_their_defaults(name, given, value):
    made = config.structure("tape", Settings, {name: given})
    assert made == attrs.evolve(Settings(), **{name: value})
    assert type(getattr(made, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("threads", 2.0),
        ("threads", True),
        ("threads", "2"),
        ("threads", None),
        ("limit", True),
        ("limit", "2"),
        ("progress", "false"),
        ("progress", 0),
        ("label", 3),
        ("maybe", True),
        ("maybe", "3"),
        ("folder", 3),
        ("names", ["a", 1]),
        ("names", 3),
        ("names", "abc"),
        ("sizes", [1, "2"]),
        ("weights", {"a": "1"}),
        ("inner", {"size": "2"}),
        ("inner", {"siz": 2}),
        ("inner", 3),
        ("kind", "c"),
        ("mode", "slow"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_naming_plugin_and_setting(name, given):
    with pytest.raises(PluginConfigError) as info:
        config.structure("tape", Settings, {name: given})
    assert "'tape'" in str(info.value)
    assert f"tape.{name}" in str(info.value)


@pytest.mark.parametrize("given", ["text", ["a", "b"]])
def test_a_setting_may_be_one_of_several_plain_types(given):
    @attrs.frozen
    class Either:
        value: str | list[str] = ""

    assert config.structure("tape", Either, {"value": given}) == Either(given)


@pytest.mark.parametrize("given", [3, "three"])
def test_a_setting_may_be_a_number_or_a_string_and_is_kept_as_given(given):
    @attrs.frozen
    class Either:
        value: int | str = 0

    assert config.structure("tape", Either, {"value": given}) == Either(given)


def test_a_setting_of_several_types_is_refused_when_it_is_none_of_them():
    @attrs.frozen
    class Either:
        value: int | str = 0

    with pytest.raises(PluginConfigError, match="'tape'"):
        config.structure("tape", Either, {"value": 2.5})


def test_a_union_does_not_spoil_the_other_settings():
    @attrs.frozen
    class Either:
        value: int | str = 0
        threads: int = 1

    assert config.structure("tape", Either, {"threads": 3}) == Either(threads=3)


def test_a_private_attribute_is_set_by_the_name_its_constructor_takes():
    @attrs.frozen
    class Private:
        _token: str = ""

    assert config.structure("tape", Private, {"token": "t"}) == Private(token="t")


def test_the_message_lists_every_wrong_setting():
    with pytest.raises(PluginConfigError) as info:
        config.structure("tape", Settings, {"threads": "x", "progress": "y"})
    assert "tape.threads" in str(info.value)
    assert "tape.progress" in str(info.value)


def test_a_value_out_of_range_is_refused():
    with pytest.raises(PluginConfigError, match="'threads' must be >= 1: 0"):
        config.structure("tape", Settings, {"threads": 0})


def test_an_unknown_setting_is_refused_and_the_nearest_offered():
    with pytest.raises(PluginConfigError, match=r"no setting 'thread' \(did you mean 'threads'\?\)") as info:
        config.structure("tape", Settings, {"thread": 2})
    assert "it has threads, limit, progress" in str(info.value)


def test_an_unknown_setting_unlike_any_other_gets_no_suggestion():
    with pytest.raises(PluginConfigError, match="no setting 'qqqq'; it has"):
        config.structure("tape", Settings, {"qqqq": 2})


def test_a_config_class_without_settings_says_that_there_are_none():
    @attrs.frozen
    class Empty:
        pass

    with pytest.raises(PluginConfigError, match="it has none"):
        config.structure("tape", Empty, {"x": 2})


def test_a_plugin_without_config_is_given_none():
    assert config.structure("tape", None, {}) is None


def test_settings_for_a_plugin_without_config_are_refused():
    with pytest.raises(PluginConfigError, match=r"'tape' takes no settings, given \['a', 'b'\]"):
        config.structure("tape", None, {"b": 1, "a": 2})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("parallel_shard", " (did you mean 'parallel_shards'?)"), ("zzz", ""), ("", "")],
)
def test_did_you_mean_offers_only_what_is_near(name, hint):
    assert config.did_you_mean(name, ["disk", "parallel_shards"]) == hint
