# SPDX-License-Identifier: Apache-2.0
"""The lifecycle with small real plugins: composition, fallback, failure at every phase, cleanup."""

import gc
import threading

import attrs
import pytest
import torch
from torch import nn

import weights_core as w
from weights_core import errors
from weights_core.testing import host_of, write_checkpoint
from weights_core.weightset import WeightSetWrapper

PHASES = ["load", "lazy", "apply", "before_post_load", "publish", "post_load", "cleanup"]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(3, 2)


@pytest.fixture
def tensors():
    torch.manual_seed(1)
    return {name: torch.randn_like(t) for name, t in Model().state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path, tensors):
    return write_checkpoint(tmp_path / "ckpt", tensors, shards=2)


@pytest.fixture
def model():
    with torch.device("meta"):
        return Model()


@pytest.fixture
def calls():
    return []


def holds(model, tensors):
    return all(torch.equal(p, tensors[name]) for name, p in model.state_dict().items())


def is_meta(model):
    return all(p.is_meta for p in model.parameters())


class MemorySet(w.WeightSet):
    """Tensors of a dict; fails at `fail_at`, to test sets that break while they are read."""

    def __init__(self, tensors, *, layout=w.Layout.CHECKPOINT, fail=None, in_place=False):
        self.tensors, self.layout, self.fail, self.in_place = tensors, layout, fail, in_place
        self.closed = 0

    @property
    def metas(self):
        return {
            n: w.TensorMeta(n, tuple(t.shape), "F32", t.numel() * t.element_size())
            for n, t in self.tensors.items()
        }

    def read(self, name, slices=None):
        if self.fail is not None and name == list(self.tensors)[-1]:
            raise self.fail
        return self.tensors[name]

    def close(self):
        self.closed += 1


def source(tensors, calls, name, *, raises=None, fail=None, fit=w.Fit.GOOD, layout=w.Layout.CHECKPOINT):
    """A real source plugin class over a dict of tensors."""

    class Source:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self, request):
            return w.FormatClaim(roles={w.Role.SOURCE}, reason="memory", fit=fit, layouts={layout})

        @w.hookimpl
        def load_weights(self):
            calls.append(f"{name}.load")
            if raises is not None:
                raise raises
            self.set = MemorySet(tensors, fail=fail, layout=layout)
            self.set.provider = name
            calls.append(self.set)
            return self.set

        @w.hookimpl
        def cleanup(self, outcome):
            calls.append(f"{name}.cleanup {outcome.status}")

    return Source


def wrapper(calls, name):
    class Around(WeightSetWrapper):
        def release(self, names):
            calls.append(f"{name}.release")
            return super().release(names)

    class Wrapper:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(roles={w.Role.WRAPPER}, reason="wraps")

        @w.hookimpl(wrapper=True)
        def load_weights(self):
            calls.append(f"{name}.wrap")
            return Around((yield))

        @w.hookimpl
        def cleanup(self):
            calls.append(f"{name}.cleanup")

    return Wrapper


def owner(calls, *, keep=None):
    """Copies what lies below into memory of its own, kept until the lease ends."""

    class Owner:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(roles={w.Role.OWNER}, reason="owns")

        @w.hookimpl
        def load_weights(self, source):
            below = source.open()
            owned = MemorySet({name: t.clone() for name, t in below.stream()})
            below.close()
            owned.provider = "vault"
            if keep is not None:
                keep.append(owned)
            calls.append(f"vault over {below.provider}")
            return owned

        @w.hookimpl
        def cleanup(self):
            calls.append("vault.cleanup")

    return Owner


def test_everything_in_one_call(checkpoint, model, tensors):
    report = w.load(w.TorchEngine(model), checkpoint, host=host_of())
    assert holds(model, tensors)
    assert report.provider == "disk"
    assert report.nbytes == sum(t.numel() * 4 for t in tensors.values())
    names = [phase.name for phase in report.phases]
    assert names[:4] == ["resolve", "load", "apply", "before_post_load"]
    assert names[-1] == "cleanup"


def test_step_by_step_with_an_engine_that_post_loads_itself(checkpoint, model, tensors):
    engine = w.TorchEngine(model)
    with w.open_session(engine, checkpoint, host=host_of()) as session:
        assert session.resolve().sources == ("disk",)
        session.load()
        assert session.apply().written == set(tensors)
        session.publish(w.Layout.SHARDED)
        model.requires_grad_(False)  # the engine's own post-load
        session.publish(w.Layout.FINAL)
        report = session.finish()
    assert holds(model, tensors)
    assert report.applied.written == set(tensors)


@pytest.mark.parametrize(
    ("done", "step"),
    [
        ([], "load"),
        ([], "apply"),
        ([], "finish"),
        ([], "post_load"),
        (["resolve"], "resolve"),
        (["resolve"], "apply"),
        (["resolve", "load"], "finish"),
        (["resolve", "load"], "load"),
        (["resolve", "load", "apply"], "apply"),
        (["resolve", "load", "apply", "post_load"], "post_load"),
        (["resolve", "load", "apply", "finish"], "finish"),
        (["resolve", "load", "apply", "finish"], "load"),
    ],
)
def test_steps_out_of_order_are_refused(checkpoint, model, done, step):
    with w.open_session(w.TorchEngine(model), checkpoint, host=host_of()) as session:
        for name in done:
            getattr(session, name)()
        with pytest.raises(errors.LifecycleError):
            getattr(session, step)()


@pytest.mark.parametrize("attribute", ["plan", "weights"])
def test_what_is_not_known_yet_is_an_error(checkpoint, model, attribute):
    session = w.open_session(w.TorchEngine(model), checkpoint, host=host_of())
    with pytest.raises(errors.LifecycleError):
        getattr(session, attribute)


def test_owner_over_two_sources_over_two_wrappers(checkpoint, model, tensors, calls):
    host = host_of(
        vault=owner(calls),
        first=source({}, calls, "first", raises=w.Declined("nobody there")),
        second=source(tensors, calls, "second"),
        outer=wrapper(calls, "outer"),
        wipe=wrapper(calls, "wipe"),
    )
    report = w.load(w.TorchEngine(model), checkpoint, ["vault", "first", "second"], host=host)
    assert holds(model, tensors)
    order = [c for c in calls if isinstance(c, str)]
    assert order[:6] == ["outer.wrap", "wipe.wrap", "first.load", "outer.wrap", "wipe.wrap", "second.load"]
    assert order[6] == "vault over second"
    assert [(a.plugin, a.result) for a in report.attempts] == [
        ("first", "declined"),
        ("second", "provided the weights"),
        ("vault", "provided the weights"),
    ]
    assert report.attempts[0].reason.startswith("nobody there")
    cleanups = [c for c in order if "cleanup" in c]
    assert cleanups == [
        "wipe.cleanup",
        "outer.cleanup",
        "second.cleanup ready",
        "first.cleanup ready",
        "vault.cleanup",
    ]


def test_owners_memory_lives_until_the_lease_ends(checkpoint, model, tensors, calls):
    kept = []
    host = host_of(vault=owner(calls, keep=kept))
    report = w.load(w.TorchEngine(model), checkpoint, "vault", host=host)
    assert kept[0].closed == 0
    report.lease.close()
    assert kept[0].closed == 1


def test_lease_ends_with_the_model(checkpoint, tensors, calls):
    kept = []
    with torch.device("meta"):
        model = Model()
    report = w.load(w.TorchEngine(model), checkpoint, "vault", host=host_of(vault=owner(calls, keep=kept)))
    del report
    gc.collect()
    assert kept[0].closed == 0
    del model
    gc.collect()
    assert kept[0].closed == 1


def test_a_sources_set_is_closed_when_the_load_ends(checkpoint, model, tensors, calls):
    host = host_of(first=source(tensors, calls, "first"))
    w.load(w.TorchEngine(model), checkpoint, host=host)
    assert next(c for c in calls if isinstance(c, MemorySet)).closed == 1


@pytest.mark.parametrize("how", [w.Declined("no"), w.LoadFailed("broke", mutated=False)])
def test_next_provider_is_asked_after_a_clean_failure(checkpoint, model, tensors, calls, how):
    host = host_of(first=source({}, calls, "first", raises=how))
    report = w.load(w.TorchEngine(model), checkpoint, host=host)
    assert report.provider == "disk"
    assert holds(model, tensors)
    assert report.attempts[0].reason.startswith(str(how.message))


def test_dirty_failure_aborts_without_reinit(checkpoint, tensors, calls):
    model = Model()
    engine = w.TorchEngine(model)
    engine._written_in_place = True  # as a provider that wrote into the parameters leaves it
    host = host_of(first=source({}, calls, "first", raises=w.LoadFailed("broke", mutated=True)))
    with pytest.raises(errors.EngineError, match="reinit") as caught:
        w.load(engine, checkpoint, host=host)
    assert "broke" in str(caught.value)
    assert "disk" not in str(calls)


def test_dirty_failure_goes_on_after_reinit(checkpoint, tensors, calls):
    model, reset = Model(), []
    host = host_of(first=source(tensors, calls, "first", fail=w.LoadFailed("broke", mutated=False)))
    engine = w.TorchEngine(model, reinit=reset.append)
    report = w.load(engine, checkpoint, host=host)
    assert reset == [model]
    assert holds(model, tensors)
    assert [a.plugin for a in report.attempts] == ["first", "first", "disk"]


def test_lazy_failure_inside_apply_falls_back_if_the_engine_is_untouched(checkpoint, model, tensors, calls):
    host = host_of(first=source(tensors, calls, "first", fail=w.LoadFailed("peer died", mutated=False)))
    report = w.load(w.TorchEngine(model), checkpoint, host=host)
    assert report.provider == "disk"
    assert holds(model, tensors)
    assert next(c for c in calls if isinstance(c, MemorySet)).closed == 1


def test_lazy_failure_with_an_engine_that_cannot_reinit_aborts(checkpoint, tensors, calls):
    model = Model()
    host = host_of(first=source(tensors, calls, "first", fail=w.LoadFailed("peer died", mutated=False)))
    with pytest.raises(errors.EngineError, match="reinit") as caught:
        w.load(w.TorchEngine(model), checkpoint, host=host)
    assert "peer died" in str(caught.value)
    assert caught.value.__notes__ == ["do not use the engine"]


def test_nobody_serves(checkpoint, model, calls):
    host = host_of(
        first=source({}, calls, "first", raises=w.Declined("empty")),
        second=source({}, calls, "second", raises=w.LoadFailed("broke", mutated=False)),
        block=["disk"],
    )
    with pytest.raises(errors.NoProviderError) as caught:
        w.load(w.TorchEngine(model), checkpoint, host=host)
    assert list(caught.value.reasons) == ["first", "second"]
    assert "empty" in str(caught.value)
    assert is_meta(model)


def test_a_provider_in_a_layout_the_engine_cannot_take(checkpoint, model, tensors, calls):
    lying = source(tensors, calls, "first")
    lying.load_weights = w.hookimpl(lambda self: MemorySet(tensors, layout=w.Layout.FINAL))
    with pytest.raises(errors.PluginContractError, match=r"final.*accepts"):
        w.load(w.TorchEngine(model), checkpoint, host=host_of(first=lying))
    assert is_meta(model)


def test_sharded_weights_are_bound_not_applied(checkpoint, model, tensors, calls):
    host = host_of(first=source(tensors, calls, "first", layout=w.Layout.SHARDED))
    w.load(w.TorchEngine(model), checkpoint, host=host)
    assert model.a.weight.data_ptr() == tensors["a.weight"].data_ptr()


def in_place(tensors, written):
    class InPlace:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(roles={w.Role.OWNER}, reason="writes the parameters itself")

        @w.hookimpl
        def load_weights(self, engine):
            engine.materialize(lambda meta: torch.empty(meta.torch_shape))
            for name in written:
                engine.tensors(w.Layout.SHARDED)[name].detach().copy_(tensors[name])
            return MemorySet({name: tensors[name] for name in written}, in_place=True)

    return InPlace


def test_an_owner_may_write_in_place(checkpoint, model, tensors):
    host = host_of(vault=in_place(tensors, tensors))
    w.load(w.TorchEngine(model), checkpoint, "vault", host=host)
    assert holds(model, tensors)


def test_a_partly_written_model_is_refused_and_brought_back(checkpoint, model, tensors):
    host = host_of(vault=in_place(tensors, ["a.weight"]))
    with pytest.raises(errors.CoverageError, match="missing 3 tensors") as caught:
        w.load(w.TorchEngine(model), checkpoint, "vault", host=host)
    assert "the engine was re-initialised" in caught.value.__notes__
    assert is_meta(model)


class Silent(w.TorchEngine):
    def apply(self, weights):
        super().apply(weights)


def test_an_engine_that_does_not_report_is_refused(checkpoint, model):
    with pytest.raises(errors.CoverageError, match="did not report"):
        w.load(Silent(model), checkpoint, host=host_of())
    assert is_meta(model)


class Saboteur:
    """A plugin that fails where it is told to, and records its cleanups."""

    weights_api = 1

    def __init__(self, phase, calls):
        self.phase, self.calls = phase, calls

    def fail(self, phase):
        if phase == self.phase:
            raise RuntimeError(f"injected at {phase}")

    @w.hookimpl
    def resolve_format(self):
        return w.FormatClaim(
            roles={w.Role.WRAPPER, w.Role.PUBLISHER},
            publish_at=w.Layout.SHARDED,
            required=True,
            reason="sabotage",
        )

    @w.hookimpl(wrapper=True)
    def load_weights(self):
        weights = yield
        self.fail("load")
        if self.phase == "lazy":
            return MemorySet({n: weights[n] for n in weights}, fail=RuntimeError("injected at lazy"))
        return weights

    @w.hookimpl
    def before_post_load(self):
        self.fail("before_post_load")

    @w.hookimpl
    def publish(self, layout):
        self.fail("publish")
        return w.PublishReceipt(
            layout=layout, nbytes=0, detail="here", close=lambda: self.calls.append("closed")
        )

    @w.hookimpl
    def cleanup(self, outcome):
        self.calls.append(f"saboteur {outcome.status} in {outcome.phase}")
        self.fail("cleanup")


class FragileEngine(w.TorchEngine):
    def __init__(self, model, phase):
        super().__init__(model)
        self.phase = phase

    def apply(self, weights):
        if self.phase == "apply":
            next(iter(weights.stream()))
            raise RuntimeError("injected at apply")
        return super().apply(weights)

    def post_load(self, layout):
        if self.phase == "post_load":
            raise RuntimeError("injected at post_load")
        super().post_load(layout)


@pytest.mark.parametrize("phase", PHASES)
def test_a_failure_in_any_phase_cleans_up_once_in_reverse(checkpoint, model, tensors, calls, phase):
    saboteur = type("S", (Saboteur,), {"__init__": lambda self: Saboteur.__init__(self, phase, calls)})
    host = host_of(mid=saboteur, zz=wrapper(calls, "zz"), aa=wrapper(calls, "aa"))
    threads = threading.active_count()
    with pytest.raises((errors.WeightsError, RuntimeError)) as caught:
        w.load(FragileEngine(model, phase), checkpoint, host=host)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert f"injected at {phase}" in text
    expected = "ready in ready" if phase == "cleanup" else "failed in "
    cleanups = [c for c in calls if "cleanup" in str(c) or str(c).startswith("saboteur")]
    assert [c.split()[0] for c in cleanups] == ["zz.cleanup", "saboteur", "aa.cleanup"]
    assert expected in cleanups[1]
    assert threading.active_count() == threads
    if phase == "cleanup":
        assert isinstance(caught.value, errors.CleanupError)
        assert holds(model, tensors)
        assert caught.value.report.provider == "disk"
        assert "closed" not in calls  # the model is usable, so what was published stays
    else:
        assert is_meta(model)
        assert calls.count("closed") == (phase == "post_load")


def test_a_crash_names_plugin_distribution_hook_and_rank(checkpoint, model, calls):
    saboteur = type("S", (Saboteur,), {"__init__": lambda self: Saboteur.__init__(self, "load", calls)})
    with pytest.raises(errors.PluginFailedError) as caught:
        w.load(w.TorchEngine(model), checkpoint, host=host_of(mid=saboteur))
    assert (caught.value.plugin, caught.value.hook, caught.value.rank) == ("mid", "load_weights", 0)
    assert caught.value.distribution == "weights-mid 1.0"
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_failed_cleanup_does_not_hide_the_error_that_ended_the_load(checkpoint, model, calls):
    class Both(Saboteur):
        def __init__(self):
            super().__init__("", calls)

        def fail(self, phase):
            if phase in ("before_post_load", "cleanup"):
                raise RuntimeError(f"injected at {phase}")

    with pytest.raises(errors.PluginFailedError, match="before_post_load") as caught:
        w.load(w.TorchEngine(model), checkpoint, host=host_of(mid=Both))
    assert any("cleanup failed too" in note and "injected" in note for note in caught.value.__notes__)


def test_leaving_early_cleans_up_and_brings_the_engine_back(checkpoint, model, calls, tensors):
    host = host_of(first=source(tensors, calls, "first"))
    with w.open_session(w.TorchEngine(model), checkpoint, host=host) as session:
        session.resolve()
        session.load()
        session.apply()
    assert calls[-1] == "first.cleanup abandoned"
    assert is_meta(model)


def publisher(calls, at, *, required=False, fail=False):
    class Publisher:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(roles={w.Role.PUBLISHER}, publish_at=at, required=required, reason="offers")

        @w.hookimpl
        def publish(self, engine, layout):
            calls.append(f"publish {layout.value} {len(engine.tensors(layout))}")
            if fail:
                raise OSError("no registry")
            return w.PublishReceipt(
                layout=layout, nbytes=8, detail="offered", close=lambda: calls.append("withdrawn")
            )

    return Publisher


def test_publish_runs_once_at_its_layout_and_is_withdrawn_with_the_lease(checkpoint, model, calls):
    host = host_of(pub=publisher(calls, w.Layout.SHARDED))
    report = w.load(w.TorchEngine(model), checkpoint, host=host)
    assert calls == ["publish sharded 4"]
    assert report.receipts[0].detail == "offered"
    with report.lease:
        pass
    assert calls == ["publish sharded 4", "withdrawn"]


def test_a_second_publish_calls_nobody_again(checkpoint, model, calls):
    host = host_of(pub=publisher(calls, w.Layout.SHARDED))
    with w.open_session(w.TorchEngine(model), checkpoint, host=host) as session:
        session.resolve()
        session.load()
        session.apply()
        assert len(session.publish(w.Layout.SHARDED)) == 1
        assert session.publish(w.Layout.SHARDED) == ()
        session.finish()
    assert calls == ["publish sharded 4"]


@pytest.mark.parametrize("late", ["post_load", "final"])
def test_late_publish_is_refused(checkpoint, model, calls, late):
    host = host_of(pub=publisher(calls, w.Layout.SHARDED))
    with w.open_session(w.TorchEngine(model), checkpoint, host=host) as session:
        session.resolve()
        session.load()
        session.apply()
        if late == "post_load":
            session.post_load()
        else:
            session.publish(w.Layout.FINAL)
        with pytest.raises(errors.PublishError, match="refusing late publish"):
            session.publish(w.Layout.SHARDED)
        with pytest.raises(errors.LifecycleError):
            session.publish(w.Layout.CHECKPOINT)
        report = session.finish()
    assert calls == []
    assert any("pub did not publish" in note for note in report.notes)


def test_a_failed_publish_is_recorded_and_the_model_usable(checkpoint, model, tensors, calls):
    host = host_of(pub=publisher(calls, w.Layout.SHARDED, fail=True))
    report = w.load(w.TorchEngine(model), checkpoint, host=host)
    assert holds(model, tensors)
    assert any("no registry" in note for note in report.notes)
    assert len(calls) == 1


def test_a_failed_required_publish_fails_the_load(checkpoint, model, calls):
    host = host_of(pub=publisher(calls, w.Layout.SHARDED, required=True, fail=True))
    with pytest.raises(errors.PublishError, match="no registry"):
        w.load(w.TorchEngine(model), checkpoint, host=host)
    assert is_meta(model)


def test_a_required_publisher_that_is_never_called_fails_the_load(checkpoint, model, calls):
    host = host_of(pub=publisher(calls, w.Layout.SHARDED, required=True))
    with w.open_session(w.TorchEngine(model), checkpoint, host=host) as session:
        session.resolve()
        session.load()
        session.apply()
        with pytest.raises(errors.PublishError, match="must"):
            session.finish()
    assert is_meta(model)


def test_final_may_be_published_late_while_the_session_is_open(checkpoint, model, calls):
    class Shares(w.TorchEngine):
        @property
        def info(self):
            import attrs

            return attrs.evolve(super().info, shareable={w.Layout.FINAL: "no transforms"})

    host = host_of(pub=publisher(calls, w.Layout.FINAL))
    with w.open_session(Shares(model), checkpoint, host=host) as session:
        session.resolve()
        session.load()
        session.apply()
        session.post_load()
        assert calls == []  # the engine profiles its memory here
        session.publish(w.Layout.FINAL)
        session.finish()
    assert calls == ["publish final 4"]


def test_before_post_load_sees_the_weights_in_the_model(checkpoint, model, tensors):
    seen = []

    class Check:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(roles={w.Role.WRAPPER}, reason="checks")

        @w.hookimpl(wrapper=True)
        def load_weights(self):
            return (yield)

        @w.hookimpl
        def before_post_load(self, weights, engine):
            seen.append((weights.provider, holds(engine.model, tensors)))

    w.load(w.TorchEngine(model), checkpoint, host=host_of(check=Check))
    assert seen == [("disk", True)]


def test_the_engines_own_checkpoint_overrides(tmp_path, checkpoint, model, tensors):
    report = w.load(w.TorchEngine(model, checkpoint=checkpoint), tmp_path / "elsewhere", host=host_of())
    assert report.checkpoint == checkpoint
    assert holds(model, tensors)


def test_keyboard_interrupt_cleans_up_and_passes(checkpoint, model, tensors, calls):
    host = host_of(first=source(tensors, calls, "first", fail=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        w.load(w.TorchEngine(model), checkpoint, host=host)
    assert calls[-1] == "first.cleanup failed"
    assert is_meta(model)


class Undecided(w.Engine):
    """Stands for another engine until there is a plan."""

    def __init__(self, chosen, **info):
        self.chosen, self.plans = chosen, []
        self.own = attrs.evolve(
            getattr(chosen, "info", None) or w.EngineInfo(name="torch", version="0"), **info
        )

    @property
    def info(self):
        return self.own

    def planned(self, plan):
        self.plans.append(plan)
        if isinstance(self.chosen, Exception):
            raise self.chosen
        return self.chosen

    def expected(self, layout):
        return {}

    def apply(self, weights):
        raise AssertionError("another engine was chosen")

    def untouched(self):
        return True


def asked(requests):
    class Listens:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self, request):
            requests.append(request)
            return w.FormatClaim(roles={w.Role.WRAPPER}, reason="listens")

        @w.hookimpl(wrapper=True)
        def load_weights(self, request, engine):
            requests.append((request, engine))
            return (yield)

    return Listens


def test_an_engine_may_leave_the_load_to_another_once_there_is_a_plan(checkpoint, model, tensors):
    requests = []
    engine = w.TorchEngine(model)
    undecided = Undecided(engine)
    w.load(undecided, checkpoint, host=host_of(listens=asked(requests)))
    assert [plan.providers for plan in undecided.plans] == [("disk",)]
    assert undecided.plans[0].layouts == {w.Layout.CHECKPOINT}
    first, (second, seen) = requests
    assert first is second
    assert seen is engine
    assert holds(model, tensors)


def test_an_engine_that_says_other_things_of_itself_is_asked_for_once_more(checkpoint, model, tensors):
    requests = []
    engine = w.TorchEngine(model, role="draft")
    with w.open_session(
        Undecided(engine, role="main"), checkpoint, host=host_of(listens=asked(requests))
    ) as s:
        s.resolve()
        assert s.engine is engine
        assert [request.engine.role for request in requests] == ["main", "draft"]
        s.load()
        s.apply()
        s.finish()
    assert requests[-1][0].engine == engine.info
    assert holds(model, tensors)


def test_an_engine_that_is_chosen_has_its_own_checkpoint(tmp_path, checkpoint, model, tensors):
    engine = w.TorchEngine(model, checkpoint=checkpoint)
    report = w.load(Undecided(engine), tmp_path / "elsewhere", host=host_of())
    assert report.checkpoint == checkpoint
    assert holds(model, tensors)


def test_an_engine_that_cannot_be_chosen_ends_the_load(checkpoint, calls, tensors):
    host = host_of(a=source(tensors, calls, "a"))
    with pytest.raises(errors.EngineError, match="cannot be built") as caught:
        w.load(Undecided(errors.EngineError("cannot be built")), checkpoint, host=host)
    assert "the engine is untouched" in caught.value.__notes__
    assert calls == ["a.cleanup failed"]


def test_an_engine_that_is_chosen_must_have_an_anchor_too(checkpoint, model):
    class Unanchored(w.TorchEngine):
        anchor = 5

    with pytest.raises(errors.EngineError, match="anchor"):
        w.load(Undecided(Unanchored(model)), checkpoint)


@pytest.mark.parametrize("accepts", [set(w.Layout), {w.Layout.CHECKPOINT}])
def test_a_plan_says_which_layouts_may_come(checkpoint, model, tensors, calls, accepts):
    claims = {"a": w.Layout.SHARDED, "b": w.Layout.FINAL}
    host = host_of(**{name: source(tensors, calls, name, layout=layout) for name, layout in claims.items()})
    engine = Undecided(w.TorchEngine(model), accepts=accepts)
    assert w.explain(engine, checkpoint, host=host).layouts == accepts
