# SPDX-License-Identifier: Apache-2.0
"""What errors carry and how they read; the documentation of the hooks."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from weights_core import errors, hookspecs

WHERE = {"plugin": "tape", "distribution": "weights-tape 1.0", "hook": "load_weights", "rank": 3}
TAIL = "[plugin tape of weights-tape 1.0, hook load_weights, rank 3]"

EXAMPLES = {
    errors.ConsumedError: lambda: errors.ConsumedError("a.b", "release() at engine.py:7"),
    errors.LoadFailed: lambda: errors.LoadFailed("half-way", mutated=True),
    errors.NoProviderError: lambda: errors.NoProviderError("nobody", reasons={"disk": "gone"}),
    errors.IdentityMismatchError: lambda: errors.IdentityMismatchError("other", fields={"dtype": (1, 2)}),
    errors.CleanupError: lambda: errors.CleanupError("closing", [ValueError("a")]),
}
ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.WeightsError)
]


def an(kind):
    return EXAMPLES.get(kind, lambda: kind("what went wrong"))()


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_is_stamped_with_plugin_distribution_hook_and_rank(kind):
    error = an(kind)
    assert error.stamp(**WHERE) is error
    assert (error.plugin, error.distribution, error.hook, error.rank) == tuple(WHERE.values())


@pytest.mark.parametrize(
    "kind", [k for k in ALL if k is not errors.CleanupError], ids=lambda kind: kind.__name__
)
def test_every_error_says_who_raised_it(kind):
    unstamped = str(an(kind))
    assert str(an(kind).stamp(**WHERE)) == f"{unstamped} {TAIL}"


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_is_documented_and_unstamped_at_first(kind):
    error = an(kind)
    assert inspect.getdoc(kind)
    assert (error.plugin, error.distribution, error.hook, error.rank) == (None, None, None, None)


def test_the_first_stamp_stays_because_it_is_nearest_to_the_cause():
    error = errors.Declined("no tape").stamp(**WHERE)
    error.stamp(plugin="outer", distribution="outer 2", hook="cleanup", rank=0)
    assert (error.plugin, error.distribution, error.hook, error.rank) == tuple(WHERE.values())
    assert str(error) == f"no tape {TAIL}"


def test_stamping_one_error_leaves_others_of_its_class_alone():
    errors.Declined("first").stamp(**WHERE)
    assert errors.Declined("second").plugin is None


def test_an_unstamped_error_reads_as_its_message():
    error = errors.PluginContractError("returned None")
    assert str(error) == "returned None"
    assert error.message == "returned None"


def test_an_error_raised_without_a_message_can_still_be_printed():
    error = errors.Declined()
    assert isinstance(str(error), str)
    assert TAIL in str(error.stamp(**WHERE))


@pytest.mark.parametrize(
    ("place", "prefix"),
    [
        ({}, ""),
        ({"file": Path("m.safetensors")}, "m.safetensors: "),
        ({"tensor": "a.b"}, "tensor 'a.b': "),
        ({"file": Path("m.safetensors"), "tensor": "a"}, "m.safetensors, tensor 'a': "),
        ({"file": Path("m.bin"), "tensor": "a", "offset": 0}, "m.bin, tensor 'a', byte 0: "),
        ({"file": Path("m.bin"), "offset": 8}, "m.bin, byte 8: "),
    ],
)
def test_a_checkpoint_error_says_its_place_first_and_its_stamp_last(place, prefix):
    error = errors.CheckpointError("is torn", **place)
    assert str(error) == f"{prefix}is torn"
    assert str(error.stamp(**WHERE)) == f"{prefix}is torn {TAIL}"
    assert error.message == "is torn"


def test_errors_carry_their_details():
    assert errors.LoadFailed("x", mutated=False).mutated is False
    assert errors.NoProviderError("x", reasons={"a": "b"}).reasons == {"a": "b"}
    assert errors.IdentityMismatchError("x", fields={"dtype": (1, 2)}).fields == {"dtype": (1, 2)}
    covered = errors.CoverageError("x", missing=["m"], unexpected=["u"], mismatched={"t": "shape"})
    assert (covered.missing, covered.unexpected, covered.mismatched) == (("m",), ("u",), {"t": "shape"})


def test_details_are_copies_that_the_callers_later_changes_do_not_reach():
    reasons, missing, mismatched = {"a": "b"}, ["m"], {"t": "shape"}
    nobody = errors.NoProviderError("x", reasons=reasons)
    covered = errors.CoverageError("x", missing=missing, mismatched=mismatched)
    reasons.clear()
    missing.clear()
    mismatched.clear()
    assert nobody.reasons == {"a": "b"}
    assert (covered.missing, covered.mismatched) == (("m",), {"t": "shape"})


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (errors.PluginLoadError, errors.PluginError),
        (errors.PluginFailedError, errors.PluginError),
        (errors.FormatNotFoundError, errors.FormatError),
        (errors.AmbiguousFormatError, errors.FormatError),
        (errors.Declined, errors.LoadError),
        (errors.LoadFailed, errors.LoadError),
        (errors.NoProviderError, errors.LoadError),
        (errors.CoverageError, errors.LoadError),
        (errors.CleanupError, ExceptionGroup),
    ],
)
def test_errors_are_caught_by_their_family(kind, base):
    with pytest.raises(base):
        raise an(kind)


def test_a_cleanup_error_reads_as_its_message_and_every_failure():
    group = errors.CleanupError("closing the lease", [ValueError("one"), errors.PublishError("two")])
    assert str(group) == "closing the lease: one; two"
    assert group.message == "closing the lease"
    assert [str(exc) for exc in group.exceptions] == ["one", "two"]
    assert group.report is None


def test_a_cleanup_error_can_be_stamped_without_losing_its_failures():
    group = errors.CleanupError("cleanup", [ValueError("one")]).stamp(**WHERE)
    assert group.plugin == "tape"
    assert len(group.exceptions) == 1


def test_the_failures_of_a_cleanup_error_are_handled_by_except_star():
    caught = []
    try:
        raise errors.CleanupError("cleanup", [ValueError("v"), KeyError("k"), errors.PublishError("p")])
    except* ValueError as group:
        caught.append(group)
    except* errors.PublishError as group:
        caught.append(group)
    except* KeyError as group:
        caught.append(group)
    assert [type(group) for group in caught] == [errors.CleanupError] * 3
    assert [[type(e) for e in group.exceptions] for group in caught] == [
        [ValueError],
        [errors.PublishError],
        [KeyError],
    ]


def test_what_except_star_leaves_is_raised_on_as_a_cleanup_error():
    def handle_some():
        try:
            raise errors.CleanupError("cleanup", [ValueError("v"), KeyError("k")])
        except* ValueError:
            pass

    with pytest.raises(errors.CleanupError) as info:
        handle_some()
    assert [type(e) for e in info.value.exceptions] == [KeyError]
    assert info.value.message == "cleanup"


def test_split_and_derive_keep_type_and_message():
    group = errors.CleanupError("cleanup", [ValueError("v"), KeyError("k")])
    matched, rest = group.split(KeyError)
    assert type(matched) is type(rest) is type(group.derive([OSError("x")])) is errors.CleanupError
    assert (matched.message, rest.message) == ("cleanup", "cleanup")
    assert [type(e) for e in rest.exceptions] == [ValueError]


@pytest.mark.parametrize("wrong", [[], [KeyboardInterrupt()], ["text"]])
def test_a_cleanup_error_holds_at_least_one_plain_exception(wrong):
    with pytest.raises((TypeError, ValueError)):
        errors.CleanupError("cleanup", wrong)


SPECS = [getattr(hookspecs, name) for name in hookspecs.HOOKS]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_every_hook_documents_its_order_parameters_outcome_and_an_example(spec):
    doc = inspect.getdoc(spec)
    assert re.search(r"^Order: \w", doc, re.M)
    assert re.search(r"^(Returns|Raises):$", doc, re.M)
    assert re.search(r"^Example:$", doc, re.M)
    described = re.search(r"^Args:\n((?:    .*\n)+)", doc, re.M)[1]
    assert re.findall(r"^    (\w+):", described, re.M) == list(inspect.signature(spec).parameters)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_the_example_of_every_hook_is_python_that_implements_it_with_parameters_it_has(spec):
    example = inspect.getdoc(spec).split("Example:")[1]
    lines = re.findall(r"^(?:>>>|\.\.\.) ?(.*)$", textwrap.dedent(example), re.M)
    methods = [
        method
        for cls in ast.parse("\n".join(lines)).body
        for method in cls.body
        if isinstance(method, ast.FunctionDef) and method.name == spec.__name__
    ]
    assert methods
    for method in methods:
        assert any("hookimpl" in ast.unparse(decorator) for decorator in method.decorator_list)
        assert {arg.arg for arg in method.args.args[1:]} <= set(inspect.signature(spec).parameters)


def test_the_listed_hooks_are_exactly_the_specified_ones_in_order():
    marked = [
        name
        for name, value in vars(hookspecs).items()
        if inspect.isfunction(value) and hasattr(value, f"{hookspecs.PROJECT}_spec")
    ]
    assert tuple(marked) == hookspecs.HOOKS
