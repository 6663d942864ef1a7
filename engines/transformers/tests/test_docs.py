# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of docs/engines.md run, on a real model and a real pipeline."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[3] / "docs/engines.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_pages_code_runs(saved, wan, capsys):
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) == 5
    for block in blocks:
        if "tp_plan" in block:
            continue  # test_parallel.py does that, with two ranks
        for written, real in {"path/to/llama": saved("llama"), "path/to/pipeline": wan}.items():
            block = block.replace(f'"{written}"', repr(str(real)))
        exec(block, names := {})  # each alone, as it is pasted
    told = capsys.readouterr().out
    assert "by disk" in told
    assert ", transformer:" in told
    assert next(names["loaded"].pipeline.vae.parameters()).dtype is torch.bfloat16
