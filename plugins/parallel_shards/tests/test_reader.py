# SPDX-License-Identifier: Apache-2.0

import contextlib
import functools
import gc
import os
import signal
import threading
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file

from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.errors import CheckpointError, WeightsError
from weights_core.shards import SafetensorsShard, open_shards
from weights_core.tensors import as_bytes, nbytes
from weights_core.testing import every_dtype, random_tensor, write_checkpoint
from weights_core.weightset import Target
from weights_parallel_shards.reader import ParallelSet

PATIENCE = 20
"""Seconds after which a test gives up on what should have happened at once."""

KB = 256
"""Elements of an F32 tensor of one kilobyte."""


def assorted():
    tensors = {f"dtype.{d}": random_tensor(4, 6, dtype=d, seed=i) for i, d in enumerate(every_dtype())}
    tensors["scalar"] = random_tensor(dtype="F32")
    tensors["empty"] = random_tensor(3, 0, 2)
    tensors["large"] = random_tensor(300, 100)
    return tensors


def kilobytes(count, size=1):
    """`count` tensors of `size` kilobytes, t000 and on."""
    return {f"t{i:03d}": random_tensor(size * KB, seed=i) for i in range(count)}


def oracle(folder):
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            found.update(load_file(file))
        elif file.suffix == ".bin":
            found.update(torch.load(file, weights_only=True))
    return found


def parallel(folder, *, shard=None, threads=4, max_host_bytes=1 << 20):
    """A set over the files of a folder, each opened by `shard` if it is given."""
    found = find(folder)
    shards = [shard(path) for path in found.files] if shard else open_shards(found)
    return ParallelSet(shards, threads=threads, max_host_bytes=max_host_bytes)


def assert_same(have, want):
    assert have.dtype == want.dtype
    assert have.shape == want.shape
    assert torch.equal(as_bytes(have), as_bytes(want))


def assert_equal(have, want):
    assert have.keys() == want.keys()
    for name in want:
        assert_same(have[name], want[name])


def threads():
    return set(threading.enumerate())


def open_files(folder):
    paths = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            paths.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [path for path in paths if path.startswith(str(folder))]


def eventually(true):
    end = time.monotonic() + 5
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(tmp_path):
    before = threads()
    yield
    assert threads() <= before
    assert open_files(tmp_path) == []


# The bytes --------------------------------------------------------------------------------------

CUTS = [("safetensors", 2, 2), ("safetensors", 3, 8), ("safetensors", 7, 4), ("safetensors", 5, 1)]
CUTS += [("bin", 2, 1), ("bin", 4, 3), ("bin", 7, 8)]


@pytest.fixture(params=CUTS, ids=lambda cut: f"{cut[0]}-{cut[1]}shards-{cut[2]}threads")
def cut(request, tmp_path):
    kind, shards, count = request.param
    folder = write_checkpoint(tmp_path / "checkpoint", assorted(), shards=shards, kind=kind)
    with contextlib.closing(parallel(folder, threads=count)) as weights:
        yield weights, oracle(folder)


def test_stream_yields_every_tensor_once(cut):
    weights, want = cut
    streamed = list(weights.stream())
    assert len(streamed) == len(want)
    assert_equal(dict(streamed), want)
    assert weights.bytes_read == sum(nbytes(t) for t in want.values())


def test_fill_fills_every_target(cut):
    weights, want = cut
    targets = [Target(name, torch.zeros_like(t)) for name, t in want.items()]
    done = list(weights.fill(targets))
    assert sorted(map(id, done)) == sorted(map(id, targets))
    assert_equal({t.name: t.out for t in targets}, want)
    assert weights.bytes_read == sum(nbytes(t) for t in want.values())


def test_fill_fills_slices_and_parts_of_one_tensor(cut):
    weights, want = cut
    rows = [Target("large", torch.zeros(75, 100), (slice(i, i + 75),)) for i in range(0, 300, 75)]
    columns = Target("large", torch.zeros(300, 10), (slice(None), slice(20, 30)))
    strided = torch.zeros(100, 300).t()
    list(weights.fill([*rows, columns, Target("large", strided)]))
    assert_same(torch.cat([t.out for t in rows]), want["large"])
    assert_same(columns.out, want["large"][:, 20:30].contiguous())
    assert_same(strided.contiguous(), want["large"])


def test_each_tensor_and_each_slice_can_be_had_alone(cut):
    weights, want = cut
    assert_equal({name: weights[name] for name in weights}, want)
    assert_same(
        weights.read("large", (slice(10, 20), slice(5, 9))).contiguous(),
        want["large"][10:20, 5:9].contiguous(),
    )
    assert_same(weights.lazy()["large"][3:5], want["large"][3:5])


def test_same_tensors_in_the_same_order_as_the_disk_source(cut):
    weights, _ = cut
    with contextlib.closing(ShardSet(weights.shards, provider="disk")) as plain:
        assert list(weights) == list(plain)
        assert dict(weights.metas) == dict(plain.metas)
        assert_equal(dict(weights.stream()), dict(plain.stream()))
        assert weights.layout is plain.layout
        assert weights.bytes_read == plain.bytes_read


@pytest.mark.parametrize("names", [[], ["t004"], ["t009", "t000", "t003"], ["t001", "t005"]])
def test_stream_of_some_names_reads_only_those(tmp_path, names):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=4)
    with contextlib.closing(parallel(folder)) as weights:
        streamed = dict(weights.stream(names))
        assert_equal(streamed, {name: oracle(folder)[name] for name in names})
        assert weights.bytes_read == 1024 * len(names)


def test_fill_of_nothing_reads_nothing(tmp_path):
    with contextlib.closing(parallel(write_checkpoint(tmp_path, kilobytes(4), shards=2))) as weights:
        assert list(weights.fill([])) == []
        assert weights.bytes_read == 0


def test_nothing_is_read_and_no_thread_started_before_the_first_is_asked_for(tmp_path):
    with contextlib.closing(parallel(write_checkpoint(tmp_path, kilobytes(4), shards=2))) as weights:
        before = threads()
        streamed = weights.stream()
        filled = weights.fill([Target("t000", torch.zeros(KB))])
        assert threads() == before
        assert weights.bytes_read == 0
        del streamed, filled


def test_one_set_can_be_streamed_several_times_and_in_turns(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(9), shards=3)
    with contextlib.closing(parallel(folder, threads=2, max_host_bytes=1024)) as weights:
        pairs = list(zip(weights.stream(), weights.stream(), strict=True))
        assert_equal(dict(first for first, _ in pairs), oracle(folder))
        assert_equal(dict(second for _, second in pairs), oracle(folder))
        assert_equal(dict(weights.stream()), oracle(folder))


def test_each_file_is_read_in_its_own_order(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(30), shards=3)
    with contextlib.closing(parallel(folder, threads=3)) as weights:
        order = [name for name, _ in weights.stream()]
        filled = [t.name for t in weights.fill(Target(n, torch.zeros(KB)) for n in reversed(list(weights)))]
        for shard in weights.shards:
            assert [name for name in order if name in shard.metas] == list(shard.metas)
            assert [name for name in filled if name in shard.metas] == list(shard.metas)


def test_a_target_that_does_not_fit_is_the_consumers_error(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(4), shards=2)
    with contextlib.closing(parallel(folder)) as weights:
        wrong = Target("t001", torch.zeros(KB, dtype=torch.int32))
        with pytest.raises(ValueError, match="t001"):
            list(weights.fill([Target("t000", torch.zeros(KB)), wrong]))


# Concurrency ------------------------------------------------------------------------------------


class Meeting:
    """Counts the reads under way; the first of each file wait for each other."""

    def __init__(self, parties):
        self.barrier = threading.Barrier(parties)
        self.lock = threading.Lock()
        self.under_way = 0
        self.most = 0
        self.left = parties

    @contextlib.contextmanager
    def read(self):
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            meets = self.left > 0
            self.left -= 1
        if meets:
            self.barrier.wait(PATIENCE)
        yield
        with self.lock:
            self.under_way -= 1


class MeetingShard(SafetensorsShard):
    def __init__(self, meeting, path):
        super().__init__(path)
        self.meeting = meeting

    def read(self, name, slices=None):
        with self.meeting.read():
            return super().read(name, slices)

    def read_into(self, name, out, slices=None):
        with self.meeting.read():
            super().read_into(name, out, slices)


@pytest.mark.parametrize("how", ["stream", "fill"])
@pytest.mark.parametrize(("count", "shards"), [(2, 2), (2, 5), (3, 7), (8, 3)])
def test_as_many_files_as_threads_are_read_at_a_time_and_never_more(tmp_path, count, shards, how):
    folder = write_checkpoint(tmp_path, kilobytes(28), shards=shards)
    meeting = Meeting(min(count, shards))
    make = functools.partial(MeetingShard, meeting)
    with contextlib.closing(parallel(folder, shard=make, threads=count)) as weights:
        if how == "stream":
            have = dict(weights.stream())
        else:
            targets = [Target(name, torch.zeros(KB)) for name in weights]
            have = {target.name: target.out for target in weights.fill(targets)}
        assert_equal(have, oracle(folder))
    assert meeting.most == min(count, shards)


def test_one_thread_reads_one_file_at_a_time(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=3)
    meeting = Meeting(1)
    with contextlib.closing(
        parallel(folder, shard=functools.partial(MeetingShard, meeting), threads=1)
    ) as weights:
        assert_equal(dict(weights.stream()), oracle(folder))
    assert meeting.most == 1


# Bounded memory ---------------------------------------------------------------------------------


class Ledger:
    """Bytes read, or being read, that the consumer has not received yet."""

    def __init__(self, limit):
        self.limit = limit
        self.lock = threading.Lock()
        self.held = 0
        self.most = 0
        self.company = []
        self.full = threading.Event()
        self.over = threading.Event()
        self.tensors = {}

    def begin(self, count):
        with self.lock:
            if count > self.limit:
                self.company.append(self.held)
            self.held += count
            self.most = max(self.most, self.held)
            if self.held >= self.limit:
                self.full.set()
            if self.held > self.limit:
                self.over.set()

    def received(self, tensor):
        with self.lock:
            self.held -= nbytes(tensor)

    def alive(self):
        return {name for name, ref in self.tensors.items() if ref() is not None}


class LedgerShard(SafetensorsShard):
    def __init__(self, ledger, path):
        super().__init__(path)
        self.ledger = ledger

    def read(self, name, slices=None):
        self.ledger.begin(self.metas[name].nbytes)
        tensor = super().read(name, slices)
        self.ledger.tensors[name] = weakref.ref(tensor)
        return tensor


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("limit_kb", [1, 2, 5])
def test_readers_keep_ahead_of_a_slow_consumer_up_to_the_limit_and_no_further(tmp_path, limit_kb, count):
    folder = write_checkpoint(tmp_path, kilobytes(24), shards=4)
    ledger = Ledger(limit_kb * 1024)
    weights = parallel(
        folder, shard=functools.partial(LedgerShard, ledger), threads=count, max_host_bytes=ledger.limit
    )
    with contextlib.closing(weights):
        stream = weights.stream()
        have = dict([next(stream)])
        ledger.received(*have.values())
        # What the consumer has in hand counts until it comes back for more.
        if limit_kb > 1:
            assert eventually(lambda: ledger.held == ledger.limit - 1024)
        assert not ledger.over.wait(0.1)
        for name, tensor in stream:
            ledger.received(tensor)
            have[name] = tensor
    assert_equal(have, oracle(folder))
    assert ledger.most <= ledger.limit


def test_a_tensor_larger_than_the_limit_is_read_alone(tmp_path):
    tensors = {**kilobytes(8), "a_big": random_tensor(9 * KB), "b_big": random_tensor(7 * KB)}
    folder = write_checkpoint(tmp_path, tensors, shards=3)
    ledger = Ledger(2 * 1024)
    weights = parallel(
        folder, shard=functools.partial(LedgerShard, ledger), threads=3, max_host_bytes=ledger.limit
    )
    with contextlib.closing(weights):
        have = {}
        for name, tensor in weights.stream():
            ledger.received(tensor)
            have[name] = tensor
    assert_equal(have, tensors)
    assert ledger.company == [0, 0]


@pytest.mark.parametrize("limit", [1, 1024, 3000])
@pytest.mark.parametrize("count", [1, 3])
def test_a_consumer_that_keeps_every_tensor_is_not_blocked(tmp_path, limit, count):
    folder = write_checkpoint(tmp_path, {**kilobytes(20), **assorted()}, shards=5)
    with contextlib.closing(parallel(folder, threads=count, max_host_bytes=limit)) as weights:
        assert_equal(dict(list(weights.stream())), oracle(folder))


def test_a_tiny_window_has_one_tensor_under_way_at_a_time(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=4)
    ledger = Ledger(1)
    weights = parallel(folder, shard=functools.partial(LedgerShard, ledger), threads=4, max_host_bytes=1)
    with contextlib.closing(weights):
        for _, tensor in weights.stream():
            ledger.received(tensor)
    assert ledger.most == 1024
    assert ledger.company == [0] * 12


def test_tensors_that_the_consumer_dropped_are_freed_while_it_goes_on(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=4)
    ledger = Ledger(1)
    weights = parallel(folder, shard=functools.partial(LedgerShard, ledger), threads=4, max_host_bytes=1)
    with contextlib.closing(weights):
        stream = weights.stream()
        for _ in range(12):
            name, tensor = next(stream)
            assert eventually(lambda name=name: ledger.alive() == {name})
            del tensor


def test_what_was_read_ahead_is_freed_when_the_stream_is_abandoned(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=4)
    ledger = Ledger(6 * 1024)
    weights = parallel(
        folder, shard=functools.partial(LedgerShard, ledger), threads=4, max_host_bytes=ledger.limit
    )
    with contextlib.closing(weights):
        stream = weights.stream()
        next(stream)
        assert ledger.full.wait(PATIENCE)
        stream.close()
        gc.collect()
        assert ledger.alive() == set()


def test_a_finished_fill_keeps_no_target_alive(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(4), shards=2)
    with contextlib.closing(parallel(folder)) as weights:
        outs = [torch.zeros(KB) for _ in range(4)]
        alive = [weakref.ref(out) for out in outs]
        list(weights.fill([Target(name, outs.pop()) for name in weights]))
        gc.collect()
        assert [ref() for ref in alive] == [None] * 4


# Failures ---------------------------------------------------------------------------------------


class BreakingShard(SafetensorsShard):
    """The first file fails at its tensor number `good`; after that, the others read slowly."""

    def __init__(self, state, path):
        super().__init__(path)
        self.state = state
        self.breaks = "00001-of" in path.name

    def check(self, name):
        if not self.breaks:
            assert self.state["failed"].wait(PATIENCE)
            with self.state["lock"]:
                self.state["after"].append(name)
            time.sleep(0.01)
        elif list(self.metas).index(name) == self.state["good"]:
            self.state["failed"].set()
            raise self.state["error"]

    def read(self, name, slices=None):
        self.check(name)
        return super().read(name, slices)

    def read_into(self, name, out, slices=None):
        self.check(name)
        super().read_into(name, out, slices)


def breaking(good, error):
    return {"failed": threading.Event(), "lock": threading.Lock(), "after": [], "good": good, "error": error}


def consume(weights, how):
    if how == "stream":
        return [name for name, _ in weights.stream()]
    return [t.name for t in weights.fill([Target(name, torch.zeros(KB)) for name in weights])]


@pytest.mark.parametrize("how", ["stream", "fill"])
@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("kind", [RuntimeError, OSError, MemoryError])
def test_a_failing_file_is_named_its_cause_chained_and_its_siblings_stop(tmp_path, how, good, kind):
    folder = write_checkpoint(tmp_path, kilobytes(600), shards=3)
    error = kind("broken cable")
    state = breaking(good, error)
    before = threads()
    with contextlib.closing(
        parallel(folder, shard=functools.partial(BreakingShard, state), threads=3)
    ) as weights:
        with pytest.raises(CheckpointError, match="broken cable") as caught:
            consume(weights, how)
        assert threads() == before
        assert caught.value.file == folder / "model-00001-of-00003.safetensors"
        assert caught.value.__cause__ is error
        reads = len(state["after"])
        assert reads < 200
    assert len(state["after"]) == reads


def test_a_checkpoint_error_of_a_file_is_raised_as_it_is(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(6), shards=3)
    error = CheckpointError("torn", file=folder, tensor="t000")
    state = breaking(0, error)
    with contextlib.closing(
        parallel(folder, shard=functools.partial(BreakingShard, state), threads=3)
    ) as weights:
        with pytest.raises(CheckpointError) as caught:
            consume(weights, "stream")
        assert caught.value is error


@pytest.mark.parametrize("how", ["stream", "fill"])
def test_a_file_truncated_after_opening_is_an_error_that_names_it(tmp_path, how):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=3)
    with contextlib.closing(parallel(folder)) as weights:
        file = folder / "model-00002-of-00003.safetensors"
        os.truncate(file, file.stat().st_size - 100)
        with pytest.raises(CheckpointError, match=r"became shorter|was changed") as caught:
            consume(weights, how)
        assert caught.value.file == file
        assert caught.value.tensor in weights


@pytest.mark.parametrize("how", ["stream", "fill"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_that_is_changed_after_it_was_opened_is_found(tmp_path, how, kind):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=3, kind=kind)
    with contextlib.closing(parallel(folder)) as weights:
        if how == "stream":
            running = weights.stream()
        else:
            running = weights.fill([Target(name, torch.zeros(KB)) for name in weights])
        file = sorted(folder.glob(f"*.{kind}"))[1]
        os.utime(file, ns=(1, 1))
        with pytest.raises(CheckpointError, match="was changed while it was read") as caught:
            list(running)
        assert caught.value.file == file


def running_stream(tmp_path, **options):
    """A set and its stream, of which the first tensor was consumed while the rest waits for room."""
    folder = write_checkpoint(tmp_path, kilobytes(40), shards=4)
    weights = parallel(folder, max_host_bytes=3 * 1024, **options)
    stream = weights.stream()
    next(stream)
    return weights, stream


def test_abandoning_a_stream_joins_its_threads(tmp_path):
    before = threads()
    weights, stream = running_stream(tmp_path)
    assert threads() > before
    del stream
    gc.collect()
    assert threads() == before
    assert weights.bytes_read < 40 * 1024
    weights.close()
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_error_thrown_into_a_stream_joins_its_threads(tmp_path, kind):
    before = threads()
    weights, stream = running_stream(tmp_path)
    with pytest.raises(kind):
        stream.throw(kind())
    assert threads() == before
    weights.close()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["stream", "fill"])
def test_an_error_in_the_consumer_joins_the_threads(tmp_path, kind, how):
    folder = write_checkpoint(tmp_path, kilobytes(40), shards=4)
    before = threads()
    with contextlib.closing(parallel(folder, max_host_bytes=3 * 1024)) as weights:

        def consumer():
            targets = [Target(name, torch.zeros(KB)) for name in weights]
            for _ in weights.stream() if how == "stream" else weights.fill(targets):
                raise kind("enough")

        with pytest.raises(kind):
            consumer()
        assert threads() == before


class InterruptingShard(SafetensorsShard):
    """Interrupts the main thread, as Ctrl-C does, while it waits for this shard's second tensor."""

    def read(self, name, slices=None):
        if name == "t004":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return super().read(name, slices)


def test_ctrl_c_while_waiting_for_a_tensor_joins_the_threads(tmp_path):
    assert threading.current_thread() is threading.main_thread()
    folder = write_checkpoint(tmp_path, kilobytes(40), shards=4)
    before = threads()
    with contextlib.closing(parallel(folder, shard=InterruptingShard, max_host_bytes=1)) as weights:
        with pytest.raises(KeyboardInterrupt):
            list(weights.stream())
        assert threads() == before
        assert weights.bytes_read < 40 * 1024


def test_closing_the_set_during_a_stream_joins_the_threads_and_closes_the_files(tmp_path):
    before = threads()
    weights, stream = running_stream(tmp_path)
    assert len(open_files(tmp_path)) == 4
    weights.close()
    assert threads() == before
    assert open_files(tmp_path) == []
    weights.close()
    stream.close()


def test_a_stream_whose_set_was_closed_does_not_end_as_if_it_were_complete(tmp_path):
    weights, stream = running_stream(tmp_path)
    weights.close()
    with pytest.raises(WeightsError):
        list(stream)


def test_a_closed_set_does_not_read_from_a_file_that_has_its_old_descriptor(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(4), shards=2)
    decoy = tmp_path / "decoy"
    decoy.write_bytes(bytes(1 << 16))
    weights = parallel(folder)
    weights.close()
    with contextlib.ExitStack() as files:
        for _ in range(8):  # these take the numbers that were just given back
            files.enter_context(decoy.open("rb"))
        with pytest.raises(WeightsError):
            weights.read("t000")
        with pytest.raises(WeightsError):
            list(weights.stream())


def test_closing_from_another_thread_ends_a_consumer_that_waits(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(8), shards=4)
    reading, closed = threading.Event(), threading.Event()

    class Stuck(SafetensorsShard):
        def read(self, name, slices=None):
            reading.set()
            assert closing.wait(PATIENCE)
            return super().read(name, slices)

    closing = threading.Event()
    weights = parallel(folder, shard=Stuck, threads=2)
    ended = []

    def consumer():
        try:
            ended.append(len(list(weights.stream())))
        except Exception as exc:
            ended.append(exc)

    def closer():
        weights.close()
        closed.set()

    workers = [threading.Thread(target=consumer), threading.Thread(target=closer)]
    workers[0].start()
    assert reading.wait(PATIENCE)
    workers[1].start()
    closing.set()
    for worker in workers:
        worker.join(PATIENCE)
    assert closed.is_set()
    assert len(ended) == 1
