"""The list of all operations with a fast implementation, over which tests and benchmarks iterate."""

from __future__ import annotations

from qsparse_moe.kernels import (
    block_topk,
    combine_rows,
    expert_products,
    fused_glu,
    int8_quantize,
    site_sums,
    topk_select,
)
from qsparse_moe.kernels.spec import OpSpec

OPS: tuple[OpSpec, ...] = (
    topk_select.SPEC,
    block_topk.SPEC,
    fused_glu.SPEC,
    combine_rows.SPEC,
    expert_products.SPEC,
    int8_quantize.SPEC,
    site_sums.SPEC,
    site_sums.PATTERN_SPEC,
)
