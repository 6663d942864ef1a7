# SPDX-License-Identifier: Apache-2.0
"""Broken publishers. All pin tensors to a board in this process, and do one thing wrong."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from weights_core.hookspecs import hookimpl
from weights_core.plugin import PublisherPlugin
from weights_core.types import FormatClaim, Layout, LoadRequest, PublishReceipt, Role
from weights_core.weightset import WeightSet

if TYPE_CHECKING:
    import torch

    from weights_core.engine import Engine

BOARD: dict[str, Mapping[str, torch.Tensor]] = {}
"""What is offered, by the `detail` of its receipt."""

_numbers = itertools.count()


class SoundPublisher(PublisherPlugin[None]):
    """Pins a copy of the engine's tensors to the board until the receipt is closed."""

    at: ClassVar[Layout] = Layout.SHARDED

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        return FormatClaim(roles={Role.PUBLISHER}, reason="pins to a board", publish_at=self.at)

    @hookimpl
    def publish(self, request: LoadRequest, engine: Engine, layout: Layout) -> PublishReceipt | None:
        return self.pin(engine, layout)

    def pin(self, engine: Engine, layout: Layout) -> PublishReceipt:
        name = f"offer {next(_numbers)}"
        tensors = {key: tensor.clone() for key, tensor in engine.tensors(layout).items()}
        BOARD[name] = tensors
        return PublishReceipt(
            layout=layout,
            nbytes=sum(tensor.nbytes for tensor in tensors.values()),
            detail=name,
            close=lambda: self.unpin(name, engine),
        )

    def unpin(self, name: str, engine: Engine) -> None:
        BOARD.pop(name, None)


SOUND = SoundPublisher


class SaysNoSize(SoundPublisher):
    def pin(self, engine: Engine, layout: Layout) -> PublishReceipt:
        receipt = super().pin(engine, layout)
        return PublishReceipt(layout=layout, nbytes=0, detail=receipt.detail, close=receipt.close)


class LosesATensor(SoundPublisher):
    def pin(self, engine: Engine, layout: Layout) -> PublishReceipt:
        receipt = super().pin(engine, layout)
        offered = dict(BOARD[receipt.detail])
        offered.popitem()
        BOARD[receipt.detail] = offered
        return receipt


class NeverWithdraws(SoundPublisher):
    def unpin(self, name: str, engine: Engine) -> None:
        return


class WipesWhenItWithdraws(SoundPublisher):
    at = Layout.FINAL

    def unpin(self, name: str, engine: Engine) -> None:
        super().unpin(name, engine)
        for tensor in engine.tensors(Layout.FINAL).values():
            tensor.fill_(0)


class ReadsTwoLayouts(SoundPublisher):
    at = Layout.FINAL

    def pin(self, engine: Engine, layout: Layout) -> PublishReceipt:
        engine.tensors(Layout.SHARDED)
        return super().pin(engine, layout)


class PublishesWhenItCleansUp(SoundPublisher):
    engine: Engine | None = None

    @hookimpl
    def before_post_load(self, request: LoadRequest, weights: WeightSet, engine: Engine) -> None:
        self.engine = engine

    def pin(self, engine: Engine, layout: Layout) -> PublishReceipt:
        self.engine = None
        return super().pin(engine, layout)

    @hookimpl
    def cleanup(self) -> None:
        if self.engine is not None:
            self.engine.tensors(self.at)


BROKEN: Mapping[str, type] = {
    "publishes_once_where_it_claimed": SaysNoSize,
    "offers_what_the_engine_holds": LosesATensor,
    "an_offer_ends_with_the_lease": NeverWithdraws,
    "publishing_leaves_the_model_as_it_is": WipesWhenItWithdraws,
    "reads_the_engine_only_while_it_publishes": ReadsTwoLayouts,
    "never_publishes_late": PublishesWhenItCleansUp,
}
"""Clause → the publisher that breaks it."""
