# SPDX-License-Identifier: Apache-2.0
import pytest

from weights_core.errors import PluginConfigError
from weights_vllm import version
from weights_vllm.settings import LoaderSettings, settings_of


def test_nothing_said_is_auto():
    assert settings_of({}) == settings_of(None) == LoaderSettings()
    assert settings_of({}).format_of("main") == settings_of({}).format_of("draft") == "auto"


def test_what_an_operator_may_say():
    given = {"format": ["gms", "parallel_shards"], "draft_format": "auto", "config": {"gms": {"tag": "a"}}}
    settings = settings_of({**given, "timeout": 5})
    assert settings.format_of("main") == ["gms", "parallel_shards"]
    assert settings.format_of("draft") == "auto"
    assert settings.config == {"gms": {"tag": "a"}}
    assert settings.timeout == 5.0


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"fromat": "gms"}, r"no setting 'fromat' \(did you mean 'format'\?\); it has format, draft_format"),
        ({"format": 3}, "format"),
        ({"timeout": "soon"}, "timeout"),
        ({"timeout": 0}, "timeout"),
        ({"config": {"gms": "rw"}}, "config"),
        ([1], "no mapping"),
    ],
)
def test_what_they_may_not_say_is_one_error_that_names_it(extra, why):
    with pytest.raises(PluginConfigError, match=why):
        settings_of(extra)


@pytest.mark.parametrize("known", ["0.32.0", "0.32.5", "0.32.0+cpu", "0.32.1.post1", "0.32.0rc1"])
def test_versions_that_were_tested(known):
    assert version.warning(known) is None


@pytest.mark.parametrize("other", ["0.31.9", "0.33.0", "1.0", "dev"])
def test_other_versions_are_named(other):
    told = version.warning(other)
    assert f"vLLM {other} " in told
    assert "0.32" in told
