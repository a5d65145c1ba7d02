"""The MoE feed-forward layer: route, sort by expert, dispatch, run the experts, combine.

B batch, S sequence, T = B * S tokens, D width, E experts, A experts per token. N routed tokens of this rank, M routed
tokens of this rank's L experts: N = T * A unless a capacity drops some, and M = N without expert parallelism.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.moe.capacity import expert_capacity, within_capacity
from qsparse_moe.moe.dispatcher import ExpertTokens, start_dispatch
from qsparse_moe.moe.experts import Experts
from qsparse_moe.moe.losses import BalanceTerms, balance_terms, load_balance_loss, router_z_loss
from qsparse_moe.moe.permutation import GATHERS, Permutation, RoutedTokens
from qsparse_moe.moe.router import Router, Routing, router_stats
from qsparse_moe.moe.runtime import Runtime, resolve_runtime
from qsparse_moe.moe.shared import SharedExperts
from qsparse_moe.nn.sparse_site import SiteOutput
from qsparse_moe.sparsity.stats import Readers, Stats


class MoEOutput(NamedTuple):
    """The output of a MoE layer: tokens, the terms of its load balance loss, its z-loss, and its statistics."""

    y_BSD: Tensor
    balance: BalanceTerms
    """One group per sequence if ``load_balance_scope`` is ``sequence``, else one group."""
    router_z_loss: Tensor
    stats: Stats

    @property
    def load_balance_loss(self) -> Tensor:
        """The load balance loss of these tokens alone, without its coefficient."""
        return load_balance_loss(self.balance)


class MoELayer(nn.Module):
    """Routed experts with Q-Sparse inside each, and shared experts if there are any.

    Tokens are dropped only in training and only with a capacity factor. If all experts have the same K (or threshold),
    one selection at ``expert_input`` serves all A experts of a token; otherwise each routed token has its own. The
    router reads the dense tokens, or with ``router_input: sparse`` the result of that one selection.
    """

    def __init__(self, config: ModelConfig, runtime: Runtime | None = None) -> None:
        """Create the layer; without a ``runtime``, implementations for a CPU are chosen."""
        super().__init__()
        runtime = runtime or resolve_runtime(config, "cpu")
        moe = config.moe
        self.num_experts = moe.num_experts
        self.capacity_factor = moe.capacity_factor
        self.expert_group = runtime.expert_group
        self.balance_over_sequences = moe.load_balance_scope == "sequence"
        self.router_sees_sparse = moe.router_input == "sparse"
        self.permutation = runtime.permutation
        self.router = Router(config.hidden_size, moe)
        self.input_site = runtime.sites.make_site(
            "expert_input", config.hidden_size, config.sparsity, num_experts=moe.num_experts
        )
        self.experts = Experts(config, runtime)
        self.shared = SharedExperts(config, runtime.sites) if moe.num_shared_experts else None

    def forward(self, x_BSD: Tensor, *, with_stats: bool = True) -> MoEOutput:
        """Return the output for ``x_BSD``, with the losses and statistics of the router.

        ``router/routed_E`` is always among the statistics, because it balances the load; all others need
        ``with_stats``.
        """
        x_TD = x_BSD.flatten(0, 1)
        # Made before routing, because a router with ``router_input: sparse`` reads its result.
        selected = self.input_site.select(x_TD) if self.input_site.is_uniform else None
        routing = self._route(x_TD, selected)
        capacity = self._capacity(routing)
        within_TA = routing.used_TA if capacity is None else _within(routing, capacity)
        # Kernels cannot be launched for no rows at all.
        permutation = self.permutation if routing.expert_ids_TA.numel() else GATHERS
        routed = permutation.sort(routing.expert_ids_TA, self.num_experts, within_TA)
        continues_N = _continues(routed, x_BSD.shape[1]) if with_stats else None
        x_ND, input_stats = self._gather(x_TD, selected, routed, continues_N, permutation)
        dispatcher = start_dispatch(
            ExpertTokens(x_ND, routed.tokens_per_expert_E, routed.expert_N, continues_N), self.expert_group
        )
        # The loss terms and the shared experts are computed here, because they overlap with the transfer that has been
        # started.
        num_groups = len(x_BSD) if self.balance_over_sequences else 1
        balance = balance_terms(routing.probs_TE, routing.expert_ids_TA, num_groups, used_TA=routing.used_TA)
        stats = {"router/routed_E": balance.routed_GE.sum(0)}
        if self.shared is not None:
            shared_BSD, *shared_stats = self.shared(x_BSD, with_stats=with_stats)
            stats |= site_names(dict(zip(("shared_input", "shared_hidden"), shared_stats, strict=True)))
        y_MD, late_input_stats, hidden_stats = self._run_experts(dispatcher.receive(), with_stats)
        y_TD = permutation.combine(dispatcher.combine(y_MD), routing.weights_TA, routed)
        if self.shared is not None:
            y_TD = y_TD + shared_BSD.flatten(0, 1)
        # Not only with statistics: in training a shared selection measures the energies of its features.
        stats |= site_names({"expert_input": input_stats | late_input_stats, "expert_hidden": hidden_stats})
        if with_stats:
            stats |= {f"router/{name}": value for name, value in router_stats(routing).items()}
            if capacity is not None:
                # The balance terms count the choices of the router, which a capacity does not change.
                stats["router/dropped_E"] = stats["router/routed_E"] - routed.tokens_per_expert_E
        return MoEOutput(y_TD.view_as(x_BSD), balance, router_z_loss(routing.logits_TE), stats)

    def _route(self, x_TD: Tensor, selected: SiteOutput | None) -> Routing:
        if not self.router_sees_sparse:
            return self.router(x_TD)
        assert selected is not None, (
            "with a selection per expert there is no single sparse token for the router; the config rules refuse it"
        )
        return self.router(selected.sparse)

    def _capacity(self, routing: Routing) -> int | None:
        """Return the capacity of an expert; None if no token is dropped."""
        # In evaluation nothing is dropped: the output for a token must not depend on the rest of its batch.
        if self.capacity_factor is None or not self.training:
            return None
        # Under top_p this counts the most experts that tokens may use: their number is known on the device only.
        return expert_capacity(self.capacity_factor, routing.expert_ids_TA.numel(), self.num_experts)

    def _gather(
        self,
        x_TD: Tensor,
        selected: SiteOutput | None,
        routed: RoutedTokens,
        continues_N: Tensor | None,
        permutation: Permutation,
    ) -> tuple[Tensor, Stats]:
        """Return the sparse routed tokens and, unless ``continues_N`` is None, the statistics of the site.

        With a shared selection the tokens are dense, because an expert selects by the tokens of all ranks.

        ``selected`` is the one selection that serves all experts of a token; None if each routed token has its own.
        """
        with_stats = continues_N is not None
        if self.input_site.shared is not None:
            return permutation.permute(x_TD, routed), {}
        if selected is None:
            x_ND, readers = permutation.permute(x_TD, routed), self._readers(routed.expert_N, continues_N)
            return self.input_site(x_ND, routed.expert_N, with_stats=with_stats, readers=readers)
        # Counted once per reading and not once per token, so that the statistics are those of a selection per expert.
        readers = self._readers(routed.expert_N, continues_N, routed.token_N)
        stats = self.input_site.sums(selected, readers) if with_stats else {}
        return permutation.permute(selected.sparse, routed), stats

    def _run_experts(self, received: ExpertTokens, with_stats: bool) -> tuple[Tensor, Stats, Stats]:
        """Return the outputs, and the statistics of ``expert_input``, if selected here, and of ``expert_hidden``."""
        x_MD, tokens_per_expert_L, expert_M, continues_M = received
        readers = self._readers(expert_M, continues_M)
        site = None if self.input_site.shared is None else self.input_site
        return self.experts(
            x_MD, tokens_per_expert_L, expert_M, with_stats=with_stats, readers=readers, input_site=site
        )

    def _readers(self, expert_N: Tensor, continues_N: Tensor | None, token_N: Tensor | None = None) -> Readers | None:
        """Return which expert reads which routed token, or which token; None if no statistics are recorded."""
        if continues_N is None:
            return None
        # MegaBlocks' permutation returns int32, and the statistics index with int64.
        row_N = None if token_N is None else token_N.long()
        return Readers(row_N, expert_N.long(), self.num_experts, continues_N)


def _within(routing: Routing, capacity: int) -> Tensor:
    """Return ``(T, A)`` bool: the choices that their token uses and that are within the capacity of their expert."""
    used_TA = routing.used_TA
    if used_TA is None:
        return within_capacity(routing.weights_TA, routing.expert_ids_TA, capacity)
    # Below every weight, so that a choice that is not used takes no place of one that is.
    weights_TA = routing.weights_TA.masked_fill(~used_TA, -1.0)
    return used_TA & within_capacity(weights_TA, routing.expert_ids_TA, capacity)


def _continues(routed: RoutedTokens, sequence_length: int) -> Tensor:
    """Return ``(N,)`` bool: whether the next routed token has the same expert and is the next token of its sequence."""
    token_N, expert_N = routed.token_N, routed.expert_N
    continues_N = torch.zeros_like(token_N, dtype=torch.bool)
    # A token whose position is 0 begins a sequence, so it continues none.
    continues_N[:-1] = (
        (token_N[1:] == token_N[:-1] + 1) & (expert_N[1:] == expert_N[:-1]) & (token_N[1:] % sequence_length != 0)
    )
    return continues_N


def site_names(stats_by_site: dict[str, Stats]) -> Stats:
    """Return the statistics of all sites under full names, such as ``sparsity/expert_input/rows``."""
    return {f"sparsity/{site}/{name}": v for site, stats in stats_by_site.items() for name, v in stats.items()}
