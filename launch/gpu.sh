#!/usr/bin/env bash
# Run the tests that need an NVIDIA GPU, then time the operations, the MoE layer, a step, and decoding; results go to
# results/gpu/.
# Nothing is installed: PYTHON (default: python) is an interpreter with qsparse_moe[dev], a CUDA build of torch, and
# MegaBlocks (launch/megablocks.sh).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python}"
if ! accelerator="$("$python" -c 'import torch; print(torch.cuda.get_device_name())')"; then
    echo "launch/gpu.sh: $python finds no CUDA device; set PYTHON to an interpreter whose torch does" >&2
    exit 2
fi
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("megablocks") is None)'; then
    echo "launch/gpu.sh: $python has no megablocks; PYTHON=$python bash launch/megablocks.sh installs it" >&2
    exit 2
fi
# Triton must compile here; its interpreter is for machines without a GPU.
export TRITON_INTERPRET=0
"$python" -m pytest -m gpu "$@"
name="${accelerator//[^[:alnum:]]/-}"
"$python" -m qsparse_moe bench ops --device cuda --output "results/gpu/ops-$name.json"
"$python" -m qsparse_moe bench moe --device cuda --output "results/gpu/moe-$name.json"
# One layer in the shape of OLMoE: the cost of Q-Sparse at every site in a training step.
"$python" -m qsparse_moe bench step --device cuda --precision bf16 --layers 1 --hidden-size 2048 --heads 16 --experts 64 \
    --experts-per-token 8 --expert-hidden-size 1024 --rows 4 --sequence-length 4096 --output "results/gpu/step-$name.json"
# Decoding by the Triton engine at several S, beside the modules of the training model.
"$python" -m qsparse_moe bench decode --device cuda --weights bf16,int8 --sparsity 0.5,0.75 --batch 1,8 \
    --output "results/gpu/decode-$name.json"
