# SPDX-License-Identifier: Apache-2.0

import contextlib
import errno
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file

from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.errors import CheckpointError, WeightsError
from weights_core.shards import open_shards
from weights_core.tensors import as_bytes, nbytes
from weights_core.testing import every_dtype, random_tensor, write_checkpoint
from weights_core.weightset import Target
from weights_parallel_shards import ahead, reader, storage
from weights_parallel_shards.reader import ParallelSet
from weights_parallel_shards.tuning import Tuning

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


def parallel(folder, *, readers=4, window=1 << 20, chunk=1024, direct="auto"):
    """A set over the files of a folder, read by threads in chunks of a tensor of `kilobytes`."""
    tuning = Tuning(readers=readers, chunk=chunk, slots=1, window=window, direct=direct, inline=0)
    return ParallelSet(open_shards(find(folder)), tuning=tuning)


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
    with contextlib.closing(parallel(folder, readers=count)) as weights:
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
    with contextlib.closing(parallel(folder, readers=2, window=1024)) as weights:
        pairs = list(zip(weights.stream(), weights.stream(), strict=True))
        assert_equal(dict(first for first, _ in pairs), oracle(folder))
        assert_equal(dict(second for _, second in pairs), oracle(folder))
        assert_equal(dict(weights.stream()), oracle(folder))


def test_a_target_that_does_not_fit_is_the_consumers_error(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(4), shards=2)
    with contextlib.closing(parallel(folder)) as weights:
        wrong = Target("t001", torch.zeros(KB, dtype=torch.int32))
        with pytest.raises(ValueError, match="t001"):
            list(weights.fill([Target("t000", torch.zeros(KB)), wrong]))


# Concurrency ------------------------------------------------------------------------------------


def path_of(fd):
    return os.readlink(f"/proc/self/fd/{fd}")


@pytest.fixture
def at_read(monkeypatch):
    """Have a function called with path and offset before every read of tensor data."""
    plain = storage.preadv

    def install(before):
        def preadv(fd, buffers, offset):
            before(path_of(fd), offset)
            return plain(fd, buffers, offset)

        monkeypatch.setattr(storage, "preadv", preadv)

    return install


class Meeting:
    """Counts the reads under way; the first of them wait for each other."""

    def __init__(self, parties):
        self.barrier = threading.Barrier(parties)
        self.lock = threading.Lock()
        self.under_way = 0
        self.most = 0
        self.left = parties

    def enter(self, path, offset):
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            meets = self.left > 0
            self.left -= 1
        if meets:
            self.barrier.wait(PATIENCE)

    def leave(self):
        with self.lock:
            self.under_way -= 1


@pytest.mark.parametrize("how", ["stream", "fill"])
@pytest.mark.parametrize(("count", "shards"), [(2, 1), (2, 5), (5, 3), (8, 1)])
def test_as_many_chunks_as_readers_are_read_at_a_time_and_never_more(
    tmp_path, monkeypatch, count, shards, how
):
    folder = write_checkpoint(tmp_path, kilobytes(28), shards=shards)
    meeting, plain = Meeting(count), storage.preadv

    def preadv(fd, buffers, offset):
        meeting.enter(fd, offset)
        try:
            return plain(fd, buffers, offset)
        finally:
            meeting.leave()

    monkeypatch.setattr(storage, "preadv", preadv)
    with contextlib.closing(parallel(folder, readers=count)) as weights:
        if how == "stream":
            have = dict(weights.stream())
        else:
            targets = [Target(name, torch.zeros(KB)) for name in weights]
            have = {target.name: target.out for target in weights.fill(targets)}
        assert_equal(have, oracle(folder))
    assert meeting.most == count


def test_chunks_begin_in_the_order_of_files_and_offsets(tmp_path, at_read):
    folder = write_checkpoint(tmp_path, kilobytes(30), shards=3)
    reads = []
    at_read(lambda path, offset: reads.append((path, offset)))
    with contextlib.closing(parallel(folder, readers=1)) as weights:
        order = [name for name, _ in weights.stream()]
        assert order == list(weights)
        assert reads == sorted(reads)
        filled = [t.name for t in weights.fill(Target(n, torch.zeros(KB)) for n in reversed(list(weights)))]
        assert filled == order


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_is_small_is_read_in_the_callers_thread(tmp_path, kind, monkeypatch):
    folder = write_checkpoint(tmp_path, assorted(), shards=2, kind=kind)
    weights = ParallelSet(
        open_shards(find(folder)), tuning=Tuning(readers=4, chunk=1 << 20, slots=1, window=1 << 20)
    )
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread was started"))
    with contextlib.closing(weights):
        assert_equal(dict(weights.stream()), oracle(folder))
        assert_equal({name: weights[name] for name in weights}, oracle(folder))


# Bounded memory ---------------------------------------------------------------------------------


class Ledger:
    """Tensors made for a stream, and the bytes of those that the consumer has not received yet."""

    def __init__(self, limit, make):
        self.limit = limit
        self.make = make
        self.lock = threading.Lock()
        self.held = 0
        self.most = 0
        self.company = []
        self.full = threading.Event()
        self.over = threading.Event()
        self.refs = []

    def allocate(self, size, offset=0):
        tensor = self.make(size, offset)
        with self.lock:
            if size > self.limit:
                self.company.append(self.held)
            self.held += size
            self.most = max(self.most, self.held)
            if self.held >= self.limit:
                self.full.set()
            if self.held > self.limit:
                self.over.set()
            self.refs.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    def received(self, tensor):
        with self.lock:
            self.held -= nbytes(tensor)

    def alive(self):
        return sum(ref() is not None for ref in self.refs)


@pytest.fixture
def ledger(monkeypatch):
    def made(limit):
        ledger = Ledger(limit, reader.allocate)
        monkeypatch.setattr(reader, "allocate", ledger.allocate)
        return ledger

    return made


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("limit_kb", [1, 2, 5])
def test_readers_keep_ahead_of_a_slow_consumer_up_to_the_limit_and_no_further(
    tmp_path, ledger, limit_kb, count
):
    folder = write_checkpoint(tmp_path, kilobytes(24), shards=4)
    made = ledger(limit_kb * 1024)
    with contextlib.closing(parallel(folder, readers=count, window=made.limit)) as weights:
        stream = weights.stream()
        have = dict([next(stream)])
        made.received(*have.values())
        # What the consumer has in hand counts until it comes back for more.
        if limit_kb > 1:
            assert eventually(lambda: made.held == made.limit - 1024)
        assert not made.over.wait(0.1)
        for name, tensor in stream:
            made.received(tensor)
            have[name] = tensor
    assert_equal(have, oracle(folder))
    assert made.most <= made.limit


@pytest.mark.parametrize("count", [1, 3])
def test_a_tensor_larger_than_the_limit_is_read_alone(tmp_path, ledger, count):
    tensors = {**kilobytes(8), "a_big": random_tensor(9 * KB), "b_big": random_tensor(7 * KB)}
    folder = write_checkpoint(tmp_path, tensors, shards=3)
    made = ledger(2 * 1024)
    with contextlib.closing(parallel(folder, readers=count, window=made.limit)) as weights:
        have = {}
        for name, tensor in weights.stream():
            made.received(tensor)
            have[name] = tensor
    assert_equal(have, tensors)
    assert made.company == [0, 0]


@pytest.mark.parametrize("window", [1, 1024, 3000])
@pytest.mark.parametrize("chunk", [512, 4096, 1 << 20])
@pytest.mark.parametrize("count", [1, 3])
def test_a_consumer_that_keeps_every_tensor_is_not_blocked(tmp_path, count, chunk, window):
    folder = write_checkpoint(tmp_path, {**kilobytes(20), **assorted()}, shards=5)
    with contextlib.closing(parallel(folder, readers=count, window=window, chunk=chunk)) as weights:
        assert_equal(dict(list(weights.stream())), oracle(folder))


def test_a_tiny_window_has_one_tensor_under_way_at_a_time(tmp_path, ledger):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=4)
    made = ledger(1)
    with contextlib.closing(parallel(folder, window=1)) as weights:
        for _, tensor in weights.stream():
            made.received(tensor)
    assert made.most == 1024
    assert made.company == [0] * 12


def test_tensors_that_the_consumer_dropped_are_freed_while_it_goes_on(tmp_path, ledger):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=4)
    made = ledger(1)
    with contextlib.closing(parallel(folder, window=1)) as weights:
        stream = weights.stream()
        for _ in range(12):
            _, tensor = next(stream)
            assert eventually(lambda: made.alive() == 1)
            del tensor


def test_what_was_read_ahead_is_freed_when_the_stream_is_abandoned(tmp_path, ledger):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=4)
    made = ledger(6 * 1024)
    with contextlib.closing(parallel(folder, window=made.limit)) as weights:
        stream = weights.stream()
        next(stream)
        assert made.full.wait(PATIENCE)
        stream.close()
        gc.collect()
        assert made.alive() == 0


def test_a_finished_fill_keeps_no_target_alive(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(4), shards=2)
    with contextlib.closing(parallel(folder)) as weights:
        outs = [torch.zeros(KB) for _ in range(4)]
        alive = [weakref.ref(out) for out in outs]
        list(weights.fill([Target(name, outs.pop()) for name in weights]))
        gc.collect()
        assert [ref() for ref in alive] == [None] * 4


def test_staging_memory_is_reused_from_pass_to_pass_and_freed_by_close(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=4)
    made = []
    plain = reader.Lane

    def lane(tuning):
        lane = plain(tuning)
        made.append(weakref.ref(lane))
        return lane

    monkeypatch.setattr(reader, "Lane", lane)
    weights = parallel(folder, readers=3)
    for _ in range(3):
        list(weights.stream())
        list(weights.fill([Target(name, torch.zeros(KB)) for name in weights]))
    assert len(made) == 3
    weights.close()
    gc.collect()
    assert [ref() for ref in made] == [None] * 3


# Failures ---------------------------------------------------------------------------------------


class Breaking:
    """Reads of the first file fail from its tensor number `good` on; after that, others are slow."""

    def __init__(self, good, error):
        self.good, self.error = good, error
        self.failed = threading.Event()
        self.lock = threading.Lock()
        self.first = 0
        self.after = 0

    def __call__(self, path, offset):
        if "00001-of" in path:
            with self.lock:
                self.first += 1
                fails = self.first > self.good
            if fails:
                self.failed.set()
                raise self.error
        else:
            assert self.failed.wait(PATIENCE)
            with self.lock:
                self.after += 1
            time.sleep(0.01)


def consume(weights, how, size=1):
    if how == "stream":
        return [name for name, _ in weights.stream()]
    return [t.name for t in weights.fill([Target(name, torch.zeros(size * KB)) for name in weights])]


@pytest.mark.parametrize("how", ["stream", "fill"])
@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("kind", [RuntimeError, OSError, MemoryError])
def test_a_failing_file_is_named_its_cause_chained_and_its_siblings_stop(tmp_path, at_read, how, good, kind):
    folder = write_checkpoint(tmp_path, kilobytes(600), shards=3)
    error = kind("broken cable")
    breaks = Breaking(good, error)
    at_read(breaks)
    before = threads()
    with contextlib.closing(parallel(folder, readers=3)) as weights:
        with pytest.raises(CheckpointError, match="broken cable") as caught:
            consume(weights, how)
        assert threads() == before
        assert caught.value.file == folder / "model-00001-of-00003.safetensors"
        assert caught.value.__cause__ is error
        reads = breaks.after
        assert reads < 200
    assert breaks.after == reads


@pytest.mark.parametrize("how", ["stream", "fill"])
@pytest.mark.parametrize("direct", ["always", "never"])
def test_an_error_of_the_device_names_tensor_and_byte(tmp_path, at_read, how, direct):
    folder = write_checkpoint(tmp_path, kilobytes(60, size=8), shards=3)
    bad = folder / "model-00002-of-00003.safetensors"

    def broken(path, offset):
        if path == str(bad) and offset >= 65536:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    at_read(broken)
    with contextlib.closing(parallel(folder, chunk=16384, direct=direct)) as weights:
        with pytest.raises(CheckpointError, match="Input/output error") as caught:
            consume(weights, how, size=8)
        meta = weights.meta(caught.value.tensor)
    assert caught.value.file == bad == meta.file
    assert isinstance(caught.value.__cause__, OSError)
    assert max(65536, meta.offset) <= caught.value.offset < meta.offset + meta.nbytes


def test_the_first_error_wins(tmp_path, at_read):
    folder = write_checkpoint(tmp_path, kilobytes(6), shards=3)
    together = threading.Barrier(3)
    errors = []

    def broken(path, offset):
        together.wait(PATIENCE)
        errors.append(OSError(errno.EIO, f"number {len(errors)}"))
        raise errors[-1]

    at_read(broken)
    with contextlib.closing(parallel(folder, readers=3)) as weights:
        with pytest.raises(CheckpointError) as caught:
            consume(weights, "stream")
        assert caught.value.__cause__ in errors
    assert len(errors) == 3


@pytest.mark.parametrize("how", ["stream", "fill"])
@pytest.mark.parametrize("direct", ["always", "never"])
def test_a_file_truncated_after_opening_is_an_error_that_names_it(tmp_path, how, direct):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=3)
    with contextlib.closing(parallel(folder, direct=direct)) as weights:
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


def test_nothing_that_was_rewritten_in_the_middle_of_a_read_is_handed_out(tmp_path, at_read):
    folder = write_checkpoint(tmp_path, kilobytes(12), shards=2)
    want = oracle(folder)
    file = folder / "model-00002-of-00002.safetensors"

    def rewrite(path, offset):
        if path == str(file):
            with file.open("r+b") as stream:
                stream.seek(-512, os.SEEK_END)
                stream.write(bytes(512))
            os.utime(file, ns=(1, 1))

    at_read(rewrite)
    have = {}

    def stream_all():
        for name, tensor in weights.stream():
            have[name] = tensor  # noqa: PERF403 - what came before the error counts

    with contextlib.closing(parallel(folder)) as weights:
        with pytest.raises(CheckpointError, match="was changed while it was read"):
            stream_all()
        assert all(weights.meta(name).file != file for name in have)
    assert_equal(have, {name: want[name] for name in have})


@pytest.mark.parametrize("direct", ["always", "never", "auto"])
def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path, direct):
    folder = write_checkpoint(tmp_path / "c", kilobytes(12), shards=2)
    want = oracle(folder)
    other = write_checkpoint(tmp_path / "d", {n: t + 1 for n, t in kilobytes(12).items()}, shards=2)
    with contextlib.closing(parallel(folder, direct=direct)) as weights:
        for file in other.iterdir():
            os.replace(file, folder / file.name)
        assert_equal(dict(weights.stream()), want)


def running_stream(tmp_path, **options):
    """A set and its stream, of which the first tensor was consumed while the rest waits for room."""
    folder = write_checkpoint(tmp_path, kilobytes(40), shards=4)
    weights = parallel(folder, window=3 * 1024, **options)
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
    assert weights.bytes_read == 1024
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
    with contextlib.closing(parallel(folder, window=3 * 1024)) as weights:

        def consumer():
            targets = [Target(name, torch.zeros(KB)) for name in weights]
            for _ in weights.stream() if how == "stream" else weights.fill(targets):
                raise kind("enough")

        with pytest.raises(kind):
            consumer()
        assert threads() == before


@pytest.fixture
def interruptible():
    """Ctrl-C is heard also where tests run in the background of a shell, which has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_waiting_for_a_tensor_joins_the_threads(tmp_path, at_read, interruptible):
    assert threading.current_thread() is threading.main_thread()
    folder = write_checkpoint(tmp_path, kilobytes(40), shards=4)
    reads = itertools.count()

    def interrupt(path, offset):
        if next(reads) == 5:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    at_read(interrupt)
    before = threads()
    with contextlib.closing(parallel(folder, window=1)) as weights:
        with pytest.raises(KeyboardInterrupt):
            list(weights.stream())
        assert threads() == before
        assert weights.bytes_read < 40 * 1024


def test_signals_that_are_handled_do_not_disturb(tmp_path):
    assert threading.current_thread() is threading.main_thread()
    folder = write_checkpoint(tmp_path, kilobytes(400), shards=4)
    rings = []
    old = signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with contextlib.closing(parallel(folder, direct="always")) as weights:
            have = dict(weights.stream())
            assert eventually(lambda: rings)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert_equal(have, oracle(folder))


def test_closing_the_set_during_a_stream_joins_the_threads_and_closes_the_files(tmp_path):
    before = threads()
    weights, stream = running_stream(tmp_path)
    assert len(set(open_files(tmp_path))) == 4
    weights.close()
    assert threads() == before
    assert open_files(tmp_path) == []
    weights.close()
    stream.close()


@pytest.mark.parametrize("inline", [False, True])
def test_a_stream_whose_set_was_closed_does_not_end_as_if_it_were_complete(tmp_path, inline):
    folder = write_checkpoint(tmp_path, kilobytes(40), shards=4)
    tuning = Tuning(readers=2, chunk=1024, slots=1, window=3 * 1024, inline=inline << 20)
    weights = ParallelSet(open_shards(find(folder)), tuning=tuning)
    stream = weights.stream()
    next(stream)
    weights.close()
    with pytest.raises(WeightsError):
        list(stream)


def test_a_closed_set_does_not_read_from_a_file_that_has_its_old_descriptor(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(4), shards=2)
    decoy = tmp_path / "decoy"
    decoy.write_bytes(bytes(1 << 16))
    weights = parallel(folder)
    list(weights.stream())
    weights.close()
    with contextlib.ExitStack() as files:
        for _ in range(8):  # these take the numbers that were just given back
            files.enter_context(decoy.open("rb"))
        with pytest.raises(WeightsError):
            weights.read("t000")
        with pytest.raises(WeightsError):
            list(weights.stream())


def test_closing_from_another_thread_ends_a_consumer_that_waits(tmp_path, at_read):
    folder = write_checkpoint(tmp_path, kilobytes(8), shards=4)
    reading, closing, closed = threading.Event(), threading.Event(), threading.Event()

    def stuck(path, offset):
        reading.set()
        assert closing.wait(PATIENCE)

    at_read(stuck)
    weights = parallel(folder, readers=2)
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


FORKING = """
import os, sys
from pathlib import Path
from weights_core.checkpoint import find
from weights_core.errors import CheckpointError
from weights_core.shards import open_shards
from weights_parallel_shards.reader import ParallelSet
from weights_parallel_shards.tuning import Tuning

tuning = Tuning(readers=3, chunk=1024, slots=1, window=3000, inline=0)
weights = ParallelSet(open_shards(find(Path(sys.argv[1]))), tuning=tuning)
stream = weights.stream()
name, first = next(stream)
child = os.fork()
if not child:
    try:
        list(stream)  # what had arrived may come, and no more
    except CheckpointError as exc:
        assert "forked" in str(exc), exc
    else:
        os._exit(3)
    assert first.numel() == weights.read(name).numel()
    assert len(list(weights.stream())) == len(weights)
    weights.close()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert len(list(stream)) == len(weights) - 1
weights.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_neither_hangs_nor_reads_on_and_the_parent_does(tmp_path):
    folder = write_checkpoint(tmp_path, kilobytes(40), shards=4)
    code = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + FORKING
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# What is mapped ---------------------------------------------------------------------------------


@pytest.fixture(params=["cached", "not cached"])
def mapping(request, tmp_path, monkeypatch):
    """A set whose bytes seem to be cached or not, and what it holds; pieces are small."""
    monkeypatch.setattr(ahead, "SMALLEST", 4096)
    monkeypatch.setattr(ahead, "STEP", 4096)
    monkeypatch.setattr(storage.Storage, "is_cached", lambda self, offset: request.param == "cached")
    folder = write_checkpoint(tmp_path / "checkpoint", assorted() | kilobytes(50, 3), shards=3)
    with contextlib.closing(parallel(folder, readers=6)) as weights:
        yield weights, oracle(folder)


def test_everything_is_mapped_that_can_be(mapping):
    weights, want = mapping
    mapped = dict(weights.mapped())
    assert want.keys() - mapped.keys() == {"empty"}
    assert_equal(mapped, {name: tensor for name, tensor in want.items() if name in mapped})
    assert weights.bytes_read == sum(nbytes(t) for t in want.values())


def test_parts_are_mapped_and_no_more_is_counted(mapping):
    weights, want = mapping
    parts = {
        "large": (slice(100, 200),),
        "t003": None,
        "t010": (slice(0, 9),),
        "dtype.F32": (slice(None), slice(1)),
    }
    mapped = dict(weights.mapped(parts))
    assert_equal(mapped, {"large": want["large"][100:200], "t003": want["t003"], "t010": want["t010"][:9]})
    assert weights.bytes_read == sum(nbytes(t) for t in mapped.values())


def test_abandoning_and_closing_join_the_threads(mapping):
    weights, want = mapping
    before = threads()
    some = weights.mapped()
    name, tensor = next(some)
    some.close()
    assert threads() <= before
    some = weights.mapped()
    next(some)
    weights.close()
    assert threads() <= before
    with pytest.raises(CheckpointError, match="was closed"):
        list(some)
    assert_same(tensor, want[name])


def test_damage_is_named_by_who_maps(mapping):
    weights, _ = mapping
    shard = weights.shards[-1]
    os.truncate(shard.path, shard.path.stat().st_size - 5)
    with pytest.raises(CheckpointError, match=rf"{shard.path}, tensor '.*(shorter|changed)"):
        list(weights.mapped())


def test_nothing_is_mapped_if_reads_are_to_be_direct(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", kilobytes(3))
    with contextlib.closing(parallel(folder, direct="always")) as weights:
        assert list(weights.mapped()) == []
        with pytest.raises(KeyError):
            list(weights.mapped(["ghost"]))


def test_a_fork_does_not_wait_for_threads_it_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "SMALLEST", 4096)
    monkeypatch.setattr(storage.Storage, "is_cached", lambda self, offset: False)
    folder = write_checkpoint(tmp_path / "checkpoint", kilobytes(50, 3))
    with contextlib.closing(parallel(folder, readers=2)) as weights:
        shard = weights.shards[0]
        parts = [(name, shard, shard.extent(name)) for name in weights]
        reading = ahead.ReadAhead(parts, 1)
        monkeypatch.setattr(type(shard), "bring", lambda self, extent: time.sleep(0.05))
        reading.start(lambda shard, offset: False)
        child = os.fork()
        if not child:
            try:
                reading.wait(parts[-1][0])
            except CheckpointError:
                reading.stop()
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        reading.stop()
