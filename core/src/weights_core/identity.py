# SPDX-License-Identifier: Apache-2.0
"""What must be equal for two sets of weights to be interchangeable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import attrs

from weights_core.errors import IdentityMismatchError
from weights_core.types import Axis, EngineInfo, Layout

_TEXTS = ("digest", "role", "engine", "engine_version", "model")
_MAYBE = ("component", "dtype", "quantization")


def _plain(axes: Mapping[str, Axis]) -> dict[str, Axis]:
    return dict(axes)


@attrs.frozen(kw_only=True)
class Identity:
    """The identity of weights in one engine process; equal identities, interchangeable weights.

    `digest` is of the content, never a name or a path. At CHECKPOINT the engine's fields don't
    matter, so `of` leaves them empty there.
    """

    digest: str = attrs.field(validator=attrs.validators.min_len(1))
    layout: Layout
    role: str = "main"
    component: str | None = None
    engine: str = ""
    engine_version: str = ""
    model: str = ""
    dtype: str | None = None
    quantization: str | None = None
    axes: Mapping[str, Axis] = attrs.field(factory=dict, converter=_plain, hash=False)

    @classmethod
    def of(cls, info: EngineInfo, digest: str, layout: Layout) -> Self:
        """Return the identity of weights with content `digest` as `info`'s engine holds them."""
        if layout is Layout.CHECKPOINT:
            return cls(digest=digest, layout=layout, role=info.role, component=info.component)
        return cls(
            digest=digest,
            layout=layout,
            role=info.role,
            component=info.component,
            engine=info.name,
            engine_version=info.version,
            model=info.model,
            dtype=info.dtype,
            quantization=info.quantization,
            axes=info.topology.axes,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` reads them back."""
        axes = {name: [axis.size, axis.rank] for name, axis in sorted(self.axes.items())}
        names = [field.name for field in attrs.fields(Identity)]
        return {name: getattr(self, name) for name in names} | {"layout": self.layout.value, "axes": axes}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Read what `as_dict` returned, and believe nothing in it.

        Raises:
            ValueError: it is no identity.
        """
        try:
            fields = dict(given)
            texts = {name: fields.pop(name) for name in _TEXTS}
            maybe = {name: fields.pop(name) for name in _MAYBE}
            layout = Layout(fields.pop("layout"))
            axes = {str(name): Axis(*pair) for name, pair in fields.pop("axes").items()}
            sound = (
                all(isinstance(text, str) for text in texts.values())
                and all(text is None or isinstance(text, str) for text in maybe.values())
                and all(type(n) is int for axis in axes.values() for n in (axis.size, axis.rank))
            )
            if fields or not sound:
                raise ValueError(f"fields that are none, or of another type: {fields or given}")
        except (KeyError, TypeError, AttributeError) as exc:
            raise ValueError(f"is no identity: {type(exc).__name__}: {exc}") from exc
        return cls(layout=layout, axes=axes, **texts, **maybe)

    def differences(self, other: Identity) -> dict[str, tuple[object, object]]:
        """Return each field in which the two differ, with both values."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in attrs.fields(Identity))
        return {name: (mine, theirs) for name, mine, theirs in pairs if mine != theirs}

    def require(self, other: Identity) -> None:
        """Refuse weights that are not interchangeable with these.

        Raises:
            IdentityMismatchError: naming every field that differs, and both values.
        """
        fields = self.differences(other)
        if fields:
            listed = "; ".join(
                f"{name}: need {mine!r}, got {theirs!r}" for name, (mine, theirs) in fields.items()
            )
            raise IdentityMismatchError(f"not the same weights: {listed}", fields=fields)
