#!/usr/bin/env bash
# Train on several machines that are reachable by ssh without a password and by pdsh, with the repository at the same
# path on each. HOSTFILE has one line per machine, "worker-1 slots=8":
#   HOSTFILE=hosts.txt bash launch/multi_node.sh configs/base.yaml training.name=two-nodes
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

[[ -f "${HOSTFILE:-}" ]] ||
    fail "HOSTFILE is '${HOSTFILE:-}', which is not a file: name one with a line 'machine slots=GPUS' for each machine"
[[ "$repository" != *[[:space:]]* ]] ||
    fail "$repository has a space in its path, which pdsh splits on the other machines: move the repository"

exec "$python" -m qsparse_moe.training.launcher --max_restarts "${MAX_RESTARTS:-0}" \
    --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" \
    --module qsparse_moe train "$@"
