"""One place of the model where a row is made sparse before a weight matrix reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import Site, SparsityConfig
from qsparse_moe.config.shapes import site_format
from qsparse_moe.kernels.topk_select.op import SelectRows, select
from qsparse_moe.sparsity.plan import site_num_kept
from qsparse_moe.sparsity.quantize import as_format
from qsparse_moe.sparsity.stats import Stats, site_stats
from qsparse_moe.sparsity.topk import apply_mask, rescale_kept


class SparseSite(nn.Module):
    """Keeps K features of every row, K being one number or one an expert, and rounds them to the site's number format.

    The selection looks at the row before it is rounded. It has no parameters; K is changed at any time by
    ``set_sparsity`` and is no part of a checkpoint.
    """

    num_kept_E: Tensor

    def __init__(
        self, site: Site, num_features: int, settings: SparsityConfig, select_rows: SelectRows, *, num_experts: int = 1
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.settings = settings
        self.group_size = settings.group_size if settings.selection == "block" else None
        self.number_format = site_format(settings, site)
        self.select_rows = select_rows
        self.uniform_num_kept: int | None = num_features
        self.register_buffer("num_kept_E", torch.full((num_experts,), num_features), persistent=False)

    def set_sparsity(self, values: Sequence[float]) -> None:
        """Take over S, one value or one an expert; every forward from here on uses it."""
        kept = [site_num_kept(self.settings, value, self.num_features) for value in values]
        self.uniform_num_kept = kept[0] if len(set(kept)) == 1 else None
        self.num_kept_E.copy_(torch.tensor(kept))

    def forward(self, x: Tensor, expert_ids_N: Tensor | None = None, *, with_stats: bool) -> tuple[Tensor, Stats]:
        """The sparse rows and, if asked for, the sums of ``site_stats``.

        Args:
            x: ``(*, D)``.
            expert_ids_N: the expert of every row of ``x`` ``(N, D)``; needed where K differs between experts.
            with_stats: False returns no sums.
        """
        if self.uniform_num_kept == self.num_features:
            rounded = as_format(x, self.number_format)
            return rounded, site_stats(x, rounded, self.num_features) if with_stats else {}
        wanted = self._num_kept_of_rows(expert_ids_N)
        kept = self._select(x, wanted)
        stats = site_stats(x, kept, wanted) if with_stats else {}
        return rescale_kept(kept, x, self.settings.rescale), stats

    def _select(self, x: Tensor, wanted: int | Tensor) -> Tensor:
        gradient = self.settings.gradient
        if self.number_format == "none":
            return select(x, wanted, rows=self.select_rows, group_size=self.group_size, gradient=gradient)
        mask = topk_rows_mask(x.detach(), wanted, self.select_rows, self.group_size)
        return apply_mask(as_format(x, self.number_format), mask, gradient=gradient)

    def _num_kept_of_rows(self, expert_ids_N: Tensor | None) -> int | Tensor:
        if self.uniform_num_kept is not None:
            return self.uniform_num_kept
        assert expert_ids_N is not None, "K differs between experts, so every row must name its expert"
        return self.num_kept_E[expert_ids_N]


def topk_rows_mask(x: Tensor, num_kept: int | Tensor, rows: SelectRows, group_size: int | None) -> Tensor:
    """``topk_mask(x, num_kept, group_size=group_size)``, computed by ``rows``."""
    if group_size is None:
        return rows(x, num_kept, True)[1]
    num_groups = x.shape[-1] // group_size
    per_group = num_kept // num_groups
    groups = x.unflatten(-1, (num_groups, group_size))
    if isinstance(per_group, Tensor):
        per_group = per_group[..., None].expand(groups.shape[:-1])
    return rows(groups, per_group, True)[1].flatten(-2)
