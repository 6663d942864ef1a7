# SPDX-License-Identifier: Apache-2.0
"""What a hostile reader of the core found, each as a test."""

import gc
import logging
import os
import subprocess
import sys
import weakref

import attrs
import pytest
import torch
from torch import nn

import weights_core as w
from weights_core import errors
from weights_core.discovery import installed
from weights_core.testing import Group, host_of, write_checkpoint


@pytest.fixture
def tensors():
    torch.manual_seed(2)
    return {"weight": torch.randn(2, 3), "bias": torch.randn(2)}


@pytest.fixture
def checkpoint(tmp_path, tensors):
    return write_checkpoint(tmp_path / "ckpt", tensors)


@pytest.fixture
def model():
    with torch.device("meta"):
        return nn.Linear(3, 2)


class InMemory(w.WeightSet):
    def __init__(self, tensors, *, layout=w.Layout.CHECKPOINT, in_place=False, fail=None):
        self.layout, self.in_place, self._tensors, self._fail = layout, in_place, tensors, fail
        self._metas = {n: w.TensorMeta(n, tuple(t.shape), "F32", t.nbytes) for n, t in tensors.items()}

    @property
    def metas(self):
        return self._metas

    def read(self, name, slices=None):
        if self._fail is not None:
            raise self._fail
        return self._tensors[name]


def plugin(*, roles=(w.Role.SOURCE,), load=None, layouts=(w.Layout.CHECKPOINT,), publish_at=None, **hooks):
    """A plugin class whose hooks are the given functions of `self` and keyword arguments."""

    class Made:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(
                roles=roles,
                reason="test",
                fit=w.Fit.BEST,
                layouts=layouts,
                publish_at=publish_at,
                required=hooks.get("required", False),
            )

        if load is not None:

            @w.hookimpl
            def load_weights(self, request, engine, source):
                return load(engine, source)

        if "publish" in hooks:

            @w.hookimpl
            def publish(self, engine, layout):
                return hooks["publish"](engine, layout)

        @w.hookimpl
        def before_post_load(self, request):
            hooks.get("before", lambda request: None)(request)

        @w.hookimpl
        def cleanup(self):
            hooks.get("cleanup", lambda: None)()

    return Made


def test_a_wrapper_that_changes_read_changes_every_path(checkpoint, model, tensors):
    class Doubled(w.WeightSetWrapper):
        def read(self, name, slices=None):
            return super().read(name, slices) * 2

    class Wrapper:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(roles={w.Role.WRAPPER}, reason="doubles")

        @w.hookimpl(wrapper=True)
        def load_weights(self):
            return Doubled((yield))

    w.load(w.TorchEngine(model), checkpoint, host=host_of(twice=Wrapper))
    assert torch.equal(model.weight, tensors["weight"] * 2)


@pytest.mark.parametrize("failing", ["before", "post_load", "publish"])
def test_a_session_does_not_go_on_after_a_step_that_failed(checkpoint, model, failing):
    def fail(*_):
        raise RuntimeError("no")

    class Engine(w.TorchEngine):
        def post_load(self, layout):
            if failing == "post_load":
                fail()

    offers = plugin(
        roles={w.Role.PUBLISHER},
        publish_at=w.Layout.SHARDED,
        required=True,
        before=fail if failing == "before" else lambda request: None,
        publish=fail if failing == "publish" else lambda engine, layout: None,
    )
    with w.open_session(Engine(model), checkpoint, host=host_of(offers=offers)) as session:
        session.resolve()
        session.load()

        def go_on():
            session.apply()
            session.publish(w.Layout.SHARDED)
            session.post_load()

        with pytest.raises((errors.WeightsError, RuntimeError)):
            go_on()
        with pytest.raises(errors.LifecycleError, match="this one is failed"):
            session.finish()
    assert model.weight.is_meta


def test_a_resolve_that_failed_is_not_tried_again(model, checkpoint):
    with w.open_session(w.TorchEngine(model), checkpoint, "nowhere", host=host_of()) as session:
        with pytest.raises(errors.FormatNotFoundError):
            session.resolve()
        with pytest.raises(errors.LifecycleError):
            session.resolve()


def ranks(checkpoint, host_for, engine=w.TorchEngine, gather=None):
    group = Group(2)

    def rank_main(rank):
        with torch.device("meta"):
            model = nn.Linear(3, 2)
        topology = w.Topology.tensor_parallel(2, rank)
        made = engine(model, topology=topology, gather=(gather or group.gather)(rank))
        return w.load(made, checkpoint, host=host_for(rank), timeout=20)

    return group.run(rank_main)


def test_a_gather_that_forgets_the_other_ranks_is_refused(checkpoint):
    for future in ranks(
        checkpoint, lambda rank: host_of(), gather=lambda rank: lambda value, timeout: [value]
    ):
        with pytest.raises(errors.RanksDisagreeError, match="gathered 1 answers; the topology says 2"):
            future.result()


def test_a_gather_that_breaks_does_not_hide_this_ranks_own_error(checkpoint, model):
    def broken(value, timeout):
        raise RuntimeError("connection closed")

    engine = w.TorchEngine(model, gather=broken)
    with pytest.raises(errors.RanksDisagreeError, match="connection closed") as caught:
        w.load(engine, checkpoint, "nowhere", host=host_of())
    assert isinstance(caught.value.__cause__, errors.FormatNotFoundError)


@pytest.mark.parametrize("step", ["resolve", "before_post_load", "post_load", "publish"])
def test_a_step_that_fails_on_one_rank_ends_the_load_on_all(checkpoint, step):
    def fail_on_rank_1(request):
        if request.rank == 1:
            raise RuntimeError("disk quota")

    class Engine(w.TorchEngine):
        def post_load(self, layout):
            if step == "post_load":
                fail_on_rank_1(self.info.topology)

    def host_for(rank):
        offers = plugin(
            roles={w.Role.PUBLISHER},
            publish_at=w.Layout.SHARDED,
            required=True,
            before=fail_on_rank_1 if step == "before_post_load" else lambda request: None,
            publish=lambda engine, _: fail_on_rank_1(engine.info.topology) if step == "publish" else None,
        )
        return host_of(offers=offers, block=["disk"] if step == "resolve" and rank == 1 else [])

    first, second = ranks(checkpoint, host_for, engine=Engine)
    with pytest.raises(errors.RanksDisagreeError, match="rank 1 failed at " + step):
        first.result()
    with pytest.raises((errors.WeightsError, RuntimeError)) as caught:
        second.result()
    assert not isinstance(caught.value, errors.RanksDisagreeError)


def overwrite(engine):
    for tensor in engine.tensors(w.Layout.SHARDED).values():
        tensor.detach().fill_(9)


@pytest.mark.parametrize("how", ["in place, then a failure", "crash", "LoadFailed"])
def test_an_engine_that_a_provider_wrote_to_is_never_called_untouched(checkpoint, tensors, how):
    def load(engine, source):
        overwrite(engine)
        if how == "crash":
            raise RuntimeError("crashed")
        if how == "LoadFailed":
            raise w.LoadFailed("cut off", mutated=True)
        return InMemory(tensors, in_place=True)

    def fail(request):
        raise RuntimeError("later")

    host = host_of(peer=plugin(load=load, before=fail), block=["disk"])
    with pytest.raises(errors.WeightsError) as caught:
        w.load(w.TorchEngine(nn.Linear(3, 2)), checkpoint, host=host)
    notes = "\n".join(caught.value.__notes__)
    assert "do not use" in notes
    assert "untouched" not in notes


@pytest.mark.parametrize("wrong", ["shape", "meta"])
def test_a_provider_that_says_it_wrote_in_place_is_not_believed_blindly(checkpoint, model, tensors, wrong):
    given = {n: torch.zeros(1) for n in tensors} if wrong == "shape" else tensors
    host = host_of(peer=plugin(load=lambda engine, source: InMemory(given, in_place=True)))
    with pytest.raises(errors.CoverageError, match="in place"):
        w.load(w.TorchEngine(model), checkpoint, host=host)


class TakesFinal(w.TorchEngine):
    @property
    def info(self):
        both = {w.Layout.SHARDED: "test", w.Layout.FINAL: "test"}
        return attrs.evolve(super().info, accepts={w.Layout.FINAL}, shareable=both)


def test_final_weights_are_not_published_as_sharded(checkpoint, model, tensors):
    offered = []
    host = host_of(
        peer=plugin(
            layouts={w.Layout.FINAL}, load=lambda engine, source: InMemory(tensors, layout=w.Layout.FINAL)
        ),
        offers=plugin(
            roles={w.Role.PUBLISHER},
            publish_at=w.Layout.SHARDED,
            publish=lambda engine, layout: offered.append(layout),
        ),
        block=["disk"],
    )
    report = w.load(TakesFinal(model), checkpoint, host=host)
    assert offered == []
    assert any("FINAL" in note for note in report.notes)


def test_a_source_that_is_left_out_still_publishes(checkpoint, model):
    offered = []
    peer = plugin(
        roles={w.Role.SOURCE, w.Role.PUBLISHER},
        layouts={w.Layout.FINAL},
        load=lambda engine, source: None,
        publish_at=w.Layout.SHARDED,
        required=True,
        publish=lambda engine, layout: offered.append(layout),
    )
    report = w.load(w.TorchEngine(model), checkpoint, host=host_of(peer=peer))
    assert report.provider == "disk"
    assert offered == [w.Layout.SHARDED]


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_cast_does_not_take_quantised_numbers_for_plain_ones(tmp_path, model, stored):
    path = write_checkpoint(tmp_path, {"weight": torch.zeros(2, 3, dtype=stored), "bias": torch.zeros(2)})
    with pytest.raises(errors.CoverageError, match="dtype"):
        w.load(w.TorchEngine(model, cast=True), path, host=host_of())


def test_a_second_load_that_fails_leaves_what_the_first_brought(tmp_path, checkpoint, model, tensors):
    engine = w.TorchEngine(model)
    w.load(engine, checkpoint, host=host_of())
    with pytest.raises(errors.CoverageError):
        w.load(engine, write_checkpoint(tmp_path / "bad", {"bias": torch.zeros(2)}), host=host_of())
    assert torch.equal(model.weight, tensors["weight"])


def test_a_set_that_keeps_its_source_keeps_no_model(checkpoint):
    kept = []

    def load(engine, source):
        owned = InMemory({n: t.clone() for n, t in source.open().stream()})
        owned.source = source
        kept.append(owned)
        return owned

    with torch.device("meta"):
        model = nn.Linear(3, 2)
    host = host_of(vault=plugin(roles={w.Role.OWNER}, load=load))
    report = w.load(w.TorchEngine(model), checkpoint, "vault", host=host)
    with pytest.raises(errors.LifecycleError):
        kept[0].source.open()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert report.lease.closed


def test_a_session_and_a_report_that_are_kept_keep_no_model(checkpoint):
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with w.open_session(w.TorchEngine(model), checkpoint, host=host_of()) as session:
        session.resolve()
        session.load()
        session.apply()
        report = session.finish()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert report.provider == "disk"
    assert "closed" in repr(session)


def test_the_memory_of_an_attempt_that_failed_is_freed_before_the_next(checkpoint, model, tensors):
    staged, alive = [], []

    class Fails(InMemory):
        def read_into(self, name, out, slices=None):
            staged.append(weakref.ref(out))
            raise w.LoadFailed("lost", mutated=False)

    class Watched(w.TorchEngine):
        def apply(self, weights):
            alive.append([ref() for ref in staged])
            return super().apply(weights)

    host = host_of(peer=plugin(load=lambda engine, source: Fails(tensors)))
    assert w.load(Watched(model), checkpoint, host=host).provider == "disk"
    assert alive == [[], [None]]


def test_a_forked_child_does_not_withdraw_what_its_parent_offers(tmp_path, checkpoint):
    log = tmp_path / "log"
    code = f"""
import os, sys, torch, weights_core as w
from weights_core.lease import Lease
lease = Lease()
class Anchor: pass
anchor = Anchor()
lease.add(lambda: open({str(log)!r}, "a").write(f"{{os.getpid()}}\\n"))
lease.anchor(anchor)
child = os.fork()
if child == 0:
    sys.exit(0)
os.waitpid(child, 0)
print(os.getpid())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert log.read_text().split() == done.stdout.split()


def test_an_interrupt_in_a_cleanup_skips_no_other_and_leaves_nothing(checkpoint, model):
    ran = []

    def interrupt():
        raise KeyboardInterrupt

    host = host_of(
        aa=plugin(
            roles={w.Role.PUBLISHER},
            publish_at=w.Layout.SHARDED,
            publish=lambda *_: None,
            cleanup=lambda: ran.append("aa"),
        ),
        bb=plugin(
            roles={w.Role.PUBLISHER}, publish_at=w.Layout.SHARDED, publish=lambda *_: None, cleanup=interrupt
        ),
    )
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        w.load(w.TorchEngine(model), checkpoint, host=host)
    assert ran == ["aa"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_anchor_that_cannot_die_is_refused_before_anything_is_loaded(checkpoint, model):
    class Engine(w.TorchEngine):
        @property
        def anchor(self):
            return {}

    with pytest.raises(errors.EngineError, match="anchor"):
        w.open_session(Engine(model), checkpoint, host=host_of())


@pytest.mark.parametrize("format", [None, 3, ["disk", None], {"disk": 1}])
def test_what_is_no_format_is_named(checkpoint, model, format):
    with pytest.raises(
        errors.FormatUnresolvedError, match="format is 'auto', a plugin's name, or several; got"
    ):
        w.load(w.TorchEngine(model), checkpoint, format, host=host_of())


def test_what_is_no_engine_is_said_to_be_none(checkpoint, model):
    with pytest.raises(errors.EngineError, match="wrap a torch module in TorchEngine"):
        w.load(model, checkpoint, host=host_of())
    with pytest.raises(errors.EngineError, match="TorchEngine is a class: give an engine"):
        w.load(w.TorchEngine, checkpoint, host=host_of())
    with pytest.raises(errors.EngineError, match=r"takes a torch\.nn\.Module"):
        w.TorchEngine("llama")


def test_the_callers_default_device_does_not_matter(checkpoint, model, tensors):
    with torch.device("meta"):
        w.load(w.TorchEngine(model), checkpoint, host=host_of())
    assert torch.equal(model.weight, tensors["weight"])


def test_a_target_without_memory_is_refused(checkpoint):
    from weights_core.checkpoint import find
    from weights_core.disk import ShardSet
    from weights_core.shards import open_shards

    weights = ShardSet(open_shards(find(checkpoint)), provider="disk")
    with pytest.raises(ValueError, match="meta device"):
        list(weights.fill([w.Target("bias", torch.empty(2, device="meta"))]))
    weights.close()


def test_broken_metadata_of_a_stranger_is_passed_over(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "left_over-1.0.dist-info"
    folder.mkdir()
    (folder / "entry_points.txt").write_text("[weights.plugins]\nleft = nowhere:Nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING, logger="weights"):
        assert "left" not in [plugin.name for plugin in installed()]
    assert "metadata is broken" in caplog.text


def test_a_folder_that_is_on_the_path_twice_brings_its_plugins_once(monkeypatch):
    before = installed()
    for folder in list(sys.path):
        monkeypatch.syspath_prepend(folder + "/")
    assert installed() == before


def test_a_stream_that_nobody_finishes_does_not_keep_the_process(tmp_path):
    path = write_checkpoint(tmp_path, {f"t{i}": torch.zeros(1 << 20) for i in range(8)}, shards=4)
    code = f"""
import torch, weights_core as w
model = torch.nn.Module()
for i in range(8):
    model.register_parameter(f"t{{i}}", torch.nn.Parameter(torch.zeros(1 << 20)))
config = {{"parallel_shards": {{"max_host_bytes": 1 << 20}}}}
session = w.open_session(w.TorchEngine(model), {str(path)!r}, "parallel_shards", config)
session.resolve()
reading = session.load().stream()
next(reading)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr


def test_errors_cross_processes(checkpoint):
    import pickle

    error = errors.LoadFailed("lost", mutated=True).stamp(plugin="p", distribution="d 1", hook="h", rank=3)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.mutated, again.rank) == (str(error), True, 3)
    group = errors.CleanupError("cleanup", [ValueError("v")])
    assert str(pickle.loads(pickle.dumps(group))) == str(group)
