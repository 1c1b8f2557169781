#!/usr/bin/env bash
# All that is to be measured on a GPU, in one call of less than ten minutes (benchmarks/gpu.py says what):
#
#   benchmarks/gpu.sh --out FOLDER [--wheels FOLDER] [--nanogpt FOLDER] [--parts ...] [--cpu-dry-run]
#
# It needs Python with torch and numpy. With --wheels it takes what is missing of the rest from wheels in that folder, and the
# network is not asked: hydra-core, omegaconf, antlr4-python3-runtime, PyYAML, pydantic, pydantic-core, annotated-types,
# typing-inspection, rich, markdown-it-py, mdurl, Pygments, tokenizers, xxhash.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
rest=()
wheels=
while (($#)); do
  case $1 in
    --wheels) wheels=$2; shift 2 ;;
    *) rest+=("$1"); shift ;;
  esac
done
if [[ -n $wheels ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}"
else
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
fi
python3 "$root/benchmarks/gpu.py" "${rest[@]}"
