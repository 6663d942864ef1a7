# SPDX-License-Identifier: Apache-2.0
"""The values that hooks exchange: what is asked for, what is claimed, what was planned."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import attrs

from weights_core import dtypes


class Layout(enum.Enum):
    """How far weights have come on their way into an engine."""

    CHECKPOINT = "checkpoint"
    """Names and full tensors as on disk; the engine maps, fuses, slices and post-processes."""
    SHARDED = "sharded"
    """The engine's parameter names and this rank's slices, before the engine's post-load."""
    FINAL = "final"
    """After the engine's post-load transforms: ready for inference."""


class Role(enum.Enum):
    """What a plugin does in a load; one plugin may hold several roles."""

    SOURCE = "source"
    """Gets bytes from somewhere."""
    OWNER = "owner"
    """Decides where weights live; takes part only when it is named."""
    WRAPPER = "wrapper"
    """Wraps what a source returned."""
    PUBLISHER = "publisher"
    """Offers loaded weights to others."""


class Fit(enum.IntEnum):
    """How well a source serves a request; orders the sources that were not named."""

    POSSIBLE = 1
    GOOD = 2
    BEST = 3


def _layouts(given: Iterable[Layout]) -> frozenset[Layout]:
    return frozenset(given)


def _roles(given: Iterable[Role]) -> frozenset[Role]:
    return frozenset(given)


def _names(given: Iterable[str]) -> frozenset[str]:
    return frozenset(given)


def _optional_names(given: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if given is None else tuple(given)


def _format(given: str | Iterable[str]) -> tuple[str, ...]:
    """Take a list of names, or one string of names with commas, as the command line does."""
    if not isinstance(given, str):
        return tuple(given)
    return tuple(name.strip() for name in given.split(",") if name.strip()) or ("auto",)


def _axes(given: Mapping[str, Axis]) -> Mapping[str, Axis]:
    return dict(given)


@attrs.frozen
class Axis:
    """One axis of parallelism: how many ranks it has and which of them this is."""

    size: int = 1
    rank: int = 0

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in an axis of size {self.size}")


@attrs.frozen
class Topology:
    """Where this process stands among those that hold one model together.

    `axes` names each axis of parallelism, e.g. `{"tp": Axis(4, 2)}`; weights are interchangeable
    only between equal axes. `world` is the whole group that loads together.
    """

    world: Axis = Axis()
    axes: Mapping[str, Axis] = attrs.field(factory=dict, converter=_axes, hash=False)

    @classmethod
    def tensor_parallel(cls, size: int, rank: int) -> Topology:
        """Return the topology of plain tensor parallelism over `size` ranks."""
        return cls(world=Axis(size, rank), axes={"tp": Axis(size, rank)})

    @property
    def rank(self) -> int:
        """This process's rank in the whole group."""
        return self.world.rank


@attrs.frozen
class TensorMeta:
    """What is known of a tensor without reading it.

    `shape` and `dtype` are those of the safetensors format; `file` and `offset` (bytes from the
    start of the file) say where it lies, if it lies in a file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path | None = None
    offset: int | None = None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape torch gives this tensor."""
        return dtypes.torch_shape(self.dtype, self.shape)


@attrs.frozen(kw_only=True)
class EngineInfo:
    """What an engine says of itself before anything is loaded.

    The fields up to `component` decide whether weights are interchangeable with another engine's.
    `accepts` lists the layouts the engine can take. `shareable` maps each layout whose tensors
    others may read to the reason why that is sound. `mutates_after_load` says what changes the
    weights later (a load balancer, adapter merging, refitting), or is None. `post_load_writes` says
    what its post-load changes in place in SHARDED tensors, or is None: then they may be read-only.
    """

    name: str
    version: str
    model: str = ""
    dtype: str | None = None
    quantization: str | None = None
    device: str = "cpu"
    topology: Topology = Topology()
    role: str = "main"
    component: str | None = None
    accepts: frozenset[Layout] = attrs.field(default=frozenset({Layout.CHECKPOINT}), converter=_layouts)
    shareable: Mapping[Layout, str] = attrs.field(factory=dict, hash=False)
    mutates_after_load: str | None = None
    post_load_writes: str | None = None


@attrs.frozen(kw_only=True)
class LoadRequest:
    """One load: which weights, in which format, for which engine.

    `format` is `("auto",)` or the names of plugins in the order they are to be asked.
    `is_pipeline` says whether `checkpoint` holds one folder per component; None means: look for a
    `model_index.json`. `unused` says what to do with checkpoint tensors the engine did not take.
    """

    checkpoint: Path = attrs.field(converter=Path)
    engine: EngineInfo
    format: tuple[str, ...] = attrs.field(default=("auto",), converter=_format)
    is_pipeline: bool | None = None
    unused: Literal["report", "refuse"] = attrs.field(
        default="report", validator=attrs.validators.in_(("report", "refuse"))
    )
    timeout: float = 600.0
    """Seconds a rank waits for the others to agree."""

    @property
    def rank(self) -> int:
        """The rank of the process that loads."""
        return self.engine.topology.rank


@attrs.frozen(kw_only=True)
class Part:
    """What one rank would load of a checkpoint that was cut for several, for who has no engine to ask with.

    `engine` is one that it was cut for; `notes` tell operators of it.
    """

    engine: EngineInfo
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Whose part it is, in the whole group."""
        return self.engine.topology.rank

    @property
    def name(self) -> str:
        """Which part, for people; empty if it is all there is."""
        world, axes = self.engine.topology.world, self.engine.topology.axes
        if world.size == 1:
            return ""
        place = ", ".join(f"{name} {axis.rank} of {axis.size}" for name, axis in axes.items())
        return f"rank {world.rank} of {world.size}" + (f" ({place})" if len(axes) > 1 else "")


def _parts(given: Iterable[Part]) -> tuple[Part, ...]:
    return tuple(given)


@attrs.frozen(kw_only=True)
class FormatClaim:
    """A plugin's answer to "can you take part in this load, and how?".

    Args of a claim: `roles` it would take; as a source or owner, the `layouts` it can deliver and
    how well it fits (`fit`); as a publisher, `publish_at`, and whether a failure to publish fails
    the load (`required`). `reason` is one sentence for the operator. An owner's `held` tells, when it
    is called, how many bytes of these weights are in the engine's memory already, held for others too.
    A source of a checkpoint that no engine takes whole says in `parts`, whoever asks, for which engines
    it was cut: `weights inspect` and `weights load` go through them.
    """

    roles: frozenset[Role] = attrs.field(converter=_roles)
    reason: str
    layouts: frozenset[Layout] = attrs.field(default=frozenset({Layout.CHECKPOINT}), converter=_layouts)
    fit: Fit = Fit.POSSIBLE
    publish_at: Layout | None = None
    required: bool = False
    held: Callable[[], int] | None = attrs.field(default=None, eq=False)
    parts: tuple[Part, ...] = attrs.field(default=(), converter=_parts)

    def __attrs_post_init__(self) -> None:
        for given, kind in ((self.roles, Role), (self.layouts, Layout), (self.parts, Part)):
            strangers = [value for value in given if not isinstance(value, kind)]
            if strangers:
                raise TypeError(f"{strangers[0]!r} is no {kind.__name__}")
        if (Role.PUBLISHER in self.roles) != (self.publish_at is not None):
            raise ValueError("a claim has publish_at exactly if it takes the role of a publisher")
        if self.publish_at is Layout.CHECKPOINT:
            raise ValueError("weights are published at SHARDED or FINAL, never at CHECKPOINT")

    @classmethod
    def refuse(cls, reason: str) -> FormatClaim:
        """Return the answer of a plugin that takes no part, and says why."""
        return cls(roles=frozenset(), reason=reason)


@attrs.frozen(kw_only=True)
class Decision:
    """Why one installed plugin takes part in a load or not."""

    plugin: str
    distribution: str
    roles: frozenset[Role]
    reason: str


@attrs.frozen(kw_only=True)
class Plan:
    """Who does what in one load.

    At most one `owner`; `sources` in the order they are asked, the built-in disk last; `wrappers`
    from the outermost in; `publishers`; and for each installed plugin a `Decision`. Plugins are
    named; `publish_at` and `required` repeat what each publisher claimed. `layouts` are those that the
    owner and the sources may deliver. `held` is the owner's, for engines that budget their memory
    before they load.
    """

    owner: str | None
    sources: tuple[str, ...]
    wrappers: tuple[str, ...]
    publishers: Mapping[str, FormatClaim]
    decisions: tuple[Decision, ...]
    layouts: frozenset[Layout] = attrs.field(default=frozenset({Layout.CHECKPOINT}), converter=_layouts)
    held: Callable[[], int] | None = attrs.field(default=None, eq=False)

    @property
    def providers(self) -> tuple[str, ...]:
        """Those the session asks for weights, in order: the owner, if there is one, then the sources."""
        return (self.owner, *self.sources) if self.owner else self.sources

    @property
    def active(self) -> tuple[str, ...]:
        """All plugins that take part, in the order they were decided on."""
        return tuple(d.plugin for d in self.decisions if d.roles)


@attrs.frozen(kw_only=True)
class Applied:
    """What an engine did with a set of weights.

    `written` names every tensor the engine now holds from the set, ties included, by the names of
    `Engine.expected`. `defaulted` maps names the engine filled by other means to the reason.
    `unused` lists tensors of the set that the engine did not take, or is None if it can't say.
    `host_bytes` is the host memory newly allocated for the model itself.
    """

    written: frozenset[str] = attrs.field(converter=_names)
    defaulted: Mapping[str, str] = attrs.field(factory=dict)
    unused: tuple[str, ...] | None = attrs.field(default=None, converter=_optional_names)
    host_bytes: int = 0


@attrs.frozen(kw_only=True)
class PublishReceipt:
    """What a publisher offers now; `close` withdraws it and is called when the lease ends."""

    layout: Layout
    nbytes: int
    detail: str
    close: Callable[[], None] | None = None


@attrs.frozen(kw_only=True)
class Outcome:
    """How a load ended, told to `cleanup`: `ready`, `failed` or `abandoned` by its driver."""

    status: Literal["ready", "failed", "abandoned"]
    phase: str
    error: BaseException | None = None
