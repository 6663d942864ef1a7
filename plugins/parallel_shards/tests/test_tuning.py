# SPDX-License-Identifier: Apache-2.0

import pytest

from weights_parallel_shards.tuning import LEAST, SMALLEST_SLOT, SPARE, tune

MIB = 1 << 20


@pytest.mark.parametrize("limit", [LEAST, LEAST + 1, 3 * MIB, 64 * MIB, 256 * MIB, 1 << 30, 1 << 40])
@pytest.mark.parametrize("threads", [None, 1, 7, 500])
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("remote", [False, True])
def test_staging_and_window_together_keep_to_the_limit(limit, threads, cuda, remote):
    tuning = tune(limit, threads=threads, direct="auto", remote=remote, cuda=cuda)
    assert tuning.readers >= 1
    assert tuning.slots >= 1
    assert tuning.chunk >= SMALLEST_SLOT - SPARE
    assert tuning.chunk % 4096 == tuning.slot_bytes % 4096 == 0
    assert tuning.window > 0
    staging = tuning.slots * tuning.slot_bytes
    assert tuning.slots >= tuning.readers
    assert staging <= limit
    assert cuda or staging + tuning.window + tuning.chunk <= limit
    assert tuning.readers <= (threads or 16)


def test_by_default_the_storage_decides_how_many_read():
    def readers(**given):
        return tune(None, **{"threads": None, "direct": "auto", "remote": False, "cuda": False, **given})

    assert readers().readers == 8
    assert readers(remote=True).readers == 16
    assert readers(cuda=True).readers == 15
    assert readers(cuda=True).slots == 20
    assert readers(threads=3, remote=True).readers == 3
