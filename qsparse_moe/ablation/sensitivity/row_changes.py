"""The change of the output of a site for another K, along a gradient. N rows, D features, X values of K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.quantize import as_format


def row_order(site: SparseSite, x_ND: Tensor) -> Tensor:
    """Return the features of every row and group in descending order of magnitude, ``(N, groups, features)``."""
    group = site.ranking.group_size or site.num_features
    # Stable, so that ties go to the lower index as in the selection itself.
    return x_ND.unflatten(-1, (-1, group)).abs().sort(dim=-1, descending=True, stable=True).indices


def row_changes(
    site: SparseSite,
    x_ND: Tensor,
    sparse_ND: Tensor,
    grad_ND: Tensor,
    counts: Sequence[int],
    order_NGF: Tensor | None = None,
) -> Tensor:
    """Return ``g.(y(K) - y)`` of every row for each K of ``counts``, ``(N, X)``, in at least fp32.

    Args:
        site: the site whose selection, number format, and rescaling turn x into y.
        x_ND: the input of the site.
        sparse_ND: the current y.
        grad_ND: g, the gradient with respect to ``sparse_ND``.
        counts: values of K, as returned by ``site_num_selected``.
        order_NGF: as returned by ``row_order``; None: it is computed.
    """
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    # The selection ranks x itself, but the matrix reads x in the number format of the site.
    rounded_ND, grad_ND = as_format(x_ND, site.number_format).to(wide), grad_ND.to(wide)
    now_N1 = (grad_ND * sparse_ND.to(wide)).sum(-1, keepdim=True)
    order_NGF = row_order(site, x_ND) if order_NGF is None else order_NGF
    along_NX = _read(grad_ND * rounded_ND, order_NGF, counts)
    # Without rescaling the change is linear in the sums, and no energies are needed.
    if site.settings.rescale == "none":
        return along_NX - now_N1
    energy_NX = _read(rounded_ND.square(), order_NGF, counts)
    # unit scales a row to norm 1, preserve to the norm of its input.
    target_N1 = x_ND.to(wide).square().sum(-1, keepdim=True) if site.settings.rescale == "preserve" else 1.0
    # SparseSite does not rescale a row of which it selects every feature, so S = 0 must not be rescaled here either.
    is_whole_X = torch.tensor([count == site.num_features for count in counts], device=x_ND.device)
    # A row of zeros has no energy to scale to: 0 / 0 becomes 0.
    scale_NX = (target_N1 / energy_NX).sqrt().nan_to_num(0.0, 0.0, 0.0)
    return torch.where(is_whole_X, along_NX, along_NX * scale_NX) - now_N1


def _read(terms_ND: Tensor, order_NGF: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the sums of ``terms`` over the features that each K selects, ``(N, X)``, an equal part from each group."""
    num_groups, group = order_NGF.shape[-2:]
    running_NGF = terms_ND.unflatten(-1, (num_groups, group)).gather(-1, order_NGF).cumsum(-1)
    last_X = torch.tensor([count // num_groups - 1 for count in counts], device=terms_ND.device)
    return running_NGF.index_select(-1, last_X).sum(-2)
