"""Top-K selection as an autograd operation. N rows, D features, G features per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.kernels import native, tiles
from qsparse_moe.sparsity.topk import split_into_groups, topk_mask

SelectRows = Callable[[Tensor, "int | Tensor", bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TopKSelect:
    """A named implementation of ``select_rows(x, num_selected, with_mask) -> (selected, mask)``.

    ``x`` is ``(*, D)``, and ``num_selected`` is an int or an int64 tensor ``(*)``. ``selected`` is ``x`` with all but
    the K largest magnitudes of every row set to zero. ``mask`` is bool ``(*, D)``; it may be empty if ``with_mask`` is
    False.
    """

    name: str
    select_rows: SelectRows
    why_not: Callable[[torch.device], str | None]


def select_rows_torch(x: Tensor, num_selected: int | Tensor, with_mask: bool) -> tuple[Tensor, Tensor]:
    """Select in stock PyTorch, on any device."""
    mask = topk_mask(x, num_selected)
    # A new tensor: a mask applied in place would change the input of the site.
    return x * mask, mask


def select_rows_native(x: Tensor, num_selected: int | Tensor, with_mask: bool) -> tuple[Tensor, Tensor]:
    """Select with the C++ operators, on a CPU."""
    native.load()
    per_row = num_selected.contiguous() if isinstance(num_selected, Tensor) else None
    return torch.ops.qsparse_moe.topk_select(
        x.contiguous(), 0 if per_row is not None else num_selected, per_row, with_mask
    )


def select_rows_triton(x: Tensor, num_selected: int | Tensor, with_mask: bool) -> tuple[Tensor, Tensor]:
    """Select with the Triton kernels, on an NVIDIA GPU; Triton is imported on the first call."""
    # Imported here, because Triton is an optional dependency.
    from qsparse_moe.kernels.topk_select import triton

    return triton.select_rows_triton(x, num_selected, with_mask)


# 2048 rows of 768 take 2.3 ms in native and 19.7 in torch, in fp32 on one thread of a Zen 5 (lab log of 23 November
# 2026). No time of triton is known; it runs where native does not.
TOPK_SELECTS: tuple[TopKSelect, ...] = (
    TopKSelect("native", select_rows_native, native.why_not),
    TopKSelect("triton", select_rows_triton, tiles.why_not),
    TopKSelect("torch", select_rows_torch, lambda device: None),
)
"""All implementations, fastest first."""


def select(
    x: Tensor, num_selected: int | Tensor, *, rows: SelectRows, group_size: int | None = None, gradient: str = "ste"
) -> Tensor:
    """Compute ``topk_sparsify`` without a rescale, with ``rows``.

    Args:
        x: the rows ``(*, D)``.
        num_selected: K per row, an int or an int64 tensor ``(*)``; with ``group_size`` it is split evenly over
            the groups.
        rows: the implementation.
        group_size: G; the selection is made in every contiguous group of G features.
        gradient: ``ste`` or ``masked``.
    """
    if not torch.is_grad_enabled():
        # An autograd function costs more than the selection of a few rows, as in a step of generation.
        return _without_gradient(x, num_selected, rows, group_size)
    masked = gradient == "masked"
    if group_size is None:
        return _Select.apply(x, num_selected, rows, masked)
    return _Select.apply(*split_into_groups(x, num_selected, group_size), rows, masked).flatten(-2)


def _without_gradient(x: Tensor, num_selected: int | Tensor, rows: SelectRows, group_size: int | None) -> Tensor:
    if group_size is None:
        return rows(x, num_selected, False)[0]
    return rows(*split_into_groups(x, num_selected, group_size), False)[0].flatten(-2)


def select_mask(x: Tensor, num_selected: int | Tensor, *, rows: SelectRows, group_size: int | None = None) -> Tensor:
    """Compute ``topk_mask(x, num_selected, group_size=group_size)`` with ``rows``."""
    if group_size is None:
        return rows(x, num_selected, True)[1]
    return rows(*split_into_groups(x, num_selected, group_size), True)[1].flatten(-2)


def sparsify_torch(x: Tensor, num_selected: int | Tensor, **settings: Any) -> Tensor:
    """Call ``select`` with ``select_rows_torch``; ``settings`` are ``group_size`` and ``gradient``."""
    return select(x, num_selected, rows=select_rows_torch, **settings)


def sparsify_native(x: Tensor, num_selected: int | Tensor, **settings: Any) -> Tensor:
    """Call ``select`` with ``select_rows_native``."""
    return select(x, num_selected, rows=select_rows_native, **settings)


def sparsify_triton(x: Tensor, num_selected: int | Tensor, **settings: Any) -> Tensor:
    """Call ``select`` with ``select_rows_triton``."""
    return select(x, num_selected, rows=select_rows_triton, **settings)


class _Select(torch.autograd.Function):
    """The selection, with the straight-through or the masked gradient; only the latter saves the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_selected: int | Tensor, rows: SelectRows, masked: bool) -> Tensor:
        # The straight-through gradient ignores the mask, so it is neither requested nor saved for it.
        selected, mask = rows(x, num_selected, masked)
        if masked:
            ctx.save_for_backward(mask)
        ctx.masked = masked
        return selected

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (grad * ctx.saved_tensors[0] if ctx.masked else grad), None, None, None
