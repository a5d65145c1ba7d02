"""Compile every Triton kernel of the registry for NVIDIA GPUs, as its example inputs launch it, without such a GPU.

Those of row products, which are no operation of training, are compiled as decoding launches them.

Run as a program, with TRITON_INTERPRET unset, it prints the compiled kernels as one JSON object. Triton takes the
target from its driver and brings its own assembler; a driver of our making names the target, and nothing is launched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from qsparse_moe.kernels.registry import OPS
from qsparse_moe.kernels.row_product.op import list_features, listed_product
from qsparse_moe.kernels.row_product.stored import WEIGHT_FORMATS, StoredWeights, store
from qsparse_moe.kernels.spec import OpSpec

AMPERE, HOPPER = 80, 90


class NamedTarget:
    """The methods that Triton calls on a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def only_compiling(capability: int, compiled: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Inside, a launch only compiles for ``capability``; ``compiled`` gets a kernel's name and its code by form."""
    triton.runtime.driver.set_active(NamedTarget(capability))
    run = JITFunction.run

    def only_compile(self: JITFunction, *args: object, **settings: object) -> object:
        settings["warmup"] = True
        kernel = run(self, *args, **settings)
        compiled(self.__name__, kernel.asm)
        return kernel

    JITFunction.run = only_compile
    try:
        yield
    finally:
        JITFunction.run = run


def compile_all(capability: int) -> dict[str, dict[str, list[int]]]:
    """By operation and case, for each kernel that it launches: bytes of machine code, and fused multiply-adds."""
    compiled: dict[str, dict[str, list[int]]] = {}

    def note(name: str, code: dict[str, Any]) -> None:
        compiled.setdefault(where, {})[name] = [len(code["cubin"]), code["ptx"].count("fma.rn")]

    with only_compiling(capability, note):
        for spec in (spec for spec in OPS if "triton" in spec.fast):
            for case in cases(spec) if capability == HOPPER else ("large",):
                for dtype in (torch.float32, torch.bfloat16):
                    where = f"{spec.name} {case} {dtype}"
                    forward_and_backward(spec, case, dtype)
        for weight_format in WEIGHT_FORMATS:
            where = f"row_product {weight_format}"
            project_and_run_experts(store(torch.ones(4, 1024, 2048), weight_format))
    return compiled


def cases(spec: OpSpec) -> tuple[str, ...]:
    """Return the cases that differ in what is compiled: one K or one per row, a mask or none, benchmark shapes."""
    wanted = ("k_per_row", "masked_gradient", "odd_group")
    return ("large", *(case for case in spec.cases if case.split()[-1] in wanted))


def forward_and_backward(spec: OpSpec, case: str, dtype: torch.dtype) -> None:
    example = spec.example_inputs(case, dtype, "cpu")
    leaves = {name: x[:64].detach().requires_grad_() for name, x in example.tensors.items()}
    settings = {name: v[:64] if isinstance(v, torch.Tensor) else v for name, v in example.settings.items()}
    output = spec.load("triton")(**leaves, **settings)
    first = output if isinstance(output, torch.Tensor) else output[0]
    if first.requires_grad:
        first.backward(torch.zeros_like(first))


def project_and_run_experts(stored: StoredWeights) -> None:
    """A projection, gate and up, and down, in one number format."""
    lists = list_features(torch.zeros(2, 1024), 512)
    listed_product(stored, lists)
    expert_P, factors_P = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    listed_product(stored, lists, matrix_P=expert_P, products_per_list=2)
    listed_product(stored, lists, matrix_P=expert_P, factors_P=factors_P, products_per_sum=2)


if __name__ == "__main__":
    json.dump({str(capability): compile_all(capability) for capability in (AMPERE, HOPPER)}, sys.stdout)
