# SPDX-License-Identifier: Apache-2.0

import contextlib
import io
import logging
import threading

import pytest
import torch
from torch import nn

import weights_core as w
from weights_core.progress import Progress
from weights_core.testing import Group, host_of, write_checkpoint


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def show():
    """Return a function that calls another with a terminal for standard error, and what it wrote."""

    def shown(call, *arguments, **options):
        with contextlib.redirect_stderr(Terminal()) as screen:
            call(*arguments, **options)
        return screen.getvalue()

    return shown


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", nn.Linear(64, 64).state_dict(), shards=2)


def load(path, **options):
    with torch.device("meta"):
        model = nn.Linear(64, 64)
    return w.load(w.TorchEngine(model), path, host=host_of(), **options)


def test_a_bar_of_bytes_is_shown_on_a_terminal(checkpoint, show):
    written = show(load, checkpoint)
    assert "weights: 100%" in written
    assert "16.6k/16.6k" in written


def test_nothing_is_written_where_there_is_no_terminal(checkpoint):
    with contextlib.redirect_stderr(io.StringIO()) as screen:
        load(checkpoint)
    assert screen.getvalue() == ""


def test_nothing_is_written_if_it_is_not_wanted(checkpoint, show):
    assert show(load, checkpoint, progress="never") == ""


@pytest.mark.parametrize(("which", "ranks"), [("rank 0", [0]), ("every rank", [0, 1])])
def test_which_ranks_show_a_bar(checkpoint, show, which, ranks):
    def both():
        group = Group(2)

        def rank_main(rank):
            topology = w.Topology.tensor_parallel(2, rank)
            engine = w.TorchEngine(nn.Linear(64, 64), topology=topology, gather=group.gather(rank))
            return w.load(engine, checkpoint, host=host_of(), progress=which)

        for future in group.run(rank_main):
            future.result()

    written = show(both)
    assert [rank for rank in range(2) if f"weights, rank {rank}: 100%" in written] == ranks


def test_tensors_that_the_model_does_not_want_are_not_waited_for(tmp_path, show):
    tensors = {**nn.Linear(64, 64).state_dict(), "other": torch.zeros(1 << 16)}
    assert "16.6k/16.6k" in show(load, write_checkpoint(tmp_path / "ckpt", tensors))


def test_no_thread_is_left(checkpoint, show):
    before = set(threading.enumerate())
    assert show(load, checkpoint)
    assert set(threading.enumerate()) == before


def test_a_second_start_replaces_the_bar_and_close_is_idempotent(show):
    def drive():
        progress = Progress("rank 0", 0, 1)
        progress.show(5)
        progress.start(10)
        progress.show(4)
        progress.start(100)
        progress.show(100)
        progress.close()
        progress.close()

    assert "100/100" in show(drive)


def test_a_line_of_log_begins_below_the_bar(checkpoint, show):
    def logged():
        handler = logging.StreamHandler()
        logger = logging.getLogger("weights")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            load(checkpoint)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)

    lines = show(logged).replace("\r", "\n").splitlines()
    assert any(line.startswith("apply: ") for line in lines)
    assert not any("apply: " in line and "%|" in line for line in lines)
