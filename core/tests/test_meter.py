# SPDX-License-Identifier: Apache-2.0

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import weights_core.meter
from weights_core.meter import Meter, Phase, rss

MIB = 1 << 20
BLOCK = 64 * MIB


class Counting(Meter):
    """A meter of a load whose fetched bytes the test sets."""

    def __init__(self, watch=None):
        self.fetched = 0
        super().__init__(lambda: self.fetched, watch)


@pytest.fixture
def meter():
    made = Counting()
    yield made
    made.close()


def samplers():
    return [thread for thread in threading.enumerate() if thread.name == "weights-meter"]


def a_phase(name, *, seconds=1.0, nbytes=0, peak_rss=0):
    return Phase(name=name, began=0.0, seconds=seconds, nbytes=nbytes, peak_rss=peak_rss)


def test_phases_are_recorded_in_order_with_their_bytes(meter):
    with meter.phase("load"):
        meter.fetched = 5
    with meter.phase("apply"):
        pass
    assert [(phase.name, phase.nbytes) for phase in meter.phases] == [("load", 5), ("apply", 0)]
    assert all(phase.seconds >= 0 for phase in meter.phases)


def test_a_phase_that_fails_is_not_recorded_and_its_error_passes(meter):
    with pytest.raises(KeyError), meter.phase("load"):
        raise KeyError("x")
    assert meter.phases == []


def test_a_phase_is_measured_by_the_clock(meter, monkeypatch):
    clock = iter([10.0, 10.0, 12.5, 12.5])
    monkeypatch.setattr(weights_core.meter.time, "perf_counter", lambda: next(clock))
    with meter.phase("load"):
        pass
    assert meter.phases[0].seconds == 2.5


@pytest.mark.parametrize(
    ("seconds", "nbytes", "rate"), [(2.0, 3_000_000_000, 1.5), (2.0, 0, 0.0), (0.0, 5, 0.0), (0.0, 0, 0.0)]
)
def test_the_rate_of_a_phase_is_in_gigabytes_per_second(seconds, nbytes, rate):
    assert a_phase("apply", seconds=seconds, nbytes=nbytes).gb_per_s == rate


def test_memory_that_is_still_held_at_the_end_of_a_phase_is_in_its_peak(meter):
    before = rss()
    with meter.phase("load"):
        held = b"\1" * BLOCK
    assert meter.phases[0].peak_rss >= before + 0.9 * BLOCK
    assert len(held) == BLOCK


def test_memory_that_was_freed_within_a_phase_is_seen_by_the_sampler(meter, monkeypatch):
    sampled = threading.Event()

    def watched():
        value = rss()
        if threading.current_thread().name == "weights-meter":
            sampled.set()
        return value

    monkeypatch.setattr(weights_core.meter, "rss", watched)
    monkeypatch.setattr(weights_core.meter, "_high_water", lambda: 0)
    meter.start()
    before = rss()
    with meter.phase("load"):
        held = b"\1" * BLOCK
        for _ in range(2):  # the first sample may have begun before the block was there
            sampled.clear()
            assert sampled.wait(30)
        del held
    assert rss() < before + BLOCK / 2
    assert meter.phases[0].peak_rss >= before + 0.9 * BLOCK


def test_the_peak_of_one_phase_is_not_carried_into_the_next(meter):
    with meter.phase("load"):
        held = b"\1" * BLOCK
    del held
    with meter.phase("apply"):
        pass
    first, second = meter.phases
    assert second.peak_rss < first.peak_rss - BLOCK / 2


def test_a_new_record_of_the_process_is_exact_without_any_sample():
    code = (
        "import json\n"
        "from weights_core.meter import Meter\n"
        "meter = Meter(lambda: 0)\n"  # not started: there is no sampler
        "with meter.phase('load'):\n"
        f"    held = b'\\1' * {BLOCK}\n"
        "    del held\n"
        "print(json.dumps([meter.start_rss, meter.phases[0].peak_rss]))\n"
    )
    # A process starts with the record of the one that forked it: let that be a small shell.
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    start, peak = json.loads(done.stdout)
    assert start + 0.9 * BLOCK <= peak <= start + 2 * BLOCK


def test_resident_memory_is_near_what_the_kernel_says():
    status = Path("/proc/self/status").read_text()
    kib = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    assert abs(rss() - kib * 1024) < 16 * MIB


def test_the_sampling_thread_runs_from_start_and_is_joined_by_close(meter):
    assert samplers() == []
    meter.start()
    assert len(samplers()) == 1
    meter.close()
    assert samplers() == []
    meter.close()


def test_a_meter_that_never_started_can_be_closed(meter):
    meter.close()
    assert samplers() == []


def test_the_sampling_thread_does_not_keep_the_interpreter_alive():
    code = "from weights_core.meter import Meter\nMeter(lambda: 0).start()\nprint('done')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_each_phase_begins_and_ends_with_a_sample_that_the_watcher_sees():
    seen = []
    meter = Counting(seen.append)
    with meter.phase("load"):
        meter.fetched = 7
    assert seen == [0, 7]
    assert [sample.nbytes for sample in meter.samples] == [0, 7]
    first, last = meter.samples
    assert 0 <= first.seconds <= last.seconds
    assert meter.phases[0].began <= first.seconds
    assert first.rss > 0


def test_a_long_load_keeps_a_bounded_number_of_samples(monkeypatch):
    monkeypatch.setattr(weights_core.meter, "_INTERVAL", 1e-5)
    monkeypatch.setattr(weights_core.meter, "_MOST_SAMPLES", 8)
    taken, enough = [], threading.Event()

    def watch(nbytes):
        taken.append(nbytes)
        if len(taken) == 50:
            enough.set()

    meter = Counting(watch)
    meter.start()
    assert enough.wait(60)
    meter.close()
    assert len(meter.samples) <= 8
    assert [s.seconds for s in meter.samples] == sorted(s.seconds for s in meter.samples)


def test_the_measured_seconds_of_a_report_are_real(meter):
    began = time.perf_counter()
    with meter.phase("load"):
        sum(range(1000))
    assert 0 < meter.phases[0].seconds <= time.perf_counter() - began
