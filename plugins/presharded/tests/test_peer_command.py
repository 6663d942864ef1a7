# SPDX-License-Identifier: Apache-2.0
"""`weights peers`: what runs, as a table and as JSON."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from weights_core.testing.waiting import until


def weights(*arguments, **environ):
    done = subprocess.run(
        [Path(sys.executable).parent / "weights", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environ,
    )
    return done.returncode, done.stdout, done.stderr


def test_sources_are_listed(workers, checkpoint, registry, tmp_path):
    assert weights("peers", "--registry", registry)[1] == f"no source is in the directory {registry}\n"
    source = workers()
    source("load", checkpoint=checkpoint)
    code, out, _ = weights("peers", "--registry", registry)
    assert code == 0
    assert out.startswith("1 source in the directory ")
    assert re.search(
        rf"\w{{8}}  pid {source.pid}, cpu: sharded, \d.\d MB, \d+ tensors, 0 of 4 served, 0 before", out
    )
    assert "tensor-parallel, 1, llama, BF16, tp 0 of 1" in out
    workers(source=False)("load", checkpoint=checkpoint)
    settings = tmp_path / "weights.toml"
    settings.write_text(f'[presharded]\nregistry = "{registry}"\n')

    def listed():
        return json.loads(weights("peers", "--json", WEIGHTS_CONFIG=str(settings))[1])

    told = listed()
    assert told["schema"] == "weights.peers/1"
    (one,) = told["sources"]
    assert (one["pid"], one["stale"], one["identity"]["layout"]) == (source.pid, False, "sharded")
    until(lambda: listed()["sources"][0]["served"] == 1)
    source.signal(signal.SIGSTOP)
    entry = next(Path(registry).glob("*.json"))
    os.utime(entry, (0, 0))
    assert listed()["sources"][0]["stale"]
    assert "stale, silent for" in weights("peers", "--registry", registry)[1]


def test_a_registry_that_cannot_be_reached_is_one_line(tmp_path):
    code, out, err = weights("peers", "--registry", "redis://:secret@127.0.0.1:1/0")
    assert (code, out) == (2, "") or code != 0
    assert "Redis at redis://127.0.0.1:1/0" in err
    assert "secret" not in err
    assert "Traceback" not in err
    code, _, err = weights("peers", "--registry", "carrier://pigeon")
    assert code != 0
    assert "is of no kind that is known" in err


def test_the_program_in_the_documentation_serves_itself(tmp_path):
    """Two terminals, as the page says, and nothing set but where this test's folder is."""
    page = (Path(__file__).parents[3] / "docs" / "presharded.md").read_text()
    (program,) = re.findall(r"```python\n(# engine\.py.*?)```", page, re.DOTALL)
    (tmp_path / "engine.py").write_text(program)
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    running = []
    try:
        for pulled in (False, True):
            process = subprocess.Popen(
                [sys.executable, "engine.py"],
                cwd=tmp_path,
                env=os.environ | environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            running.append(process)
            said = list(itertools.takewhile(lambda line: "serving until" not in line, process.stdout))
            assert said[0].endswith("by presharded\n") == pulled, said
        code, out, _ = weights("peers", **environ)
        assert code == 0
        assert out.startswith(f"2 sources in the directory {tmp_path}/weights-presharded\n")
        for process in running:
            process.communicate("\n", timeout=60)
            assert process.returncode == 0
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert os.listdir(tmp_path / "weights-presharded") == ["token"]
