"""The router: the choice of A experts per token and their weights. T tokens, D width, E experts, G expert groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import MoEConfig
from qsparse_moe.sparsity.log_counts import PROBABILITIES, log_counts
from qsparse_moe.sparsity.stats import Stats

# Added to a sum of sigmoid scores, all of which can underflow to 0 in fp32; the value is that of DeepSeek-V3's code.
_TINY = 1e-20


class Routing(NamedTuple):
    """The experts of T tokens, first choice first; everything except the ids is at least fp32."""

    weights_TA: Tensor
    expert_ids_TA: Tensor
    probs_TE: Tensor
    """Probabilities that sum to 1: softmax scores, or sigmoid scores divided by their sum."""
    logits_TE: Tensor


class Router(nn.Module):
    """A linear map to E logits, computed in fp32 regardless of the model's dtype, and the choice of A experts.

    Scores are a softmax of the logits, or a sigmoid of each (arXiv 2412.19437, eq. 12 to 16). With
    ``bias_update_rate``, load-balancing biases are added to the scores for the choice of experts only, not for their
    weights. ``expert_bias`` is a buffer, not a parameter: it stays in fp32 when the module is cast, and only
    ``update_bias`` changes it.
    """

    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.hook: Callable[[Tensor], None] | None = None
        """Called in every forward pass with the chosen experts ``(T, A)``; None if no hook is attached."""
        bias_E = torch.zeros(config.num_experts, dtype=torch.float32) if config.bias_update_rate else None
        self.register_buffer("expert_bias", bias_E)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route the tokens ``(T, D)``. Jitter and noise apply in training only."""
        config = self.config
        # In bf16, logits of different experts would round to one value, and the choice between them would be arbitrary.
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD = x_TD.to(wide)
        weight_ED = self.weight.to(wide)
        if self.training and config.router_jitter:
            # Switch Transformer (arXiv 2101.03961): the router reads x * uniform(1 - jitter, 1 + jitter).
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - config.router_jitter, 1 + config.router_jitter)
        logits_TE = x_TD @ weight_ED.T
        if self.training and config.router_noise:
            # V-MoE (arXiv 2106.05974): TOP_A(softmax(W x + noise)) with normal noise, equally strong for all experts.
            logits_TE = logits_TE + config.router_noise * torch.randn_like(logits_TE)
        scores_TE, probs_TE = self._scores(logits_TE)
        expert_ids_TA = self._choose(logits_TE, scores_TE)
        if self.hook is not None:
            self.hook(expert_ids_TA)
        return Routing(self._weights(logits_TE, scores_TE, expert_ids_TA), expert_ids_TA, probs_TE, logits_TE)

    def _scores(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores, and the same as probabilities."""
        if not self.config.router.startswith("sigmoid"):
            probs_TE = logits_TE.softmax(-1)
            return probs_TE, probs_TE
        scores_TE = logits_TE.sigmoid()
        return scores_TE, scores_TE / (scores_TE.sum(-1, keepdim=True) + _TINY)

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """Return ``(T, A)``: the experts of every token."""
        config = self.config
        # For measurements of speed: the load is even and independent of the weights.
        if config.force_uniform_routing:
            return round_robin(len(logits_TE), config.experts_per_token, config.num_experts, device=logits_TE.device)
        if self.expert_bias is None and config.num_expert_groups == 1:
            # Scores have the same order as the logits, but can round to the same 0 or 1 where logits still differ.
            return logits_TE.topk(config.experts_per_token, dim=-1).indices
        # The choice has no gradient; the router learns from the weights of the chosen experts.
        choice_TE = scores_TE.detach()
        if self.expert_bias is not None:
            choice_TE = choice_TE + self.expert_bias
        if config.num_expert_groups > 1:
            allowed_TE = chosen_groups(choice_TE, config.num_expert_groups, config.groups_per_token, config.group_score)
            choice_TE = choice_TE.masked_fill(~allowed_TE, -torch.inf)
        return choice_TE.topk(config.experts_per_token, dim=-1).indices

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, expert_ids_TA: Tensor) -> Tensor:
        """Return ``(T, A)``: the weights of the chosen experts, without the load-balancing bias."""
        config = self.config
        if config.router == "topk_softmax":
            weights_TA = logits_TE.gather(-1, expert_ids_TA).softmax(-1)
        else:
            weights_TA = scores_TE.gather(-1, expert_ids_TA)
        if config.router.endswith("renormalized"):
            weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + _TINY)
        return weights_TA * config.router_scaling_factor if config.router_scaling_factor != 1.0 else weights_TA

    @torch.no_grad()
    def update_bias(self, routed_E: Tensor, rate: float) -> None:
        """Change every bias by ``rate`` towards an even load (arXiv 2408.15664, algorithm 1).

        Args:
            routed_E: number of routed tokens per expert in the global batch of one step.
            rate: ``bias_update_rate``.
        """
        assert self.expert_bias is not None, "this router has no biases: bias_update_rate is 0"
        # Only the sign of the deviation counts, as in the paper, so the rate is the size of every update.
        self.expert_bias += rate * (routed_E.mean() - routed_E).sign().to(self.expert_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        """Cast or move the module, but keep the biases in fp32: in bf16 their small updates would round to nothing."""
        before = self.expert_bias
        super()._apply(fn, *args, **kwargs)
        if before is not None and self.expert_bias is not None and self.expert_bias.dtype != before.dtype:
            self.expert_bias = before.to(self.expert_bias.device)
        return self


def bias_update_rate(config: MoEConfig, step: int) -> float:
    """Return the change of the biases after ``step`` (counted from 0); 0 if they are not updated."""
    ended = config.bias_update_steps is not None and step >= config.bias_update_steps
    return 0.0 if ended else config.bias_update_rate


def round_robin(num_tokens: int, experts_per_token: int, num_experts: int, *, device: torch.device) -> Tensor:
    """Return ``(T, A)``: token t uses the experts from t * A on, modulo E, so loads differ by at most one token."""
    choices = torch.arange(num_tokens * experts_per_token, device=device)
    return choices.remainder(num_experts).view(num_tokens, experts_per_token)


def chosen_groups(choice_TE: Tensor, num_groups: int, groups_per_token: int, score: str) -> Tensor:
    """Return ``(T, E)`` bool: the experts in the groups that a token may use.

    The score of a group is its largest value (``max``, arXiv 2405.04434, section 2.2.2) or the sum of its two largest
    (``top2_sum``). arXiv 2412.19437, section 2.1.2, sums the A / M largest for M groups, which is 2 in DeepSeek-V3.
    """
    grouped_TGX = choice_TE.unflatten(-1, (num_groups, -1))
    score_TG = grouped_TGX.topk(1 if score == "max" else 2, dim=-1).values.sum(-1)
    chosen = score_TG.topk(groups_per_token, dim=-1).indices
    allowed_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(-1, chosen, True)
    return allowed_TG[..., None].expand_as(grouped_TGX).flatten(-2)


def router_stats(routing: Routing) -> Stats:
    """Return detached float64 sums over the tokens: their number, probabilities, entropies, and first weights.

    ``probability_counts_H`` is the histogram of all probabilities over the bins ``PROBABILITIES``.
    """
    # Detached: statistics must not prolong the life of the graph.
    probs_TE = routing.probs_TE.detach()
    entropy_TE = torch.special.entr(probs_TE)
    return {
        "tokens": torch.tensor(len(probs_TE), dtype=torch.float64, device=probs_TE.device),
        "probability_E": probs_TE.sum(0).double(),
        "probability_counts_H": log_counts(probs_TE, PROBABILITIES),
        "choice_entropy": entropy_TE.sum().double(),
        "first_weight": routing.weights_TA.detach()[:, 0].sum().double(),
    }
