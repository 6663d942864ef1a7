# SPDX-License-Identifier: Apache-2.0
"""Measuring phases: seconds, bytes, peak memory; and the report made of them."""

from pathlib import Path

import attrs
import pytest

from weights_core import Applied, FormatClaim, Layout, Lease, Plan, PublishReceipt, Role
from weights_core.meter import Phase
from weights_core.report import MIB, Attempt, LoadReport, render_decision
from weights_core.types import Decision

GIB = 1 << 30
BLOCK = 64 * MIB


def a_phase(name, *, seconds=1.0, nbytes=0, peak_rss=0):
    return Phase(name=name, began=0.0, seconds=seconds, nbytes=nbytes, peak_rss=peak_rss)


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
        component=None,
        provider="disk",
        plan=plan,
        attempts=(
            Attempt(plugin="tape", distribution="weights-tape 1.0", result="declined", reason="no tape"),
            Attempt(plugin="disk", distribution="weights-core 0.1", result="provided the weights"),
        ),
        phases=(a_phase("load", seconds=0.5), a_phase("apply", seconds=1.5, nbytes=3_000_000_000)),
        applied=Applied(written={"a", "b"}),
        samples=(),
        receipts=(),
        notes=(),
        start_rss=0,
        rank=0,
        lease=Lease(),
    )
    return attrs.evolve(made, **changes)


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
