#!/usr/bin/env bash
# One cell of the paper's tables: train.sh, then evaluate.sh. Both go on where they were interrupted.
#
#   examples/paper/cell.sh MODEL METHOD [--section.setting VALUE of training ...] [-- --section.setting VALUE of evaluation ...]
#
#   RUN   the run folder of both, in place of runs/paper/MODEL/METHOD
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
train=()
while (($#)) && [[ "$1" != -- ]]; do
  if [[ "$1" == --run.dir || "$1" == --run.dir=* ]]; then
    echo "cell.sh: --run.dir would be that of training alone; set the folder of both by RUN=FOLDER in front of the command" >&2
    exit 2
  fi
  train+=("$1")
  shift
done
"$here/train.sh" ${train[@]+"${train[@]}"}
if [[ -f "${RUN:-runs/paper/${train[0]}/${train[1]}}/requeue" ]]; then exit 0; fi # told to leave: the same command goes on
exec "$here/evaluate.sh" "${train[@]:0:2}" "${@:2}"
