# SPDX-License-Identifier: Apache-2.0
"""A lease ends once, wholly, and at the latest with what it is anchored to."""

import gc
import subprocess
import sys
import weakref

import pytest

from weights_core import Lease
from weights_core.errors import CleanupError, WeightsError


class Model:
    pass


def failing(error):
    def callback():
        raise error

    return callback


def test_the_last_added_is_closed_first():
    lease, closed = Lease(), []
    for name in "abc":
        lease.add(lambda name=name: closed.append(name))
    assert closed == []
    lease.close()
    assert closed == ["c", "b", "a"]


def test_closing_twice_calls_nothing_twice():
    lease, closed = Lease(), []
    lease.add(lambda: closed.append(1))
    lease.close()
    lease.close()
    assert closed == [1]


def test_a_lease_knows_whether_it_is_closed():
    lease = Lease()
    assert not lease.closed
    lease.close()
    assert lease.closed


def test_an_empty_lease_closes():
    with Lease() as lease:
        assert not lease.closed
    assert lease.closed


def test_a_lease_is_a_context_manager_that_returns_itself():
    lease, closed = Lease(), []
    lease.add(lambda: closed.append(1))
    with lease as entered:
        assert entered is lease
        assert closed == []
    assert closed == [1]


def test_leaving_the_block_by_an_error_closes_too_and_lets_the_error_through():
    lease, closed = Lease(), []
    lease.add(lambda: closed.append(1))
    with pytest.raises(KeyError), lease:
        raise KeyError("x")
    assert closed == [1]


def test_errors_are_collected_and_everything_else_is_closed():
    lease, closed = Lease(), []
    lease.add(lambda: closed.append("first"))
    lease.add(failing(ValueError("one")))
    lease.add(lambda: closed.append("middle"))
    lease.add(failing(WeightsError("two")))
    lease.add(lambda: closed.append("last"))
    with pytest.raises(CleanupError) as info:
        lease.close()
    assert str(info.value) == "closing the lease: two; one"
    assert closed == ["last", "middle", "first"]
    assert [str(error) for error in info.value.exceptions] == ["two", "one"]
    assert lease.closed


def test_closing_again_after_errors_raises_nothing():
    lease = Lease()
    lease.add(failing(ValueError("one")))
    with pytest.raises(CleanupError):
        lease.close()
    lease.close()


def test_an_interrupt_is_not_collected_and_the_rest_can_still_be_closed():
    lease, closed = Lease(), []
    lease.add(lambda: closed.append("first"))
    lease.add(failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        lease.close()
    lease.close()
    assert closed == ["first"]


def test_a_callback_may_close_the_lease_itself():
    lease, closed = Lease(), []
    lease.add(lambda: closed.append("first"))
    lease.add(lease.close)
    lease.close()
    assert closed == ["first"]


def test_the_lease_ends_when_its_anchor_dies():
    lease, closed, model = Lease(), [], Model()
    lease.add(lambda: closed.append(1))
    lease.anchor(model)
    gc.collect()
    assert closed == []
    del model
    gc.collect()
    assert closed == [1]
    assert lease.closed


def test_the_lease_does_not_keep_its_anchor_alive():
    lease, model = Lease(), Model()
    lease.anchor(model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_an_anchor_keeps_the_lease_when_nobody_else_does():
    closed, model = [], Model()
    lease = Lease()
    lease.add(lambda: closed.append(1))
    lease.anchor(model)
    del lease
    gc.collect()
    assert closed == []
    del model
    gc.collect()
    assert closed == [1]


def test_an_anchor_in_a_cycle_ends_the_lease_at_collection():
    lease, closed, model = Lease(), [], Model()
    lease.add(lambda: closed.append(1))
    lease.anchor(model)
    model.itself = model
    del model
    gc.collect()
    assert closed == [1]


def test_a_lease_closed_before_its_anchor_dies_is_not_closed_again():
    lease, closed, model = Lease(), [], Model()
    lease.add(lambda: closed.append(1))
    lease.anchor(model)
    lease.close()
    del model
    gc.collect()
    assert closed == [1]


def test_an_anchor_must_allow_weak_references():
    with pytest.raises(TypeError):
        Lease().anchor(3)


def test_the_lease_ends_when_the_interpreter_exits():
    code = (
        "from weights_core import Lease\n"
        "class Model: pass\n"
        "model, lease = Model(), Lease()\n"
        "lease.add(lambda: print('closed'))\n"
        "lease.anchor(model)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("closed\n", "")
