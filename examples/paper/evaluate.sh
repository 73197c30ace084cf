#!/usr/bin/env bash
# Evaluates what `train.sh MODEL METHOD` has trained (in $RUN, if that is set) on the paper's benchmarks.
#
#   examples/paper/evaluate.sh MODEL METHOD [--section.setting VALUE ...]
#
#   LIVECODEBENCH   folder with the files of a LiveCodeBench release (its hub dataset is a program, which is never run). Without it
#                   the other three benchmarks are evaluated; the same command with it adds the fourth.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if (($# < 2)); then
  echo "evaluate.sh: give MODEL and METHOD, as to train.sh" >&2
  exit 2
fi
run="${RUN:-runs/paper/$1/$2}"
shift 2
if [[ ! -d "$run/hf" ]]; then
  echo "evaluate.sh: $run has no finished model (hf/); train it first: $here/train.sh" >&2
  exit 2
fi
benchmarks=aime24,aime25,math500
if [[ -n "${LIVECODEBENCH:-}" ]]; then
  benchmarks+=",livecodebench=$LIVECODEBENCH"
else
  echo "evaluate.sh: without LiveCodeBench; set LIVECODEBENCH to the folder of its files to add it" >&2
fi
exec tic-megatron evaluate --config "$here/evaluate.yaml" \
  --model "$run/hf" --benchmarks "$benchmarks" --out "$run/evaluation" "$@"
