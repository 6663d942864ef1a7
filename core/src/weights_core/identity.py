# SPDX-License-Identifier: Apache-2.0
"""What must be equal for two sets of weights to be interchangeable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import attrs

from weights_core.errors import IdentityMismatchError
from weights_core.types import Axis, EngineInfo, Layout


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
