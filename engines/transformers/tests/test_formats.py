# SPDX-License-Identifier: Apache-2.0
"""The plugins do for a Transformers model what they do for others."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import weights_core as w
from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.errors import (
    CheckpointError,
    CoverageError,
    FormatUnresolvedError,
    IdentityMismatchError,
    LoadError,
)
from weights_core.shards import open_shards
from weights_core.testing import host_of
from weights_presharded import shard
from weights_transformers import from_pretrained, load, open_engine

MODELS = ["llama", "qwen3-tied", "mixtral"]
READER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from weights_transformers import load
path, where, tokens = sys.argv[1:]
loaded = load(AutoModelForCausalLM, path, format="gms", config={"gms": {"socket_path": where, "mode": "ro"}})
with torch.no_grad():
    answer = loaded.model(torch.tensor(json.loads(tokens)))[0]
smaps = open("/proc/self/smaps").read().split("Name:")[0]
shared = own = 0
inside = False
for line in smaps.splitlines():
    if "-" in line.split()[0] and not line.startswith(" "):
        inside = "memfd:weights" in line
    elif inside and line.startswith("Private"):
        own += int(line.split()[1]) * 1024
    elif inside and line.startswith("Rss"):
        shared += int(line.split()[1]) * 1024
print(json.dumps({"provider": loaded.report.provider, "bytes": loaded.report.nbytes, "own": own,
                  "shared": shared, "answer": answer.float().tolist(), "notes": loaded.report.notes}))
"""


@pytest.mark.parametrize("name", MODELS)
def test_consumable_frees_every_source(saved, logits, name):
    path = saved(name)
    engine = open_engine(AutoModelForCausalLM, path)
    with w.open_session(engine, path, "parallel_shards") as session:
        session.resolve()
        weights = session.load()
        assert type(weights).__name__ == "ConsumableWeights"
        total = sum(meta.nbytes for meta in weights.metas.values())
        session.apply()
        assert len(weights) == 0
        assert weights.consumed_bytes == total
        assert weights.live_bytes == 0
        session.publish(w.Layout.SHARDED)
        session.post_load()
        report = session.finish()
    assert not [note for note in report.notes if "consumed" in note]
    assert torch.equal(logits(engine.model), logits(AutoModelForCausalLM.from_pretrained(path)))


@pytest.mark.parametrize("name", MODELS)
def test_gms_shares_one_copy(saved, logits, vault, name):
    path = saved(name)
    theirs = logits(AutoModelForCausalLM.from_pretrained(path))
    writer = load(AutoModelForCausalLM, path, format=["gms", "parallel_shards"], config=vault)
    assert writer.report.receipts
    reader = load(AutoModelForCausalLM, path, format="gms", config=vault)
    assert not reader.report.receipts
    assert reader.report.nbytes == 0
    for model in (writer.model, reader.model):
        assert torch.equal(logits(model), theirs)
    generator = torch.Generator().manual_seed(5)
    tokens = json.dumps(torch.randint(0, 199, (2, 17), generator=generator).tolist())
    command = [sys.executable, "-c", READER, str(path), vault["gms"]["socket_path"], tokens]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["provider"] == "gms"
    assert told["bytes"] == 0
    assert torch.equal(torch.tensor(told["answer"]), theirs.float())
    assert told["shared"] > 0
    assert told["own"] == 0  # every page of the weights is the writer's
    reader.report.lease.close()
    writer.report.lease.close()


def test_parameters_of_a_reader_are_views_of_the_arena(saved, vault):
    path = saved("qwen3-tied")
    writer = load(AutoModelForCausalLM, path, format="gms", config=vault)
    engine = open_engine(AutoModelForCausalLM, path)
    with w.open_session(engine, path, "gms", vault) as session:
        session.resolve()
        places = {tensor.data_ptr() for _, tensor in session.load().stream()}
        session.apply()
        session.publish(w.Layout.SHARDED)
        session.post_load()
        report = session.finish()
    assert {parameter.data_ptr() for parameter in engine.model.parameters()} == places
    assert engine.model.lm_head.weight is engine.model.model.embed_tokens.weight
    report.lease.close()
    writer.report.lease.close()


def test_two_engines_with_different_dtypes_do_not_share_a_slot(saved, vault):
    path = saved("llama")
    writer = load(AutoModelForCausalLM, path, format="gms", config=vault)
    engine = open_engine(AutoModelForCausalLM, path, dtype=torch.float32)
    with pytest.raises(IdentityMismatchError, match=r"BF16.*F32|F32.*BF16"):
        w.load(engine, path, "gms", vault)
    assert all(p.is_meta for p in engine.model.parameters())
    writer.report.lease.close()


def test_engines_that_take_other_names_do_not_share(saved, vault):
    """Same files, class, dtype and shapes, and yet other weights."""
    path = saved("llama")
    writer = load(AutoModelForCausalLM, path, format="gms", config=vault)
    swapped = {
        r"up_proj\.weight": "swap.weight",
        r"gate_proj\.weight": "up_proj.weight",
        r"swap\.weight": "gate_proj.weight",
    }
    theirs = AutoModelForCausalLM.from_pretrained(path, key_mapping=swapped)
    alone = from_pretrained(AutoModelForCausalLM, path, key_mapping=swapped)
    assert torch.equal(alone.model.layers[1].mlp.up_proj.weight, theirs.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(
        alone.model.layers[1].mlp.up_proj.weight, writer.model.model.layers[1].mlp.gate_proj.weight
    )
    with pytest.raises(IdentityMismatchError, match="model: need 'LlamaForCausalLM#"):
        load(AutoModelForCausalLM, path, format="gms", config=vault, key_mapping=swapped)
    writer.report.lease.close()


def test_what_was_not_loaded_is_not_shared(saved, vault):
    with pytest.raises(FormatUnresolvedError, match=r"score\.weight"):
        from_pretrained(AutoModelForSequenceClassification, saved("llama"), format="gms", config=vault)


class Baked(w.ProviderPlugin[None]):
    @w.hookimpl
    def resolve_format(self, request):
        return w.FormatClaim(roles={w.Role.SOURCE}, layouts={w.Layout.FINAL}, reason="final weights")

    @w.hookimpl
    def load_weights(self, request, engine, source):
        raise AssertionError("never asked")


def test_a_format_whose_layout_it_cannot_take(saved):
    with pytest.raises(
        FormatUnresolvedError, match=r"delivers final, engine transformers accepts checkpoint or"
    ):
        from_pretrained(AutoModelForCausalLM, saved("llama"), format="baked", host=host_of(baked=Baked))


def test_a_damaged_file_is_named(saved, tmp_path):
    path = saved("llama")
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=shard.name):
        from_pretrained(AutoModelForCausalLM, tmp_path)


def test_a_checkpoint_that_changed_since_the_model_was_built(saved, tmp_path):
    path = saved("llama")
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    engine = open_engine(AutoModelForCausalLM, tmp_path, dtype=torch.float32)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:1]}, shard, metadata={"format": "pt"})
    with pytest.raises(CoverageError, match=f"{name}.* was BF16"):
        w.load(engine, tmp_path)
    assert all(parameter.is_meta for parameter in engine.model.parameters())


class Breaking(w.WeightSetWrapper):
    def fill(self, targets):
        for index, target in enumerate(self.inner.fill(targets)):
            if index == 5:
                raise w.LoadFailed("the line is dead", mutated=False)
            yield target


class BreakingPlugin(w.ProviderPlugin[None]):
    @w.hookimpl
    def resolve_format(self, request):
        return w.FormatClaim(roles={w.Role.SOURCE}, reason="breaks", fit=w.Fit.BEST)

    @w.hookimpl
    def load_weights(self, request, engine, source):
        return Breaking(ShardSet(open_shards(find(request.checkpoint)), provider="breaking"))


@pytest.mark.parametrize("name", MODELS)
def test_a_source_that_fails_half_way_is_followed_by_the_next(saved, logits, name):
    path = saved(name)
    loaded = load(AutoModelForCausalLM, path, host=host_of(breaking=BreakingPlugin))
    assert [(a.plugin, a.result) for a in loaded.report.attempts if a.plugin == "breaking"][-1][1] == "failed"
    assert loaded.report.provider == "disk"
    assert torch.equal(logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(path)))


def test_a_load_that_fails_leaves_the_engine_as_it_was(saved):
    path = saved("llama")
    engine = open_engine(AutoModelForCausalLM, path)
    with pytest.raises(LoadError, match="no provider"):
        w.load(engine, path, "breaking", host=host_of(block=["disk"], breaking=BreakingPlugin))
    assert engine.untouched()
    assert all(parameter.is_meta for parameter in engine.model.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_a_folder_that_was_cut(saved, logits, tmp_path, name):
    """The engine is opened from the checkpoint, for its configuration; the weights come from the cut one."""
    path = saved(name)
    shard(path, tmp_path / "cut", size=1)
    engine = open_engine(AutoModelForCausalLM, path)
    report = w.load(engine, tmp_path / "cut", "presharded")
    assert report.provider == "presharded"
    assert torch.equal(logits(engine.model), logits(AutoModelForCausalLM.from_pretrained(path)))
