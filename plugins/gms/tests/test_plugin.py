# SPDX-License-Identifier: Apache-2.0
"""The plugin in whole loads: what is written, what is read, and what is refused."""

import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

import weights_core as w
from weights_core import memory
from weights_core.errors import (
    ArenaError,
    FormatUnresolvedError,
    IdentityMismatchError,
    LoadError,
    PluginConfigError,
    PublishError,
    RanksDisagreeError,
)
from weights_core.tensors import as_bytes
from weights_core.testing import Group, every_dtype, host_of, random_tensor, write_checkpoint
from weights_core.testing.waiting import until
from weights_gms import client, owner
from weights_gms.client import VaultError
from weights_gms.holding import StaleWeights
from weights_gms.plugin import GmsConfig, GmsPlugin

sys.path.insert(0, str(Path(__file__).parent))
from conftest import brokers_of

sys.path.pop(0)


class Model(nn.Module):
    """Ties, a buffer, an odd shape, and an attribute on a parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((), 2.0))
        self.layers[0].weight.mark = "kept"

    def forward(self, ids):
        x = self.embed(ids) * self.scale
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def model(*, meta=True, seed=1):
    torch.manual_seed(seed)
    if not meta:
        return Model()
    with torch.device("meta"):
        return Model()


@pytest.fixture
def source():
    return model(meta=False, seed=0)


@pytest.fixture
def path(tmp_path, source):
    state = {k: v for k, v in source.state_dict().items() if k != "head.weight"}
    return write_checkpoint(tmp_path / "ckpt", state)


@pytest.fixture
def load(where, path):
    """Load `path` through gms; settings of gms by name."""

    reports = []

    def load(into=None, *, format="gms", checkpoint=path, engine=w.TorchEngine, host=None, **config):
        made = host or host_of(
            config={"gms": {"socket_path": where, "timeout": 10.0, **config}}, gms=GmsPlugin
        )
        into = model() if into is None else into
        report = w.load(engine(into), checkpoint, format, host=made)
        reports.append(report)
        return into, report

    yield load
    for report in reports:
        report.lease.close()  # an error that a test caught keeps the test's models alive


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


def notes(report):
    return "\n".join(report.notes)


def is_shared(tensor):
    """Whether a tensor lies in a memfd of ours, and cannot be written."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            return "memfd:weights" in line and line.split()[1] == "r--s"
    return False


@pytest.mark.parametrize("meta", [(True, True), (False, False), (True, False), (False, True)])
def test_the_second_engine_reads_what_the_first_wrote(load, source, meta):
    first, wrote = load(model(meta=meta[0]))
    second, read = load(model(meta=meta[1]))
    assert (wrote.provider, read.provider) == ("gms", "gms")
    for one in (first, second):
        assert same(one, source)
        assert one.head.weight is one.embed.weight
        assert one.layers[0].weight.mark == "kept"
        assert all(map(is_shared, one.state_dict().values()))
        ids = torch.arange(11)
        assert torch.equal(one(ids), source(ids))
    assert [a.plugin for a in wrote.attempts] == ["disk", "gms"]
    assert [a.plugin for a in read.attempts] == ["gms"]
    assert (wrote.receipts[0].layout, read.receipts) == (w.Layout.SHARDED, ())
    assert read.nbytes == 0
    assert "gms: loaded by disk\ngms: wrote slot weights/cpu/-/main/0of1, generation 1" in notes(wrote)
    assert "gms: read slot weights/cpu/-/main/0of1, generation 1, of the broker at" in notes(read)
    assert "0.0 MB of it copied" in notes(read)
    assert "the weights' digest is xxh3_128:" in notes(read)


def test_what_the_slot_serves_is_told_before_a_load(load, path, where):
    def held(**config):
        settings = {"gms": {"socket_path": where, **config}}
        return w.explain(
            w.TorchEngine(model()), path, "gms", host=host_of(config=settings, gms=GmsPlugin)
        ).held()

    assert held() == 0
    assert not brokers_of(where)
    _, report = load()
    assert held() == report.receipts[0].nbytes > 0
    assert held(tag="another") == held(mode="rw") == held(backend="dynamo") == 0


def test_every_dtype_is_read_as_written(load, tmp_path):
    tensors = {dtype: random_tensor(4, 8, dtype=dtype) for dtype in every_dtype()}
    tensors["empty"] = random_tensor(0, 8, dtype="BF16")
    path = write_checkpoint(tmp_path / "dtype", tensors)

    def module():
        made = nn.Module()
        for name, tensor in tensors.items():
            made.register_buffer(name, torch.empty_like(tensor, device="meta"))
        return made

    for made, _ in [load(module(), checkpoint=path) for _ in range(2)]:
        for name, tensor in tensors.items():
            assert torch.equal(as_bytes(made.get_buffer(name)), as_bytes(tensor))


def test_weights_live_on_when_the_lease_has_ended(load, source):
    _, wrote = load()
    second, read = load()
    wrote.lease.close()
    read.lease.close()
    assert same(second, source)
    again, _ = load()
    assert same(again, source)


def test_the_lease_ends_with_the_model(load, status, where):
    first, _ = load()
    second, report = load()
    assert len(status()["slots"][0]["generations"][0]["leases"]) == 2
    del first, second
    gc.collect()
    until(lambda: not (status() or {}).get("slots"))
    assert report.lease.closed
    until(lambda: not brokers_of(where))


def test_loads_one_after_the_other_leave_nothing_behind(load, where):
    def count():
        gc.collect()
        with open("/proc/self/maps") as maps:
            mapped = sum("memfd:" in line for line in maps)
        return len(os.listdir("/proc/self/fd")), mapped

    load()[1].lease.close()
    before = count()
    keeper = load()
    for _ in range(20):
        _, report = load()
        report.lease.close()
    keeper[1].lease.close()
    del keeper, report, _
    until(lambda: count() == before)


# Modes ------------------------------------------------------------------------------------------------


def test_rw_replaces_and_ro_reads(load, tmp_path, status):
    first, one = load()
    other = model(meta=False, seed=5)
    state = {k: v for k, v in other.state_dict().items() if k != "head.weight"}
    newer = write_checkpoint(tmp_path / "newer", state)
    with pytest.raises(
        IdentityMismatchError, match=r"digest: need .*Use another tag, or mode='rw'"
    ) as caught:
        load(checkpoint=newer)
    assert list(caught.value.fields) == ["digest"]
    with pytest.raises(IdentityMismatchError):
        load(checkpoint=newer, mode="ro")
    second, two = load(checkpoint=newer, mode="rw")
    assert "generation 2" in notes(two)
    third, _ = load(checkpoint=newer, mode="ro")
    assert same(second, other)
    assert same(third, other)
    generations = status()["slots"][0]["generations"]
    assert [(g["number"], g["serving"]) for g in generations] == [(2, True), (1, False)]
    one.lease.close()
    until(lambda: len(status()["slots"][0]["generations"]) == 1)
    beside, _ = load(tag="old")
    assert same(beside, first)


def test_ro_waits_for_a_writer_and_ends_with_an_error(load):
    with pytest.raises(LoadError, match="waited in vain for an engine that loads these weights"):
        load(mode="ro", timeout=0.2)


def test_evict_first_waits_for_the_readers(load):
    _, first = load()
    with pytest.raises(LoadError, match="waited in vain for readers of the slot to give back"):
        load(mode="rw", replace="evict-first", timeout=0.3)
    first.lease.close()
    _, second = load(mode="rw", replace="evict-first")
    assert "wrote slot" in notes(second)


def test_weights_are_kept_for_the_next_engine(load):
    _, first = load(keep=30.0)
    first.lease.close()
    _, second = load()
    assert "read slot" in notes(second)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"quantization": "fp8"}, "quantization"),
        ({"version": "other"}, "engine_version"),
        ({"model": "Other"}, "model"),
        ({"dtype": "F16"}, "dtype"),
    ],
)
def test_same_shapes_and_another_identity_are_refused_naming_the_field(load, change, field):
    class Other(w.TorchEngine):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            self._info = attrs.evolve(self._info, **change)

    kept = load()
    with pytest.raises(IdentityMismatchError) as caught:
        load(engine=Other)
    assert list(caught.value.fields) == [field]
    assert kept


def test_drafts_and_components_have_slots_of_their_own(load, status):
    def draft(m):
        return w.TorchEngine(m, role="draft", component="vae/2")

    kept = load(), load(engine=draft), load(engine=draft)
    assert [slot["slot"] for slot in status()["slots"]] == [
        "weights/cpu/-/main/0of1",
        "weights/cpu/vae%2F2/draft/0of1",
    ]
    assert "read slot" in notes(kept[2][1])


def test_a_digest_that_is_given_needs_no_files(load, source, tmp_path):
    kept = load(digest="sha256:" + "0" * 64)
    second, read = load(digest="sha256:" + "0" * 64, checkpoint=tmp_path / "nowhere", mode="ro")
    assert same(second, source)
    assert "given by the settings" in notes(read)
    assert kept


# Engines ------------------------------------------------------------------------------------------------


def test_an_engine_that_changes_its_weights_later_is_refused_at_plan_time(load, where):
    def merging(m):
        return w.TorchEngine(m, mutates_after_load="merges adapters")

    with pytest.raises(
        FormatUnresolvedError, match=r"changes its weights after the load \(merges adapters\)"
    ):
        load(engine=merging)
    assert not os.path.exists(where)


def test_an_engine_that_shares_nothing_is_refused(load):
    class Hoarding(w.TorchEngine):
        @property
        def info(self):
            return attrs.evolve(super().info, shareable={})

    with pytest.raises(FormatUnresolvedError, match="shares nothing and accepts checkpoint, sharded"):
        load(engine=Hoarding)


def test_not_named_not_used(load, path, where):
    into = model()
    report = w.load(w.TorchEngine(into), path, host=host_of(gms=GmsPlugin))
    assert report.provider == "disk"
    decision = next(d for d in report.plan.decisions if d.plugin == "gms")
    assert (decision.roles, "only when the format names it" in decision.reason) == (frozenset(), True)


class Scaling(w.TorchEngine):
    """Its post-load doubles one layer in place."""

    @property
    def info(self):
        return attrs.evolve(super().info, post_load_writes="scales the first layer")

    def post_load(self, layout):
        self.model.layers[0].weight.data.mul_(2)


def test_post_load_in_place_gets_copies_of_its_own(load, source):
    engines = [load(engine=Scaling) for _ in range(3)]
    for made, report in engines:
        assert torch.equal(made.layers[0].weight, 2 * source.layers[0].weight)
        assert torch.equal(made.layers[1].weight, source.layers[1].weight)
        assert "copied for this engine" in notes(report)


def test_how_much_was_copied_is_said(load, tmp_path):
    big = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))
    path = write_checkpoint(tmp_path / "big", big.state_dict())

    class First(Scaling):
        def post_load(self, layout):
            self.model[0].weight.data.mul_(2)

    def fresh():
        with torch.device("meta"):
            return nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))

    loads = [load(fresh(), checkpoint=path, engine=First) for _ in range(2)]
    for made, report in loads:
        assert torch.equal(made[0].weight, 2 * big[0].weight)
        assert re.search(r"4.2 MB shared, 1.[01] MB of it copied for this engine", notes(report))


class Final(w.TorchEngine):
    """Its FINAL weights are shared: transposed layers and a derived attribute."""

    transforms = 0

    @property
    def info(self):
        return attrs.evolve(
            super().info,
            accepts={w.Layout.CHECKPOINT, w.Layout.FINAL},
            shareable={w.Layout.FINAL: "a test"},
        )

    def post_load(self, layout):
        for layer in self.model.layers:
            if layout is not w.Layout.FINAL:
                type(self).transforms += 1
                layer.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
            layer.derived = layer.weight.sum()


def test_final_weights_are_shared_after_the_transform_and_not_transformed_again(load, source):
    Final.transforms = 0
    (first, wrote), (second, _) = load(engine=Final), load(engine=Final)
    assert Final.transforms == 3
    assert wrote.receipts[0].layout is w.Layout.FINAL
    regions = 4 + 2 * 3  # of 256 bytes each: the transforms' originals are not among them
    assert wrote.receipts[0].nbytes <= regions * 512
    for made in (first, second):
        assert all(map(is_shared, made.state_dict().values()))
        for layer, original in zip(made.layers, source.layers, strict=True):
            assert torch.equal(layer.weight, original.weight.t())
            assert torch.equal(layer.derived, layer.weight.sum())


def test_a_write_to_shared_weights_is_trapped(load):
    for made, _ in (load(), load()):
        child = os.fork()
        if child == 0:
            import faulthandler

            faulthandler.disable()
            with torch.no_grad():
                made.layers[1].weight.zero_()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


# Sleep ------------------------------------------------------------------------------------------------


def test_sleep_gives_the_memory_up_and_wake_maps_it_at_the_same_addresses(load, source, status):
    (first, wrote), (second, read) = load(), load()
    for made, report in ((first, wrote), (second, read)):
        addresses = [p.data_ptr() for p in made.parameters()]
        owned = report.lease.owned
        owned.sleep()
        owned.sleep()
        assert owned.holding.asleep
        until(lambda: len(status()["slots"][0]["generations"][0]["leases"]) == 1)
        owned.wake()
        owned.wake()
        assert [p.data_ptr() for p in made.parameters()] == addresses
        assert all(map(is_shared, made.state_dict().values()))
        assert same(made, source)
    wrote.lease.close()
    assert wrote.lease.owned is None
    assert same(second, source)


def test_weights_that_were_replaced_while_asleep_are_stale(load, tmp_path):
    _, report = load()
    kept = load()
    owned = report.lease.owned
    owned.sleep()
    replaced = load(mode="rw")
    with pytest.raises(StaleWeights, match=r"generation 1 of slot .* was replaced by 2: load again"):
        owned.wake()
    state = {k: v for k, v in model(meta=False, seed=5).state_dict().items() if k != "head.weight"}
    other = load(mode="rw", checkpoint=write_checkpoint(tmp_path / "newer", state))
    with pytest.raises(StaleWeights, match="has other weights by now"):
        owned.wake()
    assert kept
    assert replaced
    assert other


def test_weights_that_are_gone_when_it_wakes(load, where):
    _, report = load()
    report.lease.owned.sleep()
    until(lambda: not brokers_of(where))
    with pytest.raises(VaultError, match="waited in vain"):
        report.lease.owned.wake(timeout=0.2)
    report.lease.close()


def test_copies_of_its_own_are_not_put_to_sleep(load):
    _, report = load(engine=Scaling)
    with pytest.raises(VaultError, match="which sleeping would lose"):
        report.lease.owned.sleep()


def test_what_was_not_shared_has_nothing_to_give_up(load):
    class Copying(w.TorchEngine):
        def tensors(self, layout):
            return {n: t.clone() for n, t in super().tensors(layout).items()}

    _, report = load(engine=Copying)
    with pytest.raises(VaultError, match="nothing was shared"):
        report.lease.owned.sleep()


# Failures ---------------------------------------------------------------------------------------------


def test_a_load_that_fails_half_way_gives_up_its_grant(load, status, source):
    class Failing(w.TorchEngine):
        def apply(self, weights):
            next(iter(weights.stream()))
            raise RuntimeError("no more")

    with pytest.raises(LoadError, match="no more"):
        load(engine=Failing)
    until(lambda: not (status() or {}).get("slots"))
    made, report = load()
    assert same(made, source)
    assert "generation 1" in notes(report)


def test_an_engine_that_is_not_filled_is_not_offered(load, status):
    class Forgetful(w.TorchEngine):
        def tensors(self, layout):
            return {n: t for n, t in super().tensors(layout).items() if n != "scale"}

    made, report = load(engine=Forgetful)
    assert "gms did not publish: refusing to share a model that is not filled: 'scale' is missing" in notes(
        report
    )
    assert made.scale == 2
    until(lambda: not (status() or {}).get("slots"))
    with pytest.raises(PublishError, match="must publish, and failed: refusing to share"):
        load(engine=Forgetful, mode="rw")


def test_an_engine_that_hands_out_copies_is_not_offered(load, status):
    class Copying(w.TorchEngine):
        def tensors(self, layout):
            return {n: t.clone() for n, t in super().tensors(layout).items()}

    _, report = load(engine=Copying)
    assert "does the engine hand out copies?" in notes(report)
    until(lambda: not (status() or {}).get("slots"))


def test_no_memory_is_a_clear_error_and_the_old_generation_is_intact(load, monkeypatch, status, source):
    first, _ = load()
    monkeypatch.setattr(memory, "memory_available", lambda: 1000)
    into = model()
    with pytest.raises(ArenaError, match="GB of host memory are needed"):
        load(into, mode="rw")
    assert all(p.is_meta for p in into.parameters())
    assert same(first, source)
    assert not status()["slots"][0]["writer"]
    second, _ = load()
    assert same(second, source)


LIMITED = """
import resource, sys
import torch
from torch import nn
import weights_core as w
with torch.device("meta"):
    model = nn.Linear(1000, 1000, bias=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    w.load(w.TorchEngine(model), sys.argv[1], "gms", {"gms": {"socket_path": sys.argv[2], "mode": "rw"}})
except w.WeightsError as error:
    print(type(error).__name__, error, model.weight.is_meta)
"""


def test_a_limit_on_file_sizes_is_a_clear_error(load, tmp_path, where):
    path = write_checkpoint(tmp_path / "c", {"weight": torch.zeros(1000, 1000)})

    def fresh():
        with torch.device("meta"):
            return nn.Linear(1000, 1000, bias=False)

    kept = load(fresh(), checkpoint=path)
    limited = [sys.executable, "-c", LIMITED, path, where]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.stdout.startswith("ArenaError 4,000,000 bytes of shared memory cannot be had"), done
    assert "ulimit -f" in done.stdout
    assert done.stdout.endswith("True\n")
    assert "read slot weights/cpu/-/main/0of1, generation 1" in notes(load(fresh(), checkpoint=path)[1])
    assert kept


def test_other_weights_than_were_asked_for_are_refused(load, monkeypatch):
    kept = load()
    real = w.Identity.as_dict
    monkeypatch.setattr(w.Identity, "as_dict", lambda identity: real(identity) | {"dtype": "F64"})
    monkeypatch.setattr(owner, "open_slot", lambda at, ask, real=owner.open_slot: real(at, honest(ask)))

    def honest(ask):
        return attrs.evolve(ask, members=[(s, {**i, "dtype": "F32"}) for s, i in ask.members])

    with pytest.raises(LoadError, match="other weights than were asked for"):
        load()
    assert kept


def test_a_broken_manifest_is_refused(load, monkeypatch):
    kept = load()
    monkeypatch.setattr(owner, "read_manifest", lambda grant: b"{}")
    with pytest.raises(ArenaError, match="no manifest of an arena"):
        load()
    assert kept


def test_what_is_below_may_fail(load, tmp_path, status):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(w.WeightsError, match="holds no weights"):
        load(checkpoint=empty)
    assert status() is None


def test_memory_in_the_set_below_is_moved(load, source, where):
    class Sharded(w.WeightSetWrapper):
        layout = w.Layout.SHARDED

    class Presliced:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(
                roles={w.Role.SOURCE}, layouts={w.Layout.SHARDED}, reason="x", fit=w.Fit.BEST
            )

        @w.hookimpl
        def load_weights(self, source):
            made = Sharded(source.open())
            made.layout = w.Layout.SHARDED
            return made

    def host():
        return host_of(config={"gms": {"socket_path": where}}, gms=GmsPlugin, pre=Presliced)

    first, wrote = load(format=["gms", "pre"], host=host())
    second, _ = load(format=["gms", "pre"], host=host())
    assert [a.plugin for a in wrote.attempts] == ["disk", "pre", "gms"]
    for made in (first, second):
        assert same(made, source)
        assert all(map(is_shared, made.state_dict().values()))


# Ranks ------------------------------------------------------------------------------------------------


def rank_load(where, path, group, rank, host=None, **config):
    into = model()
    topology = w.Topology.tensor_parallel(group.size, rank)
    engine = w.TorchEngine(into, topology=topology, gather=group.gather(rank))
    made = host_of(config={"gms": {"socket_path": where, "timeout": 10.0, **config}}, gms=GmsPlugin)
    return into, w.load(engine, path, "gms", host=made, timeout=10.0)


def test_two_tensor_parallel_engines(where, path, source, status):
    groups = Group(2), Group(2)
    futures = []
    import threading

    def engine(group):
        futures.append(group.run(lambda rank: rank_load(where, path, group, rank)))

    threads = [threading.Thread(target=engine, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loads = [future.result() for engine_futures in futures for future in engine_futures]
    assert all(same(made, source) for made, _ in loads)
    assert sorted("wrote" in notes(report) for _, report in loads) == [False, False, True, True]
    assert [s["slot"] for s in status()["slots"]] == [f"weights/cpu/-/main/{r}of2" for r in (0, 1)]


def test_one_rank_that_cannot_ask_fails_them_all_at_once(where, path, tmp_path):
    group = Group(2)
    started = time.monotonic()
    futures = group.run(
        lambda rank: rank_load(where, path if rank == 0 else tmp_path / "nowhere", group, rank)
    )
    errors = [future.exception() for future in futures]
    assert isinstance(errors[0], LoadError | RanksDisagreeError)
    assert "rank 1 cannot ask for its slot" in str(errors[0])
    assert "no such file or folder" in str(errors[1])
    assert time.monotonic() - started < 5


# Settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "wo"}, "mode"),
        ({"tag": ""}, "a tag is"),
        ({"tag": "a/b"}, "a tag is"),
        ({"timeout": -1.0}, "timeout"),
        ({"keep": -1.0}, "keep"),
        ({"replace": "maybe"}, "replace"),
        ({"digest": "x"}, "is no digest"),
        ({"backend": "other"}, "backend"),
        ({"trusted_uids": 1}, "trusted_uids"),
        ({"sockt": "x"}, "did you mean"),
    ],
)
def test_wrong_settings_are_named(load, settings, says):
    with pytest.raises(PluginConfigError, match=says):
        load(**settings)


def test_where_the_broker_is_comes_from_the_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert owner.endpoint_of(GmsConfig()).socket == f"{tmp_path}/weights-gms/broker.sock"
    given = owner.endpoint_of(GmsConfig(socket_path="x/y.sock", start_broker=False, trusted_uids=(7,)))
    assert given == client.Endpoint(os.path.abspath("x/y.sock"), False, frozenset({7, os.geteuid()}))


def test_memory_of_other_devices_is_refused(load):
    class Elsewhere(w.TorchEngine):
        @property
        def info(self):
            return attrs.evolve(super().info, device="xpu:0")

    with pytest.raises(w.WeightsError, match="weights on xpu:0 cannot be shared"):
        load(engine=Elsewhere)


def test_fresh_processes_share(where, tmp_path):
    code = """
import json, sys, torch
import weights_core as w
with torch.device("meta"):
    model = torch.nn.Linear(3, 3)
report = w.load(w.TorchEngine(model), sys.argv[1], "gms", {"gms": {"socket_path": sys.argv[2]}})
print(json.dumps({"weight": model.weight.tolist(), "notes": report.notes}), flush=True)
sys.stdin.read()
"""
    source = nn.Linear(3, 3)
    path = write_checkpoint(tmp_path / "linear", source.state_dict())
    command = [sys.executable, "-c", code, path, where]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = [json.loads(process.stdout.readline()) for process in running]
    for process in running:
        process.communicate(timeout=30)
    assert [t["weight"] for t in told] == [source.weight.tolist()] * 2
    assert sorted("wrote" in " ".join(t["notes"]) for t in told) == [False, True]


def test_it_says_what_it_does_in_the_log(load, caplog):
    with caplog.at_level(logging.INFO, "weights.gms"):
        kept = load()
    assert "digest xxh3_128:" in caplog.text
    assert "offered 0.0 MB as slot weights/cpu/-/main/0of1, generation 1" in caplog.text
    assert kept


@pytest.mark.parametrize("formats", [["gms"], ["gms", "parallel_shards"]])
def test_memory_goes_with_the_model_and_not_with_the_next_garbage_collection(path, where, formats):
    def mapped():
        return sum("memfd:weights" in line for line in Path("/proc/self/maps").read_text().splitlines())

    made = [model(), model()]
    gc.collect()  # torch's initialisation on meta leaves frames behind
    before = mapped()
    gc.disable()
    try:
        reports = [w.load(w.TorchEngine(one), path, formats, {"gms": {"socket_path": where}}) for one in made]
        assert mapped() - before == 2
        for report in reports:
            report.lease.close()
        assert mapped() - before == 2  # the models are still there
        made.clear()
        assert mapped() == before
    finally:
        gc.enable()
