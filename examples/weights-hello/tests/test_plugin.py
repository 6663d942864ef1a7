# SPDX-License-Identifier: Apache-2.0
"""What is this plugin's own: what it takes, what it refuses, and how it is configured."""

import numpy as np
import pytest
import torch

import weights_core as w
from weights_hello.plugin import HelloPlugin


@pytest.fixture
def archive(tmp_path):
    np.savez(tmp_path / "model.npz", weight=np.ones((2, 3), np.float32), bias=np.zeros(2, np.float32))
    return tmp_path / "model.npz"


def test_it_loads_a_model(archive, weights_host, hook_recorder):
    host = weights_host(hello=HelloPlugin)
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    report = w.load(w.TorchEngine(model), archive, host=host)
    assert report.provider == "hello"
    assert torch.equal(model.weight, torch.ones(2, 3))
    assert hook_recorder.names("hello") == ["resolve_format", "load_weights"]


def test_it_leaves_other_files_to_others(tmp_path, weights_host, make_checkpoint):
    host = weights_host(hello=HelloPlugin)
    plan = w.explain(w.TorchEngine(torch.nn.Linear(3, 2)), make_checkpoint({"w": torch.ones(2)}), host=host)
    assert plan.sources == ("disk",)


def test_an_array_of_objects_is_refused_by_name(tmp_path, weights_host, fake_engine):
    np.savez(tmp_path / "model.npz", **{"layer.weight": np.array([{}, {}], object)})
    engine = fake_engine({"layer.weight": torch.zeros(2)})
    with pytest.raises(w.errors.CheckpointError, match=r"model\.npz, tensor 'layer\.weight'"):
        w.load(engine, tmp_path / "model.npz", host=weights_host(hello=HelloPlugin))


def test_a_wrong_checksum_is_an_error_if_asked_for(archive, weights_host, fake_engine):
    raw = bytearray(archive.read_bytes())
    raw[raw.index(b"\x00\x00\x80\x3f")] ^= 1  # a bit of the first 1.0
    archive.write_bytes(raw)
    engine = fake_engine({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    host = weights_host(config={"hello": {"verify": True}}, hello=HelloPlugin)
    with pytest.raises(w.errors.CheckpointError, match=r"tensor 'weight'.*CRC"):
        w.load(engine, archive, format=["hello"], host=host)
