"""Which experts a token uses, and with what weight. T tokens, D width, E experts, A experts a token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import MoEConfig
from qsparse_moe.sparsity.stats import Stats


class Routing(NamedTuple):
    """The choice for T tokens; all but the ids in fp32, first choice first."""

    weights_TA: Tensor
    expert_ids_TA: Tensor
    probs_TE: Tensor
    logits_TE: Tensor


class Router(nn.Module):
    """A linear map to E logits, computed in fp32 whatever the model's dtype, and the choice of the A largest."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.kind = config.router
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))

    def forward(self, x_TD: Tensor) -> Routing:
        """Route the dense tokens ``(T, D)``."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD = x_TD.to(wide)
        weight_ED = self.weight.to(wide)
        logits_TE = x_TD @ weight_ED.T
        probs_TE = logits_TE.softmax(-1)
        # Softmax keeps the order, so all kinds choose the same experts and differ in their weights only.
        top_TA, expert_ids_TA = logits_TE.topk(self.experts_per_token, dim=-1)
        if self.kind == "topk_softmax":
            weights_TA = top_TA.softmax(-1)
        else:
            weights_TA = probs_TE.gather(-1, expert_ids_TA)
            if self.kind == "softmax_topk_renormalized":
                weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        return Routing(weights_TA, expert_ids_TA, probs_TE, logits_TE)


def router_stats(routing: Routing) -> Stats:
    """Detached float64 sums over the tokens: ``tokens``, ``probability_E``, ``choice_entropy``, ``first_weight``."""
    probs_TE = routing.probs_TE.detach()
    entropy_TE = torch.special.entr(probs_TE)
    return {
        "tokens": torch.tensor(len(probs_TE), dtype=torch.float64, device=probs_TE.device),
        "probability_E": probs_TE.sum(0).double(),
        "choice_entropy": entropy_TE.sum().double(),
        "first_weight": routing.weights_TA.detach()[:, 0].sum().double(),
    }
