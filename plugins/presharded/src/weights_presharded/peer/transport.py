# SPDX-License-Identifier: Apache-2.0
"""What a transport is: the side of the source grants access, the side of the target fetches."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

if TYPE_CHECKING:
    from weights_core.arena import Manifest
    from weights_presharded.peer.client import Connection
    from weights_presharded.peer.landing import Landing
    from weights_presharded.peer.offer import Offer


@attrs.frozen(eq=False, kw_only=True)
class Fetch:
    """One transfer that is to be done: from where, what, into what, and by which rules."""

    connection: Connection
    manifest: Manifest
    sums: Sequence[Sequence[int]]
    landing: Landing
    device: str
    verify: bool
    threads: int
    stall: float


class Grantor(abc.ABC):
    """The side of the source."""

    name: ClassVar[str]

    @abc.abstractmethod
    def grant(self, offer: Offer) -> tuple[dict[str, Any], list[int]]:
        """Return what a target is told, and descriptors that go along and stay the source's."""

    def close(self) -> None:  # noqa: B027 - descriptors are the offer's
        """Grant nothing any more."""


class Transport(abc.ABC):
    """The side of the target, for one transfer."""

    name: ClassVar[str]
    wrote: bool = False
    """Whether any byte was written to where it is to be."""
    notes: tuple[str, ...] = ()
    """What the operator should know."""

    @abc.abstractmethod
    def described(self, connection: Connection) -> bytes:
        """Return the source's description of its offer.

        Raises:
            PeerError, OSError: what came is something else.
        """

    @abc.abstractmethod
    def fetch(self, fetch: Fetch) -> None:
        """Bring every byte to where it is to be, and verify it.

        Raises:
            PeerError: it could not, or a byte is another than the source said.
        """
