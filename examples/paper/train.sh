#!/usr/bin/env bash
# Trains MODEL by METHOD.
#
#   examples/paper/train.sh MODEL METHOD [--section.setting VALUE ...]
#
#   MODEL   qwen3-1.7b or qwen3-8b
#   METHOD  grpo, gspo, tic_grpo, traj_is, ub_clip or no_is
#
# The arguments that follow go to `tic-megatron train`, the last one wins. The run folder is runs/paper/MODEL/METHOD, or $RUN.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
usage() {
  echo "train.sh: $1; give MODEL ($(cd "$here" && echo qwen3-*.yaml | sed 's/\.yaml//g')) and METHOD ($(cd "$here/methods" && echo *.yaml | sed 's/\.yaml//g'))" >&2
  exit 2
}
(($# >= 2)) || usage "MODEL or METHOD is missing"
model="$1" method="$2"
shift 2
[[ "$model" == qwen3-* && -f "$here/$model.yaml" ]] || usage "there is no model $model"
[[ -f "$here/methods/$method.yaml" ]] || usage "there is no method $method"

exec tic-megatron train \
  --config "$here/common.yaml" --config "$here/$model.yaml" --config "$here/methods/$method.yaml" \
  --run.dir "${RUN:-runs/paper/$model/$method}" "$@"
