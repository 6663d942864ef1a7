#!/usr/bin/env bash
# Run the GPU tests on a machine with a GPU and torch, without installing anything: the packages are
# taken from this checkout, and their metadata is made up for the length of the run.
#     tests/gpu/run.sh                                           the tests
#     tests/gpu/run.sh -- python3 benchmarks/reading_gpu.py      something else, with the packages at hand
set -euo pipefail
cd "$(dirname "$0")/../.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for project in core plugins/* engines/*; do
    name=$(sed -n 's/^name = "\(.*\)"/\1/p' "$project/pyproject.toml" | head -1)
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$project/pyproject.toml" | head -1)
    info="$site/${name//-/_}-$version.dist-info"
    mkdir "$info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$name" "$version" >"$info/METADATA"
    sed -n '/^\[project.entry-points/,/^$/p' "$project/pyproject.toml" |
        sed 's/^\[project.entry-points."\(.*\)"\]/[\1]/; s/"//g' >"$info/entry_points.txt"
done
PYTHONPATH="$site:$(printf %s: core/src plugins/*/src engines/*/src)${PYTHONPATH:-}"
export PYTHONPATH
if [ "${1:-}" = -- ]; then
    shift
    "$@"
else
    python3 -m pytest -c /dev/null --rootdir . -p no:cacheprovider -s -q "$@" tests/gpu
fi
