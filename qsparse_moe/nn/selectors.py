"""The two ways in which a sparse site selects features of a row: by rank, or by comparison with a threshold.

Both hold one number per expert (a single one at a site without experts), select by the unrounded row, and round the
selected features to the number format of the site. N rows, D features, E experts, G features per group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import Site, SparsityConfig
from qsparse_moe.config.shapes import site_format
from qsparse_moe.kernels.int8_quantize.op import FormatRows
from qsparse_moe.kernels.topk_select.op import SelectRows, select, select_mask
from qsparse_moe.sparsity.plan import site_num_selected, site_threshold
from qsparse_moe.sparsity.selection import THRESHOLD_MASKS
from qsparse_moe.sparsity.topk import apply_mask


class Selection(NamedTuple):
    """The rows after a selection, and the number of selected features of each."""

    rows: Tensor
    """``(*, D)``: the selected features, rounded to the number format, before any rescale."""
    chosen: int | Tensor
    """K as an int for all rows or as a tensor with one entry per row, or the bool mask ``(*, D)`` to count in."""

    @property
    def num_selected(self) -> int | Tensor:
        """Number of selected features: one for all rows, or one per row."""
        # Counted only when statistics are wanted: a mask costs a pass over memory to count.
        is_mask = isinstance(self.chosen, Tensor) and self.chosen.dtype == torch.bool
        return self.chosen.sum(-1) if is_mask else self.chosen  # type: ignore[union-attr]


class RankingSelector(nn.Module):
    """Selects the K largest magnitudes of every row, or of each contiguous group of it: ``topk`` and ``block``."""

    num_selected_E: Tensor

    def __init__(
        self,
        site: Site,
        num_features: int,
        settings: SparsityConfig,
        select_rows: SelectRows,
        *,
        num_experts: int,
        format_rows: FormatRows,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.settings = settings
        self.group_size = settings.group_size if settings.selection == "block" else None
        self.number_format = site_format(settings, site)
        self.select_rows = select_rows
        self.format_rows = format_rows
        # Not persistent: K follows from the plan, which is not part of a checkpoint.
        self.register_buffer("num_selected_E", torch.empty(num_experts, dtype=torch.int64), persistent=False)
        self.uniform_num_selected: int | None
        """K if all experts have the same; None if they differ."""
        self.largest_num_selected: int
        """The largest K of any expert."""
        self.selects_all: bool
        self.set_sparsity([0.0] * num_experts)

    def set_sparsity(self, values: Sequence[float]) -> None:
        """Use S from now on, one value per expert."""
        counts = [site_num_selected(self.settings, value, self.num_features) for value in values]
        # Copied into the buffer and not assigned, so that it stays on the device of the model.
        self.num_selected_E.copy_(torch.tensor(counts))
        self.uniform_num_selected = counts[0] if len(set(counts)) == 1 else None
        self.largest_num_selected = max(counts)
        self.selects_all = min(counts) == self.num_features

    @property
    def is_uniform(self) -> bool:
        """True if all experts have the same K, so that the expert of a row is not needed."""
        return self.uniform_num_selected is not None

    def num_selected_of_rows(self, expert_ids_N: Tensor | None) -> int | Tensor:
        """Return K of every row ``(N,)``, or one int if all experts have the same K."""
        if self.uniform_num_selected is not None:
            return self.uniform_num_selected
        assert expert_ids_N is not None, "K differs between experts, so the expert of every row is required"
        return self.num_selected_E[expert_ids_N]

    def select(self, x: Tensor, expert_ids_N: Tensor | None, *, ste_share: float) -> Selection:
        """Select features of the rows.

        Args:
            x: the rows ``(*, D)``.
            expert_ids_N: the expert of every row; required if K differs between experts.
            ste_share: weight of the straight-through gradient, from 0 (masked gradient only) to 1.
        """
        num_selected = self.num_selected_of_rows(expert_ids_N)
        if self.number_format == "none" and ste_share in (0.0, 1.0):
            gradient = "ste" if ste_share else "masked"
            rows = select(x, num_selected, rows=self.select_rows, group_size=self.group_size, gradient=gradient)
            return Selection(rows, num_selected)
        # A format or a blended gradient needs the mask itself, and the mask comes from the unrounded magnitudes.
        mask = select_mask(x.detach(), num_selected, rows=self.select_rows, group_size=self.group_size)
        return Selection(apply_mask(self.format_rows(x, self.number_format), mask, gradient=ste_share), num_selected)


class ThresholdSelector(nn.Module):
    """Selects the features above a threshold: ``threshold``, ``statistical``, and ``relu``."""

    threshold_bits_E: Tensor

    def __init__(self, site: Site, settings: SparsityConfig, *, num_experts: int, format_rows: FormatRows) -> None:
        super().__init__()
        self.settings = settings
        self.number_format = site_format(settings, site)
        self.format_rows = format_rows
        self._mask_of = THRESHOLD_MASKS[settings.selection]
        # Stored as integers, because a cast of the model to bf16 would round a floating-point buffer.
        self.register_buffer("threshold_bits_E", torch.zeros(num_experts, dtype=torch.int32), persistent=False)
        self.is_uniform: bool
        """Whether all experts have the same threshold."""
        self.selects_all: bool
        self.set_sparsity([0.0] * num_experts, None)

    def set_sparsity(self, values: Sequence[float], thresholds: Sequence[float] | None) -> None:
        """Use S from now on: one value per expert, with its calibrated threshold if the selection needs one."""
        pairs = zip(values, thresholds or [math.nan] * len(values), strict=True)
        found = [site_threshold(self.settings, value, threshold) for value, threshold in pairs]
        assert not any(math.isnan(value) for value in found), (
            "selection by threshold needs thresholds; SparsityPlan.check_fits reports a plan without them"
        )
        # Copied for the same reason as K in RankingSelector.
        self.threshold_bits_E.copy_(torch.tensor(found, dtype=torch.float32).view(torch.int32))
        # A threshold of minus infinity selects every feature.
        self.is_uniform, self.selects_all = len(set(found)) == 1, max(found) == -math.inf

    def select(self, x: Tensor, expert_ids_N: Tensor | None, *, ste_share: float) -> Selection:
        """Select features of the rows ``(*, D)``; the arguments are those of ``RankingSelector.select``."""
        # By the unrounded row, as in the paper (arXiv 2407.10969, section 2.4): features that round to one code differ.
        mask = self._mask_of(x, self._threshold_of_rows(expert_ids_N))
        return Selection(apply_mask(self.format_rows(x, self.number_format), mask, gradient=ste_share), mask)

    def _threshold_of_rows(self, expert_ids_N: Tensor | None) -> Tensor:
        """Return the threshold ``(1,)`` for all rows, or one per row ``(N, 1)``, in fp32."""
        # A Python number would be rounded to the dtype of the rows before the comparison.
        threshold_E = self.threshold_bits_E.view(torch.float32)
        if self.is_uniform:
            return threshold_E[:1]
        assert expert_ids_N is not None, "the threshold differs between experts, so the expert of every row is required"
        return threshold_E[expert_ids_N, None]
