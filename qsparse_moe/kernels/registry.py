"""Every operation that has a fast version. Tests and benchmarks iterate over this list."""

from __future__ import annotations

from qsparse_moe.kernels import block_topk, topk_select
from qsparse_moe.kernels.spec import OpSpec

OPS: tuple[OpSpec, ...] = (topk_select.SPEC, block_topk.SPEC)
