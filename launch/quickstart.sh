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

# once FILE COMMAND...: what the command prints, kept in the run folder for the next time.
once() {
    if [[ ! -f "$run/$1" ]]; then
        "${@:2}" >"$run/$1.part"
        mv -- "$run/$1.part" "$run/$1"
    fi
}

if [[ "$state" == finished* ]]; then
    echo "$run is trained already; remove it, or give training.name=NAME, to train again" >&2
else
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_per_rank 2)}" \
        "$python" -m qsparse_moe.training.launcher --quiet --num_gpus 2 --master_port "$(free_port)" \
        --module qsparse_moe train "${settings[@]}" &
    launcher=$!
    # The launcher tells the ranks, which save, and ends after them. The terminal sends it Ctrl-C itself.
    trap '' INT
    trap 'kill -TERM "$launcher"' TERM
    while kill -0 "$launcher" 2>/dev/null; do
        code=0
        wait "$launcher" || code=$?
    done
    trap - INT TERM
    [[ "$code" -eq 0 ]] || exit "$code"
    # The launcher ends with 0 when it was killed itself.
    [[ "$("$python" launch/run_state.py "${settings[@]}")" == finished* ]] ||
        fail "$run stopped before its last step (training.steps): run the same command again to go on"
    rm -f -- "$run/evaluation.json" "$run/description.json" "$run/sample.txt" "$run/sample-drawn.txt"
fi

sample=(generate "$run" --device cpu --prompt "def __init__(self" --max-tokens 120)
once evaluation.json "$python" -m qsparse_moe evaluate "$run" --device cpu --json
once description.json "$python" -m qsparse_moe describe "$run" --json
once sample.txt "$python" -m qsparse_moe "${sample[@]}"
once sample-drawn.txt "$python" -m qsparse_moe "${sample[@]}" --temperature 0.8
"$python" launch/summary.py "$run"
