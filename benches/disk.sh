#!/usr/bin/env bash
# The disk tier beside fio: same file system, block length and depth, direct I/O, one after the other in each round.
#
#   benches/disk.sh [DIRECTORY] [MiB per run] [rounds]
#
# fio is installed with apt-get when it is missing; without it the fio columns stay empty.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v fio >/dev/null; then
    echo "fio is missing: installing it" >&2
    apt-get install -y fio >/dev/null || echo "it could not be installed; going on without" >&2
fi
dir=${1:-$(mktemp -d)}
[ -n "${1:-}" ] || trap 'rm -rf "$dir"' EXIT
exec_args=("$dir" "${2:-1024}" "${3:-3}")
cargo run --release -p kv-ssd --example ssd_bench -- "${exec_args[@]}"
