#!/usr/bin/env bash
# One cell of the paper's tables: train.sh, then evaluate.sh. Both go on where they were interrupted.
#
#   examples/paper/cell.sh MODEL METHOD [--section.setting VALUE of training ...]
#
#   RUN   the run folder of both, in place of runs/paper/MODEL/METHOD
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ " $* " == *" --run.dir"[\ =]* ]]; then
  echo "cell.sh: --run.dir would be that of training alone; set the folder of both by RUN=FOLDER in front of the command" >&2
  exit 2
fi
"$here/train.sh" "$@"
if [[ -f "${RUN:-runs/paper/$1/$2}/requeue" ]]; then exit 0; fi # told to leave: the same command goes on
exec "$here/evaluate.sh" "$1" "$2"
