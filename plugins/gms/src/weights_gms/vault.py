# SPDX-License-Identifier: Apache-2.0
"""The rules of the vault: who may write, who reads what, who waits. No sockets, clocks or processes.

A *slot* is a place for one rank's weights. It holds at most one committed *generation* that is
served, and at most one writer of the next. A client asks for the slots of all ranks of its engine as
a *group*, which is granted as a whole or not at all, so that no two engines can each hold what the
other waits for. A *lease* keeps a generation's memory; a generation goes with its last lease.

Standard library only, and little of it: the broker that imports this is to stay small.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Literal

    Identity = dict[str, Any]
    Mode = Literal["auto", "ro", "rw"]
    Replace = Literal["keep", "evict-first"]


class Generation:
    """Weights that were committed: what they are, and who holds them."""

    def __init__(self, key: str, number: int, identity: Identity, slot: str, *, keep: float = 0.0) -> None:
        self.key = key
        self.number = number
        self.identity = identity
        self.slot = slot
        self.keep = keep
        self.leases: set[int] = set()
        self.expires: float | None = None
        self.reseeded = False
        self.contents: Any = None
        """The descriptors; the vault's rules don't look at them."""


class Slot:
    """A place for one rank's weights."""

    def __init__(self) -> None:
        self.number = 0
        self.current: Generation | None = None
        self.retired: set[Generation] = set()
        self.writer: int | None = None
        self.writing: Identity = {}
        self.withheld = False
        """Whether `current` is handed to nobody more, because a writer waits for it to be given back."""

    @property
    def empty(self) -> bool:
        """Whether nothing would be lost with the slot."""
        return self.current is None and self.writer is None and not self.retired


class Group:
    """The ranks of one engine, which are granted together."""

    def __init__(
        self,
        key: str,
        members: list[tuple[str, Identity]],
        mode: Mode,
        replace: Replace,
        keep: float,
        deadline: float,
    ) -> None:
        self.key = key
        self.members = members
        self.mode = mode
        self.replace = replace
        self.keep = keep
        self.deadline = deadline
        self.clients: dict[int, int] = {}
        """Rank → client, of those that have asked."""
        self.waits_for = "the other ranks of its engine"

    def same_terms(self, other: Group) -> bool:
        """Whether another rank asks for the same."""
        return (self.members, self.mode, self.replace) == (other.members, other.mode, other.replace)


class Event:
    """Something the vault decided and the broker has to carry out."""


class MayWrite(Event):
    """`client` is to write generation `number` of `slot`."""

    def __init__(self, client: int, slot: str, number: int) -> None:
        self.client, self.slot, self.number = client, slot, number


class MayRead(Event):
    """`client` has a lease on `generation`."""

    def __init__(self, client: int, generation: Generation) -> None:
        self.client, self.generation = client, generation


class Refused(Event):
    """`client` gets nothing, and why; `fields` maps what differs in the identities to both values."""

    def __init__(self, client: int, code: str, why: str, fields: dict[str, list[Any]] | None = None) -> None:
        self.client, self.code, self.why, self.fields = client, code, why, fields or {}


class Freed(Event):
    """Nobody holds `generation` any more: its descriptors are to be closed."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation


class Misuse(Exception):  # noqa: N818 - not an error of the vault
    """A client asked for what it may not ask for in its state."""


class Vault:
    """All slots, and every client that waits, writes or reads.

    Methods return what came of them, in the order it is to be carried out. Clients are numbers that
    the caller gives out and never uses again.
    """

    def __init__(self, *, no_writers_before: float = 0.0) -> None:
        """Start empty.

        Args:
            no_writers_before: a time until which nobody may write unasked: after a crash the readers
                need a moment to bring back what they hold.
        """
        self.slots: dict[str, Slot] = {}
        self.groups: dict[str, Group] = {}
        self.waiting: dict[int, Group] = {}
        self.writing: dict[int, tuple[str, float]] = {}
        self.reading: dict[int, Generation] = {}
        self._no_writers_before = no_writers_before

    @property
    def empty(self) -> bool:
        """Whether nobody is served and nothing is held."""
        return not (self.waiting or self.writing or self.reading or self.slots)

    def open(self, client: int, rank: int, asked: Group, now: float) -> list[Event]:
        """`client`, a rank of an engine, asks for its slot.

        Raises:
            Misuse: it has a slot already, or its engine's ranks don't ask for the same.
        """
        if client in self.waiting or client in self.writing or client in self.reading:
            raise Misuse("asked twice")
        if len({slot for slot, _ in asked.members}) < len(asked.members):
            raise Misuse("two ranks ask for one slot")
        group = self.groups.setdefault(asked.key, asked)
        if rank in group.clients or not 0 <= rank < len(group.members) or not group.same_terms(asked):
            raise Misuse("the ranks of one engine must each ask once, and for the same")
        group.clients[rank] = client
        self.waiting[client] = group
        return self._settle(now)

    def commit(self, client: int, key: str, contents: Any, now: float) -> list[Event]:
        """`client` has written its slot: serve that from now on. The writer becomes its first reader.

        Raises:
            Misuse: the client is not a writer.
        """
        if client not in self.writing:
            raise Misuse("nothing was granted to be written")
        name, keep = self.writing.pop(client)
        slot = self.slots[name]
        slot.number += 1
        made = Generation(key, slot.number, slot.writing, name, keep=keep)
        made.contents = contents
        slot.writer = None
        events = self._retire(slot, now)
        slot.current = made
        self._lease(client, made)
        return [MayRead(client, made), *events, *self._settle(now)]

    def reseed(self, client: int, held: Generation, now: float) -> list[Event]:
        """`client` brings back a generation it holds, after the broker was restarted.

        The newest that is brought back is served, unless something was committed since. Look at the
        event to see which generation the lease is on: one of another identity object is as good.

        Raises:
            Misuse: the client has asked for something already.
        """
        if client in self.waiting or client in self.writing or client in self.reading:
            raise Misuse("asked twice")
        slot = self.slots.setdefault(held.slot, Slot())
        slot.number = max(slot.number, held.number)
        events: list[Event] = []
        known = next((g for g in (slot.current, *slot.retired) if g is not None and g.key == held.key), None)
        if known is None:
            known = held
            held.reseeded = True
            current = slot.current
            if current is None or (current.reseeded and current.number < held.number):
                events = self._retire(slot, now)
                slot.current = held
            else:
                slot.retired.add(held)
        self._lease(client, known)
        return [MayRead(client, known), *events, *self._settle(now)]

    def drop(self, client: int, now: float) -> list[Event]:
        """`client` is gone, or is to get nothing: whatever it waited for, wrote or read is given up."""
        events: list[Event] = []
        group = self.waiting.get(client)
        if group is not None:
            events = self._dissolve(group, "gone", "another rank of this engine went away", but=client)
        if client in self.writing:
            name, _ = self.writing.pop(client)
            self.slots[name].writer = None
        generation = self.reading.pop(client, None)
        if generation is not None:
            generation.leases.discard(client)
            if not generation.leases:
                events += self._left(generation, now)
        return events + self._settle(now)

    def evict(self, name: str, now: float) -> list[Event] | None:
        """Serve a slot's generation to nobody more; None if it has none. Those who hold it keep it."""
        slot = self.slots.get(name)
        if slot is None or slot.current is None:
            return None
        return self._retire(slot, now) + self._settle(now)

    def tick(self, now: float) -> list[Event]:
        """Let go of what has had its time: groups that waited too long, generations kept for a while."""
        events: list[Event] = []
        for group in [g for g in self.groups.values() if g.deadline <= now]:
            events += self._dissolve(group, "timeout", f"waited in vain for {group.waits_for}")
        for slot in list(self.slots.values()):
            current = slot.current
            if current is not None and current.expires is not None and current.expires <= now:
                slot.current = None
                events.append(Freed(current))
        return events + self._settle(now)

    def next_tick(self, now: float) -> float | None:
        """Return when `tick` is next due, or None."""
        times = [group.deadline for group in self.groups.values()]
        times += [
            s.current.expires for s in self.slots.values() if s.current and s.current.expires is not None
        ]
        if self._no_writers_before > now and self.groups:
            times.append(self._no_writers_before)
        return min(times, default=None)

    # ------------------------------------------------------------------------------------------

    def _settle(self, now: float) -> list[Event]:
        """Grant or refuse every complete group that can be, in the order they came."""
        events: list[Event] = []
        while True:  # what is granted to one may be what another waited for
            for slot in self.slots.values():
                slot.withheld = False
            decided: list[Event] = []
            for group in list(self.groups.values()):
                if len(group.clients) == len(group.members):
                    decided += self._decide(group, now)
            if not decided:
                break
            events += decided
        for name in [name for name, slot in self.slots.items() if slot.empty]:
            del self.slots[name]
        return events

    def _decide(self, group: Group, now: float) -> list[Event]:
        verdicts = []
        for name, identity in group.members:
            slot = self.slots.setdefault(name, Slot())
            verdict, other = self._verdict(slot, identity, group, now)
            if verdict == "mismatch":
                keys = {**identity, **other}
                fields = {k: [identity.get(k), other.get(k)] for k in keys if identity.get(k) != other.get(k)}
                return self._dissolve(group, "mismatch", f"slot {name} has other weights", fields=fields)
            verdicts.append(verdict)
        if "wait" in verdicts:
            return []
        del self.groups[group.key]
        events: list[Event] = []
        for rank, verdict in enumerate(verdicts):
            client, (name, identity) = group.clients[rank], group.members[rank]
            slot = self.slots[name]
            del self.waiting[client]
            if verdict == "read":
                assert slot.current is not None
                self._lease(client, slot.current)
                events.append(MayRead(client, slot.current))
                continue
            if group.replace == "evict-first":
                events += self._retire(slot, now)
            slot.writer, slot.writing = client, identity
            self.writing[client] = name, group.keep
            events.append(MayWrite(client, name, slot.number + 1))
        return events

    def _verdict(self, slot: Slot, identity: Identity, group: Group, now: float) -> tuple[str, Identity]:
        """Return `read`, `write`, `wait`, or `mismatch` with the other identity."""
        current = slot.current
        if group.mode == "rw":
            if slot.writer is not None:
                group.waits_for = "another writer of the slot"
                return "wait", {}
            if now < self._no_writers_before:
                group.waits_for = "readers to come back"
                return "wait", {}
            held = slot.retired or (current is not None and current.leases)
            if group.replace == "evict-first" and held:
                slot.withheld = True
                group.waits_for = "readers of the slot to give back what they hold"
                return "wait", {}
            return "write", {}
        if current is not None:
            if current.identity != identity:
                return "mismatch", current.identity
            group.waits_for = "a writer that replaces what the slot has"
            return ("wait", {}) if slot.withheld else ("read", {})
        if slot.writer is not None:
            if slot.writing != identity:
                return "mismatch", slot.writing
            group.waits_for = "the engine that loads these weights"
            return "wait", {}
        group.waits_for = "an engine that loads these weights"
        if group.mode == "ro" or now < self._no_writers_before or slot.withheld:
            return "wait", {}
        return "write", {}

    def _lease(self, client: int, generation: Generation) -> None:
        generation.leases.add(client)
        generation.expires = None
        self.reading[client] = generation

    def _retire(self, slot: Slot, now: float) -> list[Event]:
        """Take the slot's generation out of service; it goes when the last who holds it does."""
        old, slot.current = slot.current, None
        if old is None:
            return []
        if old.leases:
            slot.retired.add(old)
            return []
        return [Freed(old)]

    def _left(self, generation: Generation, now: float) -> list[Event]:
        slot = self.slots[generation.slot]
        if slot.current is generation:
            if generation.keep > 0:
                generation.expires = now + generation.keep
                return []
            slot.current = None
        slot.retired.discard(generation)
        return [Freed(generation)]

    def _dissolve(
        self,
        group: Group,
        code: str,
        why: str,
        *,
        but: int | None = None,
        fields: dict[str, list[Any]] | None = None,
    ) -> list[Event]:
        del self.groups[group.key]
        for client in group.clients.values():
            del self.waiting[client]
        return [Refused(client, code, why, fields) for client in group.clients.values() if client != but]

    def generations(self) -> Iterator[Generation]:
        """Yield everything that is held, in service or not."""
        for slot in self.slots.values():
            yield from ([slot.current] if slot.current is not None else [])
            yield from slot.retired
