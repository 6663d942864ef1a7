# SPDX-License-Identifier: Apache-2.0
"""Between hosts: NIXL reads the source's memory, over whatever UCX finds there.

Whole segments are registered, not tensors, and read in large pieces, several at a time. What NIXL
needs to read a source's memory lets it be written too, so it is told only to who proved the token.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from weights_core.errors import ExtraNotInstalledError
from weights_presharded.peer import hashing
from weights_presharded.peer.client import Connection, PeerError
from weights_presharded.peer.copying import Pool, Pulse, checks
from weights_presharded.peer.devices import compare
from weights_presharded.peer.transport import Fetch, Grantor, Transport

if TYPE_CHECKING:
    import torch

    from weights_presharded.peer.offer import Offer

PIECE = 64 << 20
"""Bytes of a first read; those after one that took less than _QUICK seconds are twice as large."""
LARGEST = 8 << 30
"""A read, between devices of one host; what a network takes longer for is never read at once."""
READS = 4
"""At a time."""
_PIECES = 4096
_QUICK = 0.1
_POLL = 0.0002
_IB = Path("/sys/class/infiniband")

Region = tuple[int, int, int]
"""Address, bytes, device."""


class Agent:
    """NIXL in this process, with memory that is registered; close it."""

    def __init__(self, regions: Sequence[Region], kind: str, *, is_read: bool) -> None:
        """Start it and register memory: `kind` is `DRAM` or `VRAM`.

        Who is read needs a thread for what UCX asks of it. Who reads looks after its reads itself; a
        thread beside it would take a third of the speed between devices.

        Raises:
            ExtraNotInstalledError: NIXL is not installed.
            PeerError: it can't start, or can't register this memory.
        """
        prepare(os.environ)
        try:
            api: Any = importlib.import_module("nixl_cu13._api")
            bindings: Any = importlib.import_module("nixl_cu13._bindings")
        except ImportError as exc:
            raise ExtraNotInstalledError(
                "peers on other hosts need NIXL: pip install 'weights-presharded[nixl]'"
            ) from exc
        self.faults: tuple[type[Exception], ...] = (
            RuntimeError,
            *(v for v in vars(bindings).values() if isinstance(v, type) and issubclass(v, Exception)),
        )
        self._registered: Any = None
        self._devices = sorted({device for _, _, device in regions}) if kind == "VRAM" else []
        self.peer = ""
        with self.told("NIXL cannot start"):
            self.agent: Any = api.nixl_agent(
                f"weights-{uuid.uuid4().hex}", api.nixl_agent_config(enable_prog_thread=is_read)
            )
        with self.told("NIXL cannot register the memory"):
            listed = [(address, nbytes, device, "") for address, nbytes, device in regions]
            self._registered = self.agent.register_memory(listed, kind)

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Have what NIXL raises be a source's failure."""
        try:
            yield
        except self.faults as exc:
            raise PeerError(f"{what}: {type(exc).__name__}: {exc}") from exc

    @property
    def metadata(self) -> bytes:
        """What another agent needs to read, and could write, the registered memory."""
        found: bytes = self.agent.get_agent_metadata()
        return found

    def close(self) -> None:
        """Forget the peer and the memory, once the devices do nothing more: UCX has calls queued there."""
        for device in self._devices:
            _wait_for(device)
        with contextlib.suppress(*self.faults):
            if self.peer:
                self.agent.remove_remote_agent(self.peer)
            if self._registered is not None:
                self.agent.deregister_memory(self._registered)
        self._registered, self.peer = None, ""
        self.agent = None


class NixlGrantor(Grantor):
    """Registers the offer's segments once, and tells proven peers how to read them."""

    name = "nixl"

    def __init__(self, offer: Offer) -> None:
        """Register.

        Raises:
            PeerError, ExtraNotInstalledError: it can't.
        """
        device = offer.index
        self._kind = "VRAM" if offer.memory == "cuda" else "DRAM"
        self._regions = [
            (segment.address, size, device)
            for segment, size in zip(offer.segments, offer.manifest.sizes, strict=True)
            if size
        ]
        self._agent: Agent | None = Agent(self._regions, self._kind, is_read=True)
        self._described = base64.b64encode(offer.described()).decode()

    def grant(self, offer: Offer) -> tuple[dict[str, Any], list[int]]:
        """Return what reading takes, and the description of the weights."""
        if self._agent is None:
            raise PeerError("serves no more")
        told = {
            "memory": offer.memory,
            "kind": self._kind,
            "agent": base64.b64encode(self._agent.metadata).decode(),
            "regions": self._regions,
            "described": self._described,
        }
        return told, []

    def close(self) -> None:
        """Let nobody read any more."""
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()


class NixlTransport(Transport):
    """Reads."""

    name = "nixl"

    def described(self, connection: Connection) -> bytes:
        """Return the description that came with the answer."""
        try:
            return base64.b64decode(connection.told["described"], validate=True)
        except (KeyError, TypeError, ValueError) as exc:
            raise PeerError(f"describes nothing: {exc}") from exc

    def fetch(self, fetch: Fetch) -> None:
        """Register where everything goes, and read it."""
        told, landing = fetch.connection.told, fetch.landing
        regions = _regions(told.get("regions"), fetch)
        on_device = bool(landing.runs) and landing.runs[0].out.device.type != "cpu"
        kind = "VRAM" if on_device else "DRAM"
        device = (landing.runs[0].out.device.index or 0) if on_device else 0
        ours = [(run.out.data_ptr(), run.nbytes, device) for run in landing.runs]
        if not ours:
            return
        agent = Agent(ours, kind, is_read=False)
        try:
            with agent.told("NIXL cannot use what the source said"):
                agent.peer = agent.agent.add_remote_agent(base64.b64decode(str(told.get("agent"))))
                if isinstance(agent.peer, bytes):
                    agent.peer = agent.peer.decode()
            self.wrote = True
            summing = _Summing(fetch) if fetch.verify and on_device and fetch.sums else None
            come = (lambda _: None) if summing is None else summing.add
            _read(agent, fetch, _pieces(fetch, regions, ours), (kind, str(told.get("kind"))), come)
        finally:
            agent.close()
        if summing is not None:
            summing.compare()
        elif fetch.verify:
            _verify(fetch, on_device)


def prepare(environ: MutableMapping[str, str]) -> None:
    """Set what UCX needs to know before it starts.

    Without an InfiniBand device its module for them ends the process at exit, so it is left out.

    Raises:
        PeerError: `UCX_TLS` leaves out what connections are set up by.
    """
    environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    if not (_IB.is_dir() and any(_IB.iterdir())):
        environ.setdefault("UCX_MODULES", "^ib")
    allowed = environ.get("UCX_TLS", "all")
    if not allowed.startswith("^") and not {"all", "tcp"} & set(allowed.split(",")):
        raise PeerError(f"UCX_TLS={allowed} leaves out tcp, by which UCX sets up connections: add it")


def _regions(given: object, fetch: Fetch) -> dict[int, Region]:
    """Return where each segment is at the source, by the segment's number."""
    sized = [i for i, size in enumerate(fetch.manifest.sizes) if size]
    if not isinstance(given, list) or len(given) != len(sized):
        raise PeerError("told of another number of segments than it describes")
    regions: dict[int, Region] = {}
    for index, region in zip(sized, given, strict=True):
        sound = isinstance(region, list) and len(region) == 3
        if not sound or not all(type(n) is int and n >= 0 for n in region):
            raise PeerError("told of memory that is none")
        if region[1] < fetch.manifest.sizes[index]:
            raise PeerError("told of less memory than it describes")
        regions[index] = (region[0], region[1], region[2])
    return regions


@attrs.frozen
class _Piece:
    """Bytes of a run: where they go, and where they lie at the source."""

    run: int
    ours: Region
    theirs: Region

    @property
    def nbytes(self) -> int:
        return self.ours[1]


def _pieces(fetch: Fetch, regions: Mapping[int, Region], ours: Sequence[Region]) -> Iterator[_Piece]:
    """Cut every run into pieces of at most PIECE bytes."""
    for index, (run, (address, nbytes, device)) in enumerate(zip(fetch.landing.runs, ours, strict=True)):
        base, _, their_device = regions[run.segment]
        for start in range(0, nbytes, PIECE):
            size = min(PIECE, nbytes - start)
            yield _Piece(
                index, (address + start, size, device), (base + run.start + start, size, their_device)
            )


def _read(
    agent: Agent,
    fetch: Fetch,
    pieces: Iterable[_Piece],
    kinds: tuple[str, str],
    come: Callable[[int], None],
) -> None:
    """Have READS reads on their way until all is here, and tell `come` of each run that is.

    Raises:
        PeerError: NIXL tells of a failure, none has ended for `stall` seconds, or the source has gone.
    """
    due = deque(pieces)
    left = Counter(piece.run for piece in due)
    pulse = Pulse(fetch.connection.alive)
    running: list[tuple[Any, float, list[_Piece]]] = []
    at_once, heard = PIECE, time.monotonic()
    try:
        while due or running:
            with agent.told("the read failed"):
                while due and len(running) < READS:
                    taken = _take(due, at_once)
                    handle = agent.agent.initialize_xfer(
                        "READ",
                        agent.agent.get_xfer_descs([piece.ours for piece in taken], kinds[0]),
                        agent.agent.get_xfer_descs([piece.theirs for piece in taken], kinds[1]),
                        agent.peer,
                    )
                    running.append((handle, time.monotonic(), taken))
                    agent.agent.transfer(handle)
                still = []
                for handle, begun, taken in running:
                    state = agent.agent.check_xfer_state(handle)
                    if state == "ERR":
                        raise PeerError("the read failed")
                    if state == "DONE":
                        agent.agent.release_xfer_handle(handle)
                        heard = time.monotonic()
                        if heard - begun < _QUICK:
                            at_once = min(LARGEST, 2 * at_once)
                        for piece in taken:
                            left[piece.run] -= 1
                            if not left[piece.run]:
                                come(piece.run)
                    else:
                        still.append((handle, begun, taken))
                ended, running = len(still) < len(running), still
            if not ended:
                if time.monotonic() - heard > fetch.stall:
                    raise PeerError(f"no byte came for {fetch.stall:g} s")
                time.sleep(_POLL)
            pulse()
    finally:
        with contextlib.suppress(*agent.faults):
            for handle, _, _ in running:
                agent.agent.release_xfer_handle(handle)


def _take(due: deque[_Piece], nbytes: int) -> list[_Piece]:
    """Take the next pieces, of about so many bytes."""
    taken: list[_Piece] = []
    while due and len(taken) < _PIECES and (not taken or due[0].nbytes <= nbytes):
        taken.append(due.popleft())
        nbytes -= taken[-1].nbytes
    return taken


class _Summing:
    """Sums the blocks of what has come, on its device, while more is coming."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._factors = hashing.multipliers(fetch.landing.runs[0].out.device)
        self._sums: dict[int, torch.Tensor] = {}

    def add(self, index: int) -> None:
        """Begin to sum a run."""
        run = self._fetch.landing.runs[index]
        self._sums[run.segment] = hashing.block_sums(run.out, self._factors)

    def compare(self) -> None:
        """Wait, and compare; raises as `devices.compare`."""
        for segment, sums in sorted(self._sums.items()):
            compare(self._fetch, segment, sums.tolist())


def _verify(fetch: Fetch, on_device: bool) -> None:
    """Compare digests of tensors: there are no sums of a host's memory."""
    held: list[Any] = []

    def here(key: tuple[int, int, int]) -> int:
        flat = fetch.landing.flats[key]
        held.append(flat.cpu() if on_device else flat)
        return int(held[-1].data_ptr())

    Pool(fetch.threads).verify(checks(fetch.manifest, here), Pulse(fetch.connection.alive))


def _wait_for(device: int) -> None:
    import torch

    torch.cuda.synchronize(device)
