# SPDX-License-Identifier: Apache-2.0
"""The vault's rules: tables of what each step does, and any sequence of steps keeps the promises."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weights_gms.vault import Freed, Generation, Group, MayRead, MayWrite, Misuse, Refused, Vault

A, B = {"digest": "a"}, {"digest": "b"}


class Bench:
    """A vault with clients by number, one slot unless said, and what became of each step in short."""

    def __init__(self, **options):
        self.vault = Vault(**options)
        self.now = 0.0

    def open(self, client, mode="auto", identity=A, *, slots=("s",), group=None, rank=0, **terms):
        asked = Group(
            group or f"g{client}",
            [(slot, identity) for slot in slots],
            mode,
            terms.get("replace", "keep"),
            terms.get("keep", 0.0),
            self.now + terms.get("timeout", 100.0),
        )
        return self.told(self.vault.open(client, rank, asked, self.now))

    def commit(self, client, key=None):
        return self.told(self.vault.commit(client, key or f"k{client}", None, self.now))

    def drop(self, client):
        return self.told(self.vault.drop(client, self.now))

    def reseed(self, client, key, number, identity=A, slot="s", keep=0.0):
        held = Generation(key, number, identity, slot, keep=keep)
        return self.told(self.vault.reseed(client, held, self.now))

    def tick(self, now):
        self.now = now
        return self.told(self.vault.tick(now))

    def told(self, events):
        short = []
        for e in events:
            if isinstance(e, MayWrite):
                short.append(f"{e.client} writes {e.number}")
            elif isinstance(e, MayRead):
                short.append(f"{e.client} reads {e.generation.key}")
            elif isinstance(e, Refused):
                short.append(f"{e.client} {e.code}")
            else:
                assert isinstance(e, Freed)
                short.append(f"{e.generation.key} freed")
        return short


@pytest.fixture
def bench():
    return Bench()


def committed(bench, client=1, **terms):
    assert bench.open(client, **terms) == [f"{client} writes 1"]
    assert bench.commit(client) == [f"{client} reads k{client}"]


# mode × what the slot has → what a newcomer (client 9) is told
TABLE = [
    ("auto", "empty", ["9 writes 1"]),
    ("auto", "written: same", []),
    ("auto", "written: other", ["9 mismatch"]),
    ("auto", "committed: same", ["9 reads k1"]),
    ("auto", "committed: other", ["9 mismatch"]),
    ("auto", "committed, n+1 written", ["9 reads k1"]),
    ("ro", "empty", []),
    ("ro", "written: same", []),
    ("ro", "written: other", ["9 mismatch"]),
    ("ro", "committed: same", ["9 reads k1"]),
    ("ro", "committed: other", ["9 mismatch"]),
    ("ro", "committed, n+1 written", ["9 reads k1"]),
    ("rw", "empty", ["9 writes 1"]),
    ("rw", "written: same", []),
    ("rw", "written: other", []),
    ("rw", "committed: same", ["9 writes 2"]),
    ("rw", "committed: other", ["9 writes 2"]),
    ("rw", "committed, n+1 written", []),
]


@pytest.mark.parametrize(("mode", "state", "told"), TABLE)
def test_what_a_newcomer_is_told(bench, mode, state, told):
    theirs = B if "other" in state else A
    if state.startswith("written"):
        bench.open(1, identity=theirs)
    elif state.startswith("committed"):
        committed(bench, identity=theirs)
    if "n+1" in state:
        assert bench.open(2, "rw", B) == ["2 writes 2"]
    assert bench.open(9, mode) == told


# role of the one who dies → what the others are told; 1 wrote or writes, 2 waits, 3 reads
@pytest.mark.parametrize(
    ("before", "dies", "told"),
    [
        ("writing", 1, ["2 writes 1"]),
        ("writing", 2, []),
        ("committed", 1, []),
        ("committed", 3, []),
    ],
)
def test_who_dies(bench, before, dies, told):
    bench.open(1)
    bench.open(2)
    if before == "committed":
        assert bench.commit(1) == ["1 reads k1", "2 reads k1"]
        assert bench.open(3) == ["3 reads k1"]
    assert bench.drop(dies) == told
    assert bench.open(9) == (["9 reads k1"] if before == "committed" else [])


def test_memory_returns_with_the_last_lease_whoever_holds_it(bench):
    committed(bench)
    bench.open(2)
    assert bench.drop(1) == []
    assert bench.drop(2) == ["k1 freed"]
    assert bench.vault.empty
    assert bench.drop(2) == []


def test_kept_for_a_while(bench):
    committed(bench, keep=10.0)
    assert bench.drop(1) == []
    assert bench.vault.next_tick(0.0) == 10.0
    assert bench.tick(9.0) == []
    assert bench.open(2) == ["2 reads k1"]
    assert bench.tick(30.0) == []
    assert bench.drop(2) == []
    assert bench.tick(40.0) == ["k1 freed"]
    assert bench.vault.empty


def test_a_writer_that_dies_in_the_next_generation_leaves_this_one_served(bench):
    committed(bench)
    assert bench.open(2, "rw", B) == ["2 writes 2"]
    assert bench.open(3, "rw", B) == []
    assert bench.drop(2) == ["3 writes 2"]
    assert bench.open(4) == ["4 reads k1"]
    assert bench.commit(3) == ["3 reads k3"]
    assert bench.open(5) == ["5 mismatch"]
    assert bench.drop(1) == []
    assert bench.drop(4) == ["k1 freed"]
    assert bench.open(6, identity=B) == ["6 reads k3"]


def test_the_old_generation_goes_at_once_if_nobody_holds_it(bench):
    committed(bench, keep=100.0)
    bench.drop(1)
    bench.open(2, "rw")
    assert bench.commit(2) == ["2 reads k2", "k1 freed"]


def test_evict_first_waits_until_the_old_memory_is_back(bench):
    committed(bench)
    bench.open(2)
    assert bench.open(3, "rw", replace="evict-first") == []
    assert bench.open(4) == []  # would make the writer wait longer
    assert bench.drop(1) == []
    assert bench.drop(2) == ["k1 freed", "3 writes 2"]
    assert bench.commit(3) == ["3 reads k3", "4 reads k3"]


def test_evict_first_frees_what_is_only_kept_and_counts_what_was_retired(bench):
    committed(bench, keep=100.0)
    bench.drop(1)
    assert bench.open(2, "rw", replace="evict-first") == ["k1 freed", "2 writes 2"]
    bench.commit(2)
    bench.open(3, "rw")
    bench.commit(3)
    bench.drop(3)
    assert bench.open(4, "rw", replace="evict-first") == []
    assert bench.drop(2) == ["k2 freed", "4 writes 4"]


def test_a_writer_that_gives_up_waiting_lets_the_readers_in_again(bench):
    committed(bench)
    bench.open(2, "rw", replace="evict-first")
    bench.open(3)
    assert bench.drop(2) == ["3 reads k1"]


def test_waiting_ends_at_the_deadline_and_says_for_whom(bench):
    bench.open(1)
    bench.open(2, timeout=5)
    bench.open(3, "ro", slots=("t",), timeout=6)
    assert bench.vault.next_tick(0) == 5
    asked = bench.vault.waiting[2].waits_for, bench.vault.waiting[3].waits_for
    assert asked == ("the engine that loads these weights", "an engine that loads these weights")
    assert bench.tick(5) == ["2 timeout"]
    assert bench.tick(6) == ["3 timeout"]
    assert bench.vault.next_tick(6) is None


def test_eviction_serves_nobody_more_and_takes_nothing_away(bench):
    assert bench.vault.evict("s", 0) is None
    committed(bench)
    assert bench.told(bench.vault.evict("s", 0)) == []
    assert bench.vault.evict("s", 0) is None
    assert bench.open(2, identity=B) == ["2 writes 2"]
    assert bench.drop(1) == ["k1 freed"]


# Ranks --------------------------------------------------------------------------------------------


def test_ranks_are_granted_together(bench):
    both = ("r0", "r1")
    assert bench.open(1, slots=both, group="x", rank=0) == []
    assert bench.open(11, slots=both, group="y", rank=1) == []
    assert bench.open(10, slots=both, group="y", rank=0) == ["10 writes 1", "11 writes 1"]
    assert bench.open(2, slots=both, group="x", rank=1) == []
    assert bench.commit(11) == ["11 reads k11"]
    assert bench.commit(10) == ["10 reads k10", "1 reads k10", "2 reads k11"]


def test_one_rank_lost_and_the_other_served(bench):
    both = ("r0", "r1")
    for rank in (0, 1):
        bench.open(rank, slots=both, group="x", rank=rank)
    bench.commit(0)
    bench.drop(1)
    bench.open(10, slots=both, group="y", rank=0)
    assert bench.open(11, slots=both, group="y", rank=1) == ["10 reads k0", "11 writes 1"]


def test_a_rank_that_goes_takes_its_waiting_engine_along(bench):
    bench.open(1, slots=("r0", "r1"), group="x", rank=0)
    bench.open(5, slots=("r0",))
    bench.open(2, slots=("r0", "r1"), group="x", rank=1)
    assert bench.drop(2) == ["1 gone"]
    assert bench.drop(1) == []
    assert bench.drop(5) == []
    assert bench.vault.empty


def test_a_mismatch_of_one_rank_is_told_to_all(bench):
    committed(bench, slots=("r1",), identity=B)
    bench.open(2, slots=("r0", "r1"), group="x", rank=0)
    assert bench.open(3, slots=("r0", "r1"), group="x", rank=1) == ["2 mismatch", "3 mismatch"]


def test_a_mismatch_names_the_fields(bench):
    committed(bench, identity={"digest": "a", "dtype": "BF16", "only": 1})
    asked = Group("g", [("s", {"digest": "b", "dtype": "BF16"})], "auto", "keep", 0.0, 9.0)
    (event,) = bench.vault.open(2, 0, asked, 0.0)
    assert event.fields == {"digest": ["b", "a"], "only": [None, 1]}
    assert event.why == "slot s has other weights"


@pytest.mark.parametrize(
    "terms", [{"rank": 0}, {"rank": 2}, {"rank": -1}, {"rank": 1, "mode": "rw"}, {"rank": 1, "identity": B}]
)
def test_ranks_that_ask_for_different_things_are_refused(bench, terms):
    bench.open(1, slots=("r0", "r1"), group="x", rank=0)
    with pytest.raises(Misuse):
        bench.open(2, slots=("r0", "r1"), group="x", **terms)


def test_two_ranks_cannot_have_one_slot(bench):
    with pytest.raises(Misuse):
        bench.open(1, slots=("s", "s"))


def test_asking_twice_and_committing_unasked_are_refused(bench):
    committed(bench)
    bench.open(2, identity=A, slots=("t",))
    bench.open(3, identity=A, slots=("t",))
    for client in (1, 2, 3):
        with pytest.raises(Misuse):
            bench.open(client)
        with pytest.raises(Misuse):
            bench.reseed(client, "k", 1)
    for client in (1, 3, 99):
        with pytest.raises(Misuse):
            bench.commit(client)


# After a crash ------------------------------------------------------------------------------------


def test_after_a_crash_readers_come_back_before_anyone_writes():
    bench = Bench(no_writers_before=1.0)
    assert bench.open(1) == []
    assert bench.open(2, "rw", B) == []
    assert bench.vault.next_tick(0.0) == 1.0
    assert bench.reseed(7, "old", 3) == ["7 reads old", "1 reads old"]
    assert bench.reseed(8, "old", 3) == ["8 reads old"]
    assert bench.tick(1.0) == ["2 writes 4"]


def test_after_a_crash_with_nobody_left_the_first_writes_when_the_time_is_up():
    bench = Bench(no_writers_before=1.0)
    assert bench.open(1) == []
    assert bench.tick(1.0) == ["1 writes 1"]


def test_the_newest_that_is_brought_back_is_served(bench):
    assert bench.reseed(1, "older", 3, B) == ["1 reads older"]
    assert bench.reseed(2, "newer", 4) == ["2 reads newer"]
    assert bench.reseed(3, "oldest", 2, B) == ["3 reads oldest"]
    assert bench.open(4) == ["4 reads newer"]
    assert bench.drop(1) == ["older freed"]
    assert bench.drop(3) == ["oldest freed"]
    assert bench.open(5, "rw") == ["5 writes 5"]


def test_what_was_committed_since_is_not_replaced_by_what_is_brought_back(bench):
    committed(bench, identity=B)
    assert bench.reseed(2, "old", 7) == ["2 reads old"]
    assert bench.open(3, identity=B) == ["3 reads k1"]
    assert bench.drop(2) == ["old freed"]


def test_a_writer_whose_broker_died_offers_it_to_the_next(bench):
    bench.open(1)
    bench.open(2)
    assert bench.reseed(3, "late", 1) == ["3 reads late", "2 reads late"]
    assert bench.commit(1) == ["1 reads k1"]  # the same weights twice, until the readers go
    for client in (1, 2, 3):
        bench.drop(client)
    assert bench.vault.empty


class AnySequence(RuleBasedStateMachine):
    """Clients that ask, commit, die and come back in any order, over two slots and two identities."""

    def __init__(self):
        super().__init__()
        self.vault = Vault()
        self.now = 0.0
        self.last = 0
        self.freed = []
        self.members = {}
        self.granted = {}

    def take(self, events):
        for event in events:
            if isinstance(event, Freed):
                assert not event.generation.leases
                self.freed.append(event.generation)
            elif isinstance(event, MayRead | MayWrite):
                self.granted[event.client] = event
            else:
                self.granted.pop(event.client, None)
        self.group_is_whole_or_not_at_all()

    def group_is_whole_or_not_at_all(self):
        for group in {id(g): g for g in self.vault.waiting.values()}.values():
            assert not [c for c in group.clients.values() if c in self.granted]

    @rule(
        mode=st.sampled_from(["auto", "ro", "rw"]),
        identity=st.sampled_from([A, B]),
        slots=st.sampled_from([("s",), ("t",), ("s", "t"), ("t", "s")]),
        replace=st.sampled_from(["keep", "evict-first"]),
        keep=st.sampled_from([0.0, 3.0]),
        timeout=st.sampled_from([1.0, 50.0]),
        absent=st.booleans(),
    )
    def engine_asks(self, mode, identity, slots, replace, keep, timeout, absent):
        key = f"g{self.last}"
        for rank in range(len(slots) - (absent and len(slots) > 1)):
            self.last += 1
            members = [(slot, identity) for slot in slots]
            asked = Group(key, members, mode, replace, keep, self.now + timeout)
            self.take(self.vault.open(self.last, rank, asked, self.now))

    @precondition(lambda self: self.vault.writing)
    @rule(data=st.data())
    def writer_commits(self, data):
        client = data.draw(st.sampled_from(sorted(self.vault.writing)))
        self.take(self.vault.commit(client, f"k{client}", None, self.now))

    @precondition(lambda self: self.granted or self.vault.waiting)
    @rule(data=st.data())
    def client_dies(self, data):
        client = data.draw(st.sampled_from(sorted({*self.granted, *self.vault.waiting})))
        self.granted.pop(client, None)
        self.take(self.vault.drop(client, self.now))

    @rule(slot=st.sampled_from(["s", "t"]), number=st.integers(1, 4), identity=st.sampled_from([A, B]))
    def reader_comes_back(self, slot, number, identity):
        self.last += 1
        key = f"{slot}{number}"
        if any(g.key == key and g.identity != identity for g in self.vault.generations()):
            return
        held = Generation(key, number, identity, slot)
        self.take(self.vault.reseed(self.last, held, self.now))

    @rule(slot=st.sampled_from(["s", "t"]))
    def operator_evicts(self, slot):
        self.take(self.vault.evict(slot, self.now) or [])

    @rule(seconds=st.sampled_from([0.5, 2.0, 60.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.take(self.vault.tick(self.now))

    @invariant()
    def every_client_has_one_state(self):
        states = [*self.vault.waiting, *self.vault.writing, *self.vault.reading]
        assert len(states) == len(set(states))
        for client, event in self.granted.items():
            state = self.vault.writing if isinstance(event, MayWrite) else self.vault.reading
            assert client in state
        assert len(self.granted) == len(self.vault.writing) + len(self.vault.reading)

    @invariant()
    def one_writer_a_slot_and_it_is_known(self):
        for name, slot in self.vault.slots.items():
            writers = [c for c, (slot_of, _) in self.vault.writing.items() if slot_of == name]
            assert writers == ([slot.writer] if slot.writer is not None else [])

    @invariant()
    def held_means_not_freed_and_unheld_means_freed(self):
        held = list(self.vault.generations())
        assert len(held) == len(set(held))
        assert not set(held) & set(self.freed)
        assert len(self.freed) == len(set(self.freed))
        for client, generation in self.vault.reading.items():
            assert client in generation.leases
            assert generation in held
        for generation in held:
            assert generation.leases or generation.expires is not None
            assert generation.leases == {c for c, g in self.vault.reading.items() if g is generation}

    @invariant()
    def nobody_waits_who_could_be_served(self):
        assert not self.vault._settle(self.now)

    @invariant()
    def someone_is_told_when_to_look_again(self):
        if self.vault.waiting:
            assert self.vault.next_tick(self.now) is not None

    def teardown(self):
        for client in [*self.granted, *self.vault.waiting]:
            self.take(self.vault.drop(client, self.now))
        self.take(self.vault.tick(self.now + 1000))
        assert self.vault.empty


AnySequence.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnySequence = AnySequence.TestCase
