# SPDX-License-Identifier: Apache-2.0
"""An engine that does not hold all it expects is never used or shared."""

import pytest

from weights_core import Applied, TensorMeta
from weights_core.coverage import SHOWN, check, listed
from weights_core.errors import CoverageError

EXPECTED = {name: TensorMeta(name, (1,), "F32", 4) for name in ("a", "b", "c")}


def test_exactly_what_is_expected_is_accepted_and_returned():
    applied = Applied(written={"a", "b", "c"})
    assert check("toy", EXPECTED, applied, "report") is applied


def test_nothing_is_expected_of_an_engine_without_tensors():
    applied = Applied(written=(), unused=())
    assert check("toy", {}, applied, "refuse") is applied


def test_an_engine_that_cannot_say_what_it_left_unused_cannot_refuse_it():
    applied = Applied(written=())
    assert check("toy", {}, applied, "report") is applied
    with pytest.raises(CoverageError, match="can't say what it left unused"):
        check("toy", {}, applied, "refuse")


@pytest.mark.parametrize("reported", [None, {"a", "b", "c"}, True, "abc", ["a", "b", "c"]])
def test_an_engine_that_reports_anything_else_is_refused(reported):
    with pytest.raises(CoverageError, match="engine toy did not report what it wrote") as info:
        check("toy", EXPECTED, reported, "report")
    assert "refusing to use or share a model that may be unpopulated" in str(info.value)
    assert repr(reported) in str(info.value)


def test_missing_tensors_are_named_in_order():
    with pytest.raises(CoverageError, match="engine toy: missing 2 tensors: a, c") as info:
        check("toy", EXPECTED, Applied(written={"b"}), "report")
    assert info.value.missing == ("a", "c")
    assert info.value.unexpected == ()


def test_what_the_engine_filled_by_other_means_is_not_missing():
    applied = Applied(written={"a"}, defaulted={"b": "tied to a", "c": "computed"})
    assert check("toy", EXPECTED, applied, "report") is applied


def test_tensors_the_engine_does_not_expect_are_named():
    with pytest.raises(CoverageError, match="wrote tensors it does not expect, 1 tensor: z") as info:
        check("toy", EXPECTED, Applied(written={"a", "b", "c", "z"}), "report")
    assert info.value.unexpected == ("z",)
    assert info.value.missing == ()


def test_missing_and_unexpected_are_told_together():
    with pytest.raises(CoverageError) as info:
        check("toy", EXPECTED, Applied(written={"b", "c", "z"}), "report")
    assert str(info.value) == (
        "engine toy: missing 1 tensor: a; wrote tensors it does not expect, 1 tensor: z"
    )
    assert (info.value.missing, info.value.unexpected) == (("a",), ("z",))


def test_unused_tensors_of_the_checkpoint_are_reported_by_default_policy():
    applied = Applied(written={"a", "b", "c"}, unused=("extra",))
    assert check("toy", EXPECTED, applied, "report").unused == ("extra",)


def test_unused_tensors_of_the_checkpoint_are_refused_on_request():
    with pytest.raises(CoverageError, match="unexpected 1 tensor: extra") as info:
        check("toy", EXPECTED, Applied(written={"a", "b", "c"}, unused=("extra",)), "refuse")
    assert info.value.unexpected == ("extra",)


def test_missing_tensors_count_more_than_unused_ones():
    with pytest.raises(CoverageError, match="missing 1 tensor: c"):
        check("toy", EXPECTED, Applied(written={"a", "b"}, unused=("extra",)), "refuse")


def test_every_missing_tensor_is_in_the_error_though_only_the_first_are_shown():
    many = {f"t{n:02}": TensorMeta(f"t{n:02}", (1,), "F32", 4) for n in range(SHOWN + 4)}
    with pytest.raises(CoverageError) as info:
        check("toy", many, Applied(written=()), "report")
    assert info.value.missing == tuple(sorted(many))
    assert str(info.value).endswith(f"missing {SHOWN + 4} tensors: t00, t01, t02, t03, t04, t05, t06, t07, …")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "0 tensors: "),
        (["a"], "1 tensor: a"),
        (["a", "b"], "2 tensors: a, b"),
        (list("abcdefgh"), "8 tensors: a, b, c, d, e, f, g, h"),
        (list("abcdefghi"), "9 tensors: a, b, c, d, e, f, g, h, …"),
    ],
)
def test_a_list_of_names_is_counted_and_cut(names, text):
    assert listed(names) == text
