#!/usr/bin/env bash
# Run the GPU tests on a machine with a GPU and torch, without installing anything: the packages are
# taken from this checkout, and their metadata is made up for the length of the run.
set -euo pipefail
cd "$(dirname "$0")/../.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for project in core plugins/parallel_shards plugins/gms; do
    name=$(sed -n 's/^name = "\(.*\)"/\1/p' "$project/pyproject.toml" | head -1)
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$project/pyproject.toml" | head -1)
    info="$site/${name//-/_}-$version.dist-info"
    mkdir "$info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$name" "$version" >"$info/METADATA"
    sed -n '/^\[project.entry-points/,/^$/p' "$project/pyproject.toml" |
        sed 's/^\[project.entry-points."\(.*\)"\]/[\1]/; s/"//g' >"$info/entry_points.txt"
done
export PYTHONPATH="$site:core/src:plugins/parallel_shards/src:plugins/gms/src"
python3 -m pytest -c /dev/null --rootdir . -p no:cacheprovider -s -q "$@" tests/gpu
