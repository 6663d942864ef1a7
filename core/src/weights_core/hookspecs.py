# SPDX-License-Identifier: Apache-2.0
"""The five hooks that a plugin may implement.

A plugin marks its methods with `hookimpl` and names only the parameters it needs; parameters are
passed by name. Within one load the hooks run in the order they stand here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from weights_core.engine import Engine
    from weights_core.source import Source
    from weights_core.types import FormatClaim, Layout, LoadRequest, Outcome, PublishReceipt
    from weights_core.weightset import WeightSet

PROJECT = "weights"
API_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def resolve_format(request: LoadRequest) -> FormatClaim | None:
    """Say whether, and how, this plugin can take part in a load.

    Order: every enabled plugin is asked once, before anything is read; no answer hides another.
    Must not import torch and must leave files, processes and the engine as they are: `weights
    explain` calls it too.

    Args:
        request: what is to be loaded and the `EngineInfo` of the engine.

    Returns:
        A claim; or `FormatClaim.refuse(reason)`, or None, to stay out.

    Raises:
        An error here aborts the load and names the plugin: a plugin that cannot serve refuses.

    Example:
        >>> class OnTape:
        ...     @hookimpl
        ...     def resolve_format(self, request):
        ...         if request.checkpoint.suffix != ".tape":
        ...             return FormatClaim.refuse("not a tape")
        ...         return FormatClaim(roles={Role.SOURCE}, reason="reads tapes", fit=Fit.BEST)
    """


@hookspec(firstresult=True)
def load_weights(request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
    """Provide the weights, as a set that may read them lazily.

    Order: the session calls one planned provider at a time, the owner first if there is one, else
    the sources in the plan's order, until one returns a set. Wrappers (`hookimpl(wrapper=True)`,
    allowed on this hook alone) surround every call of a source, outermost first in the plan's
    order, and never an owner's.

    Args:
        request: what is to be loaded.
        engine: the engine; a provider that writes into it says so by `WeightSet.in_place`.
        source: the rest of the plan; `source.open()` returns the set of the next provider below
            this one. An owner, or a cache, gets its bytes there.

    Returns:
        A `WeightSet`, in one of the layouts this plugin claimed. None is a contract error.

    Raises:
        Declined: cannot serve, and has touched nothing; the next provider is asked.
        LoadFailed: started and could not finish; the next provider is asked if `mutated` is
            false, or if the engine could be re-initialised.
        Anything else aborts the load on all ranks.

    Example:
        >>> class OnTape:
        ...     @hookimpl
        ...     def load_weights(self, request):
        ...         if not tape_is_mounted():
        ...             raise Declined("no tape is mounted")
        ...         return TapeSet(request.checkpoint)
        >>> class Counting:
        ...     @hookimpl(wrapper=True)
        ...     def load_weights(self):
        ...         weights = yield
        ...         return CountingSet(weights)
    """
    raise NotImplementedError


@hookspec
def before_post_load(request: LoadRequest, weights: WeightSet, engine: Engine) -> None:
    """Act while the weights are in the model and the engine has not transformed them yet.

    Order: called on every active plugin, in the plan's order, once coverage has been checked.

    Args:
        request: what was loaded.
        weights: the set that was applied; it may have been consumed.
        engine: the engine, holding the weights.

    Raises:
        An error aborts the load and names the plugin.

    Example:
        >>> class Verify:
        ...     @hookimpl
        ...     def before_post_load(self, request, engine):
        ...         check_digests(engine.tensors(Layout.SHARDED))
    """


@hookspec
def publish(request: LoadRequest, engine: Engine, layout: Layout) -> PublishReceipt | None:
    """Offer the loaded weights to others.

    Order: called once per publisher and load, in the plan's order, at the layout its claim named
    as `publish_at`. SHARDED is published before the engine's post-load and never after it.
    Publishers read `engine.tensors(layout)`; the set that was loaded is consumed by now.

    Args:
        request: what was loaded.
        engine: the engine, holding the weights.
        layout: the layout the engine's tensors have now.

    Returns:
        A receipt whose `close` withdraws the offer, or None if there was nothing to offer.

    Raises:
        An error is recorded in the report; it fails the load only if the claim said `required`.

    Example:
        >>> class Offer:
        ...     @hookimpl
        ...     def publish(self, request, engine, layout):
        ...         offer = serve(engine.tensors(layout))
        ...         return PublishReceipt(layout=layout, nbytes=offer.nbytes, detail=offer.url,
        ...                               close=offer.stop)
    """


@hookspec
def cleanup(request: LoadRequest, outcome: Outcome) -> None:
    """Free what the load needed and the model does not.

    Order: called on every active plugin in the reverse of the plan's order, exactly once per
    load, also after a failure in any phase. What must outlive the load belongs to the lease: the
    `close` of an owner's set or of a receipt.

    Args:
        request: what was loaded.
        outcome: how the load ended.

    Raises:
        Errors don't stop the other plugins' cleanup; all are raised together as `CleanupError`,
        or noted on the error that had ended the load.

    Example:
        >>> class OnTape:
        ...     @hookimpl
        ...     def cleanup(self, outcome):
        ...         self.drive.rewind()
    """


HOOKS = ("resolve_format", "load_weights", "before_post_load", "publish", "cleanup")
"""The names of the hooks, in the order they run."""
