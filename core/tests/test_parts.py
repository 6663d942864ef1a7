# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that were cut, as a plugin describes them: which plugin is believed, and what is shown."""

import attrs
import pytest
import torch

import weights_core as w
from weights_core.errors import CheckpointError, PluginFailedError
from weights_core.parts import inspect_part, parts_of, stored_names
from weights_core.testing import FakeEngine, host_of
from weights_core.types import Part, TensorMeta


def part(rank, size=2, **fields):
    topology = w.Topology.tensor_parallel(size, rank)
    return Part(engine=w.EngineInfo(name="any", version="", topology=topology, **fields), notes=("a note",))


def cut(*parts, fit=w.Fit.BEST, fails=None, layout=w.Layout.SHARDED):
    class Memory(w.WeightSet):
        provider = "cutter"

        @property
        def metas(self):
            return {"w": TensorMeta("w", (2,), "F32", 8), "v": TensorMeta("v", (2,), "F32", 8)}

        def read(self, name, slices=None):
            raise AssertionError("nothing is to be read")

    Memory.layout = layout

    class Cutter:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self, request):
            return w.FormatClaim(
                roles={w.Role.SOURCE}, layouts={layout}, fit=fit, reason="cut", parts=iter(parts)
            )

        @w.hookimpl
        def load_weights(self, request):
            if fails:
                raise fails
            return Memory()

    return Cutter


class Broken:
    weights_api = 1

    @w.hookimpl
    def resolve_format(self, request):
        raise ValueError("a bug")


def test_the_plugin_that_fits_best_is_believed_or_the_one_that_is_named(tmp_path, caplog):
    host = host_of(poor=cut(part(0, 1), fit=w.Fit.POSSIBLE), good=cut(part(0), part(1)), broken=Broken)
    assert [one.rank for one in parts_of(host, tmp_path)] == [0, 1]
    assert "a bug" in caplog.text
    assert parts_of(host, tmp_path, format="poor") == (part(0, 1),)
    assert parts_of(host, tmp_path, format="disk") == ()
    assert parts_of(host, tmp_path, format="nobody") == ()
    assert parts_of(host_of(), tmp_path) == ()


def test_a_part_is_looked_at_and_nothing_of_it_read(tmp_path):
    found = inspect_part(host_of(cutter=cut(part(1))), tmp_path, part(1))
    assert found.headline == f"{tmp_path}, rank 1 of 2: sharded, 0 tensors, 0.0 MB, 0 safetensors files"
    assert found.remarks == ("note: a note",)
    assert (found.as_dict()["rank"], found.as_dict()["axes"]) == (1, {"tp": [2, 1]})


def test_what_is_wrong_with_a_part_is_a_fault_and_a_bug_is_an_error(tmp_path):
    host = host_of(cutter=cut(part(0), fails=CheckpointError("is cut short", file=tmp_path / "x")))
    assert "x: is cut short" in inspect_part(host, tmp_path, part(0)).faults[0]
    with pytest.raises(PluginFailedError, match="a bug"):
        inspect_part(host_of(cutter=cut(part(0), fails=ValueError("a bug"))), tmp_path, part(0))


def test_names_of_the_same_bytes_are_told_from_those_that_are_empty(tmp_path):
    def meta(name, offset, nbytes=4, file=tmp_path / "f"):
        return TensorMeta(name, (nbytes,), "U8", nbytes, file, offset)

    metas = [
        meta("a", 0),
        meta("b", 0),
        meta("c", 4),
        meta("d", 8, 0),
        meta("e", 8, 0),
        meta("f", 0, 4, None),
    ]
    assert stored_names([*metas, meta("g", 0, 4, tmp_path / "other")]) == {"b": "a"}


def test_an_engine_with_more_axes_is_named_by_all(tmp_path):
    axes = {"pp": w.Axis(2, 1), "tp": w.Axis(2, 0)}
    both = attrs.evolve(FakeEngine({"w": torch.ones(1)}).info, topology=w.Topology(w.Axis(4, 2), axes))
    assert Part(engine=both).name == "rank 2 of 4 (pp 1 of 2, tp 0 of 2)"
    assert part(0, 1).name == ""
