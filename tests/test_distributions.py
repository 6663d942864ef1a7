# SPDX-License-Identifier: Apache-2.0
"""The distributions build, install into a clean environment, and find each other there."""

import subprocess
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
OURS = {
    tomllib.loads((project / "pyproject.toml").read_text())["project"]["name"]: project
    for project in (
        ROOT / "core",
        *sorted((ROOT / "plugins").iterdir()),
        *sorted((ROOT / "engines").iterdir()),
    )
}


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", OURS)
def test_wheel_and_sdist_hold_what_they_should(built, name):
    stem = name.replace("-", "_")
    with zipfile.ZipFile(next(built.glob(f"{stem}-*.whl"))) as wheel:
        files = wheel.namelist()
        metadata = Parser().parsestr(wheel.read(next(f for f in files if f.endswith("METADATA"))).decode())
    assert f"{stem}/py.typed" in files
    assert any(f.endswith("licenses/LICENSE") for f in files)
    assert not any("tests/" in f for f in files)
    assert metadata["License-Expression"] == "Apache-2.0"
    needs = metadata.get_all("Requires-Dist")
    assert "torch>=2.6" in needs
    assert not any("==" in need.partition(";")[0] for need in needs)
    if name != "weights-core":
        assert "weights-core<0.2,>=0.1" in needs
    with tarfile.open(next(built.glob(f"{stem}-*.tar.gz"))) as sdist:
        members = [m.name for m in sdist.getmembers()]
    assert any(f"/src/{stem}/" in m for m in members)
    assert any("/tests/" in m for m in members)
    assert any(m.endswith("/LICENSE") for m in members)


def test_what_the_wheels_require_is_there(clean):
    checked = subprocess.run([clean / "python", "-m", "pip", "check"], capture_output=True, text=True)
    assert not [line for line in checked.stdout.splitlines() if line.startswith("weights-")]


def test_plugins_are_found_by_their_entry_points(clean):
    lines = run(clean / "weights", "plugins").splitlines()
    assert [line.split()[0] for line in lines] == ["consumable", "disk", "gms", "parallel_shards", "probe"]
    assert all(" ok" in line for line in lines)
    where = run(clean / "python", "-c", "import weights_core; print(weights_core.__file__)")
    assert str(clean.parent) in where


def test_a_third_partys_plugin_runs_in_every_hook(clean, tmp_path):
    tensors = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    torch.save(tensors, tmp_path / "weights.probe")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    log = tmp_path / "log"
    config = tmp_path / "weights.toml"
    config.write_text(f'[probe]\nlog = "{log}"\n')
    code = f"""
import torch, weights_core as w
with torch.device("meta"):
    model = torch.nn.Linear(3, 2)
report = w.load(w.TorchEngine(model), {str(tmp_path)!r})
assert report.provider == "probe", report
assert "weights-probe 1.0" in str(report)
saved = torch.load({str(tmp_path / "weights.probe")!r})
assert torch.equal(model.weight, saved["weight"]) and torch.equal(model.bias, saved["bias"])
report.lease.close()
"""
    run(clean / "python", "-c", code, env={"WEIGHTS_CONFIG": str(config), "PATH": "/usr/bin:/bin"})
    assert log.read_text().splitlines() == [
        "resolve_format",
        "load_weights",
        "before_post_load probe",
        "publish 2",
        "cleanup ready",
        "withdrawn",
    ]


def test_a_blocked_plugin_takes_no_part(clean, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    out = run(
        clean / "weights",
        "explain",
        tmp_path,
        env={"WEIGHTS_BLOCK": "probe,gms,parallel_shards", "PATH": "/usr/bin:/bin"},
    )
    assert "sources, in order: disk" in out
    assert out.count(": blocked") == 3


def test_every_license_is_the_same():
    texts = {(project / "LICENSE").read_text() for project in (ROOT, *OURS.values())}
    assert len(texts) == 1
