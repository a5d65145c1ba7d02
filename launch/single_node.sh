#!/usr/bin/env bash
# Train on every GPU of this machine, or on the first NUM_GPUS of them: bash launch/single_node.sh configs/base.yaml
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

# This launcher waits on Ctrl-C and SIGTERM until the ranks have saved, also as the main process of a container.
exec "$python" -m qsparse_moe.training.launcher --max_restarts "${MAX_RESTARTS:-0}" \
    --log_level warning --num_gpus "${NUM_GPUS:--1}" --master_port "$(free_port)" \
    --module qsparse_moe train "$@"
