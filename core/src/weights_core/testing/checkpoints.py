# SPDX-License-Identifier: Apache-2.0
"""Write small real checkpoints with the safetensors library and with torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from weights_core import dtypes
from weights_core.tensors import as_bytes


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 1,
    kind: Literal["safetensors", "bin"] = "safetensors",
    index: bool = True,
    stem: str | None = None,
) -> Path:
    """Write `tensors`, spread in order over `shards` files of `folder`, and return the folder.

    The names are those that Transformers uses: one file plain, several numbered and, unless
    `index` is false, with an index. `stem` is `model` or `pytorch_model` by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = stem or ("model" if kind == "safetensors" else "pytorch_model")
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        suffix = f"-{number + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = f"{stem}{suffix}.{kind}"
        if kind == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1 and index:
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_three_files(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write `tensors` as a safetensors checkpoint of three files, which holds no strides and no ties."""
    apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return write_checkpoint(folder / "model", apart, shards=3)


def read_with_safetensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read every safetensors file of a folder with the safetensors library."""
    return {
        name: t for file in sorted(checkpoint.glob("*.safetensors")) for name, t in load_file(file).items()
    }


def random_tensor(*shape: int, dtype: str = "F32", seed: int = 0) -> torch.Tensor:
    """Return a tensor of random *bits* (random truth values for BOOL) of a safetensors dtype."""
    generator = torch.Generator().manual_seed(seed)
    kind = dtypes.to_torch(dtype)
    count = dtypes.nbytes(dtype, shape)
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    if kind == torch.bool:
        return (raw % 2).bool().reshape(shape)
    return raw.view(kind).reshape(dtypes.torch_shape(dtype, shape))


def every_dtype() -> list[str]:
    """Return the safetensors dtypes that this torch has and this safetensors library round-trips."""
    return [dtype for dtype in dtypes.BITS if _round_trips(dtype)]


def _round_trips(dtype: str) -> bool:
    try:
        tensor = random_tensor(4, dtype=dtype)
        with tempfile.TemporaryDirectory() as folder:
            save_file({"t": tensor}, Path(folder) / "t")
            return torch.equal(as_bytes(load_file(Path(folder) / "t")["t"]), as_bytes(tensor))
    except (KeyError, ValueError, SafetensorError):
        return False


def zoo(dtypes_held: Collection[str]) -> dict[str, torch.Tensor]:
    """Return tensors of random bits: every dtype of `dtypes_held` in every kind of shape, and twins.

    Shapes `()`, with 0, odd, and up to three dimensions; one of 1 MiB; a transposed one; and two
    names for one tensor.
    """
    found: dict[str, torch.Tensor] = {}
    for dtype in dtypes_held:
        for shape in ((), (0,), (7,), (3, 0, 2), (5, 6), (4, 3, 2)):
            if prod(shape) * dtypes.BITS[dtype] % 8 or (dtype == "F4" and shape in ((), (7,))):
                continue  # types of less than a byte fill whole bytes, row by row
            name = f"{dtype}.{'x'.join(map(str, shape)) or 'scalar'}"
            found[name] = random_tensor(*shape, dtype=dtype, seed=len(found))
    widest = next((dtype for dtype in ("F32", "BF16", "F16", "U8") if dtype in dtypes_held), None)
    if widest is not None:
        found["large"] = random_tensor(512, 512, dtype=widest, seed=1)
        found["transposed"] = random_tensor(6, 9, dtype=widest, seed=2).t()
        found["tied.one"] = random_tensor(8, 8, dtype=widest, seed=3)
        found["tied.other"] = found["tied.one"]
    return found
