# SPDX-License-Identifier: Apache-2.0
"""The report of a load as plain values."""

import json
import threading

import attrs
import pytest
import torch

import weights_core as w
from weights_core import meter
from weights_core.testing import host_of, random_tensor, write_checkpoint


def a_load(folder, **options):
    """Load a linear layer from two shards and return the report."""
    tensors = {"weight": random_tensor(64, 128), "bias": random_tensor(64)}
    write_checkpoint(folder, tensors | {"extra": random_tensor(2)}, shards=2)
    return w.load(w.TorchEngine(torch.nn.Linear(128, 64)), folder, host=host_of(), **options)


@pytest.fixture
def report(tmp_path):
    return a_load(tmp_path / "toy")


def test_the_values_are_json_of_a_named_schema(report):
    values = report.as_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["schema"] == "weights.load-report/1"


def test_the_values_are_complete(report):
    assert set(report.as_dict()) == {
        "schema",
        "checkpoint",
        "component",
        "provider",
        "rank",
        "seconds",
        "bytes",
        "start_rss",
        "model_host_bytes",
        "peak_over_model",
        "tensors_written",
        "defaulted",
        "unused",
        "phases",
        "attempts",
        "decisions",
        "published",
        "notes",
        "samples",
    }


def test_the_values_are_those_of_the_report(report, tmp_path):
    values = report.as_dict()
    assert values["checkpoint"] == str(tmp_path / "toy")
    assert values["provider"] == "disk"
    assert values["rank"] == 0
    assert values["seconds"] == report.seconds
    assert values["bytes"] == report.nbytes
    assert values["peak_over_model"] == report.peak_over_model
    assert values["model_host_bytes"] == report.applied.host_bytes
    assert values["tensors_written"] == 2
    assert values["unused"] == ["extra"]
    assert values["published"] == []
    assert [attempt["plugin"] for attempt in values["attempts"]] == ["disk"]
    assert values["decisions"][0]["roles"] == ["source"]


def test_the_phases_add_up(report):
    values = report.as_dict()
    phases = values["phases"]
    assert [phase["name"] for phase in phases] == [phase.name for phase in report.phases]
    assert all(
        set(phase) == {"name", "began", "seconds", "nbytes", "peak_rss", "gb_per_s"} for phase in phases
    )
    assert sum(phase["seconds"] for phase in phases) == values["seconds"]
    assert sum(phase["nbytes"] for phase in phases) == values["bytes"] == 64 * 128 * 4 + 64 * 4
    begins = [phase["began"] for phase in phases]
    assert begins == sorted(begins)


def test_samples_go_forward_in_time(report):
    samples = report.as_dict()["samples"]
    assert samples
    assert all(len(sample) == 3 for sample in samples)
    assert [s[0] for s in samples] == sorted(s[0] for s in samples)
    assert [s[2] for s in samples] == sorted(s[2] for s in samples)
    assert samples[-1][2] == report.nbytes


def test_samples_that_two_threads_take_at_once_go_forward_in_time(monkeypatch):
    measured = meter.Meter(lambda: 0)
    other = threading.Thread(target=measured.sample)

    def overtaken():
        """Let the other thread take its sample while this one is half taken, if it may."""
        if other.ident is None:
            other.start()
            other.join(0.2)  # ends early unless the meter makes it wait for this sample
        return 0

    monkeypatch.setattr(meter, "rss", overtaken)
    measured.sample()
    other.join()
    seconds = [sample.seconds for sample in measured.samples]
    assert len(seconds) == 2
    assert seconds == sorted(seconds)


def test_unused_tensors_that_cannot_be_told_are_null(report):
    unknown = attrs.evolve(report, applied=attrs.evolve(report.applied, unused=None))
    assert unknown.as_dict()["unused"] is None


def test_what_was_published_and_defaulted_is_told(report):
    receipt = w.PublishReceipt(layout=w.Layout.FINAL, nbytes=7, detail="/run/x", close=lambda: None)
    changed = attrs.evolve(
        report,
        receipts=(receipt,),
        applied=attrs.evolve(report.applied, defaulted={"rotary": "computed"}),
        notes=("a note",),
    )
    values = json.loads(json.dumps(changed.as_dict()))
    assert values["published"] == [{"layout": "final", "bytes": 7, "detail": "/run/x"}]
    assert values["defaulted"] == {"rotary": "computed"}
    assert values["notes"] == ["a note"]
