#!/usr/bin/env bash
# Everything of this project that needs CUDA, in one command of at most eight minutes, on a machine that has torch and
# no network. Nothing is installed: packages that are missing are unpacked from bench-wheels/, and what makes the plug-ins
# known is written, both into a folder that is removed afterwards. Without a GPU it runs small, as a test of itself.
#
#   bash benchmarks/gpu.sh                   all parts; table on the screen, gpu.json, gpu.txt and gpu.log in $OUT
#   bash benchmarks/gpu.sh --part refresh    one part, repeatable; --list names them
#   bash benchmarks/gpu.sh --wheels [3.12]   how to fetch what is missing there, for its Python; where there is a network
#
# OUT: folder of the results, bench-out/ if unset.  PYTHON: the interpreter that has torch, python3 if unset.
set -euo pipefail
out=$(realpath -m "${OUT:-$(dirname "$0")/../bench-out}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ "${1:-}" = "--wheels" ]; then
    exec "$python" benchmarks/gpu/bring.py --command "${2:-3.12}"
fi
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" benchmarks/gpu/bring.py "$site"
export OUT="$out" PYTHONPATH="$site:$PWD:$PWD/plugins:$PWD/cli${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m benchmarks.gpu "$@"
