# SPDX-License-Identifier: Apache-2.0
"""Who provides, owns, wraps and publishes in one load, and the reasons that operators are shown."""

import pytest

from weights_core import EngineInfo, Fit, FormatClaim, Layout, LoadRequest, Plan, Role, hookimpl
from weights_core.discovery import Installed
from weights_core.errors import (
    AmbiguousFormatError,
    FormatNotFoundError,
    FormatUnresolvedError,
    PluginContractError,
    PluginError,
    PluginFailedError,
    PluginLoadError,
)
from weights_core.host import PluginHost
from weights_core.planning import make_plan
from weights_core.testing import host_of, installed_as


class Base:
    weights_api = 1
    answer = None

    @hookimpl
    def resolve_format(self, request):
        return self.answer


class Loads(Base):
    @hookimpl
    def load_weights(self):
        raise NotImplementedError


class Wraps(Base):
    @hookimpl(wrapper=True)
    def load_weights(self):
        return (yield)


class Publishes(Base):
    @hookimpl
    def publish(self):
        raise NotImplementedError


class LoadsAndPublishes(Loads):
    @hookimpl
    def publish(self):
        raise NotImplementedError


def answering(base, answer):
    return type(base.__name__, (base,), {"answer": answer})


def source(fit=Fit.GOOD, **claim):
    return answering(Loads, FormatClaim(roles={Role.SOURCE}, reason="reads tapes", fit=fit, **claim))


def owner(**claim):
    return answering(Loads, FormatClaim(roles={Role.OWNER}, reason="owns memory", **claim))


def wrapper():
    return answering(Wraps, FormatClaim(roles={Role.WRAPPER}, reason="wraps"))


def publisher(publish_at=Layout.SHARDED, *, required=False, base=Publishes, roles=frozenset()):
    claim = FormatClaim(
        roles={Role.PUBLISHER, *roles}, reason="offers", publish_at=publish_at, required=required
    )
    return answering(base, claim)


def plan(host, *format, **info):
    engine = EngineInfo(name="toy", version="1", **info)
    request = LoadRequest(checkpoint="nowhere", engine=engine, format=format or ("auto",))
    return make_plan(host.hooks(request), request)


def reasons(made):
    return {decision.plugin: decision.reason for decision in made.decisions}


# Sources --------------------------------------------------------------------------------------


def test_with_nothing_installed_the_built_in_disk_serves():
    made = plan(host_of())
    assert made.providers == ("disk",)
    assert (made.owner, made.wrappers, dict(made.publishers)) == (None, (), {})
    assert made.active == ("disk",)


@pytest.mark.parametrize("format", [(), ("auto",)])
def test_auto_takes_the_best_fit_first_and_the_disk_last(format):
    host = host_of(a=source(Fit.POSSIBLE), b=source(Fit.BEST), c=source(Fit.GOOD))
    made = plan(host, *format)
    assert made.sources == made.providers == ("b", "c", "a", "disk")


def test_equal_fits_are_ordered_by_name():
    assert plan(host_of(c=source(), a=source(), b=source())).sources == ("a", "b", "c", "disk")


def test_equal_fits_are_ordered_by_the_explicit_list_if_there_is_one():
    host = host_of(c=source(), a=source(), b=source(), enable=["b", "c", "a"])
    assert plan(host).sources == ("b", "c", "a", "disk")


def test_a_better_fit_comes_before_the_explicit_order():
    host = host_of(a=source(Fit.BEST), b=source(Fit.GOOD), enable=["b", "a"])
    assert plan(host).sources == ("a", "b", "disk")


def test_the_disk_is_last_also_when_the_explicit_list_names_it_first():
    assert plan(host_of(a=source(Fit.POSSIBLE), enable=["disk", "a"])).sources == ("a", "disk")


def test_named_sources_come_first_in_the_given_order_then_the_rest_best_fit_first():
    host = host_of(a=source(Fit.BEST), b=source(Fit.GOOD), c=source(Fit.POSSIBLE), d=source(Fit.GOOD))
    assert plan(host, "c", "b").sources == ("c", "b", "a", "d", "disk")


@pytest.mark.parametrize("named", [("c", "auto"), ("auto", "disk"), ("auto", "auto")])
def test_auto_stands_alone(named):
    with pytest.raises(FormatUnresolvedError, match="'auto' alone, or names of plugins"):
        plan(host_of(c=source(Fit.POSSIBLE)), *named)


def test_a_source_that_is_not_asked_is_said_not_to_be_and_its_hooks_do_not_run():
    made = plan(host_of(a=source(Fit.BEST)), "disk")
    assert made.active == ("disk",)
    decision = next(d for d in made.decisions if d.plugin == "a")
    assert decision.roles == frozenset()
    assert "the format ends at 'disk'" in decision.reason


def test_naming_the_disk_ends_the_list():
    host = host_of(a=source(Fit.BEST), b=source(Fit.GOOD))
    assert plan(host, "disk").sources == ("disk",)
    assert plan(host, "b", "disk").sources == ("b", "disk")


def test_naming_a_source_after_the_disk_is_refused():
    with pytest.raises(FormatUnresolvedError, match="nothing is asked after 'disk': name it last"):
        plan(host_of(a=source()), "disk", "a")


def test_a_source_that_is_named_twice_is_asked_once():
    assert plan(host_of(a=source()), "a", "a").sources == ("a", "disk")


def test_an_owner_that_is_named_twice_is_one_owner():
    assert plan(host_of(vault=owner()), "vault", "vault").owner == "vault"


def test_a_plugin_that_refuses_or_answers_none_stays_out_with_its_reason():
    host = host_of(no=answering(Loads, FormatClaim.refuse("no tape in the drive")), none=Loads)
    made = plan(host)
    assert made.sources == ("disk",)
    assert reasons(made)["no"] == "no tape in the drive"
    assert reasons(made)["none"] == "takes no part in this load"


@pytest.mark.parametrize("answer", [FormatClaim.refuse("no tape"), None])
def test_a_named_plugin_that_stays_out_is_an_error_with_its_reason(answer):
    why = "no tape" if answer else "takes no part"
    with pytest.raises(FormatUnresolvedError, match=f"format 'tape' cannot be served: {why}"):
        plan(host_of(tape=answering(Loads, answer)), "tape")


def test_a_source_whose_layouts_the_engine_does_not_accept_stays_out():
    host = host_of(final=source(layouts={Layout.FINAL, Layout.SHARDED}))
    made = plan(host)
    assert made.sources == ("disk",)
    assert reasons(made)["final"] == "reads tapes; delivers final or sharded, engine toy accepts checkpoint"


def test_one_common_layout_is_enough():
    host = host_of(both=source(layouts={Layout.CHECKPOINT, Layout.SHARDED}))
    assert plan(host, accepts={Layout.SHARDED, Layout.FINAL}).sources == ("both",)


def test_a_named_source_whose_layouts_the_engine_does_not_accept_is_an_error():
    with pytest.raises(FormatUnresolvedError, match="delivers final, engine toy accepts checkpoint"):
        plan(host_of(final=source(layouts={Layout.FINAL})), "final")


def test_when_nobody_can_serve_the_error_gives_everyones_reason():
    host = host_of(
        no=answering(Loads, FormatClaim.refuse("no tape")),
        final=source(layouts={Layout.FINAL}),
        block=["disk"],
    )
    with pytest.raises(FormatUnresolvedError) as info:
        plan(host)
    text = str(info.value)
    assert text.startswith("no plugin can serve this load: ")
    for part in (
        "no: no tape",
        "; delivers final, engine toy accepts",
        "disk: blocked",
    ):
        assert part in text


def test_a_wrapper_alone_cannot_serve():
    with pytest.raises(FormatUnresolvedError, match="no plugin can serve"):
        plan(host_of(around=wrapper(), block=["disk"]))


# Owners ---------------------------------------------------------------------------------------


def test_an_owner_takes_part_only_when_named():
    host = host_of(vault=owner(), tape=source())
    made = plan(host)
    assert (made.owner, made.providers) == (None, ("tape", "disk"))
    assert "only when the format names it" in reasons(made)["vault"]
    named = plan(host, "vault")
    assert (named.owner, named.sources) == ("vault", ("tape", "disk"))
    assert named.providers[0] == "vault"


def test_an_owner_and_sources_can_be_named_together():
    host = host_of(vault=owner(), a=source(Fit.BEST), b=source(Fit.POSSIBLE))
    made = plan(host, "vault", "b", "disk")
    assert (made.owner, made.sources) == ("vault", ("b", "disk"))


def test_an_owner_that_can_read_by_itself_is_not_among_the_sources_below_it():
    both = answering(Loads, FormatClaim(roles={Role.OWNER, Role.SOURCE}, reason="both"))
    made = plan(host_of(vault=both), "vault")
    assert (made.owner, made.sources) == ("vault", ("disk",))


def test_two_named_owners_are_ambiguous():
    with pytest.raises(AmbiguousFormatError, match="'vault' and 'safe' would both own the weights: name one"):
        plan(host_of(vault=owner(), safe=owner()), "vault", "safe")


def test_an_owner_that_is_not_named_does_not_conflict_with_one_that_is():
    assert plan(host_of(vault=owner(), safe=owner()), "safe").owner == "safe"


def test_an_owner_is_refused_when_the_engine_changes_its_weights_after_the_load():
    with pytest.raises(FormatUnresolvedError) as info:
        plan(host_of(vault=owner()), "vault", mutates_after_load="merges adapters")
    assert "engine toy changes its weights after the load (merges adapters)" in str(info.value)


def test_sources_do_not_mind_that_the_engine_changes_its_weights():
    assert plan(host_of(tape=source()), mutates_after_load="merges adapters").sources == ("tape", "disk")


def test_an_owner_whose_layouts_the_engine_does_not_accept_is_refused():
    with pytest.raises(FormatUnresolvedError, match="delivers final, engine toy accepts checkpoint"):
        plan(host_of(vault=owner(layouts={Layout.FINAL})), "vault")


def test_an_owner_may_be_the_only_provider():
    assert plan(host_of(vault=owner(), block=["disk"]), "vault").providers == ("vault",)


def test_the_plan_asks_the_owner_that_was_named_what_is_held_already():
    host = host_of(vault=owner(held=lambda: 7), safe=owner(held=lambda: 8), tape=source())
    assert plan(host, "vault").held() == 7
    assert plan(host).held is None


# Wrappers and publishers ----------------------------------------------------------------------


def test_wrappers_take_part_when_installed_from_the_outside_in_by_name_or_explicit_list():
    classes = {"c": wrapper(), "a": wrapper(), "b": wrapper()}
    assert plan(host_of(**classes)).wrappers == ("a", "b", "c")
    assert plan(host_of(**classes, enable=["b", "c", "a"])).wrappers == ("b", "c", "a")


def test_a_publisher_whose_layout_the_engine_shares_takes_part():
    made = plan(host_of(offer=publisher()), shareable={Layout.SHARDED: "plain state dict"})
    assert list(made.publishers) == ["offer"]
    assert made.publishers["offer"].publish_at is Layout.SHARDED


@pytest.mark.parametrize("shareable", [{}, {Layout.FINAL: "x"}])
def test_a_publisher_whose_layout_the_engine_cannot_share_is_dropped_with_the_reason(shareable):
    made = plan(host_of(offer=publisher()), shareable=shareable)
    assert dict(made.publishers) == {}
    assert "offer" not in made.active
    assert "does not publish: engine toy cannot share sharded weights" in reasons(made)["offer"]


def test_a_dropped_publisher_keeps_its_other_roles_fit_and_layouts():
    both = answering(
        LoadsAndPublishes,
        FormatClaim(
            roles={Role.SOURCE, Role.PUBLISHER},
            reason="peers",
            publish_at=Layout.FINAL,
            fit=Fit.BEST,
            layouts={Layout.SHARDED},
        ),
    )
    host = host_of(peer=both, tape=source(Fit.GOOD))
    made = plan(host, accepts={Layout.SHARDED, Layout.CHECKPOINT})
    assert made.sources == ("peer", "tape", "disk")
    assert dict(made.publishers) == {}


def test_a_required_publisher_whose_layout_the_engine_cannot_share_is_an_error():
    with pytest.raises(
        FormatUnresolvedError, match="'offer' must publish, and engine toy cannot share sharded"
    ):
        plan(host_of(offer=publisher(required=True)))


def test_a_named_publisher_that_cannot_publish_is_an_error():
    with pytest.raises(FormatUnresolvedError, match="engine toy cannot share sharded weights"):
        plan(host_of(offer=publisher()), "offer")


# The contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "claim", "missing"),
    [
        (Base, {"roles": {Role.SOURCE}}, "role source but does not implement load_weights plainly"),
        (Wraps, {"roles": {Role.SOURCE}}, "role source but does not implement load_weights plainly"),
        (Base, {"roles": {Role.OWNER}}, "role owner but does not implement load_weights plainly"),
        (Loads, {"roles": {Role.WRAPPER}}, "role wrapper but does not implement load_weights as a wrapper"),
        (
            Loads,
            {"roles": {Role.PUBLISHER}, "publish_at": Layout.FINAL},
            "role publisher but does not implement publish plainly",
        ),
    ],
)
def test_claiming_a_role_without_its_hook_is_a_contract_error(base, claim, missing):
    plugin = answering(base, FormatClaim(reason="x", **claim))
    with pytest.raises(PluginContractError, match=missing) as info:
        plan(host_of(tape=plugin))
    assert "plugin 'tape' of weights-tape 1.0" in str(info.value)


def test_an_error_in_resolve_format_ends_the_load_and_names_the_plugin():
    class Crashes(Base):
        @hookimpl
        def resolve_format(self, request):
            raise OSError("no drive")

    with pytest.raises(PluginFailedError, match="no drive") as info:
        plan(host_of(tape=Crashes))
    assert (info.value.plugin, info.value.hook) == ("tape", "resolve_format")


@pytest.mark.parametrize("claim", [{"roles": {"source"}}, {"roles": {Role.SOURCE}, "layouts": {"final"}}])
def test_a_claim_with_names_in_place_of_roles_or_layouts_is_the_plugins_fault(claim):
    class Sloppy(Loads):
        @hookimpl
        def resolve_format(self, request):
            return FormatClaim(reason="x", **claim)

    with pytest.raises(PluginError, match="tape"):
        plan(host_of(tape=Sloppy))


# Names ----------------------------------------------------------------------------------------


def test_a_format_that_is_not_installed_says_how_to_install_it():
    with pytest.raises(
        FormatNotFoundError, match="'my_vault' is not installed; try: pip install weights-my-vault"
    ):
        plan(host_of(), "my_vault")


@pytest.mark.parametrize(("typed", "meant"), [("tap", "tape"), ("dsk", "disk"), ("autoo", "auto")])
def test_a_misspelt_format_is_answered_with_the_nearest(typed, meant):
    with pytest.raises(
        FormatNotFoundError, match=rf"'{typed}' is not installed \(did you mean '{meant}'\?\)"
    ):
        plan(host_of(tape=source()), typed)


def test_a_named_plugin_that_is_blocked_says_so():
    with pytest.raises(FormatUnresolvedError, match="'tape' cannot be served: the plugin is blocked"):
        plan(host_of(tape=source(), block=["tape"]), "tape")


def test_a_named_plugin_that_is_not_enabled_says_so():
    with pytest.raises(
        FormatUnresolvedError, match=r"'tape' .* the plugin is not in the list of enabled plugins"
    ):
        plan(host_of(tape=source(), enable=[]), "tape")


def broken():
    def load():
        raise ImportError("libtape")

    return Installed(name="tape", distribution="weights-tape", version="1.0", load=load)


def test_a_named_plugin_that_is_broken_is_an_error_with_the_cause():
    with pytest.raises(PluginLoadError, match="libtape"):
        plan(PluginHost([broken()]), "tape")


def test_hooks_that_were_opened_for_another_request_still_say_that_a_named_plugin_is_broken():
    host = PluginHost([broken()])
    auto = LoadRequest(checkpoint="nowhere", engine=EngineInfo(name="toy", version="1"))
    named = LoadRequest(checkpoint="nowhere", engine=auto.engine, format=("tape",))
    with pytest.raises(
        FormatUnresolvedError, match=r"'tape' cannot be served: the plugin is broken: .*libtape"
    ):
        make_plan(host.hooks(auto), named)


# Decisions ------------------------------------------------------------------------------------


def test_every_installed_plugin_has_a_decision_with_distribution_and_reason():
    host = PluginHost(
        [
            installed_as("good", source(), version="2.1"),
            installed_as("vault", owner()),
            installed_as("around", wrapper()),
            installed_as("offer", publisher()),
            installed_as("stop", source()),
            installed_as("silent", Loads),
            broken(),
        ],
        block=["stop"],
    )
    made = plan(host)
    names = [decision.plugin for decision in made.decisions]
    assert sorted(names) == ["around", "disk", "good", "offer", "silent", "stop", "tape", "vault"]
    assert all(decision.reason and decision.distribution for decision in made.decisions)
    found = {decision.plugin: decision for decision in made.decisions}
    assert (found["good"].distribution, found["good"].roles) == ("weights-good 2.1", {Role.SOURCE})
    assert found["good"].reason == "reads tapes"
    assert found["stop"].reason == "blocked"
    assert "libtape" in found["tape"].reason
    assert set(made.active) == {"good", "around", "disk"}
    assert all(not found[name].roles for name in ("vault", "offer", "silent", "stop", "tape"))


def test_a_plan_without_an_owner_asks_its_sources():
    made = Plan(owner=None, sources=("a", "b"), wrappers=(), publishers={}, decisions=())
    assert made.providers == ("a", "b")


# Claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "publish_at"),
    [
        ({Role.PUBLISHER}, None),
        ({Role.SOURCE}, Layout.SHARDED),
        (set(), Layout.FINAL),
    ],
)
def test_a_claim_has_publish_at_exactly_if_it_publishes(roles, publish_at):
    with pytest.raises(ValueError, match="exactly if it takes the role of a publisher"):
        FormatClaim(roles=roles, reason="x", publish_at=publish_at)


def test_a_claim_cannot_publish_checkpoint_weights():
    with pytest.raises(ValueError, match="never at CHECKPOINT"):
        FormatClaim(roles={Role.PUBLISHER}, reason="x", publish_at=Layout.CHECKPOINT)


def test_a_refusal_is_a_claim_without_roles():
    claim = FormatClaim.refuse("no tape")
    assert (claim.roles, claim.reason, claim.publish_at, claim.required) == (set(), "no tape", None, False)


def test_a_claims_collections_are_frozen_copies():
    roles = {Role.SOURCE}
    claim = FormatClaim(roles=roles, reason="x", layouts=[Layout.FINAL, Layout.FINAL])
    roles.clear()
    assert claim.roles == frozenset({Role.SOURCE})
    assert claim.layouts == frozenset({Layout.FINAL})
