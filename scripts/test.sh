#!/usr/bin/env bash
# Lint and tests in the environment of the quickstart.
#
#   ./scripts/test.sh [--full] [arguments of pytest]
#
# Without --full the long proofs (marked `slow`) are left out.
set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

select=(-m "not slow")
arguments=()
for argument in "$@"; do
  if [[ "$argument" == --full ]]; then select=(); else arguments+=("$argument"); fi
done

# The tests start many processes: one thread each, unless the caller knows better.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

ruff check .
ruff format --check .
exec python -m pytest ${select[@]+"${select[@]}"} ${arguments[@]+"${arguments[@]}"}
