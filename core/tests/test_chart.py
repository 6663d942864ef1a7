# SPDX-License-Identifier: Apache-2.0
"""Charts of loads."""

import sys
from pathlib import Path

import attrs
import pytest
import torch

import weights_core as w
from weights_core.chart import check_can_draw, draw
from weights_core.errors import ChartError, ExtraNotInstalledError
from weights_core.meter import Phase, Sample
from weights_core.testing import host_of, random_tensor, write_checkpoint

BEGINNINGS = {".png": b"\x89PNG\r\n", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture
def report(tmp_path):
    """Return the report of a real load."""
    folder = write_checkpoint(tmp_path / "toy", {"weight": random_tensor(64, 128), "bias": random_tensor(64)})
    return w.load(w.TorchEngine(torch.nn.Linear(128, 64)), folder, host=host_of())


@pytest.fixture
def drawing():
    """Skip without matplotlib; make it write text as text."""
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        yield


def a_timeline(report):
    """Return the report as if its load had had three phases of known length."""
    phases = [("resolve", 0.0, 1.0), ("apply", 1.0, 8.0), ("blink", 9.0, 0.01), ("post_load", 9.01, 0.99)]
    return attrs.evolve(
        report,
        phases=tuple(
            Phase(name=name, began=began, seconds=seconds, nbytes=0, peak_rss=0)
            for name, began, seconds in phases
        ),
        samples=tuple(Sample(float(i), 1_000_000 * i, 500_000 * i) for i in range(11)),
        start_rss=0,
        applied=attrs.evolve(report.applied, host_bytes=3_000_000),
    )


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_a_real_load_is_drawn(report, tmp_path, suffix):
    path = tmp_path / f"chart{suffix}"
    check_can_draw(path)
    assert not path.exists()
    draw(report, path)
    assert path.read_bytes().startswith(BEGINNINGS[suffix])


@pytest.mark.usefixtures("drawing")
def test_a_chart_names_its_phases_and_lines(report, tmp_path):
    path = tmp_path / "chart.svg"
    draw(a_timeline(report), path)
    text = path.read_text(encoding="utf-8")
    for label in (
        "toy, by disk",
        "seconds",
        "MB",
        "resident memory, above that at the start",
        "tensor data fetched",
        "memory allocated for the model",
        "resolve",
        "apply",
        "post_load",
    ):
        assert f">{label}<" in text, label
    assert "blink" not in text  # too short to be named


@pytest.mark.usefixtures("drawing")
def test_no_line_is_drawn_for_a_model_that_took_no_memory(report, tmp_path):
    path = tmp_path / "chart.svg"
    draw(attrs.evolve(report, applied=attrs.evolve(report.applied, host_bytes=0)), path)
    assert "memory allocated for the model" not in path.read_text(encoding="utf-8")


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize(
    "changes",
    [
        {"samples": ()},
        {"samples": (), "phases": ()},
        {"samples": (Sample(0.0, 0, 0),)},
        {"samples": (Sample(0.0, 10, 0), Sample(1.0, 0, 0)), "start_rss": 10},
        {"samples": (Sample(0.0, 5, 0), Sample(1.0, 5, 0)), "start_rss": 5},
    ],
    ids=["no samples", "nothing", "one sample", "less memory than before", "nothing fetched"],
)
def test_reports_with_little_in_them_can_be_drawn(report, tmp_path, changes):
    path = tmp_path / "chart.png"
    draw(attrs.evolve(report, **changes), path)
    assert path.read_bytes().startswith(BEGINNINGS[".png"])


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("name", ["", "a b", "$_$", r"$\frac$", "a$b", "<&>"])
def test_a_checkpoint_of_any_name_can_be_drawn(report, tmp_path, name):
    path = tmp_path / "chart.svg"
    draw(attrs.evolve(report, checkpoint=Path("/", name)), path)
    shown = (name or "/").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f">{shown}, by disk<" in path.read_text(encoding="utf-8")


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing/chart.png", "folder.png", "chart.jpeg", "chart", "chart.png.txt"])
def test_where_no_chart_can_be_is_refused_beforehand(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ChartError, match=name):
        check_can_draw(tmp_path / name)


def test_an_unknown_kind_of_chart_says_which_are_known(tmp_path):
    with pytest.raises(ChartError, match=r"\.png, \.svg, \.pdf"):
        check_can_draw(tmp_path / "chart.bmp")


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("weights_core.chart.os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ChartError, match="cannot be written"):
        check_can_draw(tmp_path / "chart.png")


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("name", ["missing/chart.png", "folder.png"])
def test_a_chart_that_cannot_be_written_is_an_error(report, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ChartError, match=name):
        draw(report, tmp_path / name)


def test_without_matplotlib_the_extra_is_named(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "chart.png"
    for attempt in (lambda: check_can_draw(path), lambda: draw(report, path)):
        with pytest.raises(ExtraNotInstalledError, match=r"pip install 'weights-core\[plot\]'"):
            attempt()
    assert not path.exists()
