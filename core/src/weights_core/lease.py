# SPDX-License-Identifier: Apache-2.0
"""What must live as long as the model: owners' memory and publishers' offers."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from weights_core.errors import CleanupError, LifecycleError

if TYPE_CHECKING:
    from weights_core.weightset import WeightSet


class Lease:
    """Keeps owners' memory mapped and publishers serving until it is closed.

    It ends by `close()`, at the end of a `with` block, or when the model it is anchored to is
    garbage collected or the interpreter exits, whichever is first.
    """

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []
        self.owned: WeightSet | None = None
        """The set of the owner whose memory the model lives in, if there is one, until the lease ends."""
        self._process = os.getpid()
        self.closed = False

    def add(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the lease ends; the last added is called first.

        Raises:
            LifecycleError: the lease has ended.
        """
        if self.closed:
            raise LifecycleError("the lease has ended")
        self._callbacks.append(callback)

    def anchor(self, target: object) -> None:
        """End the lease when `target` dies. It must allow weak references."""
        weakref.finalize(target, self.close)

    def close(self) -> None:
        """End the lease; idempotent. In a forked child it does nothing: the lease is the parent's.

        Raises:
            CleanupError: what was to be withdrawn failed; everything else was withdrawn.
        """
        if os.getpid() != self._process:
            return
        self.closed = True
        self.owned = None
        errors: list[Exception] = []
        while self._callbacks:
            callback = self._callbacks.pop()
            try:
                callback()
            except Exception as exc:  # noqa: BLE001 - raised with the others
                errors.append(exc)
        if errors:
            raise CleanupError("closing the lease", errors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
