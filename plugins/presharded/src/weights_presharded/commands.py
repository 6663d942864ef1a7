# SPDX-License-Identifier: Apache-2.0
"""The command `weights shard`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from weights_core.cli.app import guarded
from weights_core.digest import check_form
from weights_core.errors import PluginConfigError
from weights_core.progress import Progress


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--tp", "size", type=click.IntRange(1), required=True, help="How many ranks to cut it for.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new or empty folder.")
@click.option("--plan", default="auto", show_default=True, help="A plan file, or as Transformers would cut.")
@click.option("--resume", is_flag=True, help="Go on with a conversion that was interrupted.")
@click.option("--component", help="One component of a pipeline, e.g. transformer or vae.")
@click.option("--digest", help="The checkpoint's digest, algorithm:hex, if it is known; else it is computed.")
@guarded
def shard(
    checkpoint: Path, size: int, out: Path, plan: str, resume: bool, component: str | None, digest: str | None
) -> None:
    """Cut CHECKPOINT into files for each tensor-parallel rank, which read nothing but their own.

    Needs no GPU, and little memory however large the checkpoint is. The folder is complete when its
    READY.json is there; configurations and the tokenizer are copied. A run that was interrupted, in
    whatever way, is completed by the same command with --resume.

    \b
    Example:
      weights shard models/llama --tp 4 --out models/llama-tp4
    """
    from weights_presharded.converting import shard as convert
    from weights_presharded.plan import read_plan

    try:
        known = check_form(digest) if digest else None
    except ValueError as exc:
        raise PluginConfigError(f"--digest: {exc}") from exc
    rules = None if plan == "auto" else read_plan(Path(plan))
    with _progress() as told:
        made = convert(
            checkpoint,
            out,
            size=size,
            plan=rules,
            component=component,
            resume=resume,
            digest=known,
            progress=told,
        )
    rate = (made.nbytes - made.resumed) / 1e6 / max(made.seconds, 1e-9)
    click.echo(
        f"{made.folder}: {made.tensors} tensors for each of {made.ranks} ranks, "
        f"{made.nbytes / 1e6:,.1f} MB in {made.seconds:.1f} s, {rate:,.0f} MB/s"
    )
    if made.resumed:
        click.echo(f"{made.resumed / 1e6:,.1f} MB of it were there already")
    click.echo(f"copied beside them: {', '.join(made.copied) or 'nothing'}")
    click.echo(f"the checkpoint's digest is {made.digest}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    bar = Progress("rank 0", 0, 1)
    begun = False

    def told(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            bar.start(total)
            begun = True
        bar.show(done)

    try:
        yield told
    finally:
        bar.close()
