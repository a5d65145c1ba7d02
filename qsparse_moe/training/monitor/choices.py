"""How many of the experts that tokens chose in one evaluation they choose in the next. T tokens, A experts a token."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.moe.router import Router
from qsparse_moe.training.distributed.ranks import Distributed

logger = logging.getLogger(__name__)


class ChoiceMemory:
    """The experts that every token of this rank's validation rows chose in the evaluation before.

    It keeps 2 bytes for every token, layer and choice in the host's memory, and in every checkpoint.
    """

    def __init__(self, routers: list[Router], distributed: Distributed, *, sequences: int = 0) -> None:
        """``sequences`` is a checksum of this rank's validation rows: choices are compared token by token."""
        self._routers = routers
        self._distributed = distributed
        self._sequences = sequences
        self._before: list[Tensor] | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[list[Tensor]]]:
        """Yield a list a layer to which every forward inside adds its choices ``(T, A)``, int16 on the CPU."""
        seen: list[list[Tensor]] = [[] for _ in self._routers]

        def keep(found: list[Tensor], expert_ids_TA: Tensor) -> None:
            found.append(expert_ids_TA.to(torch.int16).cpu())

        for router, found in zip(self._routers, seen, strict=True):
            router.hook = lambda expert_ids_TA, found=found: keep(found, expert_ids_TA)
        try:
            yield seen
        finally:
            for router in self._routers:
                router.hook = None

    def compare(self, seen: list[list[Tensor]], counts_T: Tensor) -> Tensor | None:
        """The share ``(L,)`` of the choices that were made in the evaluation before too, over all ranks' tokens.

        ``seen`` takes the place of what was kept. None in the first evaluation of a run. All ranks call it together.

        Args:
            seen: what ``watch`` yielded.
            counts_T: bool, whether a token counts; those that fill up a batch differ between layouts.
        """
        now = [torch.cat(found)[counts_T] for found in seen]
        before, self._before = self._before, now
        if before is None or not now:
            return None
        common = [num_common(one, other) for one, other in zip(before, now, strict=True)]
        sums = torch.tensor([*common, now[0].numel()], dtype=torch.float64, device=self._distributed.device)
        *common_L, num_choices = self._distributed.all_reduce(sums).tolist()
        return torch.tensor(common_L, dtype=torch.float64) / num_choices

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this rank."""
        return {"sequences": self._sequences, "choices": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of as many ranks, if all have the same validation rows. All ranks call it."""
        if all(self._distributed.all_gather(state["sequences"] == self._sequences)):
            self._before = state["choices"]
        elif self._distributed.rank == 0:
            logger.info(
                "the validation rows are not those of the checkpoint (training.evaluation_rows or the size of the "
                "micro-batches has changed): router/choice_agreement starts with the second evaluation from here"
            )


def num_common(one_TA: Tensor, other_TA: Tensor) -> int:
    """Over the tokens, how many of a token's choices are in both; no token chooses an expert twice."""
    return int((one_TA[:, :, None] == other_TA[:, None, :]).sum())
