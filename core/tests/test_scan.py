# SPDX-License-Identifier: Apache-2.0
"""The engine behind `weights load`: reads everything, keeps nothing, and can verify."""

import pytest
import torch

import weights_core as w
from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.errors import CoverageError, LoadError, WeightsError
from weights_core.scan import ScanEngine
from weights_core.shards import open_shards
from weights_core.tensors import as_bytes
from weights_core.testing import every_dtype, host_of, random_tensor, write_checkpoint
from weights_core.weightset import WeightSetWrapper


@pytest.fixture
def tensors():
    return {
        "a": random_tensor(4, 3, seed=1),
        "b.weight": random_tensor(7, dtype="I64", seed=2),
        "c": random_tensor(2, 2, dtype="BF16", seed=3),
    }


@pytest.fixture
def checkpoint(tmp_path, tensors):
    return write_checkpoint(tmp_path / "ckpt", tensors, shards=2)


@pytest.fixture
def weights(checkpoint):
    made = on_disk(checkpoint)
    yield made
    made.close()


def on_disk(checkpoint):
    return ShardSet(open_shards(find(checkpoint)), provider="disk")


def size_of(tensors):
    return sum(as_bytes(tensor).numel() for tensor in tensors.values())


class Altered(WeightSetWrapper):
    """Hands out one tensor changed by `alter`, as a provider with a bug would."""

    def __init__(self, inner, name, alter):
        super().__init__(inner)
        self.name, self.alter = name, alter

    def stream(self, names=None):
        for name, tensor in self.inner.stream(names):
            yield name, self.alter(tensor) if name == self.name else tensor


def flip_last_bit(tensor):
    raw = as_bytes(tensor).clone()
    raw[-1] ^= 1
    return raw.view(tensor.dtype).reshape(tensor.shape)


def test_the_engine_takes_a_checkpoint_as_it_is_and_shares_nothing():
    info = ScanEngine("vae").info
    assert (info.name, info.component, info.accepts) == ("scan", "vae", {w.Layout.CHECKPOINT})
    assert dict(info.shareable) == {}
    assert ScanEngine().untouched()


def test_every_tensor_is_read_and_reported_as_written(weights, tensors):
    engine = ScanEngine()
    assert dict(engine.expected(w.Layout.CHECKPOINT)) == {}
    applied = engine.apply(weights)
    assert applied.written == tensors.keys()
    assert (applied.unused, applied.host_bytes) == ((), 0)
    assert engine.expected(w.Layout.CHECKPOINT).keys() == tensors.keys()
    assert weights.bytes_read == size_of(tensors)
    assert engine.verified == 0


def test_every_tensor_is_released_as_soon_as_it_is_read(weights, tensors):
    events = []

    class Watched(WeightSetWrapper):
        def stream(self, names=None):
            for name, tensor in self.inner.stream(names):
                events.append(("read", name))
                yield name, tensor

        def release(self, names):
            events.extend(("release", name) for name in names)
            return 0

    ScanEngine().apply(Watched(weights))
    order = list(weights)
    assert events == [(what, name) for name in order for what in ("read", "release")]
    assert set(order) == tensors.keys()


def test_verifying_counts_every_byte(weights, tensors):
    engine = ScanEngine(verify=True)
    engine.apply(weights)
    assert engine.verified == size_of(tensors)


@pytest.mark.parametrize("dtype", every_dtype())
def test_every_dtype_is_verified(tmp_path, dtype):
    tensor = random_tensor(4, 6, dtype=dtype)
    weights = on_disk(write_checkpoint(tmp_path, {"t": tensor}))
    engine = ScanEngine(verify=True)
    engine.apply(weights)
    weights.close()
    assert engine.verified == as_bytes(tensor).numel()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_scalars_and_empty_tensors_are_verified(tmp_path, shape):
    weights = on_disk(write_checkpoint(tmp_path, {"t": torch.zeros(shape), "u": torch.ones(2)}))
    engine = ScanEngine(verify=True)
    assert engine.apply(weights).written == {"t", "u"}
    weights.close()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_torch_files_are_verified_against_torch(tmp_path, tensors, zipped, suffix):
    torch.save(tensors, tmp_path / f"model{suffix}", _use_new_zipfile_serialization=zipped)
    weights = on_disk(tmp_path)
    engine = ScanEngine(verify=True)
    assert engine.apply(weights).written == tensors.keys()
    assert engine.verified == size_of(tensors)
    weights.close()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "alter",
    [flip_last_bit, lambda t: t.reshape(-1), lambda t: t.clone().view(torch.int32), lambda t: t[:2]],
    ids=["one bit", "shape", "dtype", "cut short"],
)
def test_a_tensor_that_differs_from_the_file_is_refused_by_name_and_file(tmp_path, tensors, kind, alter):
    weights = on_disk(write_checkpoint(tmp_path, tensors, kind=kind))
    with pytest.raises(
        CoverageError, match="tensor 'a' is not what an independent read of the file gives"
    ) as info:
        ScanEngine(verify=True).apply(Altered(weights, "a", alter))
    weights.close()
    assert str(weights.meta("a").file) in str(info.value)
    assert list(info.value.mismatched) == ["a"]


def test_nan_bits_are_compared_as_bits(tmp_path):
    nans = torch.full((4,), float("nan"))
    weights = on_disk(write_checkpoint(tmp_path, {"a": nans}))
    engine = ScanEngine(verify=True)
    engine.apply(weights)
    assert engine.verified == 16
    with pytest.raises(CoverageError):
        ScanEngine(verify=True).apply(Altered(weights, "a", flip_last_bit))
    weights.close()


def test_negative_zero_is_not_zero_when_verifying(tmp_path):
    weights = on_disk(write_checkpoint(tmp_path, {"a": torch.zeros(4)}))
    with pytest.raises(CoverageError):
        ScanEngine(verify=True).apply(Altered(weights, "a", torch.neg))
    weights.close()


def test_without_verify_the_bytes_are_not_compared(weights, tensors):
    engine = ScanEngine()
    assert engine.apply(Altered(weights, "a", flip_last_bit)).written == tensors.keys()


class Homeless(WeightSetWrapper):
    """Does not say which file its tensors come from."""

    @property
    def metas(self):
        return {
            name: w.TensorMeta(name, meta.shape, meta.dtype, meta.nbytes)
            for name, meta in self.inner.metas.items()
        }

    def meta(self, name):
        return self.metas[name]


def test_a_tensor_that_lies_in_no_file_cannot_be_verified(weights):
    with pytest.raises(CoverageError, match="lies in no file, so there is nothing to verify it against"):
        ScanEngine(verify=True).apply(Homeless(weights))


def test_a_tensor_that_lies_in_no_file_can_be_read(weights, tensors):
    assert ScanEngine().apply(Homeless(weights)).written == tensors.keys()


def test_an_empty_set_is_read():
    class Empty(w.WeightSet):
        @property
        def metas(self):
            return {}

        def read(self, name, slices=None):
            raise KeyError(name)

    assert ScanEngine(verify=True).apply(Empty()).written == frozenset()


def test_a_whole_load_verifies(checkpoint, tensors):
    engine = ScanEngine(verify=True)
    report = w.load(engine, checkpoint, host=host_of())
    report.lease.close()
    assert report.applied.written == tensors.keys()
    assert engine.verified == report.nbytes == size_of(tensors)


class Tape:
    """A source that hands on what disk reads; subclasses break it."""

    weights_api = 1

    @w.hookimpl
    def resolve_format(self, request):
        return w.FormatClaim(roles={w.Role.SOURCE}, reason="reads tapes", fit=w.Fit.BEST)

    @w.hookimpl
    def load_weights(self, request, source):
        return self.broken(source.open())


def test_a_stream_that_leaves_out_a_tensor_fails_the_load(checkpoint):
    class Forgetful(Tape):
        def broken(self, weights):
            class Skipping(WeightSetWrapper):
                def stream(self, names=None):
                    return ((name, t) for name, t in self.inner.stream(names) if name != "a")

            return Skipping(weights)

    with pytest.raises(CoverageError, match="missing 1 tensor: a"):
        w.load(ScanEngine(), checkpoint, host=host_of(tape=Forgetful))


def test_verifying_notices_a_tensor_of_the_files_that_the_set_does_not_have(checkpoint):
    class Smaller(Tape):
        def broken(self, weights):
            class Fewer(WeightSetWrapper):
                @property
                def metas(self):
                    return {name: meta for name, meta in self.inner.metas.items() if name != "a"}

                def stream(self, names=None):
                    return ((name, t) for name, t in self.inner.stream(names) if name != "a")

            return Fewer(weights)

    with pytest.raises(WeightsError, match=r"'a'|: a"):
        w.load(ScanEngine(verify=True), checkpoint, host=host_of(tape=Smaller))


def test_a_tensor_larger_than_its_meta_says_fails_the_load_as_an_error_of_this_project(checkpoint):
    class Larger(Tape):
        def broken(self, weights):
            return Altered(weights, "a", lambda tensor: torch.zeros(10_000))

    with pytest.raises(LoadError, match="engine scan failed to take the weights of 'tape'"):
        w.load(ScanEngine(), checkpoint, host=host_of(tape=Larger))


def test_after_a_fall_back_only_the_bytes_of_the_last_provider_count_as_verified(checkpoint, tensors):
    class Tearing(Tape):
        def broken(self, weights):
            class Torn(WeightSetWrapper):
                def stream(self, names=None):
                    yield from list(self.inner.stream(names))[:1]
                    raise w.LoadFailed("the tape tore", mutated=False)

            return Torn(weights)

    engine = ScanEngine(verify=True)
    report = w.load(engine, checkpoint, host=host_of(tape=Tearing))
    report.lease.close()
    assert report.provider == "disk"
    assert engine.verified == size_of(tensors)
