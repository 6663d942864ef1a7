#!/usr/bin/env bash
# Run the GPU tests on a machine with a GPU and torch, without installing anything.
#     tests/gpu/run.sh                                           the tests
#     tests/gpu/run.sh -- python3 benchmarks/reading_gpu.py      something else, with the packages at hand
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "${1:-}" = -- ]; then
    shift
    tests/in_place.sh "$@"
else
    tests/in_place.sh python3 -m pytest -c /dev/null --rootdir . -p no:cacheprovider -s -q "$@" tests/gpu
fi
