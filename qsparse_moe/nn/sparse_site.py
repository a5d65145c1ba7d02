"""One place of the model where a row is made sparse before a weight matrix reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import Site, SparsityConfig
from qsparse_moe.config.shapes import site_format
from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.kernels.site_sums.op import TORCH, SiteSums
from qsparse_moe.kernels.topk_select.op import SelectRows, select
from qsparse_moe.sparsity.plan import site_num_kept, site_threshold
from qsparse_moe.sparsity.quantize import as_format
from qsparse_moe.sparsity.schedule import ste_share
from qsparse_moe.sparsity.selection import THRESHOLD_MASKS
from qsparse_moe.sparsity.stats import Readers, RowSums, Stats, site_stats
from qsparse_moe.sparsity.topk import apply_mask, rescale_kept

SiteHook = Callable[[Tensor, "Tensor | None", Tensor], Tensor]
"""Given the rows, their experts and what the site made of them; what it returns goes on in place of the last."""


class Selected(NamedTuple):
    """What a site made of rows."""

    sparse: Tensor
    """What the projection reads."""
    before: Tensor
    after: Tensor
    """The sparse rows before any rescale."""
    chosen: int | Tensor
    """How many features of each row: K, one a row, or the mask to count in."""


class SparseSite(nn.Module):
    """Keeps some features of every row and rounds them to the site's number format.

    Which ones is decided by the row before it is rounded, and by one number or one an expert: K where the selection
    ranks, a bound where it compares. The site has no parameters; the numbers are changed at any time by
    ``set_sparsity`` and are no part of a checkpoint.
    """

    num_kept_E: Tensor
    threshold_bits_E: Tensor

    def __init__(
        self,
        site: Site,
        num_features: int,
        settings: SparsityConfig,
        select_rows: SelectRows,
        *,
        num_experts: int = 1,
        site_sums: SiteSums = TORCH,
    ) -> None:
        super().__init__()
        self.site = site
        self.layer: int | None = None
        """Number of the layer that it stands in, for messages; None outside a model."""
        self.num_features = num_features
        self.settings = settings
        self.group_size = settings.group_size if settings.selection == "block" else None
        self.number_format = site_format(settings, site)
        self.select_rows = select_rows
        self.site_sums = site_sums
        self.ste_share = ste_share(settings, 0)
        """Share of the straight-through gradient, from 0 (masked) to 1; may be changed between steps."""
        self.hook: SiteHook | None = None
        """While there is one, rows are ranked, each names its expert, and no other pass selects for this site."""
        self.register_buffer("num_kept_E", torch.full((num_experts,), num_features), persistent=False)
        # As integers, because a cast of the model to bf16 would round a floating-point buffer.
        self.register_buffer("threshold_bits_E", torch.zeros(num_experts, dtype=torch.int32), persistent=False)
        self.set_sparsity([0.0] * num_experts)

    def set_sparsity(self, values: Sequence[float], thresholds: Sequence[float] | None = None) -> None:
        """Take over S, one value or one an expert; every forward from here on uses it.

        Args:
            values: S.
            thresholds: beside each S its magnitude; needed where the selection is ``threshold`` and S above 0.
        """
        kept = [site_num_kept(self.settings, value, self.num_features) for value in values]
        self.num_kept_E.copy_(torch.tensor(kept))
        self.uniform_num_kept = kept[0] if len(set(kept)) == 1 else None
        self._is_uniform, self._keeps_all = len(set(kept)) == 1, min(kept) == self.num_features
        if self.settings.selection in THRESHOLD_MASKS:
            pairs = zip(values, thresholds or [math.nan] * len(values), strict=True)
            bounds = [site_threshold(self.settings, value, threshold) for value, threshold in pairs]
            assert not any(math.isnan(bound) for bound in bounds), "selection by threshold needs thresholds"
            self.threshold_bits_E.copy_(torch.tensor(bounds, dtype=torch.float32).view(torch.int32))
            self._is_uniform, self._keeps_all = len(set(bounds)) == 1, max(bounds) == -math.inf

    @property
    def is_uniform(self) -> bool:
        """Whether one number holds for every row, so that a row need not name its expert."""
        return self._is_uniform and self.hook is None

    @property
    def only_ranks(self) -> bool:
        """Whether all that happens here is exact top-K of the rows as they are, and at most a division by a norm of
        what is kept: what a pass that makes the rows can do as it goes."""
        return (
            self.settings.selection == "topk"
            and self.number_format == "none"
            and self.settings.rescale != "preserve"
            and self.ste_share in (0.0, 1.0)
            and not (self._keeps_all or self.settings.debug or self.hook is not None)
        )

    def forward(
        self, x: Tensor, expert_ids_N: Tensor | None = None, *, with_stats: bool, readers: Readers | None = None
    ) -> tuple[Tensor, Stats]:
        """The sparse rows and, if asked for, the sums of ``site_stats``.

        Args:
            x: ``(*, D)``.
            expert_ids_N: the expert of every row of ``x`` ``(N, D)``; needed where the numbers differ between experts.
            with_stats: False returns no sums.
            readers: which expert reads which row, for the sums; None: each row once, ``(B, S, D)`` as B sequences.

        Raises:
            TrainingDiverged: under ``model.sparsity.debug``, if a row holds a NaN.
        """
        selected = self.choose(x, expert_ids_N)
        return selected.sparse, self.sums(selected, readers) if with_stats else {}

    def choose(self, x: Tensor, expert_ids_N: Tensor | None = None) -> Selected:
        """The first half of ``forward``: the sparse rows, and what ``sums`` needs of them."""
        if self.settings.debug:
            self._check_nan(x)
        selected = self._selected(x, expert_ids_N)
        if self.hook is None:
            return selected
        # A view: where nothing is dropped the sparse rows are the rows themselves, which others may read too.
        shown = selected.sparse.view_as(selected.sparse)
        return selected._replace(sparse=self.hook(x, expert_ids_N, shown))

    def _selected(self, x: Tensor, expert_ids_N: Tensor | None) -> Selected:
        if self._keeps_all:
            rounded = as_format(x, self.number_format)
            return Selected(rounded, x, rounded, self.num_features)
        kept, chosen = self._select(x, expert_ids_N)
        return Selected(rescale_kept(kept, x, self.settings.rescale), x, kept, chosen)

    def sums(self, selected: Selected, readers: Readers | None) -> Stats:
        """The second half: ``readers`` may be known only after what was chosen has been used."""
        sums = self.site_sums.row_sums(selected.before.flatten(0, -2), selected.after.flatten(0, -2))
        return self.stats_of(sums, selected.after, _counts(selected.chosen), readers)

    def stats_of(self, sums: RowSums, after: Tensor, num_kept: int | Tensor, readers: Readers | None) -> Stats:
        """The sums of ``site_stats`` of rows whose own sums are there already.

        Args:
            sums: of the rows.
            after: ``(*, D)``, the rows after the selection and before any rescale.
            num_kept: K, an int or one a row.
            readers: as in ``forward``.
        """
        if readers is None:
            readers = Readers(continues_R=_within_sequences(after) if after.dim() == 3 else None)
        pattern = self.site_sums.row_pattern(after.flatten(0, -2), readers)
        return site_stats(sums, pattern, num_kept.flatten() if isinstance(num_kept, Tensor) else num_kept, readers)

    def _check_nan(self, x: Tensor) -> None:
        broken = x.detach().isnan().any(-1).flatten()
        if not broken.any():
            return
        where = f"layer {self.layer}, {self.site}" if self.layer is not None else self.site
        raise TrainingDiverged(
            f"{where}: NaN in {int(broken.sum())} of {len(broken)} rows, first in row {int(broken.nonzero()[0])}, seen "
            "because model.sparsity.debug is true. What stands before this site made it: look at its weights, lower "
            "training.learning_rate, or resume from the last checkpoint"
        )

    def _select(self, x: Tensor, expert_ids_N: Tensor | None) -> tuple[Tensor, int | Tensor]:
        """What is kept of the rows, and how many of each: K, or the mask to count in."""
        if self._compares:
            mask = THRESHOLD_MASKS[self.settings.selection](x, self._threshold_of_rows(expert_ids_N))
            return apply_mask(as_format(x, self.number_format), mask, gradient=self.ste_share), mask
        wanted = self.num_kept_of_rows(expert_ids_N)
        if self.number_format == "none" and self.ste_share in (0.0, 1.0):
            gradient = "ste" if self.ste_share else "masked"
            return select(x, wanted, rows=self.select_rows, group_size=self.group_size, gradient=gradient), wanted
        mask = topk_rows_mask(x.detach(), wanted, self.select_rows, self.group_size)
        return apply_mask(as_format(x, self.number_format), mask, gradient=self.ste_share), wanted

    @property
    def _compares(self) -> bool:
        # Thresholds are calibrated on what exact top-K leaves of the sites before.
        return self.settings.selection in THRESHOLD_MASKS and self.hook is None

    def num_kept_of_rows(self, expert_ids_N: Tensor | None) -> int | Tensor:
        """K of every row ``(N,)``, or the one that holds for all of them."""
        if self.uniform_num_kept is not None:
            return self.uniform_num_kept
        assert expert_ids_N is not None, "K differs between experts, so every row must name its expert"
        return self.num_kept_E[expert_ids_N]

    def _threshold_of_rows(self, expert_ids_N: Tensor | None) -> Tensor:
        """``(1,)`` or one a row ``(N, 1)``, fp32: not a number, which torch would round to the dtype of the rows."""
        threshold_E = self.threshold_bits_E.view(torch.float32)
        if self._is_uniform:
            return threshold_E[:1]
        assert expert_ids_N is not None, "the bound differs between experts, so every row must name its expert"
        return threshold_E[expert_ids_N, None]


def _counts(chosen: int | Tensor) -> int | Tensor:
    return chosen.sum(-1) if isinstance(chosen, Tensor) and chosen.dtype == torch.bool else chosen


def _within_sequences(x_BSD: Tensor) -> Tensor:
    """``(B * S,)`` bool: every token but the last of each sequence."""
    continues_BS = torch.ones(x_BSD.shape[:2], dtype=torch.bool, device=x_BSD.device)
    continues_BS[:, -1] = False
    return continues_BS.flatten()


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
