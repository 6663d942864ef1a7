# SPDX-License-Identifier: Apache-2.0
"""What was handed out under which names, and which of it still lives."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import attrs
import torch


@attrs.define(eq=False)
class Loan:
    """The storage of tensors that were handed out, first as `name`; `names` are not consumed yet."""

    name: str
    nbytes: int
    storage: weakref.ref[torch.UntypedStorage]
    names: int = 0

    @property
    def is_live(self) -> bool:
        """Whether a tensor, or a view of one, still refers to the storage."""
        return self.storage() is not None


class Loans:
    """Storages by the names of the tensors that lie on them. It keeps none alive. Not thread-safe.

    A storage that several names lie on, as those of tied or split tensors do, is one loan.
    """

    def __init__(self) -> None:
        self._of_name: dict[str, list[Loan]] = {}
        self._of_storage: weakref.WeakKeyDictionary[torch.UntypedStorage, Loan] = weakref.WeakKeyDictionary()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Note that `tensor` was handed out as `name`."""
        storage = tensor.untyped_storage()
        loan = self._of_storage.get(storage)
        if loan is None:
            loan = self._of_storage[storage] = Loan(name, storage.nbytes(), weakref.ref(storage))
        lent = self._of_name.setdefault(name, [])
        if loan not in lent:
            lent.append(loan)
            loan.names += 1

    def remove(self, names: Iterable[str]) -> list[Loan]:
        """Forget `names`; return the loans of which none is left."""
        done = []
        for name in names if self._of_name else ():
            for loan in self._of_name.pop(name, ()):
                loan.names -= 1
                if not loan.names:
                    done.append(loan)
        return done

    def live(self) -> list[Loan]:
        """Return every loan that lives, whether its names were forgotten or not."""
        return [loan for loan in self._of_storage.values() if loan.is_live]
