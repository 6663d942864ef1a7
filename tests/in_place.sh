#!/usr/bin/env bash
# Run a command with the packages of this checkout at hand, without installing anything: they are taken
# from where they lie, and their metadata is made up for the length of the run.
#     tests/in_place.sh python3 benchmarks/reading_gpu.py
set -euo pipefail
cd "$(dirname "$0")/.."
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
PYTHONPATH="$site:$(printf "$PWD/%s:" core/src plugins/*/src engines/*/src)${PYTHONPATH:-}"
export PYTHONPATH
"$@"
