# SPDX-License-Identifier: Apache-2.0
"""vLLM's ranks read their own shards from disk: what was cut, what vLLM's parameters were saved as."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from weights_core import Layout
from weights_core.testing.parallel import LlamaShape, TensorParallelEngine
from weights_presharded import save

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ALONE, IDS, QUESTION, ROOT, TP2, answers, reference, refused, until, workers_of

sys.path.pop(0)

COMMAND = "import sys; from weights_core.cli import main; sys.exit(main())"


@pytest.fixture(scope="session")
def plan(tmp_path_factory):
    """The plan that docs/vllm.md gives for a Llama."""
    (text,) = re.findall(r"```toml\n(schema = .*?)```", (ROOT / "docs/vllm.md").read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("plan") / "vllm-llama.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="session")
def cut(tmp_path_factory, environ):
    """Return `weights shard` as a function."""

    def cut(model, size, plan):
        out = tmp_path_factory.mktemp("cut") / "out"
        given = ["shard", model, "--tp", str(size), "--out", str(out), "--plan", plan]
        subprocess.run([sys.executable, "-c", COMMAND, *given], env=environ, check=True, timeout=300)
        return out

    return cut


def saving(folder, model):
    """Return settings that have an engine save its shards, and where: ours, and by vLLM's own writer."""
    to, state = folder / "saved", folder / "state"
    for made in (to, state):
        shutil.copytree(model, made, ignore=lambda _, names: [n for n in names if "safetensors" in n])
    return {"format": "disk", "config": {"saves": {"to": str(to), "vllm": str(state)}}}, to, state


def payload(folder, pattern):
    """The bytes of the tensors in a rank's files, as the safetensors library sees them."""
    total = 0
    for file in folder.glob(pattern):
        with safe_open(file, "pt") as opened:
            total += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("case", ["tied", "tp2"])
def test_ranks_read_their_own_files(hosts, expected, smollm2, llama, cut, plan, tmp_path, case):
    one, size = hosts(), 2 if case == "tp2" else 1
    model, question, more = (llama, IDS, {**TP2, **ALONE}) if case == "tp2" else (smollm2, QUESTION, {})
    due = reference(expected, "tp2" if case == "tp2" else "smollm2", one, question, model=model, **more)
    extra, saved, state = saving(tmp_path, model)
    one("load", model=model, extra=extra, **more)
    assert answers(one, question) == due
    one("close")
    folders = {
        "cut": (cut(model, size, plan), "rank-{rank}-of-{size}/*.safetensors"),
        "saved": (saved, "rank-{rank}-of-{size}/*.safetensors"),
        "state": (state, "model-rank-{rank}-part-*.safetensors"),
    }
    for name, (folder, files) in folders.items():
        workers = one("load", model=str(folder), extra={}, **more)["workers"]
        assert [worker["provider"] for worker in workers] == ["presharded"] * size, name
        for rank, worker in enumerate(workers):
            assert worker["bytes"] == payload(folder, files.format(rank=rank, size=size)) > 0, name
        notes = "\n".join(note for worker in workers for note in worker["notes"])
        assert ("of vLLM's sharded state" if name == "state" else "is verified as it is read") in notes
        assert answers(one, question) == due, name
        one("close")


def test_shards_that_are_not_this_engines_are_one_error(hosts, expected, llama, cut, plan, tmp_path):
    one = hosts()
    due = reference(expected, "tp1", one, IDS, model=llama, **ALONE)
    extra, saved, state = saving(tmp_path, llama)
    one("load", model=llama, extra=extra, **ALONE)
    late = tmp_path / "late"
    shutil.copytree(state, late, ignore=lambda _, names: [n for n in names if "safetensors" in n])
    one("save_state", folder=str(late))  # vLLM's own way, after its post-load
    one("close")
    whole = tmp_path / "whole.toml"
    whole.write_text('schema = "weights.plan/1"\n[[rule]]\nmatch = "**"\n')
    final = tmp_path / "final"
    shutil.copytree(llama, final, ignore=lambda _, names: [n for n in names if "safetensors" in n])
    save(TensorParallelEngine(LlamaShape()), final, Layout.FINAL)
    short = tmp_path / "short"
    shutil.copytree(saved, short)
    (file,) = short.glob("rank-*/*.safetensors")
    os.truncate(file, file.stat().st_size - 1)

    extra = {"format": "presharded"}
    refused(one, r"cut for .*2.*needs", model=str(cut(llama, 2, plan)), extra=extra)
    refused(one, "dtype: need 'F32', got 'BF16'", model=str(saved), extra=extra, dtype="float32")
    refused(one, r"is BF16 \[.*\], need F32", model=str(state), extra=extra, dtype="float32")
    refused(
        one, "go by the names of vLLM's own parameters", model=str(cut(llama, 1, str(whole))), extra=extra
    )
    if expected["tp1", "linear"]:  # nothing is packed, so what vLLM saves is complete
        one("load", model=str(late), extra=extra, **ALONE)
        assert answers(one, IDS) == due
        one("close")
    else:
        refused(one, r"missing \d+ tensors: model\.layers\.0", model=str(late), extra=extra)
    refused(one, "final", model=str(final), extra=extra)
    refused(one, f"{re.escape(file.name)}.*truncated", model=str(short), extra=extra)

    one("load", model=str(saved), extra=extra, **ALONE)
    assert answers(one, IDS) == due


def ended(engine, *words):
    """One load on two ranks failed: the log says why, and no worker is left."""
    told = engine.answer(180)
    assert "initialization failed" in told.get("why", ""), told
    for word in words:
        assert re.search(word, engine.said()), engine.said()[-6000:]
    until(lambda: not workers_of(engine), 30)
    engine("close")


@pytest.mark.parametrize("size", [1, 4])
def test_a_folder_that_was_cut_for_another_number_of_ranks(start, llama, cut, plan, size):
    one, folder = start(), cut(llama, size, plan)
    one.begin("load", model=str(folder), extra={}, **TP2, **ALONE)
    ended(one, rf"{re.escape(str(folder))} was cut for .*{size}.*needs .*2")


def test_ranks_end_together(start, llama, cut, plan, tmp_path):
    one, arguments = start(), {**TP2, **ALONE}

    # one rank's file was cut short
    broken = cut(llama, 2, plan)
    (file,) = broken.glob("rank-1-of-2/*.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    one.begin("load", model=str(broken), extra={}, **arguments)
    ended(one, rf"rank-1-of-2/{re.escape(file.name)}.*truncated")

    # one worker is killed while it reads
    marker = tmp_path / "half"
    extra = {"format": "stalls", "config": {"stalls": {"marker": str(marker), "rank": 1}}}
    one.begin("load", model=llama, extra=extra, **arguments)
    until(marker.exists)
    assert len(workers_of(one)) >= 2
    os.kill(int(marker.read_text()), signal.SIGKILL)
    ended(one)
