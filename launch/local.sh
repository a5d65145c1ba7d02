#!/usr/bin/env bash
# Train on CPU processes of this machine (RANKS, 2 unless set): bash launch/local.sh configs/tiny.yaml training.steps=50
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

ranks="${RANKS:-2}"
export DS_ACCELERATOR=cpu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_per_rank "$ranks")}"
# This launcher waits on Ctrl-C and SIGTERM until the ranks have saved, also as the main process of a container.
exec "$python" -m qsparse_moe.training.launcher --max_restarts "${MAX_RESTARTS:-0}" \
    --quiet --num_gpus "$ranks" --master_port "$(free_port)" \
    --module qsparse_moe train "$@" training.device=cpu
