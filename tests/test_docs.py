# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the README runs, in order, on a real checkpoint."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import weights_core as w
from weights_core.testing import host_of, write_checkpoint

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    return write_checkpoint(tmp_path / "path", Model().state_dict(), shards=2)


@pytest.fixture
def llama(tmp_path):
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", model


def test_the_readmes_code_runs_and_does_what_it_says(checkpoint, llama, capsys):
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert len(blocks) == 5
    names = {"Model": Model}
    paths = {"path/to/checkpoint": str(checkpoint), "path/to/llama": str(llama[0])}
    for block in blocks:
        for written, real in paths.items():
            block = block.replace(f'"{written}"', repr(real))
        exec(block, names)
    assert "by parallel_shards" in capsys.readouterr().out
    expected = names["model"].state_dict()
    assert not expected["linear.weight"].is_meta
    assert all(torch.equal(p, expected[n]) for n, p in names["engine"].params.items())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(names["llama"].eval()(ids).logits, llama[1](ids).logits)

    model = Model()
    report = w.load(
        w.TorchEngine(model), checkpoint, "constant", host=host_of(constant=names["ConstantPlugin"])
    )
    assert report.provider == "constant"
    assert torch.all(model.linear.weight == 0.5)


def test_the_embedded_engine_runs_as_printed(checkpoint):
    (block,) = (b for b in BLOCK.findall((ROOT / "README.md").read_text()) if "class MyEngine" in b)
    names = {}
    exec(block.replace('"path/to/checkpoint"', repr(str(checkpoint))), names)
    assert names["report"].applied.written == names["engine"].params.keys()


@pytest.mark.parametrize("page", sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md")))
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    assert all((ROOT / page).parent.joinpath(t).exists() for t in targets if t)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^):]+)\)", page.read_text())
    assert targets or page.name != "README.md"
    for target in targets:
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, (
                target
            )


def test_the_page_on_the_command_line_is_what_the_commands_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from generate_cli import page

    assert (ROOT / "docs/cli.md").read_text() == page(), "run: make docs"


def test_every_page_of_the_docs_is_reached_from_the_readme_or_another():
    pages = {p.name for p in (ROOT / "docs").glob("*.md")}
    texts = [(ROOT / "README.md").read_text(), *(p.read_text() for p in (ROOT / "docs").glob("*.md"))]
    assert {name for name in pages if not any(f"{name})" in text for text in texts)} == set()
