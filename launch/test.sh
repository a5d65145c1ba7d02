#!/usr/bin/env bash
# Run the whole test suite on two processes: first the tests that run in one process, then those that start processes.
# Arguments are passed to both pytest runs: bash launch/test.sh -k router
# --fast runs the fast tier only, the unit tests of the folders below: bash launch/test.sh --fast -k router
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
# The tests use the real MegaBlocks, under Triton's interpreter or on the GPU; an installed extension is not replaced.
PYTHON="$python" EXTENSION=no bash launch/megablocks.sh

# Several hundred processes import the package: compiled once, also where the environment forbids it for other programs.
unset PYTHONDONTWRITEBYTECODE

# Folders without training runs. The others take minutes: they train models, serve pages, or start the command line.
fast_tier=(accounting architecture bench config data kernels metrics model moe nn sparsity)

if [[ "${1-}" == --fast ]]; then
    # Only these folders are collected: importing the other tests alone would take a fifth of the two minutes.
    exec "$python" -m pytest -n 2 -m "not distributed and not slow and not gpu and not browser" \
        "${fast_tier[@]/#/tests/}" "${@:2}"
fi

# pytest exits with 5 if no test was selected, which is allowed for one of the two runs but not for both.
side_by_side=0
in_groups=0
"$python" -m pytest -n 2 -m "not distributed" "$@" || side_by_side=$?
# Importing the test files without such a test would take as long as importing those with one.
with_processes=()
if [[ $# -eq 0 ]]; then
    mapfile -t with_processes < <(grep -rl --include='test_*.py' 'mark\.distributed' tests)
fi
# The tests of a file stay together (tests/conftest.py), because they share what they have started.
"$python" -m pytest -n 2 --dist loadfile -m distributed "${with_processes[@]}" "$@" || in_groups=$?
if [[ $side_by_side -ne 0 && $side_by_side -ne 5 ]]; then
    exit "$side_by_side"
elif [[ $side_by_side -eq 5 || $in_groups -ne 5 ]]; then
    exit "$in_groups"
fi
