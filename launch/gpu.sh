#!/usr/bin/env bash
# For the owner of an NVIDIA GPU: the tests that need one, then the timings of the operations into results/gpu/.
# It sets nothing up: PYTHON (python unless set) is an interpreter with qsparse_moe[dev], a CUDA build of torch and, by
# launch/megablocks.sh, MegaBlocks.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python}"
if ! accelerator="$("$python" -c 'import torch; print(torch.cuda.get_device_name())')"; then
    echo "launch/gpu.sh: $python sees no CUDA device; PYTHON=... names one whose torch does" >&2
    exit 2
fi
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("megablocks") is None)'; then
    echo "launch/gpu.sh: $python has no megablocks; PYTHON=$python bash launch/megablocks.sh installs it" >&2
    exit 2
fi
# Triton compiles; its interpreter is for machines without a GPU.
export TRITON_INTERPRET=0
"$python" -m pytest -m gpu "$@"
"$python" -m qsparse_moe bench ops --device cuda --output "results/gpu/ops-${accelerator//[^[:alnum:]]/-}.json"
