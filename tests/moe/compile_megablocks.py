"""Compile the kernels of MegaBlocks' permutation for NVIDIA GPUs, every configuration of each, without such a GPU.

Run as a program, with TRITON_INTERPRET unset, it prints the least size of the machine code of each as one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from qsparse_moe.moe.backends import megablocks, megablocks_package
from tests.kernels.compile_kernels import AMPERE, HOPPER, only_compiling


def compile_permutation(capability: int) -> dict[str, int]:
    """Least size in bytes of the machine code, by kernel."""
    least: dict[str, int] = {}
    kernels = megablocks_package.load().backend.kernels
    tuned = (kernels._padded_copy, kernels._padded_copy_wgrad)
    configurations = [kernel.configs for kernel in tuned]

    def note(name: str, code: dict[str, Any]) -> None:
        size = len(code["cubin"])
        least[name] = min(size, least.get(name, size))

    with only_compiling(capability, note):
        for chosen in zip(*configurations, strict=True):
            for kernel, configuration in zip(tuned, chosen, strict=True):
                # With one there is nothing to time.
                kernel.configs = [configuration]
            for dtype in (torch.float32, torch.bfloat16):
                there_and_back(dtype)
    for kernel, all_of_it in zip(tuned, configurations, strict=True):
        kernel.configs = all_of_it
    return least


def there_and_back(dtype: torch.dtype) -> None:
    x = torch.zeros(8, 2048, dtype=dtype, requires_grad=True)
    weights = torch.zeros(8, 2, requires_grad=True)
    rows = megablocks.sort(torch.zeros(8, 2, dtype=torch.int64), 4)
    megablocks.combine(megablocks.permute(x, rows), weights, rows).sum().backward()


if __name__ == "__main__":
    json.dump({str(capability): compile_permutation(capability) for capability in (AMPERE, HOPPER)}, sys.stdout)
