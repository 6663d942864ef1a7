# SPDX-License-Identifier: Apache-2.0
"""What all commands share: how errors are shown, exit codes, signals, logging."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from types import FrameType
from typing import Any

import click

from weights_core.errors import (
    ChartError,
    ExtraNotInstalledError,
    FormatError,
    PluginConfigError,
    PluginError,
    PluginNotFoundError,
    WeightsError,
)

FAULT, USAGE, PLUGIN, INTERNAL = 1, 2, 3, 70
INTERRUPTED, TERMINATED, CLOSED_PIPE = 128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGPIPE

_WRONG_USE = (ChartError, ExtraNotInstalledError, FormatError, PluginConfigError, PluginNotFoundError)

EPILOG = """\b
Exit codes:
  0    done, and nothing is wrong
  1    the checkpoint, the load or the machine is at fault
  2    wrong use: an option, a setting, a format or a plugin's name
  3    a plugin is broken
  70   a fault of this program
  130, 143, 141   interrupted, terminated, nobody reads the output
"""


def exit_code(error: WeightsError) -> int:
    """Return the exit code that tells scripts whose fault an error is."""
    if isinstance(error, _WRONG_USE):
        return USAGE
    return PLUGIN if isinstance(error, PluginError) else FAULT


class Terminated(BaseException):
    """SIGTERM, as an exception, so that a load cleans up."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Show every error as one line and end with its exit code; add `--debug` and `--verbose`."""

    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @click.option("-v", "--verbose", is_flag=True, help="Show a line of log for every phase.")
    @wraps(command)
    def run(*args: Any, debug: bool, verbose: bool, **kwargs: Any) -> None:
        try:
            with _logging(logging.INFO if verbose else logging.WARNING), _terminable():
                command(*args, **kwargs)
                sys.stdout.flush()
        except click.exceptions.Exit:
            raise
        except click.ClickException:
            raise
        except BrokenPipeError:
            # Python flushes standard output once more when it exits, and must not find the pipe then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(CLOSED_PIPE)
        except (Exception, KeyboardInterrupt, Terminated) as exc:
            if debug:
                raise
            text, code = _told(exc)
            click.echo(f"weights: {text}", err=True)
            sys.exit(code)

    return run


def _told(exc: BaseException) -> tuple[str, int]:
    """Return one line for the user, and the exit code."""
    if isinstance(exc, WeightsError):
        return _one_line(f"{type(exc).__name__}: {exc}"), exit_code(exc)
    state = "".join(f"; {note}" for note in getattr(exc, "__notes__", ()))
    if isinstance(exc, KeyboardInterrupt):
        return _one_line(f"interrupted{state}"), INTERRUPTED
    if isinstance(exc, Terminated):
        return _one_line(f"terminated{state}"), TERMINATED
    what = f"{type(exc).__name__}: {exc}{state}"
    return _one_line(f"a fault of this program, see --debug: {what}"), INTERNAL


def _one_line(text: str) -> str:
    return " ".join(text.split()).encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def _logging(level: int) -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("weights: %(levelname)s: %(message)s"))
    logger = logging.getLogger("weights")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Hold back the garbage collector: with 100,000 tensors alive it takes half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
