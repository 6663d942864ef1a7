# SPDX-License-Identifier: Apache-2.0
"""What the plugin returns: an archive's arrays as a `WeightSet`, read when they are asked for."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from weights_core import TensorMeta, WeightSet, dtypes
from weights_core.errors import CheckpointError
from weights_core.weightset import Slices

_SUFFIX = ".npy"


class NpzSet(WeightSet):
    """The arrays of one archive. Uncompressed ones are read at the place where they lie."""

    provider = "hello"

    def __init__(self, path: Path, *, verify: bool) -> None:
        """Open the archive and read the headers of its arrays.

        Raises:
            CheckpointError: it cannot be read, or holds something that is no tensor.
        """
        self._path = path
        self._verify = verify
        self._lock = threading.Lock()
        self._bytes = 0
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as exc:
            raise CheckpointError(f"cannot be opened ({exc})", file=path) from exc
        try:
            self._metas = MappingProxyType(
                {
                    member.filename.removesuffix(_SUFFIX): self._describe(member)
                    for member in self._archive.infolist()
                }
            )
        except BaseException:
            self._archive.close()
            raise

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """In the order of the archive."""
        return self._metas

    @property
    def bytes_read(self) -> int:
        """Bytes of what was handed out."""
        return self._bytes

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Read an array, and cut it: an archive cannot be read in parts."""
        meta = self._metas[name]
        try:
            with self._lock:  # an archive has one position
                array = self._load(name)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
            raise CheckpointError(f"cannot be read ({exc})", file=self._path, tensor=name) from exc
        tensor = torch.from_numpy(array).reshape(meta.torch_shape)
        part = tensor if slices is None else tensor[slices].clone()
        with self._lock:
            self._bytes += part.nbytes
        return part

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    def _load(self, name: str) -> np.ndarray:
        with self._archive.open(f"{name}{_SUFFIX}") as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
            if self._verify:
                member.read()  # to the end, where zipfile compares the checksum
            return np.ascontiguousarray(array)

    def _describe(self, member: zipfile.ZipInfo) -> TensorMeta:
        name = member.filename.removesuffix(_SUFFIX)
        try:
            with self._archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                reader = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    reader = np.lib.format.read_array_header_2_0
                shape, _, dtype = reader(file)
            kind = dtypes.from_torch(torch.from_numpy(np.empty(0, dtype)).dtype)
        except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as exc:
            raise CheckpointError(f"holds no tensor there ({exc})", file=self._path, tensor=name) from exc
        return TensorMeta(name, shape, kind, dtypes.nbytes(kind, shape), self._path)
