"""A sparse site: the module in front of a weight matrix that selects features of every row. N rows, D features."""

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
from qsparse_moe.nn.shared_selector import SharedSelector
from qsparse_moe.sparsity.quantize import as_format
from qsparse_moe.sparsity.schedule import ste_share
from qsparse_moe.sparsity.selection import THRESHOLD_MASKS
from qsparse_moe.sparsity.stats import Readers, RowSums, Stats, site_stats
from qsparse_moe.sparsity.topk import rescale_selected


class SiteOutput(NamedTuple):
    """The sparse rows, together with the tensors from which the statistics of the site are computed."""

    sparse: Tensor
    """``(*, D)``: the rows that the projection reads, after the rescale."""
    before: Tensor
    """The input rows of the site."""
    selection: Selection


class SparseSite(nn.Module):
    """Selects features of every row, rounds them to the site's number format, and rescales them.

    The site has no parameters. S is one number, or one per expert. It is not part of a checkpoint, and ``set_sparsity``
    changes it at any time. ``ranking`` selects by rank. ``comparison`` selects by threshold and exists only if
    ``model.sparsity.selection`` does so; ``shared`` exists only if the tokens of an expert share their features.
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
        """Index of the layer, for error messages; None outside of a model."""
        self.num_features = num_features
        self.num_experts = num_experts
        self.settings = settings
        self.site_sums = site_sums
        self.format_rows = format_rows
        self.ste_share = ste_share(settings, 0)
        """Weight of the straight-through gradient, from 0 (masked only) to 1; it may be changed between steps."""
        self.hook: SiteHook | None = None
        """Attached by ``nn.hooks.site_hooks``. A site with a hook needs the expert of every row and is never fused."""
        self.ranking = RankingSelector(
            site, num_features, settings, select_rows, num_experts=num_experts, format_rows=format_rows
        )
        compares = settings.selection in THRESHOLD_MASKS
        self.comparison = (
            ThresholdSelector(site, settings, num_experts=num_experts, format_rows=format_rows) if compares else None
        )
        self.shared = (
            SharedSelector(site, num_features, settings, self.ranking, num_experts=num_experts, format_rows=format_rows)
            if settings.selection == "shared"
            else None
        )

    def set_sparsity(self, values: Sequence[float], thresholds: Sequence[float] | None = None) -> None:
        """Use S from the next forward on.

        Args:
            values: S, one per expert.
            thresholds: the calibrated threshold for each S; required for S above 0 if the selection is ``threshold``.
        """
        self.ranking.set_sparsity(values)
        if self.comparison is not None:
            self.comparison.set_sparsity(values, thresholds)

    @property
    def number_format(self) -> ActivationFormat:
        """The number format of the activations that leave the site."""
        return self.ranking.number_format

    @property
    def selector(self) -> RankingSelector | ThresholdSelector | SharedSelector:
        """The selector in use: the ranking, unless the settings name another one and no hook requires exact top-K."""
        other = self.comparison or self.shared
        if other is None or (self.hook is not None and self.hook.ranks):
            return self.ranking
        return other

    @property
    def gathers(self) -> bool:
        """True if a product behind the site can read the shared features alone, because nothing needs whole rows."""
        wanted = self.shared is not None and self.settings.shared.products == "gathered"
        return wanted and self.hook is None and not self.settings.debug

    @property
    def is_uniform(self) -> bool:
        """True if all experts select alike and no hook is attached, so that the expert of a row is not needed."""
        return self.selector.is_uniform and self.hook is None

    @property
    def can_fuse(self) -> bool:
        """True if the selection can be fused into the operation that computes the rows.

        It can if the site does exact top-K and, at most, divides by the norm of the selected features.
        """
        # The fused pass knows neither the norm before the selection, which preserve needs, nor a hook that reads rows.
        # It has no number format, whose mask comes from the unrounded row, and no blend of the two gradients.
        return (
            self.settings.selection == "topk"
            and self.number_format == "none"
            and self.settings.rescale != "preserve"
            and self.ste_share in (0.0, 1.0)
            and not (self.ranking.selects_all or self.settings.debug or self.hook is not None)
        )

    def forward(
        self, x: Tensor, expert_ids_N: Tensor | None = None, *, with_stats: bool, readers: Readers | None = None
    ) -> tuple[Tensor, Stats]:
        """Return the sparse rows and, if requested, the statistics of ``site_stats``.

        Args:
            x: the rows ``(*, D)``.
            expert_ids_N: the expert of every row of ``x`` ``(N, D)``; required if S differs between experts.
            with_stats: if False, the statistics are empty, but for the energies that a shared selection measures.
            readers: which expert reads which row, for the statistics. None: each row is read once, and ``(B, S, D)``
                are B sequences.

        Raises:
            TrainingDiverged: a row contains a NaN; checked only if ``model.sparsity.debug`` is true.
        """
        output = self.select(x, expert_ids_N)
        stats = self.sums(output, readers) if with_stats else {}
        return output.sparse, stats if self.shared is None else stats | self.shared.measured(x, expert_ids_N)

    def select(self, x: Tensor, expert_ids_N: Tensor | None = None) -> SiteOutput:
        """Return the sparse rows and the input of ``sums``: the first half of ``forward``."""
        if self.settings.debug:
            self._check_nan(x)
        output = self._select(x, expert_ids_N)
        if self.hook is None:
            return output
        # A view, because at S = 0 the sparse rows are the input itself: a gradient hook on them must not fire for the
        # other readers of the input.
        shown = output.sparse.view_as(output.sparse)
        return output._replace(sparse=self.hook(x, expert_ids_N, shown))

    def _select(self, x: Tensor, expert_ids_N: Tensor | None) -> SiteOutput:
        # S = 0 leaves the row as it is except for its number format: it is not rescaled either.
        if self.selector.selects_all:
            rounded = self.format_rows(x, self.number_format)
            return SiteOutput(rounded, x, Selection(rounded, self.num_features))
        # A method and not a call of the module, which DeepSpeed hooks: with ZeRO-3 and selective recomputation, its
        # prefetching gathered parameters at another point of the recomputed layer than in the forward pass and failed.
        selection = self.selector.select(x, expert_ids_N, ste_share=self.ste_share)
        return SiteOutput(rescale_selected(selection.rows, x, self.settings.rescale), x, selection)

    def sums(self, output: SiteOutput, readers: Readers | None) -> Stats:
        """Return the statistics: the second half of ``forward``, for callers that know ``readers`` only afterwards."""
        # Before the rescale, which would change the energy that the selection leaves.
        rows = output.selection.rows
        sums = self.site_sums.row_sums(output.before.flatten(0, -2), rows.flatten(0, -2))
        return self.stats_of(sums, rows, output.selection.num_selected, readers)

    def stats_of(self, sums: RowSums, after: Tensor, num_selected: int | Tensor, readers: Readers | None) -> Stats:
        """Return the statistics of rows whose sums are already known.

        Args:
            sums: the sums over the features of each row.
            after: ``(*, D)``, the rows after the selection and before any rescale.
            num_selected: number of selected features: one for all rows, or one per row.
            readers: as in ``forward``.
        """
        if readers is None:
            readers = Readers(continues_R=_within_sequences(after) if after.dim() == 3 else None)
        pattern = self.site_sums.row_pattern(after.flatten(0, -2), readers)
        count = num_selected.flatten() if isinstance(num_selected, Tensor) else num_selected
        return site_stats(sums, pattern, count, readers)

    def _check_nan(self, x: Tensor) -> None:
        broken = x.detach().isnan().any(-1).flatten()
        # This waits for the device, so the check runs only with model.sparsity.debug.
        if not broken.any():
            return
        where = f"layer {self.layer}, {self.site}" if self.layer is not None else self.site
        raise TrainingDiverged(
            f"{where}: NaN in {int(broken.sum())} of {len(broken)} rows, first in row {int(broken.nonzero()[0])} "
            "(model.sparsity.debug is true). It arose before this site: check the weights there, lower "
            "training.learning_rate, or resume from the last checkpoint"
        )


def _within_sequences(x_BSD: Tensor) -> Tensor:
    """Return ``(B * S,)`` bool: true for every token except the last of each sequence."""
    continues_BS = torch.ones(x_BSD.shape[:2], dtype=torch.bool, device=x_BSD.device)
    continues_BS[:, -1] = False
    return continues_BS.flatten()
