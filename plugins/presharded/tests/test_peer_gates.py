# SPDX-License-Identifier: Apache-2.0
"""Who is a source and who a target: the settings, the environment, the format, in this order."""

import pytest

import weights_core as w
from weights_core.errors import PluginConfigError
from weights_core.testing import host_of
from weights_core.testing.parallel import LlamaShape, TensorParallelEngine
from weights_presharded.peer import gates
from weights_presharded.plugin import PreshardedConfig, PreshardedPlugin

URL, TARGET, SOURCE = "MODEL_EXPRESS_URL", "MODEL_EXPRESS_TARGET", "MODEL_EXPRESS_SOURCE"


@pytest.mark.parametrize(
    ("source", "environ", "named", "open_"),
    [
        (None, {}, True, True),
        (None, {}, False, False),
        (True, {}, False, True),
        (False, {}, True, False),
        (None, {URL: "x"}, False, True),
        (None, {URL: "x", TARGET: "1"}, True, False),
        (None, {URL: ""}, False, False),
        (None, {URL: "x", TARGET: ""}, False, True),
        (None, {SOURCE: "1"}, False, True),
        (None, {SOURCE: "0"}, False, False),
        (None, {SOURCE: "true"}, False, False),
        (None, {SOURCE: " 1"}, False, False),
        (None, {SOURCE: "1", URL: "x", TARGET: "1"}, False, True),
        (False, {SOURCE: "1", URL: "x"}, True, False),
        (True, {URL: "x", TARGET: "1"}, False, True),
    ],
)
def test_who_is_a_source(source, environ, named, open_):
    assert gates.is_source(PreshardedConfig(source=source), environ, named=named).open is open_


@pytest.mark.parametrize(
    ("target", "environ", "named", "open_"),
    [
        (None, {}, True, True),
        (None, {}, False, False),
        (None, {TARGET: "1"}, False, True),
        (None, {TARGET: ""}, False, False),
        (None, {URL: "x"}, False, False),
        (False, {TARGET: "1"}, True, False),
        (True, {}, False, True),
    ],
)
def test_who_is_a_target(target, environ, named, open_):
    assert gates.is_target(PreshardedConfig(target=target), environ, named=named).open is open_


def info(**more):
    shares = {w.Layout.SHARDED: "x", w.Layout.FINAL: "x"}
    return w.EngineInfo(
        **{"name": "e", "version": "1", "accepts": set(w.Layout), "shareable": shares, **more}
    )


@pytest.mark.parametrize(
    ("engine", "config", "due"),
    [
        ({}, {}, (w.Layout.FINAL, "live")),
        ({"accepts": {w.Layout.SHARDED}}, {}, (w.Layout.SHARDED, "live")),
        ({"shareable": {w.Layout.SHARDED: "x"}}, {}, (w.Layout.SHARDED, "live")),
        ({"mutates_after_load": "m"}, {}, "writes to its weights later (m)"),
        ({"mutates_after_load": "m"}, {"snapshot": True}, (w.Layout.SHARDED, "snapshot")),
        ({"mutates_after_load": "m"}, {"drain": 3.0}, (w.Layout.SHARDED, "drain")),
        ({"mutates_after_load": "m", "shareable": {w.Layout.FINAL: "x"}}, {}, "changes its weights after"),
        ({"post_load_writes": "p"}, {}, (w.Layout.FINAL, "live")),
        ({"post_load_writes": "p", "accepts": {w.Layout.SHARDED}}, {}, "writes to its weights later (p)"),
        (
            {"post_load_writes": "p", "accepts": {w.Layout.SHARDED}},
            {"snapshot": True, "drain": 3.0},
            (w.Layout.SHARDED, "snapshot"),
        ),
        ({"shareable": {}}, {}, "shares nothing and accepts checkpoint, final, sharded"),
        ({"accepts": {w.Layout.CHECKPOINT}}, {}, "no layout is both"),
    ],
)
def test_what_is_served(engine, config, due):
    found = gates.serving(PreshardedConfig(**config), info(**engine))
    if isinstance(due, str):
        assert due in found
    else:
        assert (found.layout, found.how) == due


def decisions(monkeypatch, format="auto", config=None, **environ):
    for name in (URL, TARGET, SOURCE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    host = host_of(config={"presharded": config or {}}, presharded=PreshardedPlugin)
    plan = w.explain(TensorParallelEngine(LlamaShape()), "/nowhere", format, host=host)
    return next(d for d in plan.decisions if d.plugin == "presharded")


def test_the_plan_says_what_decided(monkeypatch):
    assert decisions(monkeypatch).roles == frozenset()
    named = decisions(monkeypatch, "presharded")
    assert named.roles == {w.Role.SOURCE, w.Role.PUBLISHER}
    assert "a source of sharded weights, live (the format names it)" in named.reason
    by_env = decisions(monkeypatch, **{URL: "http://x"})
    assert by_env.roles == {w.Role.PUBLISHER}
    assert f"{URL} is set and {TARGET} is not" in by_env.reason
    target = decisions(monkeypatch, **{URL: "http://x", TARGET: "1"})
    assert target.roles == {w.Role.SOURCE}
    assert f"is no source ({TARGET} is set)" in target.reason
    both = decisions(monkeypatch, **{SOURCE: "1", TARGET: "1"})
    assert both.roles == {w.Role.SOURCE, w.Role.PUBLISHER}


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"listen": "somewhere"}, "need host:port"),
        ({"listen": ":7000"}, "need host:port"),
        ({"listen": "a:70000"}, "need host:port"),
        ({"digest": "x"}, "is no digest"),
        ({"limit": 0}, "limit"),
        ({"stall": 0.0}, "stall"),
        ({"transport": "pigeon"}, "transport"),
    ],
)
def test_settings_that_make_no_sense_are_refused(monkeypatch, setting, why):
    with pytest.raises(PluginConfigError, match=why):
        decisions(monkeypatch, "presharded", setting)
