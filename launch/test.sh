#!/usr/bin/env bash
# The whole test suite: what can run side by side on two processes, then what starts processes of its own.
# Arguments go to both pytest runs: bash launch/test.sh -k router
# --fast runs the fast tier only: unit tests that start no process and are not marked slow.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
# The tests run the real package, under Triton's interpreter or on the GPU; an extension that is there stays.
PYTHON="$python" EXTENSION=no bash launch/megablocks.sh

if [[ "${1-}" == --fast ]]; then
    exec "$python" -m pytest -n 2 -m "not distributed and not slow and not gpu" "${@:2}"
fi

# pytest ends with 5 when nothing was selected, which may be so for one of the two runs but not for both.
side_by_side=0
one_by_one=0
"$python" -m pytest -n 2 -m "not distributed" "$@" || side_by_side=$?
"$python" -m pytest -m distributed "$@" || one_by_one=$?
if [[ $side_by_side -ne 0 && $side_by_side -ne 5 ]]; then
    exit "$side_by_side"
elif [[ $side_by_side -eq 5 || $one_by_one -ne 5 ]]; then
    exit "$one_by_one"
fi
