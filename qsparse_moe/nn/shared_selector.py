"""The selection that all tokens of an expert share, and the running averages by which it is made.

N rows, D features, E experts (1 at a site without experts), K selected features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import Site, SparsityConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.kernels.int8_quantize.op import FormatRows
from qsparse_moe.nn.selectors import RankingSelector, Selection
from qsparse_moe.sparsity.shared_sets import FeatureSets, energies, feature_sets, shared_mask, updated_means
from qsparse_moe.sparsity.stats import Stats
from qsparse_moe.sparsity.topk import apply_mask

AVERAGES = "shared.mean_energy_ED"
"""Name of the running averages in the state dict of a site."""
ENERGY, ROWS = "measured_energy", "measured_rows"
"""Names of the measured sums among the statistics of a site, without their dims."""


class SharedSelector(nn.Module):
    """Selects the K features with the largest energy over the tokens of an expert: ``shared``.

    ``mean_energy_ED`` holds the running averages. It is part of a checkpoint, stays in fp32 when the module is cast,
    and only ``update`` changes it.
    """

    mean_energy_ED: Tensor

    def __init__(
        self,
        site: Site,
        num_features: int,
        settings: SparsityConfig,
        ranking: RankingSelector,
        *,
        num_experts: int,
        format_rows: FormatRows,
    ) -> None:
        super().__init__()
        self.site = site
        self.num_features = num_features
        self.num_experts = num_experts
        self.settings = settings.shared
        self.format_rows = format_rows
        # In a tuple: K is the ranking's, which must not be a submodule twice.
        self._ranking = (ranking,)
        self.measures = True
        """Whether the next forward passes in training measure the energies; may be changed between steps."""
        self._is_measured = False
        self.register_buffer("mean_energy_ED", torch.zeros(num_experts, num_features, dtype=torch.float32))

    @property
    def ranking(self) -> RankingSelector:
        """The selector that holds K."""
        return self._ranking[0]

    @property
    def is_uniform(self) -> bool:
        """False: each expert has a set of its own, so the expert of a row is always needed."""
        return False

    @property
    def is_measured(self) -> bool:
        """Whether the energies have been measured at least once."""
        if not self._is_measured:
            # Read until it is true for the first time: afterwards nothing waits for the device.
            self._is_measured = bool(self.mean_energy_ED.any())
        return self._is_measured

    @property
    def is_measuring(self) -> bool:
        """Whether the next forward pass measures the energies."""
        return self.training and self.measures

    @property
    def selects_all(self) -> bool:
        """True if S is 0, and in the first steps of training with running averages, until they have been measured.

        Raises:
            ConfigError: S is above 0, nothing has been measured, and the next forward pass does not measure.
        """
        if self.ranking.selects_all:
            return True
        if (self.settings.sets == "step" and self.training) or self.is_measured:
            return False
        if not self.is_measuring:
            raise ConfigError(
                f"model.sparsity.selection (shared) selects by running averages, and {self.site} has none: its weights "
                "come from a run with another selection; train with it for at least one step by qsparse-moe train, or "
                "choose topk"
            )
        return True

    @property
    def is_known_before(self) -> bool:
        """Whether the set of a forward pass does not depend on its rows."""
        return self.settings.sets == "average" or not self.training

    def measured(self, x: Tensor, expert_N: Tensor | None) -> Stats:
        """Return the sums for ``update`` in a training step that measures, else nothing.

        Args:
            x: the dense rows ``(*, D)``.
            expert_N: the expert of each row; None at a site without experts.
        """
        if not self.is_measuring:
            return {}
        energy_ED, rows_E = energies(x.flatten(0, -2), expert_N, self.num_experts)
        return {f"{ENERGY}_ED": energy_ED, f"{ROWS}_E": rows_E}

    @torch.no_grad()
    def update(self, energy_ED: Tensor, rows_E: Tensor) -> None:
        """Add a measurement, summed over the micro-batches and ranks of a step, to the running averages."""
        self.mean_energy_ED.copy_(updated_means(self.mean_energy_ED, energy_ED, rows_E, self.settings.decay))

    def sets(self, x_ND: Tensor | None, expert_N: Tensor | None, experts: slice) -> FeatureSets:
        """Return the sets of ``experts``.

        Args:
            x_ND: the dense rows, which are not needed if ``is_known_before``.
            expert_N: the expert of each row; None at a site without experts.
            experts: the experts of this rank.
        """
        uniform = self.ranking.uniform_num_selected
        num_selected = self.ranking.num_selected_E[experts] if uniform is None else uniform
        return feature_sets(self._energy(x_ND, expert_N)[experts], num_selected, self.ranking.largest_num_selected)

    def select(self, x: Tensor, expert_ids_N: Tensor | None, *, ste_share: float) -> Selection:
        """Select features of the rows ``(*, D)`` by a mask; the arguments are those of ``RankingSelector.select``."""
        ranking = self.ranking
        counts = ranking.num_selected_E if ranking.uniform_num_selected is None else ranking.uniform_num_selected
        mask_ED = shared_mask(self._energy(x.flatten(0, -2), expert_ids_N), counts)
        mask = mask_ED[0].expand_as(x) if expert_ids_N is None else mask_ED[expert_ids_N]
        rows = apply_mask(self.format_rows(x, ranking.number_format), mask, gradient=ste_share)
        return Selection(rows, ranking.num_selected_of_rows(expert_ids_N))

    def _energy(self, x_ND: Tensor | None, expert_N: Tensor | None) -> Tensor:
        if self.is_known_before:
            return self.mean_energy_ED
        assert x_ND is not None, "the sets of a step are chosen by its rows"
        # In fp32, like the averages, so that both have the same ties.
        return energies(x_ND, expert_N, self.num_experts)[0].float()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        """Cast or move the module, but keep the averages in fp32, as the router keeps its biases."""
        before = self.mean_energy_ED
        super()._apply(fn, *args, **kwargs)
        if self.mean_energy_ED.dtype != before.dtype:
            self.mean_energy_ED = before.to(self.mean_energy_ED.device)
        return self
