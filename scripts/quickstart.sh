#!/usr/bin/env bash
# A small Qwen3 learns two-digit addition by TIC-GRPO: Ray, Megatron-core actors and vLLM on this machine's CPU.
#
#   ./scripts/quickstart.sh [--run.seed N] [any other flag of `tic-megatron train`]
#
# Makes the environment and the task at the first run; outputs lie in runs/quickstart-TIME, or where --run.dir says.
# Relative paths are relative to the repository root.
set -euo pipefail

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
fi

seed=0
previous=""
for argument in "$@"; do
  if [[ "$previous" == --run.seed ]]; then seed="$argument"; fi
  if [[ "$argument" == --run.seed=* ]]; then seed="${argument#--run.seed=}"; fi
  previous="$argument"
done
if ! [[ "$seed" =~ ^[0-9]{1,9}$ ]]; then
  printf 'quickstart: --run.seed %s is not a number from 0 to 999999999\n' "$seed" >&2
  exit 2
fi

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

example=examples/quickstart
task="$example/task/seed_$seed"
mkdir -p "$example/task"
(
  if command -v flock >/dev/null; then flock 9; fi
  if [[ -d "$task" && ! "$example/make_task.py" -nt "$task" ]]; then exit 0; fi
  rm -rf "$task"
  python "$example/make_task.py" --out "$task" --seed "$seed"
) 9>>"$example/task/seed_$seed.lock"

# Later flags win, so the caller's own come last.
train=(
  tic-megatron train
  --config "$example/quickstart.yaml"
  --model.path "$task/model"
  --data.train "$task/train.jsonl"
  --data.eval "$task/eval.jsonl"
  --run.dir "runs/quickstart-$(date +%Y%m%d-%H%M%S)"
  "$@"
)
exec "${train[@]}"
