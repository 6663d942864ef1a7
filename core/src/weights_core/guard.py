# SPDX-License-Identifier: Apache-2.0
"""Tell a plugin's faults from the engine's while the engine reads a plugin's set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from weights_core.errors import PluginFailedError, WeightsError
from weights_core.weightset import Parts, Slices, Target, WeightSet, WeightSetWrapper

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_CONTRACT = (WeightsError, KeyError, ValueError)


class Guarded(WeightSetWrapper):
    """What the engine is handed: the provider's set, whose crashes are said to be the provider's.

    Errors that the contract of a set names, a wrong name or destination, pass as they are.
    """

    def __init__(self, inner: WeightSet, provider: str, wrappers: Sequence[str] = ()) -> None:
        super().__init__(inner)
        around = f", inside {', '.join(wrappers)}," if wrappers else ""
        self._label = f"{provider!r}{around}"

    def __getattr__(self, name: str) -> Any:
        """Give engines what a wrapper's set offers beyond a `WeightSet`."""
        return getattr(self.inner, name)

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Read from the inner set."""
        with self._blame(f"tensor {name!r}"):
            return self.inner.read(name, slices)

    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Read into `out` from the inner set."""
        with self._blame(f"tensor {name!r}"):
            self.inner.read_into(name, out, slices)

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the inner set."""
        yield from self._watched(self.inner.stream(names), lambda item: item[0])

    def mapped(self, names: Parts | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Map in the inner set."""
        yield from self._watched(self.inner.mapped(names), lambda item: item[0])

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill from the inner set."""
        yield from self._watched(self.inner.fill(targets), lambda target: target.name)

    def release(self, names: Iterable[str]) -> int:
        """Release in the inner set."""
        with self._blame("release"):
            return self.inner.release(names)

    def _watched(self, items: Iterator[T], name_of: Callable[[T], str]) -> Iterator[T]:
        where = "the first tensor"
        with contextlib.closing(items) if isinstance(items, Generator) else contextlib.nullcontext():
            while True:
                try:
                    item = [next(items)]
                except StopIteration:
                    return
                except _CONTRACT:
                    raise
                except Exception as exc:
                    raise self._failed(where, exc) from exc
                where = f"what comes after tensor {name_of(item[0])!r}"
                yield item.pop()  # kept here, it would outlive what the engine does with it

    @contextlib.contextmanager
    def _blame(self, where: str) -> Iterator[None]:
        try:
            yield
        except _CONTRACT:
            raise
        except Exception as exc:
            raise self._failed(where, exc) from exc

    def _failed(self, where: str, exc: Exception) -> PluginFailedError:
        return PluginFailedError(
            f"the weights of {self._label} failed at {where}: {type(exc).__name__}: {exc}"
        )
