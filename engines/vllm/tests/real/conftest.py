# SPDX-License-Identifier: Apache-2.0
"""Real engines in processes of their own, the models they load, and a broker in a folder of its own."""

import contextlib
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from weights_core.testing import waiting
from weights_gms import client

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
QUESTION = "What is the capital of France?"
IDS = [1, 5, 9, 44]
TP2 = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "threads": "0|1"}
ALONE = {"skip_tokenizer_init": True}


class Engine:
    """A process with an engine: `engine("load", model=…)` does a step and returns what came of it."""

    def __init__(self, log, environ):
        self.log = log
        self.channel, theirs = socket.socketpair()
        with theirs, log.open("w") as out:
            command = [sys.executable, str(HERE / "host.py"), str(theirs.fileno())]
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=environ,
                stdout=out,
                stderr=out,
                cwd=log.parent,
                start_new_session=True,
            )
        self.lines = self.channel.makefile("rw")

    def __call__(self, do, **what):
        """Do a step that must succeed."""
        self.begin(do, **what)
        told = self.answer()
        assert "ok" in told, (told, self.said()[-6000:])
        return told["ok"]

    def begin(self, do, **what):
        self.lines.write(json.dumps({"do": do, **what}) + "\n")
        self.lines.flush()

    def answer(self, seconds=600):
        ready, _, _ = select.select([self.channel], [], [], seconds)
        line = self.lines.readline() if ready else ""
        assert line, ("no answer", self.said()[-6000:])
        return json.loads(line)

    def said(self):
        return self.log.read_text(errors="replace")

    def kill(self):
        """Kill the process and its workers, each on the spot."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        self.lines.close()
        self.channel.close()


@pytest.fixture(scope="session")
def environ(tmp_path_factory):
    """The environment of engines: small, offline, with the tests' own plugins."""
    cache = tmp_path_factory.mktemp("cache")
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{HERE / 'plugins'}:{os.environ.get('PYTHONPATH', '')}",
        "TMPDIR": str(tmp_path_factory.mktemp("tmp")),  # vLLM leaves files there
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to look into workers
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "WEIGHTS_CONFIG": "",
        "XDG_CACHE_HOME": str(cache),
    }


@pytest.fixture(scope="session")
def start(tmp_path_factory, environ):
    """Start an engine's process; all are killed at the end."""
    folder, started, numbers = tmp_path_factory.mktemp("logs"), [], itertools.count()
    shared = Path("/dev/shm")
    before = set(shared.glob("psm_*"))

    def start():
        started.append(Engine(folder / f"{next(numbers)}.log", environ))
        return started[-1]

    yield start
    for engine in started:
        engine.kill()
        for group in set(re.findall(r"vllm_dist_[0-9a-f]{32}", engine.said())):
            for left in shared.glob(f"{group}*"):  # vLLM's ranks leave them behind
                left.unlink()
    for left in set(shared.glob("psm_*")) - before:  # and those that are killed, their queues
        if str(left) not in mapped():
            left.unlink(missing_ok=True)


def mapped():
    """Return the queues in shared memory that living processes have."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            found |= set(re.findall(r"/dev/shm/psm_\w+", maps.read_text()))
    return found


@pytest.fixture(scope="session")
def _hosts(start):
    return []


@pytest.fixture
def hosts(_hosts, start, where):
    """Return engines' processes that are kept from test to test, since to start one takes long.

    They give up what they hold before the broker is looked for.
    """
    taken = itertools.count()

    def host():
        number = next(taken)
        while len(_hosts) <= number or _hosts[number].process.poll() is not None:
            if len(_hosts) > number:
                del _hosts[number]
            _hosts.append(start())
        return _hosts[number]

    yield host
    for engine in _hosts:
        if engine.process.poll() is None:
            engine("close")


@pytest.fixture(scope="session")
def expected():
    """What vLLM's own loader leads to, by case: asked once.

    For `case, "linear"` that is how many elements the parameter of a linear layer is left with: none where
    vLLM packs these layers for the processor, all where it does not, for want of AVX-512.
    """
    return {}


def reference(expected, case, engine, question, **arguments):
    """Load by `--load-format auto`, and keep the answer."""
    if case not in expected:
        worker, *_ = engine("load", **arguments)["workers"]
        expected[case, "linear"] = worker["linear"]
        expected[case] = answers(engine, question)
        engine("close")
    return expected[case]


def refused(engine, why, **arguments):
    """Load what must not load: one error says why, and the process can go on."""
    engine.begin("load", **arguments, **ALONE)
    told = engine.answer()
    assert re.search(why, told.get("why", "")), told
    engine("close")


def answers(engine, question):
    told = engine("ask", question=question)
    assert len(told["ids"]) == len(told["logprobs"]) == 8
    return told


@pytest.fixture(scope="session")
def smollm2():
    """Real weights: SmolLM2-135M-Instruct, dequantised once into the demo's cache."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from smollm2 import checkpoint
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return str(checkpoint(ROOT / ".cache"))


def random_llama(folder, seed):
    import torch

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return str(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("llama"), 0)


@pytest.fixture(scope="session")
def quantised(tmp_path_factory, llama):
    """The same model in 8 bits, as compressed-tensors writes it."""
    import torch
    from safetensors.torch import load_file, save_file

    folder, made = tmp_path_factory.mktemp("quantised"), {}
    for file in Path(llama).glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            made[name] = tensor
            if name.endswith("_proj.weight"):
                scale = tensor.float().abs().amax(1, keepdim=True) / 127
                made[name] = (tensor.float() / scale).round().to(torch.int8)
                made[f"{name}_scale"] = scale.bfloat16()
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((Path(llama) / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def draft(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("draft"), 1)


@pytest.fixture
def where(tmp_path):
    """The socket of a broker of the test's own; none is left when it ends."""
    path = str(tmp_path / "run" / "broker.sock")
    yield path
    for pid in brokers_of(path):
        os.kill(pid, signal.SIGTERM)
    until(lambda: not brokers_of(path), 30)


@pytest.fixture
def gms(where):
    """Return extra config for the load format: one copy per node."""
    return lambda *below, **plugins: {
        "format": ["gms", *below],
        "config": {"gms": {"socket_path": where, "timeout": 120.0}, **plugins},
    }


@pytest.fixture
def status(where):
    """Return what the broker says of itself, or None if there is none."""
    return lambda: client.ask_once(client.Endpoint(where), {"op": "status"})


def workers_of(engine):
    """Return the processes that an engine's process has started and that still run."""
    found = []
    for pid in waiting.running():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            ours = int(session) == engine.process.pid != pid and state != "Z"
            if ours and b"resource_tracker" not in command:  # it goes with the engine's process
                found.append(pid)
    return found


def brokers_of(where):
    """Return the processes that are brokers of a socket."""
    return waiting.running("weights_gms.broker", where)


def until(done, seconds=180):
    """Wait until `done()` is true; an engine takes its time to start."""
    return waiting.until(done, seconds, pause=0.05)
