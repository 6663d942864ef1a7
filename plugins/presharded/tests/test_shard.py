# SPDX-License-Identifier: Apache-2.0
"""`weights shard`: complete at once or not at all, resumable at any point, the same bytes each time."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner

from weights_core.checkpoint import find
from weights_core.cli import main
from weights_core.digest import checkpoint_digest, content_digest
from weights_core.errors import CheckpointError
from weights_core.testing import write_checkpoint
from weights_presharded import converting, read_plan, shard
from weights_presharded.manifest import JOURNAL, READY, Ready

WHOLE = 'schema = "weights.plan/1"\n[[rule]]\nmatch = "**"\n'


@pytest.fixture
def source(llama, tmp_path):
    return llama.checkpoint(tmp_path / "source", shards=2)


@pytest.fixture
def plan(llama, tmp_path):
    return llama.plan(tmp_path)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def cli(*arguments):
    return CliRunner().invoke(main, ["shard", *map(str, arguments)])


# What is made -------------------------------------------------------------------------------------


def test_the_command_makes_a_folder_and_says_what_it_did(source, plan, tmp_path):
    out = tmp_path / "out"
    result = cli(source, "--tp", 2, "--out", out, "--plan", plan)
    assert result.exit_code == 0, result.output
    assert "14 tensors for each of 2 ranks" in result.stdout
    assert "copied beside them: config.json, tokenizer.json" in result.stdout
    assert contents(out).keys() == {
        READY,
        "config.json",
        "tokenizer.json",
        "weights-digests.json",
        *(
            f"rank-{r}-of-2/{name}"
            for r in (0, 1)
            for name in ("manifest.json", "model-00001-of-00001.safetensors")
        ),
    }
    ready = Ready.read(out)
    due = content_digest(find(source)).value
    assert (ready.digest, checkpoint_digest(out).value) == (due, due)
    assert due in result.stdout
    assert json.loads((out / READY).read_bytes())["origin"]["plan"] == plan.read_text()


def test_files_beside_the_weights_are_copied_and_weights_are_not(source, plan, tmp_path):
    for name in ("tokenizer.model", "modeling_custom.py", "LICENSE", "chat_template.jinja", "merges.txt"):
        (source / name).write_text(name)
    for name in ("pytorch_model.bin", "model.gguf", "model.onnx", ".hidden", "pytorch_model.bin.index.json"):
        (source / name).write_text(name)
    (source / JOURNAL).write_text("another's")
    (source / "linked.json").symlink_to(source / "config.json")
    (source / "folder").mkdir()
    made = shard(source, tmp_path / "out", size=1, plan=read_plan(plan))
    assert set(made.copied) == {
        *("config.json", "tokenizer.json", "tokenizer.model", "modeling_custom.py", "LICENSE", "merges.txt"),
        *("chat_template.jinja", "linked.json"),
    }
    assert not (tmp_path / "out/linked.json").is_symlink()
    assert (tmp_path / "out/linked.json").read_bytes() == (source / "config.json").read_bytes()


def test_pickled_checkpoints_are_cut_too(llama, plan, source, tmp_path):
    pickled = llama.checkpoint(tmp_path / "pickled", kind="bin", shards=2)
    for where in (source, pickled):
        shard(where, tmp_path / f"out-{where.name}", size=2, plan=read_plan(plan), threads=2)
    for rank in range(2):
        name = f"rank-{rank}-of-2/model-00001-of-00001.safetensors"
        manifests = [
            json.loads((tmp_path / f"out-{w}/rank-{rank}-of-2/manifest.json").read_bytes())["tensors"]
            for w in ("source", "pickled")
        ]
        assert manifests[0] == manifests[1]
        assert (tmp_path / "out-source" / name).stat().st_size == (
            tmp_path / "out-pickled" / name
        ).stat().st_size


def test_a_digest_that_is_given_is_believed_and_nothing_hashed(source, plan, tmp_path, mocker):
    hashed = mocker.patch.object(converting, "content_digest", autospec=True)
    given = "sha256:" + "ab" * 32
    assert cli(source, "--tp", 1, "--out", tmp_path / "out", "--plan", plan, "--digest", given).exit_code == 0
    assert checkpoint_digest(tmp_path / "out").value == given
    hashed.assert_not_called()


def test_empty_and_odd_tensors(tmp_path):
    tensors = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7.0),
        "odd": torch.arange(3, dtype=torch.uint8),
    }
    source = write_checkpoint(tmp_path / "source", tensors)
    (tmp_path / "plan.toml").write_text(WHOLE)
    shard(source, tmp_path / "out", size=2, plan=read_plan(tmp_path / "plan.toml"))
    from safetensors.torch import load_file

    read = load_file(tmp_path / "out/rank-1-of-2/model-00001-of-00001.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


# Interrupted --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from weights_presharded import committing, read_plan, shard

steps, count = int(sys.argv[1]), 0

def step(frame, event, argument):
    global count
    if event == "call" and frame.f_globals.get("__name__", "").startswith("weights_presharded."):
        count += 1
        if count == steps:
            os.kill(os.getpid(), signal.SIGKILL)

committing.COMMIT = 4096
rules = read_plan(Path(sys.argv[4]))
import threading
threading.setprofile(step)
sys.setprofile(step)
shard(Path(sys.argv[2]), Path(sys.argv[3]), size=2, plan=rules, max_file=20_000, threads=1, resume=True)
sys.setprofile(None)
print(count)
"""


def test_killed_at_any_point_a_second_run_completes_it_with_the_same_bytes(source, plan, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def run(steps, out):
        command = [sys.executable, script, str(steps), source, out, plan]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    whole = run(0, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    due, total = contents(tmp_path / "whole"), int(whole.stdout)
    resumed = set()
    for number in range(1, 13):
        out = tmp_path / f"out-{number}"
        steps = total * number // 13
        assert run(steps, out).returncode == -signal.SIGKILL
        assert not (out / READY).exists() or contents(out).keys() >= due.keys()
        made = shard(source, out, size=2, plan=read_plan(plan), max_file=20_000, resume=True)
        assert contents(out) == due, steps
        resumed.add(made.resumed)
    assert len(resumed) > 3  # it went on from where it was, not from the beginning


def test_a_run_that_ends_in_an_error_is_resumed(source, plan, tmp_path, mocker):
    real = converting.Cutter.cut

    def torn(self, output, files, offset):
        if cuts.call_count > 3:
            raise CheckpointError("the disk is on fire")
        return real(self, output, files, offset)

    cuts = mocker.patch.object(converting.Cutter, "cut", autospec=True, side_effect=torn)
    with pytest.raises(CheckpointError, match="on fire"):
        shard(source, tmp_path / "out", size=2, plan=read_plan(plan), threads=1)
    mocker.stopall()
    again = cli(source, "--tp", 2, "--out", tmp_path / "out", "--plan", plan)
    assert again.exit_code == 1
    assert "--resume goes on" in again.stderr
    assert cli(source, "--tp", 2, "--out", tmp_path / "out", "--plan", plan, "--resume").exit_code == 0
    shard(source, tmp_path / "whole", size=2, plan=read_plan(plan))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def journalled(source, plan, out):
    """Leave a folder as a run leaves it that was killed before its last step."""
    shard(source, out, size=2, plan=read_plan(plan), max_file=20_000)
    ready = json.loads((out / READY).read_bytes())
    manifests = [json.loads((out / r["folder"] / "manifest.json").read_bytes()) for r in ready["ranks"]]
    job = {"schema": "weights.sharding/1", **_key_of(source, plan)}
    done = {name: [m["tensors"][name][3] for m in manifests] for name in manifests[0]["tensors"]}
    lines = [json.dumps(line, separators=(",", ":")) for line in (job, {"done": done})]
    (out / JOURNAL).write_text("\n".join(lines) + "\n")
    (out / READY).unlink()
    return out


def _key_of(source, plan):
    from weights_core.shards import open_shards

    found = find(source)
    return converting._Job.of(found, open_shards(found), source, 2, read_plan(plan), 20_000).key


def resume(source, plan, out, **how):
    return shard(source, out, size=2, plan=read_plan(plan), max_file=20_000, resume=True, **how)


def test_what_was_recorded_is_not_written_again(source, plan, tmp_path):
    due = shard(source, tmp_path / "due", size=2, plan=read_plan(plan), max_file=20_000)
    out = journalled(source, plan, tmp_path / "out")
    assert resume(source, plan, out).resumed == due.nbytes
    assert contents(out) == contents(tmp_path / "due")


def append(path, text):
    with path.open("a") as file:
        file.write(text)


LEFT = {
    "a torn line": lambda out: append(out / JOURNAL, '{"done": {"embed": ["xxh3'),
    "a file is gone": lambda out: next((out / "rank-1-of-2").glob("*.safetensors")).unlink(),
    "a file was cut": lambda out: os.truncate(next((out / "rank-0-of-2").glob("*.safetensors")), 100),
    "a torn journal": lambda out: os.truncate(out / JOURNAL, 10),
    "no manifest": lambda out: (out / "rank-0-of-2/manifest.json").unlink(),
    "a part of a small file": lambda out: (out / ".config.json.123.part").write_text("{"),
    "a part of a manifest": lambda out: (out / "rank-1-of-2/.manifest.json.9.part").write_text("{"),
}


@pytest.mark.parametrize("left", LEFT)
def test_whatever_was_left_behind_is_completed(source, plan, tmp_path, left):
    shard(source, tmp_path / "due", size=2, plan=read_plan(plan), max_file=20_000)
    out = journalled(source, plan, tmp_path / "out")
    LEFT[left](out)
    resume(source, plan, out)
    assert contents(out) == contents(tmp_path / "due")


def test_a_folder_that_is_complete_stays_as_it_is(source, plan, tmp_path):
    out = tmp_path / "out"
    shard(source, out, size=2, plan=read_plan(plan))
    before = contents(out)
    (out / JOURNAL).write_text("")
    made = shard(source, out, size=2, plan=read_plan(plan), resume=True)
    assert made.resumed == made.nbytes
    with pytest.raises(CheckpointError, match="is complete already: it was cut for 2 ranks"):
        shard(source, out, size=2, plan=read_plan(plan))
    with pytest.raises(CheckpointError, match="was made of another checkpoint or plan"):
        shard(source, out, size=4, plan=read_plan(plan), resume=True)
    assert contents(out) == before


@pytest.mark.parametrize("changed", ["tp", "plan", "source", "file size"])
def test_another_conversion_is_not_gone_on_with(source, plan, tmp_path, changed):
    out = journalled(source, plan, tmp_path / "out")
    how = {"size": 2, "max_file": 20_000}
    if changed == "tp":
        how["size"] = 1
    elif changed == "plan":
        plan.write_text(WHOLE)
    elif changed == "source":
        os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
    else:
        how["max_file"] = 30_000
    with pytest.raises(CheckpointError, match=f"begun with another .*{changed}"):
        shard(source, out, plan=read_plan(plan), resume=True, **how)


# Refused ------------------------------------------------------------------------------------------


def test_two_runs_do_not_meet(source, plan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / JOURNAL, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is converting"):
            shard(source, out, size=1, plan=read_plan(plan), resume=True)


def test_a_folder_with_other_things_is_left_alone(source, plan, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    before = set(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match="is or holds the checkpoint itself"):
        shard(source, tmp_path, size=1, plan=read_plan(plan))
    with pytest.raises(CheckpointError, match="is or holds the checkpoint itself"):
        shard(source, source, size=1, plan=read_plan(plan))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="holds other files"):
        shard(source, tmp_path / "other", size=1, plan=read_plan(plan))
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]
    assert set(os.listdir(tmp_path)) == before | {"other"}


@pytest.mark.parametrize("fault", ["cut_short", "removed"])
def test_a_damaged_checkpoint_makes_nothing(make_checkpoint, tmp_path, fault):
    (tmp_path / "plan.toml").write_text(WHOLE)
    source = make_checkpoint(fault=fault)
    result = cli(source, "--tp", 1, "--out", tmp_path / "out", "--plan", tmp_path / "plan.toml")
    assert result.exit_code == 1
    assert "CheckpointError" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_changes_meanwhile_is_an_error(source, plan, tmp_path, mocker):
    real = converting.Cutter.cut

    def meddling(self, output, files, offset):
        for file in source.glob("*.safetensors"):
            os.utime(file, ns=(1, 1))
        return real(self, output, files, offset)

    mocker.patch.object(converting.Cutter, "cut", autospec=True, side_effect=meddling)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        shard(source, tmp_path / "out", size=2, plan=read_plan(plan), digest="sha256:" + "0" * 64)
    assert not (tmp_path / "out" / READY).exists()


def test_a_full_disk_is_one_error_and_can_be_resumed(source, plan, tmp_path):
    """The limit on file sizes stands for the disk's end: the system says EFBIG in place of ENOSPC."""
    script = "import signal, resource, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    script += (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); from weights_core.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "shard", source, "--tp", "2", "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--plan", plan], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "model-00001-of-00001.safetensors: cannot be written: File too large" in done.stderr
    assert cli(source, "--tp", 2, "--out", tmp_path / "out", "--plan", plan, "--resume").exit_code == 0


def test_too_little_room_is_said_before_anything_is_written(source, plan, tmp_path, mocker):
    usage = mocker.patch("shutil.disk_usage", autospec=True)
    usage.return_value.free = 1000
    with pytest.raises(CheckpointError, match=r"GB are needed, and 0\.00 GB are free"):
        shard(source, tmp_path / "out", size=2, plan=read_plan(plan))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--tp", 0), 2, "--tp"),
        (("--tp", 5, "--plan", "PLAN"), 2, "can't be cut into 5 equal parts"),
        (("--tp", 1, "--plan", "absent.toml"), 2, "absent.toml: No such file"),
        (("--tp", 1, "--plan", "PLAN", "--digest", "abc"), 2, "--digest: 'abc' is no digest"),
        (("--tp", 1), 2, "give --plan FILE"),
    ],
)
def test_wrong_use_ends_with_2_and_makes_nothing(source, plan, tmp_path, arguments, code, says):
    given = [plan if one == "PLAN" else one for one in arguments]
    result = cli(source, "--out", tmp_path / "out", *given)
    assert result.exit_code == code
    assert says in result.stderr
    assert not (tmp_path / "out" / READY).exists()


def test_terminated_it_ends_with_143_and_is_resumed(llama, plan, tmp_path):
    source = write_checkpoint(tmp_path / "source", {f"w{i}": torch.zeros(1 << 20) for i in range(64)})
    (tmp_path / "whole.toml").write_text(WHOLE)
    out = tmp_path / "out"
    script = "import sys; from weights_core.cli import main; main()"
    command = [sys.executable, "-c", script, "shard", source, "--tp", "4", "--out", out]
    process = subprocess.Popen(
        [*command, "--plan", tmp_path / "whole.toml"], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("rank-3-of-4/*.safetensors")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143, said
    assert not (out / READY).exists()
    shard(source, out, size=4, plan=read_plan(tmp_path / "whole.toml"), resume=True)
    assert (out / READY).exists()


# Memory -------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """Of 400 MB, in one tensor cut in its second dimension and one in its first, little is ever held."""
    tensors = {"down": torch.zeros(1024, 50_000), "up": torch.zeros(50_000, 1024)}
    write_checkpoint(tmp_path / "source", tensors)
    del tensors
    (tmp_path / "plan.toml").write_text(
        'schema = "weights.plan/1"\n[[rule]]\nmatch = "down"\ncut = 1\n[[rule]]\nmatch = "up"\ncut = 0\n'
    )
    code = """
import resource, sys, torch
from pathlib import Path
from weights_presharded import read_plan, shard
folder = Path(sys.argv[1])
plan = read_plan(folder / "plan.toml")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shard(folder / "source", folder / "out", size=2, plan=plan)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 100 << 20
