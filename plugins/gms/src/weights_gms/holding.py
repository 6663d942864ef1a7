# SPDX-License-Identifier: Apache-2.0
"""What an engine holds of a generation: the lease and the memory, which it may give up for a while."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from weights_core.arena import Segment
from weights_core.backing import Backing
from weights_core.errors import IdentityMismatchError
from weights_gms.client import Ask, Endpoint, Lease, VaultError, keep, open_slot


class StaleWeights(VaultError):  # noqa: N818 - the field's term
    """The weights that an engine gave up are gone or were replaced: load again."""


class Holding:
    """A lease, and the segments it is on. Not safe to use from several threads."""

    def __init__(
        self,
        lease: Lease,
        segments: Sequence[Segment],
        sizes: Sequence[int],
        endpoint: Endpoint,
        backing: Backing,
        *,
        private: bool,
    ) -> None:
        self._lease = lease
        self._segments = segments
        self._sizes = sizes
        self._endpoint = endpoint
        self._backing = backing
        self._private = private
        self._asleep: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the segments."""
        return sum(self._sizes)

    @property
    def asleep(self) -> bool:
        """Whether the memory was given up."""
        return self._asleep is not None

    def sleep(self) -> None:
        """Give up the lease and the memory, and keep the addresses: tensors must not be touched.

        Raises:
            VaultError: the engine has copies of its own, which would be lost.
        """
        if self.asleep:
            return
        if self._private:
            raise VaultError("the engine has written into copies of its own, which sleeping would lose")
        self._backing.written()
        self._asleep = self._lease.held
        self._lease.close()
        for segment in self._segments:
            segment.sleep()

    def wake(self, timeout: float = 60.0) -> None:
        """Map the same generation at the same addresses.

        Raises:
            StaleWeights: it is gone, or was replaced; the tensors have no memory.
            VaultError: the broker cannot be reached.
        """
        held = self._asleep
        if held is None:
            return
        ask = Ask(
            members=[(held["slot"], held["identity"])],
            rank=0,
            group=uuid.uuid4().hex,
            mode="ro",
            timeout=timeout,
        )
        try:
            grant = open_slot(self._endpoint, ask)
        except IdentityMismatchError as exc:
            raise StaleWeights(f"slot {held['slot']} has other weights by now: load again") from exc
        try:
            if grant.reply["generation"] != held["generation"]:
                raise StaleWeights(
                    f"generation {held['number']} of slot {held['slot']} was replaced by "
                    f"{grant.reply['number']}: load again"
                )
            for segment, size in zip(self._segments, self._sizes, strict=True):
                segment.wake(grant.fds.pop(1), size)
            self._lease = keep(grant, self._segments)
        except BaseException:
            grant.close()
            raise
        self._asleep = None

    def close(self) -> None:
        """End the lease; idempotent. Tensors keep their memory, unless it was given up."""
        self._lease.close()
        self._segments = ()
