"""The weighted sum of the rows of each token, which combines expert outputs: one pass forward and one backward."""

from __future__ import annotations

import torch

from qsparse_moe.kernels import example_rows, native, tiles
from qsparse_moe.kernels.combine_rows.reference import combine_rows
from qsparse_moe.kernels.spec import Example, Implementation, OpSpec

_OP = "qsparse_moe.kernels.combine_rows.op"
CASES = (
    "plain",
    "odd_sizes",
    "one_value",
    "no_rows",
    "strided",
    "gaps",
    "several_tiles",
    "many_features",
    "tiles_of_columns",
    "one_choice",
    "dropped",
)


def example_inputs(case: str, dtype: torch.dtype, device: str) -> Example:
    """Return shuffled rows with one or two choices per token; in ``dropped`` every third has no row."""
    generator = example_rows.seeded(case, "choices")
    shaped_like = {"one_choice": "plain", "dropped": "many_features"}.get(case, case)
    tokens_like = example_rows.values_of(shaped_like, device)
    choices = 1 if case == "one_choice" else 2
    has_row_S = torch.arange(len(tokens_like) * choices) % 3 > 0 if case == "dropped" else None
    slot_N = torch.randperm(len(tokens_like) * choices, generator=generator)
    weights = torch.rand(len(tokens_like), choices, generator=generator)
    if has_row_S is not None:
        slot_N = slot_N[has_row_S[slot_N]]
        # The contract of the operation: a choice without a row has the weight 0.
        weights = weights * has_row_S.view_as(weights)
    row_S = torch.zeros(weights.numel(), dtype=torch.int64).scatter_(0, slot_N, torch.arange(len(slot_N)))
    rows = example_rows.values_of(shaped_like, device, "rows").repeat(choices, 1)[: len(slot_N)]
    if case == "strided":
        # ``repeat`` has made the rows contiguous, and this case is about rows that are not.
        rows = rows.T.contiguous().T
    rows = example_rows.laid_out(case, rows.to(device, dtype))
    tensors = {"rows_ND": rows, "weights_TA": weights.to(device, dtype)}
    return Example(tensors, {"row_TA": row_S.view(weights.shape).to(device), "slot_N": slot_N.to(device)})


SPEC = OpSpec(
    name="combine_rows",
    reference=combine_rows,
    fast={
        "torch": Implementation(f"{_OP}:combine_rows_torch", lambda device: None),
        "native": Implementation(f"{_OP}:combine_rows_native", native.why_not),
        "triton": Implementation(f"{_OP}:combine_rows_triton", tiles.why_not),
    },
    example_inputs=example_inputs,
    cases=CASES,
    budget=2.0,
)
