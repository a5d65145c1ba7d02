"""Time the operations that have fast implementations, and the ways to find the K-th largest in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.bench.harness import fingerprint, synchronizer, time_in_turns
from qsparse_moe.kernels import tiles
from qsparse_moe.kernels.registry import OPS
from qsparse_moe.kernels.spec import Example, Operation, OpSpec
from qsparse_moe.sparsity.topk import magnitude_bits

REFERENCE = "reference"
CASE = "large"


def run_op_benchmarks(
    dtypes: Mapping[str, torch.dtype], *, device: str, rounds: int, case: str = CASE
) -> dict[str, Any]:
    """Time every operation of the registry and of ``THRESHOLDS`` in every dtype, all versions of one in turns.

    Args:
        dtypes: the dtypes by their name in the result.
        device: ``cpu`` or ``cuda``.
        rounds: number of timed rounds.
        case: name of the example inputs.

    Returns:
        The machine, the device, and ``operations``: name, shape, precision, median ``seconds`` by pass and version, and
        ``left_out``, the reason why a version did not run.
    """
    operations = []
    for precision, dtype in dtypes.items():
        operations += [{"precision": precision} | time_operation(spec, case, dtype, device, rounds) for spec in OPS]
        operations.append({"precision": precision} | _thresholds(case, dtype, device, rounds))
    return {"benchmark": "ops", "machine": fingerprint(), "device": device, "rounds": rounds, "operations": operations}


def time_operation(spec: OpSpec, case: str, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """Return name, shape, median ``seconds`` by pass and version, and ``left_out`` of one operation on one case."""
    example = spec.example_inputs(case, dtype, device)
    left_out = {name: reason for name in spec.fast if (reason := _why_left_out(spec, name, device))}
    versions = {REFERENCE: spec.reference} | {name: spec.load(name) for name in spec.fast if name not in left_out}
    calls = {name: _forward(version, example) for name, version in versions.items()}
    seconds = {"forward": _seconds(calls, device, rounds)}
    if any(output.requires_grad for output in _outputs(spec.reference, example)):
        calls = {name: _forward_and_backward(version, example) for name, version in versions.items()}
        seconds["forward and backward"] = _seconds(calls, device, rounds)
    shape = list(next(iter(example.tensors.values())).shape)
    return {"name": spec.name, "shape": shape, "seconds": seconds, "left_out": left_out}


def threshold_by_topk(magnitude: Tensor, num_selected: int) -> Tensor:
    """Return the K-th largest, ``(N, 1)``, with ``torch.topk`` without sorting."""
    return magnitude.topk(num_selected, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def threshold_by_sorted_topk(magnitude: Tensor, num_selected: int) -> Tensor:
    """Return the K-th largest with ``torch.topk`` and its default, which sorts."""
    return magnitude.topk(num_selected, dim=-1).values[..., -1:]


def threshold_by_kthvalue(magnitude: Tensor, num_selected: int) -> Tensor:
    """Return the K-th largest with ``torch.kthvalue``, which counts from the smallest."""
    return magnitude.kthvalue(magnitude.shape[-1] + 1 - num_selected, dim=-1, keepdim=True).values


def threshold_by_sort(magnitude: Tensor, num_selected: int) -> Tensor:
    """Return the K-th largest by sorting the rows."""
    return magnitude.sort(dim=-1, descending=True).values[..., num_selected - 1 : num_selected]


def threshold_by_bisection(magnitude: Tensor, num_selected: int) -> Tensor:
    """Return the K-th largest bit by bit from the top, like the C++ and Triton operators but in tensor operations."""
    found = torch.zeros_like(magnitude[..., :1])
    # The sign bit is skipped: magnitudes are not negative.
    for bit in reversed(range(8 * magnitude.element_size() - 1)):
        candidate = found | (1 << bit)
        enough = (magnitude >= candidate).sum(-1, keepdim=True) >= num_selected
        found = torch.where(enough, candidate, found)
    return found


THRESHOLDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "topk sorted=False": threshold_by_topk,
    "topk": threshold_by_sorted_topk,
    "kthvalue": threshold_by_kthvalue,
    "sort": threshold_by_sort,
    "bisection": threshold_by_bisection,
}
"""Ways to find the K-th largest of the integers that ``magnitude_bits`` returns; ties are not resolved."""


def _thresholds(case: str, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    spec = next(spec for spec in OPS if spec.name == "topk_select")
    example = spec.example_inputs(case, dtype, device)
    x, num_selected = example.tensors["x"], example.settings["num_selected"]
    # The magnitudes are computed inside the call, because every selection has to compute them.
    calls = {name: _of_magnitudes(find, x, num_selected) for name, find in THRESHOLDS.items()}
    seconds = {"forward": _seconds(calls, device, rounds)}
    return {"name": "K-th largest magnitude, plain PyTorch", "shape": list(x.shape), "seconds": seconds, "left_out": {}}


def _of_magnitudes(find: Callable[[Tensor, int], Tensor], x: Tensor, num_selected: int) -> Callable[[], object]:
    return lambda: find(magnitude_bits(x), num_selected)


def _why_left_out(spec: OpSpec, name: str, device: str) -> str | None:
    if name == "triton" and device == "cpu" and tiles.interpreted():
        return "timings under Triton's interpreter are meaningless"
    return spec.fast[name].why_not(torch.device(device))


def _seconds(calls: Mapping[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    timings = time_in_turns(calls, rounds=rounds, synchronize=synchronizer(torch.device(device)))
    return {name: timing.median for name, timing in timings.items()}


def _forward(version: Operation, example: Example) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            version(**example.tensors, **example.settings)

    return call


def _forward_and_backward(version: Operation, example: Example) -> Callable[[], object]:
    # Detached leaves, so that autograd.grad returns the gradient of every input and accumulates nothing.
    leaves = {name: x.detach().requires_grad_() for name, x in example.tensors.items()}

    def outputs() -> list[Tensor]:
        # Statistics beside an output have no gradient.
        return [part for part in _tensors(version(**leaves, **example.settings)) if part.requires_grad]

    # Gradients of the outputs' own shapes: outputs such as those of combine_rows have the shape of no input.
    upstream = [torch.randn_like(part) for part in outputs()]

    def call() -> None:
        torch.autograd.grad(outputs(), list(leaves.values()), upstream)

    return call


def _outputs(version: Operation, example: Example) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in example.tensors.items()}
    return _tensors(version(**leaves, **example.settings))


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
