# SPDX-License-Identifier: Apache-2.0
"""The contract as pytest classes: subclass the one of your plugin's role, and run pytest.

The shape, a public class of tests with an oracle of its own, is that of zarr-python's store tests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from weights_core.testing.checkpoints import every_dtype, read_with_safetensors, write_three_files
from weights_core.testing.contract import Clause, Subject, UnfitSubjectError, Violation, clauses, excluded
from weights_core.types import Role

_MISSING: Any = None


class PluginContract:
    """What all contracts share; subclass one of those below.

    Give `name` and `plugin`, and what of the rest differs from the default. Every clause becomes one
    test, named after it: `pytest -k a_kept_tensor_never_changes`.
    """

    role: ClassVar[Role]
    name: ClassVar[str] = _MISSING
    """The name that the plugin's entry point gives it."""
    plugin: ClassVar[type] = _MISSING
    """The plugin's class, of a module that can be imported by name."""
    settings: ClassVar[Mapping[str, object]] = {}
    dtypes: ClassVar[Collection[str] | None] = None
    """The dtypes, as safetensors names them, that the plugin's format can hold, F32 and U8 among them."""
    exclusions: ClassVar[Mapping[str, str]] = {}
    """Clause → a sentence that says why it can't hold and why no engine suffers. Shown as skipped."""
    settle: ClassVar[float] = 2.0
    """Seconds that the plugin may take to give back what it held."""

    def config(self, folder: Path) -> Mapping[str, object]:
        """Return the plugin's settings; a socket or a cache belongs in `folder`, which is empty."""
        del folder
        return self.settings

    def prepare(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
        """Write `tensors` as the plugin reads them, and return the checkpoint's path.

        By default a safetensors checkpoint of three files. `tensors` may be strided and may share
        memory; what the format can't say of that, it is free to lose.
        """
        return write_three_files(folder, tensors)

    def oracle(self, checkpoint: Path) -> Mapping[str, torch.Tensor]:
        """Read what `prepare` wrote, without the plugin. By default with the safetensors library."""
        return read_with_safetensors(checkpoint)

    @classmethod
    def subject(cls) -> Subject:
        """Return what the clauses are tried on.

        Raises:
            UnfitSubjectError: a part of the contract was left out, or proves nothing.
        """
        for attribute in ("name", "plugin"):
            if getattr(cls, attribute) is _MISSING:
                raise UnfitSubjectError(f"{cls.__name__} leaves out `{attribute}`: nothing could be tested")
        if (cls.prepare is PluginContract.prepare) != (cls.oracle is PluginContract.oracle):
            given, other = (
                ("oracle", "prepare") if cls.prepare is PluginContract.prepare else ("prepare", "oracle")
            )
            raise UnfitSubjectError(
                f"{cls.__name__} gives `{given}` and leaves out `{other}`: each is the other's proof"
            )
        excluded(cls.exclusions, cls.role, cls.__name__)
        contract = cls()
        return Subject(
            name=cls.name,
            plugin=cls.plugin,
            role=cls.role,
            config=contract.config,
            prepare=contract.prepare,
            oracle=contract.oracle,
            offered=getattr(contract, "offered", None),
            dtypes=every_dtype() if cls.dtypes is None else cls.dtypes,
            settle=cls.settle,
        )

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make one test of each clause."""
        if "clause" not in metafunc.fixturenames:
            return
        try:
            subject = type(self).subject()
        except UnfitSubjectError as exc:
            raise pytest.Collector.CollectError(str(exc)) from exc
        cases = [
            pytest.param(
                clause,
                subject,
                id=clause.name,
                marks=pytest.mark.skip(reason=f"{clause.name}: {self.exclusions[clause.name]}")
                if clause.name in self.exclusions
                else (),
            )
            for clause in clauses(self.role)
        ]
        metafunc.parametrize(("clause", "subject"), cases)

    def test_contract(self, clause: Clause, subject: Subject, tmp_path: Path) -> None:
        """Try the plugin on one clause."""
        __tracebackhide__ = True
        broken = ""
        try:
            clause.check(subject, tmp_path)
        except (Violation, UnfitSubjectError) as exc:
            broken = str(exc)
        if broken:  # said without the kit's own traceback
            pytest.fail(broken, pytrace=False)


class SourceContract(PluginContract):
    """The contract of a plugin that gets bytes from somewhere."""

    role = Role.SOURCE


class OwnerContract(PluginContract):
    """The contract of a plugin that decides where weights live."""

    role = Role.OWNER


class WrapperContract(PluginContract):
    """The contract of a plugin that wraps what a source returned."""

    role = Role.WRAPPER


class PublisherContract(PluginContract):
    """The contract of a plugin that offers loaded weights to others; give `offered`."""

    role = Role.PUBLISHER

    def offered(self, receipt: Any) -> Mapping[str, torch.Tensor]:
        """Read what is offered now, without the plugin; raise LookupError or OSError if nothing is."""
        raise NotImplementedError

    @classmethod
    def subject(cls) -> Subject:
        """Return what the clauses are tried on; `offered` must be given."""
        if cls.offered is PublisherContract.offered:
            raise UnfitSubjectError(f"{cls.__name__} leaves out `offered`: nobody could look at the offer")
        return super().subject()
