# SPDX-License-Identifier: Apache-2.0

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from weights_parallel_shards.window import Window

PATIENCE = 20
"""Seconds after which a test gives up on what should have happened at once."""


class Taker:
    """A thread that takes; `answer` is set once it may go on."""

    def __init__(self, window, count):
        self._window, self._count = window, count
        self._about_to = threading.Event()
        self.done = threading.Event()
        self.answer = None
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()
        assert self._about_to.wait(PATIENCE)

    def _take(self):
        self._about_to.set()
        self.answer = self._window.take(self._count)
        self.done.set()

    def waits(self):
        return not self.done.wait(0.1)

    def finished(self):
        assert self.done.wait(PATIENCE)
        self._thread.join(PATIENCE)
        return self.answer


def test_takes_up_to_the_limit_without_waiting():
    window = Window(10)
    assert [window.take(n) for n in (4, 0, 5, 1, 0)] == [True] * 5


@pytest.mark.parametrize("more", [1, 2, 10, 1000])
def test_waits_where_the_limit_would_be_passed_until_enough_was_given_back(more):
    window = Window(10)
    assert window.take(6)
    assert window.take(4)
    taker = Taker(window, more)
    assert taker.waits()
    window.give_back(6)
    window.give_back(4)
    assert taker.finished() is True


def test_giving_back_too_little_does_not_let_the_waiter_in():
    window = Window(10)
    assert window.take(6)
    assert window.take(4)
    taker = Taker(window, 5)
    window.give_back(4)
    assert taker.waits()
    window.give_back(6)
    assert taker.finished() is True


def test_a_piece_larger_than_the_limit_is_let_in_alone():
    window = Window(10)
    assert window.take(50)
    taker = Taker(window, 1)
    assert taker.waits()
    window.give_back(50)
    assert taker.finished() is True


def test_a_piece_larger_than_the_limit_waits_for_an_empty_window():
    window = Window(10)
    assert window.take(1)
    taker = Taker(window, 50)
    assert taker.waits()
    window.give_back(1)
    assert taker.finished() is True


def test_giving_back_wakes_every_waiter_that_now_fits():
    window = Window(10)
    assert window.take(10)
    takers = [Taker(window, 2) for _ in range(5)]
    assert all(taker.waits() for taker in takers)
    window.give_back(10)
    assert [taker.finished() for taker in takers] == [True] * 5


@pytest.mark.parametrize("waiters", [1, 4])
def test_closing_wakes_blocked_takers_with_false(waiters):
    window = Window(1)
    assert window.take(1)
    takers = [Taker(window, 1) for _ in range(waiters)]
    assert all(taker.waits() for taker in takers)
    window.close()
    assert [taker.finished() for taker in takers] == [False] * waiters


@pytest.mark.parametrize("count", [0, 1, 100])
def test_nothing_can_be_taken_from_a_closed_window(count):
    window = Window(10)
    window.close()
    assert window.take(count) is False


def test_closing_twice_and_giving_back_after_closing_are_harmless():
    window = Window(10)
    assert window.take(3)
    window.close()
    window.close()
    window.give_back(3)
    assert window.take(1) is False


@pytest.mark.parametrize("limit", [1, 7, 64])
def test_many_threads_never_hold_more_than_the_limit_or_one_larger_piece(limit):
    window = Window(limit)
    lock = threading.Lock()
    held: list[int] = []
    wrong = []

    def work(seed):
        chance = random.Random(seed)
        for _ in range(200):
            count = chance.randint(0, 2 * limit)
            assert window.take(count)
            with lock:
                held.append(count)
                if sum(held) > limit and len([n for n in held if n]) > 1:
                    wrong.append(list(held))
            with lock:
                held.remove(count)
            window.give_back(count)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, seed) for seed in range(8)]:
            future.result(timeout=PATIENCE)
    assert wrong == []
    assert window.take(limit)
