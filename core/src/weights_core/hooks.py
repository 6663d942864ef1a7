# SPDX-License-Identifier: Apache-2.0
"""A typed facade over one pluggy manager: registers plugins strictly, calls one at a time.

pluggy accepts more than the contract allows; what it lets pass silently (an undecorated hook, an
ordering mark, a lost result) is refused here, with the plugin and its distribution named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType, MappingProxyType, MemberDescriptorType, MethodType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import attrs
import pluggy

from weights_core import config, hookspecs
from weights_core.discovery import Installed
from weights_core.errors import (
    PluginContractError,
    PluginError,
    PluginFailedError,
    PluginLoadError,
    PluginVersionError,
    WeightsError,
)
from weights_core.trace import HookCall, Observer
from weights_core.types import FormatClaim, Layout, LoadRequest, Outcome, PublishReceipt
from weights_core.weightset import WeightSet

if TYPE_CHECKING:
    from collections.abc import Generator

    from weights_core.engine import Engine
    from weights_core.source import Source

T = TypeVar("T")
_TAP = "weights_core tap"
_MARK = f"{hookspecs.PROJECT}_impl"
"""What `hookimpl` leaves on a function."""


@attrs.frozen
class LeftOut:
    """An installed plugin that is not registered, and why."""

    plugin: Installed
    reason: str


class Hooks:
    """The plugins of one load, registered, and the five hooks as typed calls.

    `left_out` lists installed plugins that are blocked, not enabled, or broken. An `observer` is
    told of every call.
    """

    def __init__(self, *, rank: int = 0, observer: Observer | None = None) -> None:
        self._rank = rank
        self._plugins: dict[str, tuple[Installed, object]] = {}
        self._settings: dict[str, object] = {}
        self._tap = _Tap()
        self._manager = _Manager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(self._tap, name=_TAP)
        if observer is not None:
            monitor = _Monitor(observer, rank)
            self._manager.add_hookcall_monitoring(monitor.before, monitor.after)
        self.left_out: list[LeftOut] = []

    @property
    def plugins(self) -> Mapping[str, Installed]:
        """The registered plugins by name, the last registered first: from the outside in."""
        return MappingProxyType({name: self._plugins[name][0] for name in reversed(self._plugins)})

    def register(self, plugin: Installed, settings: Mapping[str, object]) -> None:
        """Import a plugin, make an instance with its settings, and register it.

        Later registered wrappers are outside of earlier ones.

        Raises:
            PluginLoadError: it cannot be imported or built.
            PluginVersionError: it is written for another version of the plugin API.
            PluginConfigError: its settings are wrong.
            PluginContractError: its hooks do not fit the specification.
        """
        instance = self._instantiate(plugin, settings)
        if type(instance).__eq__ is not object.__eq__:
            raise PluginContractError(
                f"plugin {plugin.name!r} of {plugin.origin}: instances must be equal to themselves alone, "
                "so give attrs or dataclasses eq=False"
            )
        try:
            self._manager.register(instance, name=plugin.name)
            self._manager.check_pending()
            self._check_hooks(instance)
        except (pluggy.PluginValidationError, PluginContractError) as exc:
            self._manager.unregister(name=plugin.name)
            why = " ".join(str(exc).split())
            raise PluginContractError(f"plugin {plugin.name!r} of {plugin.origin}: {why}") from exc
        self._plugins[plugin.name] = (plugin, instance)

    def implements(self, name: str, hook: str, *, wrapper: bool = False) -> bool:
        """Whether a registered plugin implements `hook`, as a wrapper or plainly."""
        _, instance = self._plugins[name]
        caller = getattr(self._manager.hook, hook)
        return any(i.plugin is instance and i.wrapper == wrapper for i in caller.get_hookimpls())

    def roles(self, name: str) -> tuple[str, ...]:
        """Return what a registered plugin can do, by the hooks it implements."""
        found = {
            "provider": self.implements(name, "load_weights"),
            "wrapper": self.implements(name, "load_weights", wrapper=True),
            "publisher": self.implements(name, "publish"),
        }
        return tuple(role for role, can in found.items() if can)

    def settings(self, name: str) -> Mapping[str, object]:
        """Return a registered plugin's settings, its defaults included."""
        return _fields(self._settings[name])

    def resolve_format(self, name: str, request: LoadRequest) -> FormatClaim | None:
        """Ask one plugin what it would do; see `hookspecs.resolve_format`."""
        try:
            return self._optional(name, "resolve_format", FormatClaim, request=request)
        except PluginError as exc:
            exc.args = (f"{exc.message}; to load without this plugin, set WEIGHTS_BLOCK={name}",)
            raise

    def load_weights(
        self, name: str, wrappers: Iterable[str], request: LoadRequest, engine: Engine, source: Source
    ) -> WeightSet:
        """Call one provider inside `wrappers`; see `hookspecs.load_weights`."""
        around = tuple(wrappers)
        record = self._tap.record = _Record()
        caller = self._only({name, *around}, "load_weights")
        try:
            return self._unlost(caller(request=request, engine=engine, source=source), record, name, around)
        except Exception as exc:  # noqa: BLE001 - raised again, with the plugin's name
            if record.result is not None:
                record.result.close()
            culprits = around if around and exc is not record.error else (name,)
            self._blame(exc, culprits, "load_weights")
        finally:
            record.error = None  # its traceback holds what the call held

    def _unlost(self, result: object, record: _Record, name: str, around: tuple[str, ...]) -> WeightSet:
        """Refuse a wrapper that lost what it was sent, or hid that the provider failed."""
        if record.error is not None:
            raise self._breach(around, "load_weights", f"swallowed {record.error!r} of {name}")
        if not isinstance(result, WeightSet):
            raise self._breach(
                around,
                "load_weights",
                f"returned {result!r}, a wrapper must return what it was sent by `yield`, or a set around it",
            )
        return result

    def before_post_load(self, name: str, request: LoadRequest, weights: WeightSet, engine: Engine) -> None:
        """Call one plugin; see `hookspecs.before_post_load`."""
        self._call(name, "before_post_load", request=request, weights=weights, engine=engine)

    def publish(
        self, name: str, request: LoadRequest, engine: Engine, layout: Layout
    ) -> PublishReceipt | None:
        """Call one publisher; see `hookspecs.publish`."""
        return self._optional(name, "publish", PublishReceipt, request=request, engine=engine, layout=layout)

    def cleanup(self, name: str, request: LoadRequest, outcome: Outcome) -> None:
        """Call one plugin; see `hookspecs.cleanup`."""
        self._call(name, "cleanup", request=request, outcome=outcome)

    def _call(self, name: str, hook: str, **arguments: object) -> Any:
        try:
            return self._only({name}, hook)(**arguments)
        except Exception as exc:  # noqa: BLE001 - raised again, with the plugin's name
            self._blame(exc, (name,), hook)

    def _optional(self, name: str, hook: str, expected: type[T], **arguments: object) -> T | None:
        results = self._call(name, hook, **arguments)
        if not results:
            return None
        if not isinstance(results[0], expected):
            raise self._breach((name,), hook, f"returned {results[0]!r}, need {expected.__name__} or None")
        return results[0]

    def _only(self, names: set[str], hook: str) -> Callable[..., Any]:
        others = [instance for name, (_, instance) in self._plugins.items() if name not in names]
        return self._manager.subset_hook_caller(hook, others)

    def _blame(self, exc: Exception, names: tuple[str, ...], hook: str) -> NoReturn:
        if isinstance(exc, WeightsError):
            raise self._stamped(exc, names, hook)
        raise self._stamped(PluginFailedError(_one_line(exc)), names, hook) from exc

    def _breach(self, names: tuple[str, ...], hook: str, what: str) -> WeightsError:
        return self._stamped(PluginContractError(what), names, hook)

    def _stamped(self, exc: WeightsError, names: tuple[str, ...], hook: str) -> WeightsError:
        origins = ", ".join(self._plugins[name][0].origin for name in names)
        return exc.stamp(plugin=", ".join(names), distribution=origins, hook=hook, rank=self._rank)

    def _instantiate(self, plugin: Installed, settings: Mapping[str, object]) -> object:
        try:
            cls = plugin.load()
        except Exception as exc:  # importing a third party's module may raise anything
            raise PluginLoadError(
                f"plugin {plugin.name!r} of {plugin.origin} cannot be imported: {_one_line(exc)}"
            ) from exc
        speaks = getattr(cls, "weights_api", None)
        if speaks != hookspecs.API_VERSION:
            raise PluginVersionError(f"plugin {plugin.name!r} of {plugin.origin}: {_skew(speaks, plugin)}")
        schema: type | None = getattr(cls, "Config", None)
        values = config.structure(plugin.name, schema, settings)
        self._settings[plugin.name] = values
        try:
            return cls(values) if hasattr(cls, "Config") else cls()
        except Exception as exc:  # a third party's constructor may raise anything
            if isinstance(exc, PluginError):
                raise
            raise PluginLoadError(
                f"plugin {plugin.name!r} of {plugin.origin} cannot be built: {_one_line(exc)}"
            ) from exc

    def _check_hooks(self, instance: object) -> None:
        for hook in hookspecs.HOOKS:
            mine = [i for i in getattr(self._manager.hook, hook).get_hookimpls() if i.plugin is instance]
            named = getattr(instance, hook, None)
            if named is not None and named not in [implementation.function for implementation in mine]:
                raise PluginContractError(
                    f"{hook} is named like a hook but not marked with @hookimpl: it would never run"
                )
            if len(mine) > 1:
                raise PluginContractError(f"{hook} is implemented more than once")
            for implementation in mine:
                if implementation.hookwrapper:
                    raise PluginContractError(
                        f"{hook} is an old-style hookwrapper; use @hookimpl(wrapper=True)"
                    )
                if implementation.wrapper and hook != "load_weights":
                    raise PluginContractError(f"{hook} is a wrapper; only load_weights may be wrapped")
                if implementation.tryfirst or implementation.trylast:
                    raise PluginContractError(
                        f"{hook} has an ordering mark; the order is the operator's, in `format` and `enable`"
                    )


def _fields(values: Any) -> Mapping[str, object]:
    """Return the fields of an attrs value by the names its constructor takes."""
    if not attrs.has(type(values)):
        return {}
    return {field.alias: getattr(values, field.name) for field in attrs.fields(type(values)) if field.init}


def _skew(speaks: object, plugin: Installed) -> str:
    ours = hookspecs.API_VERSION
    if not isinstance(speaks, int):
        return f"its class must say which plugin API it speaks: weights_api = {ours}"
    cure = "weights-core" if speaks > ours else plugin.distribution
    return f"it speaks plugin API {speaks}, this weights-core speaks {ours}: upgrade {cure}"


def _one_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())}"


class _Manager(pluggy.PluginManager):
    """Looks for hooks only where there may be one; inspecting every name is most of registering."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        if name.startswith("__") or _is_unmarked(plugin, name):
            return None
        return super().parse_hookimpl_opts(plugin, name)

    def parse_hookspec_opts(self, module_or_class: Any, name: str) -> pluggy.HookspecOpts | None:
        return super().parse_hookspec_opts(module_or_class, name) if name in hookspecs.HOOKS else None


def _is_unmarked(plugin: object, name: str) -> bool:
    """Whether a name of an instance is surely no hook's: a value, or a plain method without the mark."""
    if name in getattr(plugin, "__dict__", ()):
        return False
    found = next((vars(cls)[name] for cls in type(plugin).__mro__ if name in vars(cls)), None)
    if isinstance(found, FunctionType):
        return not hasattr(found, _MARK)
    return not isinstance(found, staticmethod | classmethod | MethodType | MemberDescriptorType)


class _Monitor:
    """Makes a `HookCall` of what pluggy reports; one load's calls nest but do not overlap."""

    def __init__(self, observer: Observer, rank: int) -> None:
        self._observer = observer
        self._rank = rank
        self._begun: list[float] = []

    def before(self, hook: str, methods: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
        self._begun.append(time.perf_counter())

    def after(
        self,
        outcome: pluggy.Result[Any],
        hook: str,
        methods: Sequence[pluggy.HookImpl],
        arguments: Mapping[str, Any],
    ) -> None:
        seconds = time.perf_counter() - self._begun.pop()
        called = [m for m in methods if not m.wrapper]
        if not called:  # the plugin does not implement this hook
            return
        result = None if outcome.exception is not None else outcome.get_result()
        self._observer(
            HookCall(
                plugin=called[0].plugin_name,
                hook=hook,
                arguments=dict(arguments),
                around=tuple(m.plugin_name for m in reversed(methods) if m.wrapper and m.plugin_name != _TAP),
                result=next(iter(result), None) if isinstance(result, list) else result,
                error=outcome.exception,
                seconds=seconds,
                depth=len(self._begun),
                rank=self._rank,
            )
        )


@attrs.define
class _Record:
    result: WeightSet | None = None
    error: BaseException | None = None


class _Tap:
    """The innermost wrapper: tells the provider's result and errors from its wrappers'."""

    record = _Record()

    @hookspecs.hookimpl(wrapper=True, trylast=True)
    def load_weights(self) -> Generator[None, object, object]:
        record = self.record
        try:
            result = yield
            if not isinstance(result, WeightSet):
                raise PluginContractError(f"returned {result!r}, a planned provider owes a WeightSet")
        except BaseException as exc:
            record.error = exc
            raise
        record.result = result
        return result
