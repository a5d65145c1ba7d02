"""A sparse site: a place in front of a weight matrix where some features of every row are kept. N rows, D features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import ActivationFormat, Site, SparsityConfig
from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.kernels.int8_quantize.op import FormatRows
from qsparse_moe.kernels.site_sums.op import TORCH, SiteSums
from qsparse_moe.kernels.topk_select.op import SelectRows
from qsparse_moe.nn.hooks import SiteHook
from qsparse_moe.nn.selectors import RankingSelector, Selection, ThresholdSelector
from qsparse_moe.sparsity.quantize import as_format
from qsparse_moe.sparsity.schedule import ste_share
from qsparse_moe.sparsity.selection import THRESHOLD_MASKS
from qsparse_moe.sparsity.stats import Readers, RowSums, Stats, site_stats
from qsparse_moe.sparsity.topk import rescale_kept


class SiteOutput(NamedTuple):
    """The result of a site for some rows, with what its statistics need."""

    sparse: Tensor
    """``(*, D)``: what the projection reads, after the rescale."""
    before: Tensor
    """The rows that were given to the site."""
    selection: Selection


class SparseSite(nn.Module):
    """Selects features of every row, rounds them to the site's number format, and rescales them.

    The site has no parameters. S is one number, or one per expert; ``set_sparsity`` changes it at any time, and it is
    not part of a checkpoint. ``ranking`` selects by rank, ``comparison`` by a threshold under selections that have one.
    """

    def __init__(
        self,
        site: Site,
        num_features: int,
        settings: SparsityConfig,
        select_rows: SelectRows,
        *,
        num_experts: int = 1,
        site_sums: SiteSums = TORCH,
        format_rows: FormatRows = as_format,
    ) -> None:
        super().__init__()
        self.site = site
        self.layer: int | None = None
        """Number of the layer, for messages; None outside a model."""
        self.num_features = num_features
        self.num_experts = num_experts
        self.settings = settings
        self.site_sums = site_sums
        self.format_rows = format_rows
        self.ste_share = ste_share(settings, 0)
        """Share of the straight-through gradient, from 0 (masked) to 1; may be changed between steps."""
        self.hook: SiteHook | None = None
        """Attached by ``nn.hooks.site_hooks``. With a hook, every row names its expert and no fused pass runs."""
        self.ranking = RankingSelector(
            site, num_features, settings, select_rows, num_experts=num_experts, format_rows=format_rows
        )
        compares = settings.selection in THRESHOLD_MASKS
        self.comparison = (
            ThresholdSelector(site, settings, num_experts=num_experts, format_rows=format_rows) if compares else None
        )

    def set_sparsity(self, values: Sequence[float], thresholds: Sequence[float] | None = None) -> None:
        """Use S from the next forward on.

        Args:
            values: S, one per expert.
            thresholds: the magnitude that belongs to each S; needed if the selection is ``threshold`` and S above 0.
        """
        self.ranking.set_sparsity(values)
        if self.comparison is not None:
            self.comparison.set_sparsity(values, thresholds)

    @property
    def number_format(self) -> ActivationFormat:
        """The number format of the activations that leave the site."""
        return self.ranking.number_format

    @property
    def selector(self) -> RankingSelector | ThresholdSelector:
        """The selector in use: the comparison, unless an attached hook asks for exact top-K."""
        if self.comparison is None or (self.hook is not None and self.hook.ranks):
            return self.ranking
        return self.comparison

    @property
    def is_uniform(self) -> bool:
        """Whether one number holds for every row, so that a row need not name its expert."""
        return self.selector.is_uniform and self.hook is None

    @property
    def can_fuse(self) -> bool:
        """Whether a pass that computes the rows can select in them as it goes.

        It can if the site does nothing but exact top-K and, at most, a division by a norm of the selected features.
        """
        return (
            self.settings.selection == "topk"
            and self.number_format == "none"
            and self.settings.rescale != "preserve"
            and self.ste_share in (0.0, 1.0)
            and not (self.ranking.keeps_all or self.settings.debug or self.hook is not None)
        )

    def forward(
        self, x: Tensor, expert_ids_N: Tensor | None = None, *, with_stats: bool, readers: Readers | None = None
    ) -> tuple[Tensor, Stats]:
        """Return the sparse rows and, if asked for, the sums of ``site_stats``.

        Args:
            x: ``(*, D)``.
            expert_ids_N: the expert of every row of ``x`` ``(N, D)``; needed where the numbers differ between experts.
            with_stats: False returns no sums.
            readers: which expert reads which row, for the sums; None: each row once, ``(B, S, D)`` as B sequences.

        Raises:
            TrainingDiverged: under ``model.sparsity.debug``, if a row holds a NaN.
        """
        output = self.select(x, expert_ids_N)
        return output.sparse, self.sums(output, readers) if with_stats else {}

    def select(self, x: Tensor, expert_ids_N: Tensor | None = None) -> SiteOutput:
        """Return the sparse rows, and what ``sums`` needs: the first half of ``forward``."""
        if self.settings.debug:
            self._check_nan(x)
        output = self._select(x, expert_ids_N)
        if self.hook is None:
            return output
        # A view: where nothing is dropped the sparse rows are the rows themselves, which others may read too.
        shown = output.sparse.view_as(output.sparse)
        return output._replace(sparse=self.hook(x, expert_ids_N, shown))

    def _select(self, x: Tensor, expert_ids_N: Tensor | None) -> SiteOutput:
        if self.selector.keeps_all:
            rounded = self.format_rows(x, self.number_format)
            return SiteOutput(rounded, x, Selection(rounded, self.num_features))
        selection = self.selector.select(x, expert_ids_N, ste_share=self.ste_share)
        return SiteOutput(rescale_kept(selection.rows, x, self.settings.rescale), x, selection)

    def sums(self, output: SiteOutput, readers: Readers | None) -> Stats:
        """Return the statistics: the second half of ``forward``, for callers that learn ``readers`` only later."""
        rows = output.selection.rows
        sums = self.site_sums.row_sums(output.before.flatten(0, -2), rows.flatten(0, -2))
        return self.stats_of(sums, rows, output.selection.num_selected, readers)

    def stats_of(self, sums: RowSums, after: Tensor, num_selected: int | Tensor, readers: Readers | None) -> Stats:
        """Return the sums of ``site_stats`` of rows whose own sums are known already.

        Args:
            sums: of the rows.
            after: ``(*, D)``, the rows after the selection and before any rescale.
            num_selected: K, an int or one per row.
            readers: as in ``forward``.
        """
        if readers is None:
            readers = Readers(continues_R=_within_sequences(after) if after.dim() == 3 else None)
        pattern = self.site_sums.row_pattern(after.flatten(0, -2), readers)
        count = num_selected.flatten() if isinstance(num_selected, Tensor) else num_selected
        return site_stats(sums, pattern, count, readers)

    def _check_nan(self, x: Tensor) -> None:
        broken = x.detach().isnan().any(-1).flatten()
        if not broken.any():
            return
        where = f"layer {self.layer}, {self.site}" if self.layer is not None else self.site
        raise TrainingDiverged(
            f"{where}: NaN in {int(broken.sum())} of {len(broken)} rows, first in row {int(broken.nonzero()[0])} "
            "(model.sparsity.debug is true). It was computed before this site: look at the weights there, lower "
            "training.learning_rate, or resume from the last checkpoint"
        )


def _within_sequences(x_BSD: Tensor) -> Tensor:
    """Return ``(B * S,)`` bool: true for every token but the last of each sequence."""
    continues_BS = torch.ones(x_BSD.shape[:2], dtype=torch.bool, device=x_BSD.device)
    continues_BS[:, -1] = False
    return continues_BS.flatten()
