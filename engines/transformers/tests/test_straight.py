# SPDX-License-Identifier: Apache-2.0
"""What a model takes unchanged is put straight into it; the rest is left to Transformers."""

import functools
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from weights_core.disk import ShardSet
from weights_core.errors import CheckpointError, WeightsError
from weights_transformers import arguments, from_pretrained, opening
from weights_transformers.straight import is_possible, straight


@pytest.fixture
def left(mocker):
    """The names of the state dicts that Transformers' own method is given, call by call."""
    theirs = PreTrainedModel._load_pretrained_model
    calls = []

    @functools.wraps(theirs)
    def load(model, state, *more):
        if state is not None:
            calls.append(sorted(state))
        return theirs(model, state, *more)

    mocker.patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(load))
    return calls


@pytest.fixture
def changed(saved, tmp_path):
    """Return a folder of the tiny Llama, its tensors changed by a function of a dict."""

    def make(change):
        (tmp_path / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
        held = {}
        for file in saved("llama").glob("*.safetensors"):
            held |= load_file(file)
        save_file(change(held), tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


def check(path, **how):
    """Compare with what Transformers makes of the folder; return ours."""
    theirs = LlamaForCausalLM.from_pretrained(path, **how)
    ours = from_pretrained(LlamaForCausalLM, path, **how)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    for name, parameter in theirs.named_parameters():
        got = ours.get_parameter(name)
        assert (type(got), got.requires_grad, vars(got)) == (
            type(parameter),
            parameter.requires_grad,
            vars(parameter),
        )
    return ours


def test_nothing_is_left_of_a_model_that_is_as_its_checkpoint(saved, left, capsys):
    ours = check(saved("llama"))
    assert left[-1] == []
    assert type(ours) is LlamaForCausalLM
    assert "_load_pretrained_model" not in vars(LlamaForCausalLM)
    assert " 0it" not in capsys.readouterr().err


def test_the_bar_of_transformers_is_as_it_was(saved):
    shown = []

    def hook(factory, args, kwargs):
        shown.append(kwargs)
        return factory(*args, **kwargs)

    before = logging.set_tqdm_hook(hook)
    try:
        from_pretrained(LlamaForCausalLM, saved("llama"))
        assert shown == []
        assert logging.set_tqdm_hook(hook) is hook
    finally:
        logging.set_tqdm_hook(before)


def test_a_new_name_is_no_reason_to_read_it_otherwise(changed, left):
    path = changed(lambda held: {"old." + name if "norm" in name else name: t for name, t in held.items()})
    check(path, key_mapping={r"^old\.": ""})
    assert left[-1] == []


def test_a_base_models_names_are_completed(changed, left):
    path = changed(lambda held: {name.removeprefix("model."): t for name, t in held.items()})
    check(path)
    assert left[-1] == []


def test_what_two_names_become_is_left_to_transformers(changed, left):
    twice = "model.norm.weight"
    path = changed(lambda held: {**held, "old.norm.weight": held[twice] + 1})
    check(path, key_mapping={r"^old\.": "model."})
    assert left[-1] == [twice, "old.norm.weight"]


def test_what_has_another_dtype_is_left_to_transformers(changed, left):
    path = changed(lambda held: {n: t.float() if n.endswith("norm.weight") else t for n, t in held.items()})
    check(path)
    assert left[-1]
    assert all(name.endswith("norm.weight") for name in left[-1])


def test_what_stays_in_float32_is_left_to_transformers(saved, left, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
    check(saved("llama"))
    assert left[-1]


def test_a_class_with_a_method_of_its_own_is_left_alone(saved, left):
    class Own(LlamaForCausalLM):
        @staticmethod
        def _load_pretrained_model(model, *args):
            return LlamaForCausalLM._load_pretrained_model(model, *args)

    assert is_possible(LlamaForCausalLM)
    assert not is_possible(Own)
    assert isinstance(from_pretrained(Own, saved("llama")), Own)
    assert left[-1]


def test_a_class_sees_nothing_but_itself(saved):
    seen = []

    class Registering(LlamaForCausalLM):
        def __init_subclass__(cls, **kwargs):
            raise TypeError("final")

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            seen.append(cls)
            return super().from_pretrained(*args, **kwargs)

    assert is_possible(Registering)
    assert type(from_pretrained(Registering, saved("llama"))) is Registering
    assert seen == [Registering]


def test_a_module_is_told_what_it_gets(saved, monkeypatch):
    class Watching(torch.nn.Linear):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "weight":
                object.__setattr__(self, "alias", value)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.nn.Linear", Watching)
    head = from_pretrained(LlamaForCausalLM, saved("llama")).lm_head
    assert head.alias is head.weight


def test_a_source_that_fails_half_way_leaves_all_as_it_was(saved, mocker):
    whole = ShardSet.mapped

    def mapped(self, names=None):
        yield next(whole(self, names))
        raise CheckpointError("the device failed", file=self.shards[0].path)

    broken = mocker.patch.object(ShardSet, "mapped", mapped)
    with pytest.raises(WeightsError, match="the device failed"):
        from_pretrained(LlamaForCausalLM, saved("llama"), format="disk")
    assert "_load_pretrained_model" not in vars(LlamaForCausalLM)
    mocker.stop(broken)
    check(saved("llama"))


def test_loads_of_others_meanwhile_are_theirs(saved, left):
    """The class has a method of ours for as long as it lasts, in all threads."""
    path, ours = saved("llama"), {"lm_head.weight": None}
    models = []
    with straight(LlamaForCausalLM, ours, iter):
        thread = threading.Thread(target=lambda: models.append(LlamaForCausalLM.from_pretrained(path)))
        thread.start()
        thread.join()
        assert is_possible(LlamaForCausalLM)
    state = LlamaForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in models[0].state_dict().items())


def test_of_another_version_it_is_not_known(saved, left, monkeypatch, mocker):
    monkeypatch.setitem(arguments.TESTED, "transformers", ((3, 0), (4, 0)))
    traces = mocker.spy(opening, "trace")
    assert from_pretrained(AutoModelForCausalLM, saved("llama")) is not None
    assert traces.call_count == 1
    assert left[-1]
