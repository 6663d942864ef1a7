# SPDX-License-Identifier: Apache-2.0
"""Draw a load: bytes fetched and resident memory over time, the phases shaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from weights_core.errors import ChartError, ExtraNotInstalledError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from weights_core.report import LoadReport

_MB = 1e6
_KINDS = (".png", ".svg", ".pdf")
_SHORTEST = 0.02
"""A phase shorter than this share of the load is shaded, but not named."""


def check_can_draw(path: Path) -> None:
    """Find out before a load whether its chart could be written after it.

    Raises:
        ExtraNotInstalledError: matplotlib is missing; says how to install it.
        ChartError: the folder does not exist or may not be written, or the kind of picture is unknown.
    """
    if path.suffix.lower() not in _KINDS:
        raise ChartError(f"{path}: a chart is one of {', '.join(_KINDS)}")
    target = path if path.exists() else path.parent
    if path.is_dir() or not path.parent.is_dir() or not os.access(target, os.W_OK):
        raise ChartError(f"{path}: cannot be written there")
    _figure()


def draw(report: LoadReport, path: Path) -> None:
    """Write the chart of a load to `path`; the suffix decides the kind of picture.

    Raises:
        ExtraNotInstalledError: matplotlib is missing; says how to install it.
        ChartError: the file cannot be written.
    """
    figure = _figure()
    plot(figure.add_subplot(), report)
    try:
        figure.savefig(path, dpi=120)
    except OSError as exc:
        raise ChartError(f"{path}: {exc.strerror}") from exc


def plot(axes: Axes, report: LoadReport) -> None:
    """Draw a load into `axes`, for a figure of one's own."""
    seconds = [sample.seconds for sample in report.samples]
    growth = [(sample.rss - report.start_rss) / _MB for sample in report.samples]
    fetched = [sample.nbytes / _MB for sample in report.samples]
    axes.plot(seconds, growth, color="tab:red", label="resident memory, above that at the start")
    axes.plot(seconds, fetched, color="tab:blue", label="tensor data fetched")
    if report.applied.host_bytes:
        model = report.applied.host_bytes / _MB
        axes.axhline(model, color="grey", linestyle=":", label="memory allocated for the model")
    _shade_phases(axes, report, seconds[-1] if seconds else 0.0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MB")
    axes.set_ylim(bottom=min(0.0, *growth) if growth else 0.0)
    axes.set_title(
        f"{report.checkpoint.name or report.checkpoint}, by {report.provider}", pad=22, parse_math=False
    )
    axes.margins(x=0)
    axes.legend(loc="upper left")


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ExtraNotInstalledError("a chart needs matplotlib: pip install 'weights-core[plot]'") from exc
    return Figure(figsize=(9, 4.5), layout="constrained")


def _shade_phases(axes: Axes, report: LoadReport, total: float) -> None:
    for number, phase in enumerate(report.phases):
        end = phase.began + phase.seconds
        axes.axvspan(phase.began, end, color="tab:grey", alpha=0.18 if number % 2 else 0.08, linewidth=0)
        if phase.seconds > total * _SHORTEST:
            middle = (phase.began + end) / 2
            where = axes.get_xaxis_transform()
            axes.text(middle, 1.01, phase.name, ha="center", va="bottom", transform=where, fontsize=8)
