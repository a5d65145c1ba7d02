"""Gated activation, top-K selection, and row sums, fused into one pass forward and one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.kernels import example_rows, native, tiles
from qsparse_moe.kernels.fused_glu import reference
from qsparse_moe.kernels.spec import Example, Implementation, OpSpec
from qsparse_moe.sparsity.topk import topk_mask

_OP = "qsparse_moe.kernels.fused_glu.op"
_ROWS = tuple(case for case in example_rows.SHAPES if case != "one_value")
CASES = tuple(f"{activation} {case}" for activation in reference.ACTIVATIONS for case in (*_ROWS, "masked_gradient"))


def example_inputs(case: str, dtype: torch.dtype, device: str) -> Example:
    """Return ``gate`` and ``up`` such that the K-th and the next activation of a row are equal or differ by 1.5 times.

    Every precision then selects the same features, so results can differ only by rounding.
    """
    activation, _, rows = case.rpartition(" ")
    activation = activation or "relu2glu"
    rows, gradient = ("k_per_row", "masked") if rows == "masked_gradient" else (rows, "ste")
    gate, up = (example_rows.values_of(rows, device, salt) for salt in ("gate", "up"))
    if rows == "ties":
        gate, up = _few_pairs(gate.shape)
    num_selected = example_rows.num_selected_of(rows, gate.shape[0], gate.shape[1], device)
    if rows not in ("ties", "large"):
        chosen = topk_mask(reference.ACTIVATIONS[activation](gate, up), num_selected)
        # Doubled in up, because every activation is linear in it: the selected values are then clear of the others.
        up = torch.where(chosen, 2 * up, up)
    # In the case "gaps" only gate has gaps between its rows, so that the strides of gate and up differ.
    tensors = {"gate_NF": example_rows.laid_out(rows, gate.to(device, dtype)), "up_NF": up.to(device, dtype)}
    return Example(tensors, {"num_selected": num_selected, "activation": activation, "gradient": gradient})


def _few_pairs(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return gate and up drawn from four pairs whose activations are far apart, so that ties are frequent."""
    dealt = torch.randint(0, 4, shape, generator=example_rows.seeded("ties", "pairs"))
    return torch.tensor([0.5, 1.0, -1.0, 2.0])[dealt], torch.tensor([1.0, -2.0, 1.0, 3.0])[dealt]


SPEC = OpSpec(
    name="fused_glu",
    reference=reference.fused_glu,
    fast={
        "native": Implementation(f"{_OP}:fused_glu_native", native.why_not),
        "triton": Implementation(f"{_OP}:fused_glu_triton", tiles.why_not),
    },
    example_inputs=example_inputs,
    cases=CASES,
    budget=2.0,
)
