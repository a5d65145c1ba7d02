"""Agreement of the experts that tokens choose in successive evaluations. T tokens, A experts per token."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.moe.router import UNUSED, Router
from qsparse_moe.training.distributed.ranks import Distributed

logger = logging.getLogger(__name__)


class ChoiceAgreement:
    """Compares the experts that each token of this rank's validation sequences chose in successive evaluations.

    The choices of one evaluation take 2 bytes per token, layer, and choice in host memory and in every checkpoint.
    """

    def __init__(self, routers: list[Router], distributed: Distributed, *, sequences: int = 0) -> None:
        """Args: ``sequences`` is a checksum of this rank's validation sequences; tokens are compared by position."""
        self._routers = routers
        self._distributed = distributed
        self._sequences = sequences
        self._previous: list[Tensor] | None = None

    @contextlib.contextmanager
    def record(self) -> Iterator[list[list[Tensor]]]:
        """Yield one list per layer, to which every forward pass appends its choices ``(T, A)``, int16 on the CPU."""
        chosen: list[list[Tensor]] = [[] for _ in self._routers]

        def append(layer: list[Tensor], expert_ids_TA: Tensor) -> None:
            layer.append(expert_ids_TA.to(torch.int16).cpu())

        for router, layer in zip(self._routers, chosen, strict=True):
            # The default argument binds this layer's list; a closure would see the last one.
            router.hook = lambda expert_ids_TA, layer=layer: append(layer, expert_ids_TA)
        try:
            yield chosen
        finally:
            for router in self._routers:
                router.hook = None

    def compare(self, chosen: list[list[Tensor]], counts_T: Tensor) -> Tensor | None:
        """Return the fraction ``(L,)`` of choices that the previous evaluation has as well, over all ranks' tokens.

        It is NaN for a layer whose tokens use no expert.

        ``chosen`` replaces the stored choices. The result is None in the first evaluation of a run. All ranks must call
        it together.

        Args:
            chosen: the lists from ``record``.
            counts_T: bool, whether a token counts; the padding of batches differs between layouts.
        """
        now = [torch.cat(layer)[counts_T] for layer in chosen]
        previous, self._previous = self._previous, now
        if previous is None or not now:
            return None
        common = [num_common(one, other) for one, other in zip(previous, now, strict=True)]
        # Layers may differ in their experts per token, and so may tokens.
        choices = [int((one != UNUSED).sum()) for one in now]
        # Counts and not fractions are reduced: the ranks may have different numbers of tokens.
        sums = torch.tensor([common, choices], dtype=torch.float64, device=self._distributed.device)
        common_L, choices_L = self._distributed.all_reduce(sums).cpu()
        return common_L / choices_L

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state for a checkpoint."""
        return {"sequences": self._sequences, "choices": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state in a checkpoint of the same number of ranks. All ranks must call it together.

        The state is dropped if the validation sequences of any rank have changed.
        """
        if all(self._distributed.all_gather(state["sequences"] == self._sequences)):
            self._previous = state["choices"]
        elif self._distributed.rank == 0:
            logger.info(
                "the validation sequences differ from those of the checkpoint, because training.evaluation_rows or "
                "training.micro_batch_size has changed: router/choice_agreement starts with the second evaluation from "
                "here"
            )


def num_common(one_TA: Tensor, other_TA: Tensor) -> int:
    """Return the number of choices that are in both tensors for the same token; no token chooses an expert twice."""
    same_TAA = one_TA[:, :, None] == other_TA[:, None, :]
    return int((same_TAA & (one_TA != UNUSED)[:, :, None]).sum())
