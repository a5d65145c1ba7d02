#!/usr/bin/env bash
# Train on every GPU of this machine, or on the first NUM_GPUS of them: bash launch/single_node.sh configs/base.yaml
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

# Ctrl-C is for the ranks, which save and leave: the launcher waits for them.
trap '' INT
exec "$python" -m deepspeed.launcher.runner --log_level warning --num_gpus "${NUM_GPUS:--1}" --master_port "$(free_port)" \
    --module qsparse_moe train "$@"
