# SPDX-License-Identifier: Apache-2.0
"""Every error this project raises, and what each carries.

All derive from `WeightsError`. An error that passes through a plugin's hook is stamped with the
plugin, its distribution, the hook and the rank, so a log line of one rank says who failed where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from weights_core.report import LoadReport


class WeightsError(Exception):
    """Base of all errors of this project.

    `plugin`, `distribution`, `hook` and `rank` are set where the error passed through a hook.
    """

    plugin: str | None = None
    distribution: str | None = None
    hook: str | None = None
    rank: int | None = None

    @property
    def message(self) -> str:
        """What went wrong, without where."""
        return str(self.args[0]) if self.args else type(self).__name__

    def __reduce__(self) -> tuple[object, ...]:
        """Let errors cross process boundaries, with all that they carry."""
        return _rebuild, (type(self), self.args, vars(self))

    def stamp(self, *, plugin: str, distribution: str, hook: str, rank: int) -> Self:
        """Record where the error happened, unless something nearer to the cause already did."""
        if self.plugin is None:
            self.plugin, self.distribution, self.hook, self.rank = plugin, distribution, hook, rank
        return self

    @property
    def brief(self) -> str:
        """What went wrong and in which file or tensor, without the plugin."""
        return self.message

    def __str__(self) -> str:
        """Return `brief` and, if stamped, who raised it."""
        if self.plugin is None:
            return self.brief
        where = f"plugin {self.plugin} of {self.distribution}, hook {self.hook}, rank {self.rank}"
        return f"{self.brief} [{where}]"


def _rebuild(cls: type[WeightsError], args: tuple[object, ...], carried: dict[str, object]) -> WeightsError:
    error = cls.__new__(cls, *args)
    vars(error).update(carried)
    return error


class PluginError(WeightsError):
    """A plugin is missing, broken, or broke the contract of a hook."""


class PluginNotFoundError(PluginError):
    """A plugin that was asked for by name is not installed."""


class PluginLoadError(PluginError):
    """A plugin's module could not be imported or its class could not be built."""


class PluginVersionError(PluginError):
    """A plugin was written for another version of the plugin API."""


class PluginConflictError(PluginError):
    """Two distributions offer a plugin of the same name."""


class PluginContractError(PluginError):
    """A plugin does not do what a hook demands, e.g. returned None where a set was due."""


class PluginConfigError(PluginError):
    """A setting is unknown, of the wrong type, or out of range."""


class PluginFailedError(PluginError):
    """A hook raised something that is not a `WeightsError`; it is chained as the cause."""


class ExtraNotInstalledError(WeightsError):
    """What was asked for needs an optional dependency; says how to install it."""


class ChartError(WeightsError):
    """A chart cannot be drawn where it was asked for."""


class FormatError(WeightsError):
    """The format asked for cannot be served."""


class FormatNotFoundError(FormatError):
    """No installed plugin has the name of the format asked for."""


class FormatUnresolvedError(FormatError):
    """The plugins asked for are installed but cannot serve this request; says why each cannot."""


class AmbiguousFormatError(FormatError):
    """More than one owner was asked for."""


class CheckpointError(WeightsError):
    """A checkpoint is missing, malformed or changed while it was read."""

    def __init__(
        self,
        message: str,
        *,
        file: Path | None = None,
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor
        self.offset = offset

    @property
    def brief(self) -> str:
        """The message preceded by the file, tensor and byte it is about."""
        place = [str(self.file)] if self.file is not None else []
        if self.tensor is not None:
            place.append(f"tensor {self.tensor!r}")
        if self.offset is not None:
            place.append(f"byte {self.offset}")
        prefix = f"{', '.join(place)}: " if place else ""
        return prefix + self.message


class ConsumedError(WeightsError, KeyError):
    """A tensor was asked for after it had been released, from a set that lets each be consumed once.

    `by` says what released it, and where. It is a `KeyError`, as the set no longer has the tensor.
    """

    def __init__(self, tensor: str, by: str) -> None:
        super().__init__(f"tensor {tensor!r} was consumed by {by}, and cannot be read again")
        self.tensor = tensor
        self.by = by


class LoadError(WeightsError):
    """Weights could not be brought into the engine."""


class Declined(LoadError):  # noqa: N818 - a signal between plugin and session, not a fault
    """Raised by a provider that cannot serve this load and has touched nothing.

    The session records the reason and asks the next provider.
    """


class LoadFailed(LoadError):  # noqa: N818 - a signal between plugin and session
    """Raised by a provider, or by its lazily read set, that started and could not finish.

    `mutated` says whether the provider itself has written into the engine. The next provider is
    asked only if nothing was written or the engine could be re-initialised.
    """

    def __init__(self, message: str, *, mutated: bool) -> None:
        super().__init__(message)
        self.mutated = mutated


class NoProviderError(LoadError):
    """Every planned provider declined or failed; `reasons` lists them in the order asked."""

    def __init__(self, message: str, *, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)


class RanksDisagreeError(LoadError):
    """Another rank failed or took another path, so this rank may not go on.

    `lost` says that the ranks cannot reach each other any more, so that nobody is to be told. `mutated`
    says whether a provider that found out had written into the engine.
    """

    def __init__(self, message: str, *, lost: bool = False, mutated: bool = False) -> None:
        super().__init__(message)
        self.lost = lost
        self.mutated = mutated


class CoverageError(LoadError):
    """What was delivered is not what the engine expects.

    `missing` and `unexpected` list tensor names; `mismatched` maps a name to what differs.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = dict(mismatched or {})


class EngineError(WeightsError):
    """The engine cannot do what a load demands of it."""


class EngineDirtyError(EngineError):
    """A load that failed had written to the engine, which cannot be brought back: do not use it."""


class ArenaError(WeightsError):
    """Memory to share cannot be had, or what was handed over as such is not sound."""


class IdentityMismatchError(WeightsError):
    """Two sets of weights are not interchangeable; `fields` maps each differing field to both."""

    def __init__(self, message: str, *, fields: Mapping[str, tuple[object, object]]) -> None:
        super().__init__(message)
        self.fields = dict(fields)


class LifecycleError(WeightsError):
    """A session's step was called out of order."""


class PublishError(WeightsError):
    """Weights could not be offered to others, or it was too late to offer them."""


class CleanupError(WeightsError, ExceptionGroup[Exception]):
    """One or more plugins failed in `cleanup`; `exceptions` holds every failure.

    If the load itself had succeeded, `report` is its report and the model is usable.
    """

    report: LoadReport | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """Leave the report behind: it belongs to the process that loaded."""
        carried = {name: value for name, value in vars(self).items() if name != "report"}
        return _rebuild, (type(self), self.args, carried)

    def __str__(self) -> str:
        """Return the message and the first line of each failure."""
        return f"{self.message}: " + "; ".join(str(exc) for exc in self.exceptions)

    def derive(self, excs: Sequence[Exception], /) -> CleanupError:  # type: ignore[override]
        """Return a group of the same type over a part of the failures."""
        return CleanupError(self.message, excs)
