# SPDX-License-Identifier: Apache-2.0

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weights_consumable.index import NameIndex

NAMES = ["layers.1.a", "layers.10.a", "layers.1", "layers.1.b.c", "layers.1-x", "layers.1/y", "head"]


@pytest.mark.parametrize("prefix", ["layers.1", "layers.1."])
def test_a_prefix_ends_at_a_dot_and_takes_the_exact_name(prefix):
    assert NameIndex(NAMES).under(prefix) == ["layers.1", "layers.1.a", "layers.1.b.c"]


def test_the_empty_prefix_stands_for_all_in_their_order():
    assert NameIndex(NAMES).under("") == NAMES


def test_removing_returns_each_name_once():
    index = NameIndex(NAMES)
    assert index.remove(["head", "ghost", "head"]) == ["head"]
    assert index.remove(["head"]) == []
    assert index.under("head") == []
    assert list(index.names) == NAMES[:-1]


def test_a_stretch_of_removed_names_is_not_searched_again():
    index = NameIndex(f"a.{number}" for number in range(1000))
    index.remove(index.under("a"))
    assert index.under("a") == []
    assert index._sorted == []


PART = st.sampled_from(["a", "b", "1", "10", "a-", "é", ""])
NAME = st.lists(PART, min_size=1, max_size=3).map(".".join)


@given(st.lists(NAME, unique=True), st.lists(NAME))
def test_finds_what_a_scan_finds_whatever_was_removed(names, prefixes):
    index, left = NameIndex(names), set(names)
    for prefix in prefixes:
        bare = prefix.removesuffix(".")
        due = {n for n in left if not bare or n == bare or n.startswith(bare + ".")}
        found = index.under(prefix)
        assert len(found) == len(set(found))
        assert set(found) == due
        gone = sorted(due)[::2]
        assert index.remove(gone) == gone
        left -= set(gone)
    assert list(index.names) == [name for name in names if name in left]
