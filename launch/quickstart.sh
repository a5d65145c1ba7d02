#!/usr/bin/env bash
# From a fresh clone to a trained model: train configs/tiny.yaml with the deepspeed launcher on two CPU processes,
# evaluate it, generate text, and print a summary. A finished run is not repeated, an interrupted one is continued:
#   bash launch/quickstart.sh [training.steps=50 ...]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

settings=(configs/tiny.yaml "$@" training.device=cpu training.resume=true)
state="$("$python" launch/run_state.py "${settings[@]}")"
run="${state#* }"
export DS_ACCELERATOR=cpu

# once FILE COMMAND...: save the output of the command in the run folder, unless the file exists.
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
    # The launcher passes the signal to the ranks, which save, and ends after them. Ctrl-C reaches it from the terminal.
    trap '' INT
    trap 'kill -TERM "$launcher"' TERM
    while kill -0 "$launcher" 2>/dev/null; do
        code=0
        wait "$launcher" || code=$?
    done
    trap - INT TERM
    [[ "$code" -eq 0 ]] || exit "$code"
    # The launcher ends with 0 if it was killed itself, so the exit code is not enough.
    [[ "$("$python" launch/run_state.py "${settings[@]}")" == finished* ]] ||
        fail "$run stopped before its last step (training.steps): run the same command again to continue"
    rm -f -- "$run/evaluation.json" "$run/description.json" "$run/sample.txt" "$run/sample-drawn.txt"
fi

sample=(generate "$run" --device cpu --prompt "def __init__(self" --max-tokens 120)
once evaluation.json "$python" -m qsparse_moe evaluate "$run" --device cpu --json
once description.json "$python" -m qsparse_moe describe "$run" --json
once sample.txt "$python" -m qsparse_moe "${sample[@]}"
once sample-drawn.txt "$python" -m qsparse_moe "${sample[@]}" --temperature 0.8
"$python" launch/summary.py "$run"
