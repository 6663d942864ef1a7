# SPDX-License-Identifier: Apache-2.0
"""Whether a source has exactly what an engine expects: nothing missing, nothing more, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from weights_core import dtypes
from weights_core.coverage import listed
from weights_core.errors import EngineError
from weights_presharded.peer.client import PeerError

if TYPE_CHECKING:
    import torch

    from weights_core import Engine, TensorMeta
    from weights_core.arena import Manifest


def check(manifest: Manifest, engine: Engine, tensors: Mapping[str, torch.Tensor] | None) -> None:
    """Compare names, shapes, dtypes, and which names stand for one tensor.

    Args:
        manifest: the source's.
        engine: the target.
        tensors: the engine's own, which may be on meta; None if it can't list them yet.

    Raises:
        PeerError: they differ; names the tensors and how.
    """
    expected = engine.expected(manifest.layout)
    faults = _differences(manifest, expected)
    if not faults and tensors is not None:
        faults = _aliases(manifest, {name: tensors[name] for name in expected if name in tensors})
    if faults:
        raise PeerError(f"has another catalog: {'; '.join(faults)}")


def tensors_of(engine: Engine, manifest: Manifest) -> dict[str, torch.Tensor] | None:
    """Return the engine's tensors, or None if it can't list them before they are loaded."""
    try:
        found = engine.tensors(manifest.layout)
    except EngineError:
        return None
    return dict(found) if engine.expected(manifest.layout).keys() <= found.keys() else None


def _differences(manifest: Manifest, expected: Mapping[str, TensorMeta]) -> list[str]:
    missing = sorted(expected.keys() - manifest.places.keys())
    extra = sorted(manifest.places.keys() - expected.keys())
    faults = [f"missing {listed(missing)}"] if missing else []
    faults += [f"unexpected {listed(extra)}"] if extra else []
    wrong = []
    for name in (n for n in expected if n in manifest.places):
        have, need = manifest.places[name], expected[name]
        shape = dtypes.stored_shape(have.dtype, have.shape)
        if (shape, have.dtype) != (need.shape, need.dtype):
            wrong.append(f"{name} is {have.dtype} {list(shape)}, need {need.dtype} {list(need.shape)}")
    return faults + wrong[:4] + ([f"and {len(wrong) - 4} more"] if len(wrong) > 4 else [])


def _aliases(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault(_identity(tensor), []).append(name)
    ours = _groups(group for group in groups.values() if len(group) > 1)
    theirs = _groups(manifest.aliases())
    faults = [
        f"{' and '.join(sorted(group))} are one tensor here, and several there" for group in ours - theirs
    ]
    faults += [
        f"{' and '.join(sorted(group))} are one tensor there, and several here" for group in theirs - ours
    ]
    return sorted(faults)[:4]


def _groups(found: Iterable[Iterable[str]]) -> set[frozenset[str]]:
    return {frozenset(group) for group in found}


def _identity(tensor: torch.Tensor) -> object:
    if tensor.is_meta:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
