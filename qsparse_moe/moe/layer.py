"""The MoE feed-forward layer: route, gather, run the experts, combine.

B batch, S sequence, T = B * S tokens, D width, E experts, A experts a token, N = T * A routed rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import shared_hidden_size
from qsparse_moe.moe.dispatch import RoutedRows
from qsparse_moe.moe.experts import Experts
from qsparse_moe.moe.feed_forward import FeedForward
from qsparse_moe.moe.losses import load_balance_loss, router_z_loss
from qsparse_moe.moe.router import Router, Routing, router_stats
from qsparse_moe.moe.runtime import Runtime, resolve_runtime
from qsparse_moe.moe.site import SparseSite
from qsparse_moe.sparsity.stats import Readers, Stats


class MoEOutput(NamedTuple):
    """What a MoE layer returns: the tokens, its two losses (unscaled) and its sums."""

    y_BSD: Tensor
    load_balance_loss: Tensor
    router_z_loss: Tensor
    stats: Stats


class MoELayer(nn.Module):
    """Dropless routed experts with Q-Sparse inside each, and shared experts if there are any.

    The router sees the dense tokens. Where all experts have the same K (or bound), one selection at ``expert_input``
    serves all A experts of a token; otherwise each routed row has its own.
    """

    def __init__(self, config: ModelConfig, runtime: Runtime | None = None) -> None:
        """``runtime`` None chooses for a CPU; ``build_model`` passes the one that its whole model uses."""
        super().__init__()
        runtime = runtime or resolve_runtime(config, "cpu")
        moe = config.moe
        self.num_experts = moe.num_experts
        self.balance_over_sequences = moe.load_balance_scope == "sequence"
        self.permutation = runtime.permutation
        self.router = Router(config.hidden_size, moe)
        self.input_site = SparseSite(
            "expert_input",
            config.hidden_size,
            config.sparsity,
            runtime.select_rows,
            num_experts=moe.num_experts,
            site_sums=runtime.site_sums,
        )
        self.experts = Experts(config, runtime)
        self.shared = (
            FeedForward(config, "shared", shared_hidden_size(config), runtime) if moe.num_shared_experts else None
        )

    def forward(self, x_BSD: Tensor, *, with_stats: bool = True) -> MoEOutput:
        """``(B, S, D)`` to ``(B, S, D)``; ``router/rows_E`` is always among the stats, the rest ``with_stats``."""
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD)
        dispatch = self.permutation.plan(routing.expert_ids_TA, self.num_experts)
        continues_N = _continues(dispatch, x_BSD.shape[1]) if with_stats else None
        rows_ND, input_stats = self._gather(x_TD, dispatch, continues_N)
        y_ND, hidden_stats = self.experts(
            rows_ND,
            dispatch.rows_per_expert_E,
            dispatch.expert_N,
            with_stats=with_stats,
            readers=self._readers(dispatch, continues_N),
        )
        y_TD = self.permutation.combine(y_ND, routing.weights_TA, dispatch)
        stats = {"router/rows_E": dispatch.rows_per_expert_E.double()}
        if self.shared is not None:
            shared_BSD, *shared_stats = self.shared(x_BSD, with_stats=with_stats)
            y_TD = y_TD + shared_BSD.flatten(0, 1)
            stats |= site_names(dict(zip(("shared_input", "shared_hidden"), shared_stats, strict=True)))
        if with_stats:
            stats |= {f"router/{name}": value for name, value in router_stats(routing).items()}
            stats |= site_names({"expert_input": input_stats, "expert_hidden": hidden_stats})
        return MoEOutput(
            y_TD.view_as(x_BSD), self._balance_loss(routing, x_BSD), router_z_loss(routing.logits_TE), stats
        )

    def _gather(self, x_TD: Tensor, dispatch: RoutedRows, continues_N: Tensor | None) -> tuple[Tensor, Stats]:
        """The sparse rows of the experts, with sums where it is known which reading continues in the next."""
        with_stats = continues_N is not None
        if self.input_site.is_uniform:
            readers = self._readers(dispatch, continues_N, of_tokens=True)
            x_TD, stats = self.input_site(x_TD, with_stats=with_stats, readers=readers)
            return self.permutation.permute(x_TD, dispatch), stats
        rows_ND, readers = self.permutation.permute(x_TD, dispatch), self._readers(dispatch, continues_N)
        return self.input_site(rows_ND, dispatch.expert_N, with_stats=with_stats, readers=readers)

    def _readers(self, dispatch: RoutedRows, continues_N: Tensor | None, *, of_tokens: bool = False) -> Readers | None:
        """Which expert reads which routed row, or which token; None where no sums are wanted."""
        if continues_N is None:
            return None
        row_N = dispatch.token_N.long() if of_tokens else None
        return Readers(row_N, dispatch.expert_N.long(), self.num_experts, continues_N)

    def _balance_loss(self, routing: Routing, x_BSD: Tensor) -> Tensor:
        groups = len(x_BSD) if self.balance_over_sequences else 1
        probs_BSE = routing.probs_TE.unflatten(0, (groups, -1))
        return load_balance_loss(probs_BSE, routing.expert_ids_TA.unflatten(0, (groups, -1)))


def _continues(dispatch: RoutedRows, sequence_length: int) -> Tensor:
    """``(N,)`` bool: the next row is the same expert's of the next token of the same sequence."""
    token_N, expert_N = dispatch.token_N, dispatch.expert_N
    continues_N = torch.zeros_like(token_N, dtype=torch.bool)
    continues_N[:-1] = (
        (token_N[1:] == token_N[:-1] + 1) & (expert_N[1:] == expert_N[:-1]) & (token_N[1:] % sequence_length != 0)
    )
    return continues_N


def site_names(stats_by_site: dict[str, Stats]) -> Stats:
    """``{"expert_input": {"rows": r}}`` to ``{"sparsity/expert_input/rows": r}``."""
    return {f"sparsity/{site}/{name}": v for site, stats in stats_by_site.items() for name, v in stats.items()}
