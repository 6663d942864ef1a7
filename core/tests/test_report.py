# SPDX-License-Identifier: Apache-2.0
"""Measuring phases: seconds, bytes, peak memory; and the report made of them."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import attrs
import pytest

from weights_core import Applied, FormatClaim, Layout, Lease, Plan, PublishReceipt, Role, report
from weights_core.report import MIB, Attempt, LoadReport, Meter, Phase, render_decision, rss
from weights_core.types import Decision

GIB = 1 << 30
BLOCK = 64 * MIB


@pytest.fixture
def meter():
    made = Meter()
    yield made
    made.close()


def samplers():
    return [thread for thread in threading.enumerate() if thread.name == "weights-meter"]


def a_phase(name, *, seconds=1.0, nbytes=0, peak_rss=0):
    return Phase(name=name, seconds=seconds, nbytes=nbytes, peak_rss=peak_rss)


def a_report(**changes):
    plan = Plan(
        owner=None,
        sources=("tape", "disk"),
        wrappers=(),
        publishers={"offer": FormatClaim(roles={Role.PUBLISHER}, reason="x", publish_at=Layout.SHARDED)},
        decisions=(
            Decision(
                plugin="tape", distribution="weights-tape 1.0", roles=frozenset({Role.SOURCE}), reason="best"
            ),
            Decision(plugin="vault", distribution="weights-vault 2", roles=frozenset(), reason="not named"),
        ),
    )
    made = LoadReport(
        checkpoint=Path("/models/toy"),
        provider="disk",
        plan=plan,
        attempts=(
            Attempt(plugin="tape", distribution="weights-tape 1.0", result="declined", reason="no tape"),
            Attempt(plugin="disk", distribution="weights-core 0.1", result="provided the weights"),
        ),
        phases=(a_phase("load", seconds=0.5), a_phase("apply", seconds=1.5, nbytes=3_000_000_000)),
        applied=Applied(written={"a", "b"}),
        receipts=(),
        notes=(),
        start_rss=0,
        rank=0,
        lease=Lease(),
    )
    return attrs.evolve(made, **changes)


# Phases ---------------------------------------------------------------------------------------


def test_phases_are_recorded_in_order_with_their_bytes(meter):
    with meter.phase("load") as tally:
        tally.nbytes = 5
    with meter.phase("apply"):
        pass
    assert [(phase.name, phase.nbytes) for phase in meter.phases] == [("load", 5), ("apply", 0)]
    assert all(phase.seconds >= 0 for phase in meter.phases)


def test_a_phase_that_fails_is_not_recorded_and_its_error_passes(meter):
    with pytest.raises(KeyError), meter.phase("load"):
        raise KeyError("x")
    assert meter.phases == []


def test_a_phase_is_measured_by_the_clock(meter, monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(clock))
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

    monkeypatch.setattr(report, "rss", watched)
    monkeypatch.setattr(report, "_high_water", lambda: 0)
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
        "from weights_core.report import Meter\n"
        "meter = Meter()\n"  # not started: there is no sampler
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
    code = "from weights_core.report import Meter\nMeter().start()\nprint('done')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


# The report -----------------------------------------------------------------------------------


def test_seconds_and_bytes_are_those_of_all_phases():
    made = a_report()
    assert made.seconds == 2.0
    assert made.nbytes == 3_000_000_000


@pytest.mark.parametrize(
    ("peaks", "host_bytes", "over"),
    [
        ({"load": 3 * GIB}, 0, 2 * GIB),
        ({"apply": 3 * GIB}, GIB, GIB),
        ({"resolve": 2 * GIB, "load": 2 * GIB, "apply": 4 * GIB}, 3 * GIB, GIB),  # no model before apply
        ({"load": 2 * GIB, "apply": 5 * GIB, "post_load": 4 * GIB}, GIB, 3 * GIB),
        ({"apply": GIB // 2}, 0, 0),
        ({"apply": 2 * GIB}, 4 * GIB, 0),
    ],
)
def test_the_peak_over_the_model_is_above_start_and_model_memory(peaks, host_bytes, over):
    made = a_report(
        start_rss=GIB,
        phases=tuple(a_phase(name, peak_rss=peak) for name, peak in peaks.items()),
        applied=Applied(written=(), host_bytes=host_bytes),
    )
    assert made.peak_over_model == over


def test_a_report_reads_as_a_table_with_everything_an_operator_asks_for():
    text = str(
        a_report(
            start_rss=GIB,
            phases=(
                a_phase("resolve", seconds=0.25, peak_rss=GIB),
                a_phase("apply", seconds=1.5, nbytes=3_000_000_000, peak_rss=GIB + 100 * MIB),
            ),
            applied=Applied(
                written={"a", "b"},
                defaulted={"rotary": "computed"},
                unused=("u1", "u2", "u3", "u4", "u5", "u6"),
            ),
            receipts=(PublishReceipt(layout=Layout.SHARDED, nbytes=2_000_000, detail="/run/offer.sock"),),
            notes=("passed over 'consolidated.safetensors'",),
        )
    )
    lines = text.splitlines()
    assert lines[0] == "/models/toy: 2 tensors, 3,000.0 MB in 1.750 s by disk"
    assert lines[2].split() == ["phase", "seconds", "MB", "GB/s", "peak", "over", "model"]
    assert lines[3].split() == ["resolve", "0.250", "0.0", "-", "0.0", "MiB"]
    assert lines[4].split() == ["apply", "1.500", "3,000.0", "2.00", "100.0", "MiB"]
    assert {len(line) for line in lines[3:5]} == {len(lines[3])}
    assert "asked tape (weights-tape 1.0): declined, no tape" in lines
    assert "asked disk (weights-core 0.1): provided the weights" in lines
    assert any(
        line.startswith("source ") and line.endswith("tape (weights-tape 1.0): best") for line in lines
    )
    assert any(
        line.startswith("not used ") and "vault (weights-vault 2): not named" in line for line in lines
    )
    assert "published sharded, 2.0 MB: /run/offer.sock" in lines
    assert "note: rotary was not loaded: computed" in lines
    assert "note: 6 tensors of the checkpoint were not used: u1, u2, u3, u4, u5, …" in lines
    assert "note: passed over 'consolidated.safetensors'" in lines


def test_a_plain_report_has_no_notes():
    assert "note:" not in str(a_report())


def test_five_unused_tensors_are_listed_in_full():
    text = str(a_report(applied=Applied(written=(), unused=tuple("abcde"))))
    assert "note: 5 tensors of the checkpoint were not used: a, b, c, d, e\n" in text + "\n"


def test_reports_of_equal_content_are_still_different_loads():
    assert a_report() != a_report()


@pytest.mark.parametrize(
    ("roles", "taken"),
    [
        (set(), "not used"),
        ({Role.SOURCE}, "source"),
        ({Role.SOURCE, Role.PUBLISHER, Role.OWNER}, "owner+publisher+source"),
    ],
)
def test_a_decision_is_one_line_that_starts_with_the_roles(roles, taken):
    line = render_decision("tape", "weights-tape 1.0", frozenset(roles), "because")
    assert line == f"{taken:<16} tape (weights-tape 1.0): because"


def test_the_measured_seconds_of_a_report_are_real(meter):
    began = time.perf_counter()
    with meter.phase("load"):
        sum(range(1000))
    assert 0 < meter.phases[0].seconds <= time.perf_counter() - began
