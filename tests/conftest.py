# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECTS = [
    ROOT / "core",
    *sorted((ROOT / "plugins").iterdir()),
    *sorted((ROOT / "engines").iterdir()),
    ROOT / "tests/plugins/weights-probe",
]


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def smollm2():
    """Real weights: SmolLM2-135M-Instruct, dequantised once into the demo's cache."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from smollm2 import checkpoint
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return checkpoint(ROOT / ".cache")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder with the wheels and sdists of all our distributions and of a third party's."""
    dist = tmp_path_factory.mktemp("dist")
    for project in PROJECTS:
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, project)
    return dist


@pytest.fixture(scope="session")
def clean(tmp_path_factory, built):
    """The bin folder of a new environment with our wheels; others' packages are seen by links."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    third_parties = home / "third-parties"
    third_parties.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "weights" not in entry.name and entry.suffix != ".pth":
            (third_parties / entry.name).symlink_to(entry)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(purelib) / "third-parties.pth").write_text(f"{third_parties}\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *sorted(built.glob("*.whl")))
    return home / "bin"
