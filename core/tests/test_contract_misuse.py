# SPDX-License-Identifier: Apache-2.0
"""A contract that proves nothing is refused, and says so in one sentence; also in a real pytest run."""

import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest

import weights_core as w
from weights_core.plugin import ProviderPlugin
from weights_core.testing import FakeEngine, host_of
from weights_core.testing.broken import publishers, sources
from weights_core.testing.checkpoints import read_with_safetensors, write_three_files
from weights_core.testing.contract import UnfitSubjectError, Violation, clauses
from weights_core.testing.contracts import (
    OwnerContract,
    PluginContract,
    PublisherContract,
    SourceContract,
    WrapperContract,
)
from weights_core.types import Role

LIVING = "a_kept_tensor_never_changes"


class Sound(SourceContract):
    name = "tried"
    plugin = sources.SOUND
    dtypes = ("F32", "U8")


class Offers(PublisherContract):
    name = "tried"
    plugin = publishers.SOUND

    def offered(self, receipt):
        return publishers.BOARD[receipt.detail]


class Own:
    """A source that shares nothing with the kit."""

    weights_api = 1

    @w.hookimpl
    def resolve_format(self, request):
        return w.FormatClaim(roles={Role.SOURCE}, reason="reads files")

    @w.hookimpl
    def load_weights(self, request, engine, source):
        return source.open()


def named(clause):
    return next(one for one in clauses(Role.SOURCE) if one.name == clause)


# At once, when the contract is read -----------------------------------------------------------


@pytest.mark.parametrize("base", [SourceContract, OwnerContract, WrapperContract, Offers])
@pytest.mark.parametrize("left_out", ["name", "plugin"])
def test_a_member_that_is_left_out_is_named(base, left_out):
    members = {"name": "tried", "plugin": sources.SOUND} | {left_out: None}
    contract = type("MyContract", (base,), members)
    with pytest.raises(UnfitSubjectError, match=f"MyContract leaves out `{left_out}`: nothing could be"):
        contract.subject()


def test_a_publisher_whose_offer_nobody_can_look_at_is_named():
    contract = type("Mine", (PublisherContract,), {"name": "tried", "plugin": publishers.SOUND})
    with pytest.raises(UnfitSubjectError, match="Mine leaves out `offered`: nobody could look"):
        contract.subject()


@pytest.mark.parametrize(
    ("member", "other"),
    [
        ({"prepare": lambda self, folder, tensors: folder}, "gives `prepare` and leaves out `oracle`"),
        ({"oracle": lambda self, path: {}}, "gives `oracle` and leaves out `prepare`"),
    ],
)
def test_of_prepare_and_oracle_both_are_given_or_neither(member, other):
    contract = type("Mine", (Sound,), member)
    with pytest.raises(UnfitSubjectError, match=f"Mine {other}: each is the other's proof"):
        contract.subject()


def test_with_both_prepare_and_oracle_the_contract_is_read():
    def prepare(self, folder, tensors):
        return write_three_files(folder, tensors)

    def oracle(self, path):
        return read_with_safetensors(path)

    subject = type("Mine", (Sound,), {"prepare": prepare, "oracle": oracle}).subject()
    assert (subject.name, subject.role, subject.plugin) == ("tried", Role.SOURCE, sources.SOUND)


@pytest.mark.parametrize("reason", ["", "   ", "todo", "not yet", None])
def test_an_exclusion_without_a_reason_is_refused(reason):
    contract = type("Mine", (Sound,), {"exclusions": {LIVING: reason}})
    with pytest.raises(
        UnfitSubjectError, match=f"Mine excludes '{LIVING}' without a reason: say in a sentence"
    ):
        contract.subject()


@pytest.mark.parametrize(
    ("base", "clause", "role"),
    [
        (Sound, "a_kept_tensor_newer_changes", "source"),
        (Sound, "never_publishes_late", "source"),
        (Offers, LIVING, "publisher"),
    ],
)
def test_an_exclusion_of_no_clause_of_the_role_is_refused(base, clause, role):
    contract = type("Mine", (base,), {"exclusions": {clause: "because the engine does not care"}})
    with pytest.raises(
        UnfitSubjectError, match=f"Mine excludes '{clause}', which is no clause of a {role}'s contract"
    ):
        contract.subject()


@pytest.mark.parametrize("dtypes", [(), ("U8",), ("F32",), ("BF16", "F16")])
def test_dtypes_that_clauses_need_cannot_be_left_out(dtypes):
    with pytest.raises(UnfitSubjectError, match="'tried' needs F32 and U8 among its `dtypes`"):
        type("Mine", (Sound,), {"dtypes": dtypes}).subject()


def test_the_base_class_is_no_contract_of_any_role():
    with pytest.raises((UnfitSubjectError, AttributeError)):
        type("Mine", (PluginContract,), {"name": "tried", "plugin": sources.SOUND}).subject()


# At the first clause, when the oracle is used -------------------------------------------------


def calls_the_plugin(checkpoint):
    Own().resolve_format(None)
    return read_with_safetensors(checkpoint)


def loads_with_the_plugin(checkpoint):
    engine = FakeEngine(read_with_safetensors(checkpoint))
    w.load(engine, checkpoint, format="tried", host=host_of(tried=Own)).lease.close()
    return engine.params


def in_a_thread(read):
    def oracle(checkpoint):
        found = {}
        reading = threading.Thread(target=lambda: found.update(read(checkpoint)))
        reading.start()
        reading.join()
        return found

    return oracle


def an_oracle(read):
    members = {
        "plugin": Own,
        "prepare": lambda self, folder, tensors: write_three_files(folder, tensors),
        "oracle": lambda self, path: read(path),
    }
    return type("Mine", (Sound,), members).subject()


@pytest.mark.parametrize(
    "read",
    [
        calls_the_plugin,
        loads_with_the_plugin,
        in_a_thread(calls_the_plugin),
        in_a_thread(loads_with_the_plugin),
    ],
    ids=["directly", "by a load", "directly, in a thread", "by a load, in a thread"],
)
def test_an_oracle_that_uses_the_plugin_is_refused(tmp_path, read):
    with pytest.raises(UnfitSubjectError, match=rf"the oracle of 'tried' calls {__name__}\.") as info:
        named(LIVING).check(an_oracle(read), tmp_path)
    assert "which is the plugin's: what it reads would be compared with itself" in str(info.value)
    assert sys.getprofile() is None


def test_an_oracle_in_a_thread_that_does_not_use_the_plugin_is_fine(tmp_path):
    named(LIVING).check(an_oracle(in_a_thread(read_with_safetensors)), tmp_path)


def test_an_oracle_may_load_with_the_disk(tmp_path):
    """That the plugin and the disk source have a base class in common makes neither the other."""

    class Derived(ProviderPlugin[None]):
        resolve_format, load_weights = Own.resolve_format, Own.load_weights

    def read(checkpoint):
        engine = FakeEngine(read_with_safetensors(checkpoint))
        w.load(engine, checkpoint, host=host_of()).lease.close()
        return engine.params

    members = {
        "plugin": Derived,
        "prepare": lambda self, folder, tensors: write_three_files(folder, tensors),
        "oracle": lambda self, path: read(path),
    }
    named(LIVING).check(type("Mine", (Sound,), members).subject(), tmp_path)


def test_an_offer_is_not_read_with_the_plugin_either(tmp_path):
    class OwnPublisher(publishers.SOUND):
        def look(self, receipt):
            return publishers.BOARD[receipt.detail]

    members = {"plugin": OwnPublisher, "offered": lambda self, receipt: OwnPublisher.look(None, receipt)}
    subject = type("Mine", (Offers,), members).subject()
    clause = next(one for one in clauses(Role.PUBLISHER) if one.name == "offers_what_the_engine_holds")
    with pytest.raises(
        UnfitSubjectError, match=r"`offered` of 'tried' calls .*\.look, which is the plugin's"
    ):
        clause.check(subject, tmp_path)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder, tensors: 1 / 0, "`prepare` or the oracle of 'tried' failed: ZeroDivisionError"),
        (
            lambda folder, tensors: write_three_files(folder, dict([*tensors.items()][1:])),
            r"was given \d+ tensors, its oracle reads \d+",
        ),
    ],
    ids=["fails", "loses a tensor"],
)
def test_a_prepare_that_does_not_work_is_refused(tmp_path, prepare, says):
    members = {
        "prepare": lambda self, folder, tensors: prepare(folder, tensors),
        "oracle": lambda self, path: read_with_safetensors(path),
    }
    with pytest.raises(UnfitSubjectError, match=says):
        named(LIVING).check(type("Mine", (Sound,), members).subject(), tmp_path)


def test_a_plugin_that_leaves_its_work_to_the_disk_is_not_proved(tmp_path):
    """It takes no part or declines, the disk delivers the right bytes, and every clause would hold."""

    class Refuses(sources.SoundSource):
        @w.hookimpl
        def resolve_format(self, request):
            return w.FormatClaim.refuse("not today")

    class Declines(sources.SoundSource):
        @w.hookimpl
        def load_weights(self):
            raise w.Declined("not today")

    for number, plugin in enumerate((Refuses, Declines)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(Violation, match="not today") as info:
            named(LIVING).check(type("Mine", (Sound,), {"plugin": plugin}).subject(), folder)
        assert "Else " in str(info.value)


# What an author sees --------------------------------------------------------------------------

HEAD = """
import weights_core as w
from weights_core.testing import *
from weights_core.testing.broken import publishers, sources
from weights_core.testing.checkpoints import read_with_safetensors, write_three_files
"""
SAYS = {
    "TestNoName": ("plugin = sources.SOUND", "TestNoName leaves out `name`"),
    "TestNoPlugin": ("name = 'tried'", "TestNoPlugin leaves out `plugin`"),
    "TestNoReason": (
        f"name, plugin, exclusions = 'tried', sources.SOUND, {{'{LIVING}': 'todo'}}",
        f"TestNoReason excludes '{LIVING}' without a reason",
    ),
    "TestNoClause": (
        "name, plugin, exclusions = 'tried', sources.SOUND, {'all_is_well': 'it is what it is'}",
        "TestNoClause excludes 'all_is_well', which is no clause of a source's contract",
    ),
    "TestNoF32": (
        "name, plugin, dtypes = 'tried', sources.SOUND, ('U8',)",
        "the contract of 'tried' needs F32 and U8 among its `dtypes`",
    ),
    "TestNoOracle": (
        """
        name, plugin = 'tried', sources.SOUND
        def prepare(self, folder, tensors):
            return write_three_files(folder, tensors)
        """,
        "TestNoOracle gives `prepare` and leaves out `oracle`",
    ),
}
PLUGIN = """
import weights_core as w

class Mine:
    weights_api = 1

    @w.hookimpl
    def resolve_format(self, request):
        return w.FormatClaim(roles={w.Role.SOURCE}, reason="reads files")

    @w.hookimpl
    def load_weights(self, source):
        return source.open()
"""
MIXED = f"""
import my_plugin


class TestMixed(SourceContract):
    name, plugin, dtypes = 'tried', sources.BROKEN['{LIVING}'], ('F32', 'U8')
    exclusions = {{'what_was_released_is_freed': 'the format keeps nothing that could be freed'}}


class TestSound(SourceContract):
    name, plugin, dtypes = 'tried', sources.SOUND, ('F32', 'U8')


class TestItself(SourceContract):
    name, plugin, dtypes = 'tried', my_plugin.Mine, ('F32', 'U8')

    def prepare(self, folder, tensors):
        return write_three_files(folder, tensors)

    def oracle(self, path):
        engine = FakeEngine(read_with_safetensors(path))
        w.load(engine, path, format='tried', host=host_of(tried=my_plugin.Mine)).lease.close()
        return engine.params
"""


def pytest_of(folder, body, *options):
    """Run pytest over a file of an author's."""
    folder.mkdir(exist_ok=True)
    (folder / "my_plugin.py").write_text(PLUGIN)
    (folder / "test_mine.py").write_text(HEAD + body)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, *options, folder],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_author_is_told_of_every_contract_that_is_not_fit(tmp_path):
    body = ""
    for name, (members, _) in SAYS.items():
        body += (
            f"class {name}(SourceContract):\n{textwrap.indent(textwrap.dedent(members).strip(), '    ')}\n\n"
        )
    body += "class TestNoOffer(PublisherContract):\n    name, plugin = 'tried', publishers.SOUND\n"
    done = pytest_of(tmp_path / "mine", body, "-q")
    assert done.returncode not in (0, 5)
    flat = " ".join(done.stdout.split())
    for says in [*(says for _, says in SAYS.values()), "TestNoOffer leaves out `offered`"]:
        assert says in flat, done.stdout
    assert "passed" not in done.stdout
    assert "contracts.py" not in done.stdout


def test_an_author_sees_why_a_clause_fails_and_why_it_is_skipped(tmp_path):
    done = pytest_of(tmp_path / "mine", MIXED, "-ra", "-k", f"{LIVING} or (what_was_released and TestMixed)")
    out = done.stdout
    assert done.returncode == 1
    assert "2 failed, 1 passed, 1 skipped" in out
    skipped = " ".join(line for line in out.splitlines() if line.startswith("SKIPPED"))
    assert "what_was_released_is_freed: the format keeps nothing that could be freed" in skipped
    failures = out[out.index("FAILURES") : out.index("short test summary info")]
    mixed, itself = failures.split("TestItself", 1)
    assert "Else " in mixed
    assert "the oracle of 'tried' calls my_plugin." in itself
    for of_the_kit in ("Traceback", "set_clauses.py", "model.py", "contracts.py", "clause.check("):
        assert of_the_kit not in failures


def test_every_clause_is_a_test_and_contracts_that_are_imported_are_none(tmp_path):
    done = pytest_of(
        tmp_path / "mine", MIXED, "-q", "--collect-only", "-k", "not TestMixed and not TestItself"
    )
    assert done.returncode == 0, done.stdout
    found = [line for line in done.stdout.splitlines() if "::" in line]
    due = [f"test_mine.py::TestSound::test_contract[{clause.name}]" for clause in clauses(Role.SOURCE)]
    assert found == due


# Imports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import weights_core.testing", {"pytest", "torch"}),
        ("import weights_core.testing.contract.check; from weights_core.testing import Group", {"pytest"}),
        ("from weights_core.cli.checking import tried", {"pytest", "torch"}),
    ],
)
def test_importing_costs_what_it_must(statement, absent):
    code = (
        f"{statement}; import json, sys; print(json.dumps([m for m in {sorted(absent)} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == []


def test_everything_that_the_kit_exports_is_there():
    from weights_core import testing

    assert sorted(testing.__all__) == list(testing.__all__)
    for name in testing.__all__:
        assert getattr(testing, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        testing.Nothing  # noqa: B018
