# SPDX-License-Identifier: Apache-2.0
"""What a load did: seconds, bytes and memory per phase, and who provided the bytes and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs

from weights_core.lease import Lease
from weights_core.meter import Phase, Sample
from weights_core.types import Applied, Plan, PublishReceipt

MIB = 1 << 20
_BRIEF = 0.0005
"""Seconds below which a phase that fetched nothing is not worth a line."""


@attrs.frozen(kw_only=True)
class Attempt:
    """One provider that was asked, and what came of it."""

    plugin: str
    distribution: str
    result: str
    reason: str = ""


@attrs.frozen(kw_only=True, eq=False)
class LoadReport:
    """What a finished load did. Keep it, or its `lease`, no longer than needed: neither holds the model."""

    checkpoint: Path
    component: str | None
    provider: str
    plan: Plan
    attempts: tuple[Attempt, ...]
    phases: tuple[Phase, ...]
    samples: tuple[Sample, ...]
    applied: Applied
    receipts: tuple[PublishReceipt, ...]
    notes: tuple[str, ...]
    start_rss: int
    rank: int
    lease: Lease

    @property
    def seconds(self) -> float:
        """Seconds in all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data fetched."""
        return sum(phase.nbytes for phase in self.phases)

    @property
    def peak_over_model(self) -> int:
        """Peak resident bytes above those at the start and the memory allocated for the model."""
        return max((self._over_model(phase) for phase in self.phases), default=0)

    def _over_model(self, phase: Phase) -> int:
        before_apply = phase.name in ("resolve", "load")
        model = 0 if before_apply else self.applied.host_bytes
        return max(0, phase.peak_rss - self.start_rss - model)

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON; schema `weights.load-report/1`, described in docs/operators.md."""
        return {
            "schema": "weights.load-report/1",
            "checkpoint": str(self.checkpoint),
            "component": self.component,
            "provider": self.provider,
            "rank": self.rank,
            "seconds": self.seconds,
            "bytes": self.nbytes,
            "start_rss": self.start_rss,
            "model_host_bytes": self.applied.host_bytes,
            "peak_over_model": self.peak_over_model,
            "tensors_written": len(self.applied.written),
            "defaulted": dict(self.applied.defaulted),
            "unused": None if self.applied.unused is None else list(self.applied.unused),
            "phases": [attrs.asdict(phase) | {"gb_per_s": phase.gb_per_s} for phase in self.phases],
            "attempts": [attrs.asdict(attempt) for attempt in self.attempts],
            "decisions": [
                {
                    "plugin": d.plugin,
                    "distribution": d.distribution,
                    "roles": sorted(role.value for role in d.roles),
                    "reason": d.reason,
                }
                for d in self.plan.decisions
            ],
            "published": [
                {"layout": r.layout.value, "bytes": r.nbytes, "detail": r.detail} for r in self.receipts
            ],
            "notes": list(self.notes),
            "samples": [[s.seconds, s.rss, s.nbytes] for s in self.samples],
        }

    def __str__(self) -> str:
        """Return the report as a table for people."""
        of = f", {self.component}" if self.component else ""
        size = f"{self.nbytes / 1e6:,.1f} MB" if self.nbytes else "bytes not counted,"
        lines = [
            f"{self.checkpoint}{of}: {len(self.applied.written)} tensors, {size} "
            f"in {self.seconds:.3f} s by {self.provider}",
            "",
            f"{'phase':<18}{'seconds':>9}{'MB':>11}{'GB/s':>8}{'peak over model':>18}",
        ]
        brief = [p for p in self.phases if p.seconds < _BRIEF and not p.nbytes]
        for p in (phase for phase in self.phases if phase not in brief):
            rate = f"{p.gb_per_s:.2f}" if p.nbytes else "-"
            lines.append(
                f"{p.name:<18}{p.seconds:>9.3f}{p.nbytes / 1e6:>11,.1f}{rate:>8}"
                f"{self._over_model(p) / MIB:>14,.1f} MiB"
            )
        if brief:
            spent = sum(p.seconds for p in brief)
            lines.append(f"{'the rest':<18}{spent:>9.3f}   ({', '.join(p.name for p in brief)})")
        lines.append("")
        lines += [
            f"asked {a.plugin} ({a.distribution}): {a.result}{a.reason and f', {a.reason}'}"
            for a in self.attempts
        ]
        lines += [render_decision(d.plugin, d.distribution, d.roles, d.reason) for d in self.plan.decisions]
        for receipt in self.receipts:
            lines.append(
                f"published {receipt.layout.value}, {receipt.nbytes / 1e6:,.1f} MB: {receipt.detail}"
            )
        reasons: dict[str, list[str]] = {}
        for name, why in self.applied.defaulted.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            which = f"{names[0]} was" if len(names) == 1 else f"{len(names)} tensors were"
            shown = "" if len(names) == 1 else f" ({_first(names)})"
            lines.append(f"note: {which} not loaded: {why}{shown}")
        if self.applied.unused:
            count, shown = len(self.applied.unused), _first(self.applied.unused)
            lines.append(f"note: {count} tensors of the checkpoint were not used: {shown}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def render_decision(plugin: str, distribution: str, roles: frozenset[object], reason: str) -> str:
    """Return one line on why a plugin takes part or not."""
    taken = "+".join(sorted(str(getattr(role, "value", role)) for role in roles)) or "not used"
    return f"{taken:<16} {plugin} ({distribution}): {reason}"
