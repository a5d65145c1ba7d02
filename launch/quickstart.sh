#!/usr/bin/env bash
# From a fresh clone to a model that writes: trains configs/tiny.yaml with the deepspeed launcher on two CPU processes,
# evaluates it, lets it write and sums up. A finished run is used as it is, an interrupted one goes on:
#   bash launch/quickstart.sh [training.steps=50 ...]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

settings=(configs/tiny.yaml "$@" training.device=cpu training.resume=true)
state="$("$python" launch/run_state.py "${settings[@]}")"
run="${state#* }"
export DS_ACCELERATOR=cpu

if [[ "$state" == finished* ]]; then
    echo "$run is trained already; remove it, or give training.name=NAME, to train again" >&2
else
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_per_rank 2)}" \
        "$python" -m deepspeed.launcher.runner --quiet --num_gpus 2 --master_port "$(free_port)" \
        --module qsparse_moe train "${settings[@]}"
    # The launcher ends with 0 when it was killed itself.
    [[ "$("$python" launch/run_state.py "${settings[@]}")" == finished* ]] ||
        fail "$run stopped before its last step (training.steps): run the same command again to go on"
fi

"$python" -m qsparse_moe evaluate "$run" --device cpu --json >"$run/evaluation.json"
"$python" -m qsparse_moe describe "$run" --json >"$run/description.json"
"$python" -m qsparse_moe generate "$run" --device cpu --prompt "def " --max-tokens 200 >"$run/sample.txt"
"$python" launch/summary.py "$run"
