#!/usr/bin/env bash
# Lint and tests in the environment of the quickstart.
#
#   ./scripts/test.sh [--full] [arguments of pytest]
#
# Without --full the long proofs (marked `slow`) are left out.
#
#   TIC_TEST_WORKERS  files of tests that run at the same time (default: 2; a test that runs the whole stack takes up to 6 GiB)
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
mypy
# In the order of the files, not the one with most tests first: the longest have few.
exec python -m pytest -n "${TIC_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder \
  ${select[@]+"${select[@]}"} ${arguments[@]+"${arguments[@]}"}
