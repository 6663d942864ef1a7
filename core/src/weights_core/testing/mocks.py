# SPDX-License-Identifier: Apache-2.0
"""Plugins whose hooks are mocks, autospecced from the specification.

A bare mock is no plugin: pluggy finds no hook in it, so everything would pass. These are real
classes whose real methods call mocks of the specification's own signature.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from weights_core import hookspecs
from weights_core.hookspecs import API_VERSION, hookimpl
from weights_core.types import FormatClaim, Layout, Role

if TYPE_CHECKING:
    from pytest_mock import MockerFixture


class MockPlugin:
    """The base of what `make_mock_plugin` returns: `mocks.load_weights` is that hook's mock, and so on."""

    weights_api: ClassVar[int] = API_VERSION
    mocks: ClassVar[Any]


class _Hooks:
    """Every hook, with the parameters of its specification, handing them to its mock by name."""

    mocks: Any

    @hookimpl
    def resolve_format(self, request: Any) -> Any:
        return self.mocks.resolve_format(request=request)

    @hookimpl
    def load_weights(self, request: Any, engine: Any, source: Any) -> Any:
        return self.mocks.load_weights(request=request, engine=engine, source=source)

    @hookimpl
    def before_post_load(self, request: Any, weights: Any, engine: Any) -> Any:
        return self.mocks.before_post_load(request=request, weights=weights, engine=engine)

    @hookimpl
    def publish(self, request: Any, engine: Any, layout: Any) -> Any:
        return self.mocks.publish(request=request, engine=engine, layout=layout)

    @hookimpl
    def cleanup(self, request: Any, outcome: Any) -> Any:
        return self.mocks.cleanup(request=request, outcome=outcome)


def make_mock_plugin(mocker: MockerFixture, role: Role = Role.SOURCE, **hooks: Any) -> type[MockPlugin]:
    """Return the class of a plugin with the given hooks and no others, all of them mocks.

    Args:
        mocker: pytest-mock's fixture.
        role: what the plugin claims to be, unless `resolve_format` is given.
        **hooks: hook → what it returns, an exception that it raises, or a function of the hook's
            parameters.

    Raises:
        TypeError: there is no hook of that name.
    """
    claim = FormatClaim(
        roles={role},
        reason="a mock",
        layouts=frozenset(Layout),
        publish_at=Layout.SHARDED if role is Role.PUBLISHER else None,
    )
    members: dict[str, Any] = {"mocks": SimpleNamespace()}
    for name, does in {"resolve_format": claim, **hooks}.items():
        if name not in hookspecs.HOOKS:
            raise TypeError(f"{name!r} is no hook; they are {', '.join(hookspecs.HOOKS)}")
        mock = mocker.create_autospec(getattr(hookspecs, name))
        acts = callable(does) or isinstance(does, BaseException)
        setattr(mock, "side_effect" if acts else "return_value", does)
        setattr(members["mocks"], name, mock)
        members[name] = vars(_Hooks)[name]
    return type("MockPluginOfATest", (MockPlugin,), members)
