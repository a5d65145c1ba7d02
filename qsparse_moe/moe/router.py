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
UNUSED = -1
"""The expert that ``Router.hook`` receives for a choice that its token does not use."""


class Routing(NamedTuple):
    """The experts of T tokens, first choice first; everything except the ids is at least fp32."""

    weights_TA: Tensor
    expert_ids_TA: Tensor
    probs_TE: Tensor
    """Probabilities that sum to 1: softmax scores, or sigmoid scores divided by their sum."""
    logits_TE: Tensor
    used_TA: Tensor | None = None
    """Bool: whether the token uses the expert; the weight is 0 where it does not. None: it uses all of them."""


class FewerExperts(NamedTuple):
    """How many of its choices every token uses."""

    number: int
    """The largest number of experts of a token."""
    top_p: float = 1.0
    """A token uses the fewest first experts whose weights reach this share of the sum of all A, at least one."""


class Router(nn.Module):
    """A linear map to E logits, computed in fp32 regardless of the model's dtype, and the choice of A experts.

    Scores are a softmax of the logits, or a sigmoid of each (arXiv 2412.19437, eq. 12 to 16). With
    ``bias_update_rate``, load-balancing biases are added to the scores for the choice of experts only, not for their
    weights. ``expert_bias`` is a buffer, not a parameter: it stays in fp32 when the module is cast, and only
    ``update_bias`` changes it.

    Under a plan with fewer experts per token (``use_experts``), a token uses the first of its A choices.
    """

    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.hook: Callable[[Tensor], None] | None = None
        """Called in every forward pass with the experts ``(T, A)`` that the tokens use, ``UNUSED`` in place of those
        that a token leaves out; None if no hook is attached."""
        self.fewer = FewerExperts(config.experts_per_token)
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
        weights_TA, expert_ids_TA, used_TA = self._use(logits_TE, scores_TE)
        if self.hook is not None:
            self.hook(expert_ids_TA if used_TA is None else expert_ids_TA.masked_fill(~used_TA, UNUSED))
        return Routing(weights_TA, expert_ids_TA, probs_TE, logits_TE, used_TA)

    def use_experts(self, experts_per_token: int, top_p: float = 1.0) -> None:
        """Use fewer experts from the next forward on; see ``SparsityPlan``. The A of the model and 1 use all."""
        self.fewer = FewerExperts(experts_per_token, top_p)

    def _use(self, logits_TE: Tensor, scores_TE: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the weights and ids of the experts in use, and the mask of ``Routing``."""
        config, (number, top_p) = self.config, self.fewer
        most, mode = config.experts_per_token, config.fewer_experts_weights
        if top_p == 1.0 and (number == most or mode == "router"):
            # Chosen as in a model whose A is this number, and so with the same bits.
            ids_TA = self._choose(logits_TE, scores_TE, number)
            return self._weights(logits_TE, scores_TE, ids_TA), ids_TA, None
        all_ids_TA = self._choose(logits_TE, scores_TE, most)
        all_weights_TA = self._weights(logits_TE, scores_TE, all_ids_TA)
        ids_TA = all_ids_TA[:, :number]
        used_TA = None if top_p == 1.0 else within_share(all_weights_TA, top_p)[:, :number]
        if mode == "router":
            return self._weights(logits_TE, scores_TE, ids_TA, used_TA), ids_TA, used_TA
        weights_TA = all_weights_TA[:, :number]
        if used_TA is not None:
            weights_TA = weights_TA * used_TA
        if mode == "renormalized":
            total, kept = all_weights_TA.sum(-1, keepdim=True), weights_TA.sum(-1, keepdim=True)
            weights_TA = weights_TA * (total / (kept + _TINY))
        return weights_TA, ids_TA, used_TA

    def _scores(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores, and the same as probabilities."""
        if not self.config.router.startswith("sigmoid"):
            probs_TE = logits_TE.softmax(-1)
            return probs_TE, probs_TE
        scores_TE = logits_TE.sigmoid()
        return scores_TE, scores_TE / (scores_TE.sum(-1, keepdim=True) + _TINY)

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, number: int) -> Tensor:
        """Return ``(T, number)``: the first experts of every token."""
        config = self.config
        # For measurements of speed: the load is even and independent of the weights.
        if config.force_uniform_routing:
            return round_robin(len(logits_TE), number, config.num_experts, device=logits_TE.device)
        if self.expert_bias is None and config.num_expert_groups == 1:
            # Scores have the same order as the logits, but can round to the same 0 or 1 where logits still differ.
            return logits_TE.topk(number, dim=-1).indices
        # The choice has no gradient; the router learns from the weights of the chosen experts.
        choice_TE = scores_TE.detach()
        if self.expert_bias is not None:
            choice_TE = choice_TE + self.expert_bias
        if config.num_expert_groups > 1:
            allowed_TE = chosen_groups(choice_TE, config.num_expert_groups, config.groups_per_token, config.group_score)
            choice_TE = choice_TE.masked_fill(~allowed_TE, -torch.inf)
        return choice_TE.topk(number, dim=-1).indices

    def _weights(
        self, logits_TE: Tensor, scores_TE: Tensor, expert_ids_TA: Tensor, used_TA: Tensor | None = None
    ) -> Tensor:
        """Return ``(T, A)``: the weights of the chosen experts, without the load-balancing bias.

        With ``used_TA`` they are those of a router that chooses only the experts for which it is true, and 0 elsewhere.
        """
        config = self.config
        if config.router == "topk_softmax":
            chosen_TA = logits_TE.gather(-1, expert_ids_TA)
            weights_TA = (chosen_TA if used_TA is None else chosen_TA.masked_fill(~used_TA, -torch.inf)).softmax(-1)
        else:
            weights_TA = scores_TE.gather(-1, expert_ids_TA)
            weights_TA = weights_TA if used_TA is None else weights_TA * used_TA
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


def within_share(weights_TA: Tensor, top_p: float) -> Tensor:
    """Return ``(T, A)`` bool: the fewest first experts of every token whose weights reach ``top_p`` of their sum.

    At least the first is among them.
    """
    # fp64, so that the decode engines, which add in another order, decide alike.
    weights_TA = weights_TA.detach().double()
    before_TA = weights_TA.cumsum(-1) - weights_TA
    within_TA = before_TA < top_p * weights_TA.sum(-1, keepdim=True)
    # All weights of a sigmoid can underflow to 0.
    within_TA[:, :1] = True
    return within_TA


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
        "first_weight": routing.weights_TA.detach()[:, :1].sum().double(),
    }
