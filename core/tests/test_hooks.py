# SPDX-License-Identifier: Apache-2.0
"""The contract of the hooks: what is refused at registration, and who is blamed for what at a call."""

import attrs
import pytest

from weights_core import (
    Declined,
    EngineInfo,
    FormatClaim,
    Layout,
    LoadFailed,
    LoadRequest,
    Outcome,
    ProviderPlugin,
    PublisherPlugin,
    PublishReceipt,
    WeightSet,
    WeightSetWrapper,
    hookimpl,
)
from weights_core.errors import (
    CheckpointError,
    PluginContractError,
    PluginFailedError,
    WeightsError,
)
from weights_core.hooks import Hooks
from weights_core.scan import ScanEngine
from weights_core.testing import installed_as

REQUEST = LoadRequest(checkpoint="nowhere", engine=EngineInfo(name="e", version="1"))
ENGINE = ScanEngine()
SOURCE = object()
DONE = Outcome(status="ready", phase="ready")


class Empty(WeightSet):
    def __init__(self, provider="provider"):
        self.provider = provider

    @property
    def metas(self):
        return {}

    def read(self, name, slices=None):
        raise KeyError(name)


class Named(WeightSetWrapper):
    def __init__(self, inner, name):
        super().__init__(inner)
        self.provider = f"{name}({inner.provider})"


class Base:
    weights_api = 1

    @hookimpl
    def resolve_format(self, request):
        return FormatClaim.refuse("only a test")


class Provider(Base):
    @hookimpl
    def load_weights(self):
        return Empty()


def wrapper_named(name):
    class Wrapper(Base):
        @hookimpl(wrapper=True)
        def load_weights(self):
            weights = yield
            return Named(weights, name)

    return Wrapper


def hooks_of(*, rank=0, **plugins):
    """Register the plugins so that the first is the outermost, as a host does."""
    hooks = Hooks(rank=rank)
    for name, plugin in reversed(plugins.items()):
        hooks.register(installed_as(name, plugin), {})
    return hooks


def load(hooks, *wrappers, name="provider"):
    return hooks.load_weights(name, wrappers, REQUEST, ENGINE, SOURCE)


CALLS = {
    "resolve_format": lambda hooks: hooks.resolve_format("provider", REQUEST),
    "load_weights": load,
    "before_post_load": lambda hooks: hooks.before_post_load("provider", REQUEST, Empty(), ENGINE),
    "publish": lambda hooks: hooks.publish("provider", REQUEST, ENGINE, Layout.SHARDED),
    "cleanup": lambda hooks: hooks.cleanup("provider", REQUEST, DONE),
}


def raising(hook, error):
    """Return a plugin class whose hook raises `error`."""

    def implementation(self):
        raise error

    return type("Raising", (Base,), {hook: hookimpl(implementation)})


# Registration ---------------------------------------------------------------------------------


class WrongParameter(Base):
    @hookimpl
    def before_post_load(self, request, weight):
        return None


class Undecorated(Base):
    def publish(self, request, engine, layout):
        return None


class UndecoratedOverride(PublisherPlugin[None]):
    Config = None

    @hookimpl
    def resolve_format(self, request):
        return None

    def publish(self, request, engine, layout):
        return None


class NotAMethod(Base):
    cleanup = "later"


class UnknownHook(Base):
    @hookimpl
    def before_load(self, request):
        return None


class UnknownSpecname(Base):
    @hookimpl(specname="before_load")
    def prepare(self, request):
        return None


class OldStyle(Base):
    @hookimpl(hookwrapper=True)
    def load_weights(self):
        yield


class OldStyleElsewhere(Base):
    @hookimpl(hookwrapper=True)
    def publish(self):
        yield


class WrapsPublish(Base):
    @hookimpl(wrapper=True)
    def publish(self):
        return (yield)


class WrapsResolve:
    weights_api = 1

    @hookimpl(wrapper=True)
    def resolve_format(self):
        return (yield)


class WrapsByAnotherName(Base):
    @hookimpl(wrapper=True, specname="cleanup")
    def tidy(self):
        return (yield)


class WrapperWithoutYield(Base):
    @hookimpl(wrapper=True)
    def load_weights(self):
        return Empty()


class First(Base):
    @hookimpl(tryfirst=True)
    def load_weights(self):
        return Empty()


class Last(Base):
    @hookimpl(trylast=True)
    def cleanup(self):
        return None


class FirstWrapper(Base):
    @hookimpl(wrapper=True, tryfirst=True)
    def load_weights(self):
        return (yield)


class PrivateFirst(Base):
    @hookimpl(specname="load_weights", tryfirst=True)
    def _load(self):
        return Empty()


@attrs.define
class ValuedWithoutHash(Provider):
    pass


@attrs.frozen
class Valued(Provider):
    pass


class SourceAndWrapper(Provider):
    @hookimpl(wrapper=True, specname="load_weights")
    def around(self):
        return (yield)


REFUSED = {
    ValuedWithoutHash: "eq=False",
    Valued: "eq=False",
    SourceAndWrapper: "load_weights is implemented more than once",
    WrongParameter: "weight",
    Undecorated: "publish is named like a hook but not marked",
    UndecoratedOverride: "publish is named like a hook but not marked",
    NotAMethod: "cleanup is named like a hook but not marked",
    UnknownHook: "unknown hook 'before_load'",
    UnknownSpecname: "unknown hook 'before_load'",
    OldStyle: r"old-style hookwrapper; use @hookimpl\(wrapper=True\)",
    OldStyleElsewhere: "old-style hookwrapper",
    WrapsPublish: "publish is a wrapper; only load_weights may be wrapped",
    WrapsResolve: "resolve_format is a wrapper",
    WrapsByAnotherName: "is a wrapper; only load_weights may be wrapped",
    WrapperWithoutYield: "not a generator function",
    First: "load_weights has an ordering mark",
    Last: "cleanup has an ordering mark",
    FirstWrapper: "load_weights has an ordering mark",
    PrivateFirst: "ordering mark",
}


@pytest.mark.parametrize(("plugin", "why"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_plugin_that_breaks_the_contract_is_refused_by_name_and_distribution(plugin, why):
    with pytest.raises(PluginContractError, match=why) as info:
        hooks_of(tape=plugin)
    assert "plugin 'tape' of weights-tape 1.0: " in str(info.value)


@pytest.mark.parametrize("plugin", REFUSED, ids=lambda value: value.__name__)
def test_a_refused_plugin_leaves_nothing_behind_and_others_work(plugin):
    hooks = hooks_of(provider=Provider)
    with pytest.raises(PluginContractError):
        hooks.register(installed_as("tape", plugin), {})

    assert list(hooks.plugins) == ["provider"]
    assert load(hooks).provider == "provider"
    hooks.register(installed_as("tape", Provider), {})
    assert list(hooks.plugins) == ["tape", "provider"]
    assert load(hooks, name="tape").provider == "provider"


def test_public_helpers_and_attributes_that_are_no_hooks_are_the_plugins_own_business():
    class Helpful(Provider):
        drives = ("a", "b")

        def rewind(self):
            return self.drives

    assert load(hooks_of(provider=Helpful)).provider == "provider"


def test_a_hook_may_be_implemented_under_another_name():
    class Renamed(Base):
        @hookimpl(specname="load_weights")
        def from_tape(self):
            return Empty("renamed")

    assert load(hooks_of(provider=Renamed)).provider == "renamed"


def test_a_marked_method_is_not_passed_over_because_its_name_is_private():
    ran = []

    class Private(Base):
        @hookimpl(specname="cleanup")
        def _rewind(self):
            ran.append("cleanup")

    hooks_of(provider=Private).cleanup("provider", REQUEST, DONE)
    assert ran == ["cleanup"]


def test_what_a_plugin_implements_is_known():
    hooks = hooks_of(wrapper=wrapper_named("w"), provider=Provider)
    assert hooks.implements("provider", "load_weights")
    assert not hooks.implements("provider", "load_weights", wrapper=True)
    assert not hooks.implements("wrapper", "load_weights")
    assert hooks.implements("wrapper", "load_weights", wrapper=True)
    assert not hooks.implements("provider", "publish")


# Arguments ------------------------------------------------------------------------------------


def test_a_plugin_gets_only_the_arguments_it_names():
    seen = []

    class Modest:
        weights_api = 1

        @hookimpl
        def resolve_format(self):
            seen.append(())

        @hookimpl
        def load_weights(self, engine):
            seen.append((engine,))
            return Empty()

        @hookimpl
        def before_post_load(self, engine, request):
            seen.append((engine, request))

        @hookimpl
        def publish(self, layout):
            seen.append((layout,))

        @hookimpl
        def cleanup(self, outcome):
            seen.append((outcome,))

    hooks = hooks_of(provider=Modest)
    for call in CALLS.values():
        call(hooks)
    assert seen == [(), (ENGINE,), (ENGINE, REQUEST), (Layout.SHARDED,), (DONE,)]


def test_a_plugin_that_names_everything_gets_everything():
    seen = {}

    class Greedy:
        weights_api = 1

        @hookimpl
        def resolve_format(self, request):
            seen["resolve_format"] = [request]

        @hookimpl
        def load_weights(self, request, engine, source):
            seen["load_weights"] = [request, engine, source]
            return Empty()

        @hookimpl
        def before_post_load(self, request, weights, engine):
            seen["before_post_load"] = [request, weights.provider, engine]

        @hookimpl
        def publish(self, request, engine, layout):
            seen["publish"] = [request, engine, layout]

        @hookimpl
        def cleanup(self, request, outcome):
            seen["cleanup"] = [request, outcome]

    hooks = hooks_of(provider=Greedy)
    for call in CALLS.values():
        call(hooks)
    assert seen == {
        "resolve_format": [REQUEST],
        "load_weights": [REQUEST, ENGINE, SOURCE],
        "before_post_load": [REQUEST, "provider", ENGINE],
        "publish": [REQUEST, ENGINE, Layout.SHARDED],
        "cleanup": [REQUEST, DONE],
    }


def test_only_the_plugin_that_is_called_runs():
    ran = []

    def recording(name):
        class Recording(Base):
            @hookimpl
            def load_weights(self):
                ran.append(name)
                return Empty(name)

            @hookimpl
            def cleanup(self):
                ran.append(name)

        return Recording

    hooks = hooks_of(a=recording("a"), b=recording("b"), c=recording("c"))
    assert load(hooks, name="b").provider == "b"
    hooks.cleanup("c", REQUEST, DONE)
    assert ran == ["b", "c"]


@pytest.mark.parametrize("hook", ["before_post_load", "publish", "cleanup"])
def test_a_hook_that_a_plugin_does_not_implement_is_simply_not_called(hook):
    assert CALLS[hook](hooks_of(provider=Base)) is None


# Results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["resolve_format", "publish"])
@pytest.mark.parametrize("wrong", ["text", {}, 0, FormatClaim])
def test_a_result_of_the_wrong_type_is_a_contract_error_naming_what_is_needed(hook, wrong):
    class Wrong:
        weights_api = 1

    setattr(Wrong, hook, hookimpl(lambda self: wrong))
    need = {"resolve_format": "FormatClaim", "publish": "PublishReceipt"}[hook]
    with pytest.raises(PluginContractError, match=f"need {need} or None") as info:
        CALLS[hook](hooks_of(provider=Wrong))
    assert repr(wrong) in info.value.message
    assert (info.value.plugin, info.value.hook) == ("provider", hook)


def test_a_publishers_receipt_is_handed_on_as_it_is():
    receipt = PublishReceipt(layout=Layout.SHARDED, nbytes=1, detail="here")

    class Publisher(Base):
        @hookimpl
        def publish(self):
            return receipt

    assert CALLS["publish"](hooks_of(provider=Publisher)) is receipt


@pytest.mark.parametrize("wrong", [None, {}, "text", [Empty()]])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_planned_provider_owes_a_weight_set_and_is_blamed_also_inside_wrappers(wrong, wrapped):
    class Wrong(Base):
        @hookimpl
        def load_weights(self):
            return wrong

    class Tolerant(Base):
        @hookimpl(wrapper=True)
        def load_weights(self):
            yield
            return Empty("made up")

    hooks = hooks_of(rank=2, wrapper=Tolerant, provider=Wrong)
    with pytest.raises(PluginContractError, match="a planned provider owes a WeightSet") as info:
        load(hooks, *(["wrapper"] if wrapped else []))
    assert (info.value.plugin, info.value.distribution) == ("provider", "weights-provider 1.0")
    assert (info.value.hook, info.value.rank) == ("load_weights", 2)


def test_a_provider_without_the_hook_is_blamed_for_it():
    with pytest.raises(PluginContractError, match="returned None") as info:
        load(hooks_of(provider=Base))
    assert info.value.plugin == "provider"


@pytest.mark.parametrize("lost", [None, "text"])
def test_a_wrapper_that_loses_the_result_is_named_and_the_provider_is_not(lost):
    class Losing(Base):
        @hookimpl(wrapper=True)
        def load_weights(self):
            yield
            return lost

    with pytest.raises(PluginContractError, match="a wrapper must return what it was sent") as info:
        load(hooks_of(losing=Losing, provider=Provider), "losing")
    assert (info.value.plugin, info.value.distribution) == ("losing", "weights-losing 1.0")


def test_a_wrapper_that_yields_twice_is_blamed():
    class Twice(Base):
        @hookimpl(wrapper=True)
        def load_weights(self):
            weights = yield
            yield
            return weights

    with pytest.raises(PluginFailedError, match="second yield") as info:
        load(hooks_of(twice=Twice, provider=Provider), "twice")
    assert info.value.plugin == "twice"


# Wrappers -------------------------------------------------------------------------------------


def test_wrappers_surround_the_provider_the_first_registered_innermost():
    hooks = hooks_of(a=wrapper_named("a"), b=wrapper_named("b"), c=wrapper_named("c"), provider=Provider)
    assert load(hooks, "a", "b", "c").provider == "a(b(c(provider)))"


def test_wrappers_stand_outside_of_a_provider_that_was_registered_after_them():
    hooks = hooks_of(provider=Provider, z=wrapper_named("z"))
    assert load(hooks, "z").provider == "z(provider)"


def test_only_the_wrappers_that_are_asked_for_take_part():
    hooks = hooks_of(a=wrapper_named("a"), b=wrapper_named("b"), provider=Provider)
    assert load(hooks, "b").provider == "b(provider)"
    assert load(hooks).provider == "provider"


def test_the_order_in_which_wrappers_are_listed_in_the_call_does_not_matter():
    hooks = hooks_of(a=wrapper_named("a"), b=wrapper_named("b"), provider=Provider)
    assert load(hooks, "b", "a").provider == "a(b(provider))"


def test_a_provider_may_call_the_next_one_inside_its_own_call():
    hooks = Hooks()

    class Below:
        def open(self):
            return hooks.load_weights("below", ["around"], REQUEST, ENGINE, SOURCE)

    class Owner(Base):
        @hookimpl
        def load_weights(self, source):
            return Named(source.open(), "owner")

    for name, plugin in {"below": Provider, "around": wrapper_named("around"), "owner": Owner}.items():
        hooks.register(installed_as(name, plugin), {})
    weights = hooks.load_weights("owner", (), REQUEST, ENGINE, Below())
    assert weights.provider == "owner(around(provider))"


def test_an_error_from_the_provider_below_keeps_its_name_when_it_passes_an_owner():
    hooks = Hooks()

    class Below:
        def open(self):
            return hooks.load_weights("below", ["around"], REQUEST, ENGINE, SOURCE)

    class Owner(Base):
        @hookimpl
        def load_weights(self, source):
            return source.open()

    plugins = {
        "below": raising("load_weights", OSError("disk")),
        "around": wrapper_named("a"),
        "owner": Owner,
    }
    for name, plugin in plugins.items():
        hooks.register(installed_as(name, plugin), {})
    with pytest.raises(PluginFailedError) as info:
        hooks.load_weights("owner", (), REQUEST, ENGINE, Below())
    assert info.value.plugin == "below"


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", CALLS)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_foreign_exception_becomes_a_plugin_failure_with_its_cause(hook, rank):
    cause = OSError("the tape tore")
    with pytest.raises(PluginFailedError) as info:
        CALLS[hook](hooks_of(rank=rank, provider=raising(hook, cause)))
    error = info.value
    assert error.__cause__ is cause
    cure = "; to load without this plugin, set WEIGHTS_BLOCK=provider"
    assert error.message == "OSError: the tape tore" + (cure if hook == "resolve_format" else "")
    assert (error.plugin, error.distribution) == ("provider", "weights-provider 1.0")
    assert (error.hook, error.rank) == (hook, rank)


@pytest.mark.parametrize("hook", CALLS)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Declined("no tape"),
        lambda: LoadFailed("torn", mutated=True),
        lambda: CheckpointError("is torn", tensor="a"),
    ],
    ids=["Declined", "LoadFailed", "CheckpointError"],
)
def test_an_error_of_this_project_is_raised_as_it_is_with_its_origin_stamped(hook, rank, make):
    error = make()
    with pytest.raises(WeightsError) as info:
        CALLS[hook](hooks_of(rank=rank, provider=raising(hook, error)))
    assert info.value is error
    assert (error.plugin, error.distribution) == ("provider", "weights-provider 1.0")
    assert (error.hook, error.rank) == (hook, rank)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_cause_and_context_of_a_plugins_error_are_kept(wrapped):
    class Chained(Base):
        @hookimpl
        def load_weights(self):
            try:
                raise OSError("deep")
            except OSError as exc:
                raise Declined("no tape") from exc

    class Implicit(Base):
        @hookimpl
        def load_weights(self):
            try:
                raise OSError("deep")
            except OSError:
                raise Declined("no tape")  # noqa: B904

    wrappers = ["wrapper"] if wrapped else []
    with pytest.raises(Declined) as chained:
        load(hooks_of(wrapper=wrapper_named("w"), provider=Chained), *wrappers)
    with pytest.raises(Declined) as implicit:
        load(hooks_of(wrapper=wrapper_named("w"), provider=Implicit), *wrappers)

    assert isinstance(chained.value.__cause__, OSError)
    assert isinstance(implicit.value.__context__, OSError)
    assert implicit.value.__cause__ is None
    assert implicit.value.__suppress_context__ is False


@pytest.mark.parametrize(
    "error", [Declined("no tape"), OSError("tore"), StopIteration("stop"), RuntimeError()]
)
def test_a_providers_exception_passes_through_wrappers_and_is_blamed_on_the_provider(error):
    passed = []

    class Watching(Base):
        @hookimpl(wrapper=True)
        def load_weights(self):
            try:
                return (yield)
            except Exception as exc:
                passed.append(exc)
                raise

    hooks = hooks_of(
        rank=1, watching=Watching, plain=wrapper_named("plain"), provider=raising("load_weights", error)
    )
    with pytest.raises(WeightsError) as info:
        load(hooks, "watching", "plain")
    assert passed == [error]
    assert (info.value.plugin, info.value.rank) == ("provider", 1)
    assert error in (info.value, info.value.__cause__)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [ValueError("wrapper"), Declined("wrapper")])
def test_a_wrapper_that_raises_is_blamed_and_the_provider_is_not(when, error):
    class Failing(Base):
        @hookimpl(wrapper=True)
        def load_weights(self):
            if when == "before":
                raise error
            yield
            raise error

    with pytest.raises(WeightsError) as info:
        load(hooks_of(failing=Failing, provider=Provider), "failing")
    assert (info.value.plugin, info.value.distribution) == ("failing", "weights-failing 1.0")
    assert error in (info.value, info.value.__cause__)


def test_a_wrapper_that_replaces_the_providers_exception_is_blamed_for_its_own():
    class Replacing(Base):
        @hookimpl(wrapper=True)
        def load_weights(self):
            try:
                return (yield)
            except Declined as exc:
                raise KeyError("mine") from exc

    hooks = hooks_of(replacing=Replacing, provider=raising("load_weights", Declined("no tape")))
    with pytest.raises(PluginFailedError, match="mine") as info:
        load(hooks, "replacing")
    assert info.value.plugin == "replacing"
    assert isinstance(info.value.__cause__, KeyError)


@pytest.mark.parametrize("instead", [None, Empty("stale cache")])
def test_a_wrapper_that_swallows_the_providers_exception_is_not_blamed_on_the_provider(instead):
    class Swallowing(Base):
        @hookimpl(wrapper=True)
        def load_weights(self):
            try:
                return (yield)
            except Declined:
                return instead

    hooks = hooks_of(swallowing=Swallowing, provider=raising("load_weights", Declined("no tape")))
    with pytest.raises(PluginContractError) as info:
        load(hooks, "swallowing")
    assert info.value.plugin == "swallowing"


def test_one_failed_call_does_not_colour_the_next():
    class Flaky(Base):
        def __init__(self):
            self.calls = 0

        @hookimpl
        def load_weights(self):
            self.calls += 1
            if self.calls == 1:
                raise Declined("not yet")
            return Empty("second time")

    hooks = hooks_of(around=wrapper_named("around"), provider=Flaky)
    with pytest.raises(Declined):
        load(hooks, "around")
    assert load(hooks, "around").provider == "around(second time)"


@pytest.mark.parametrize("hook", CALLS)
def test_an_interrupt_is_not_turned_into_a_plugins_failure(hook):
    with pytest.raises(KeyboardInterrupt):
        CALLS[hook](hooks_of(provider=raising(hook, KeyboardInterrupt())))


# Typed bases ----------------------------------------------------------------------------------


def test_a_typed_base_demands_its_hooks():
    class Half(ProviderPlugin[None]):
        @hookimpl
        def resolve_format(self, request):
            return None

    with pytest.raises(TypeError, match="load_weights"):
        Half(None)


def test_a_typed_base_hands_the_settings_to_the_plugin():
    class Whole(ProviderPlugin[dict]):
        @hookimpl
        def resolve_format(self, request):
            return None

        @hookimpl
        def load_weights(self, request, engine, source):
            return Empty(str(self.config))

    assert load(hooks_of(provider=Whole)).provider == "None"
