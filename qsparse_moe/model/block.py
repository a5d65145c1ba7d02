"""One decoder layer: attention, then routed experts or a dense feed-forward, each normed and added to the residual."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig, Recompute, Site
from qsparse_moe.config.shapes import dense_hidden_size, has_experts, latent_sizes
from qsparse_moe.model.attention import Attend, Attention, AttentionCache
from qsparse_moe.model.latent_attention import LatentAttention
from qsparse_moe.model.recompute import run_part
from qsparse_moe.model.rope import Rotation
from qsparse_moe.moe.layer import MoELayer, site_names
from qsparse_moe.moe.losses import BalanceTerms
from qsparse_moe.moe.runtime import Runtime
from qsparse_moe.nn.feed_forward import FeedForward
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.stats import Stats


class BlockOutput(NamedTuple):
    """The result of a decoder layer: hidden states, the terms of its router losses (None if dense), and statistics."""

    hidden_BSD: Tensor
    balance: BalanceTerms | None
    router_z_loss: Tensor | None
    stats: Stats


class Block(nn.Module):
    """A pre-norm decoder layer, the ``layer``-th of the model."""

    def __init__(self, config: ModelConfig, layer: int, runtime: Runtime) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        attention = LatentAttention if latent_sizes(config) else Attention
        self.attention = attention(config, runtime.sites)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        routed = has_experts(config, layer)
        self.dense = None if routed else FeedForward(config, "dense", dense_hidden_size(config), runtime.sites)
        self.moe = MoELayer(config, runtime) if routed else None
        # Only for messages: a site that finds a NaN names its layer.
        for site in self.sites().values():
            site.layer = layer

    def forward(
        self,
        hidden_BSD: Tensor,
        rotation: Rotation,
        with_stats: bool,
        recompute: Recompute = "none",
        cache: AttentionCache | None = None,
        attend: Attend | None = None,
    ) -> BlockOutput:
        """Return the hidden states ``(B, S, D)`` after this layer and its statistics.

        ``recompute`` names the half that the backward recomputes, or a setting that names neither half. A ``cache``
        gives attention the keys and values of earlier tokens; only in evaluation mode. ``attend`` replaces the product
        of queries with keys and values, with its mask and its cache.
        """
        mixed_BSD, *attention_stats = run_part(
            recompute, "attention", self._attend, hidden_BSD, rotation, with_stats, cache, attend
        )
        hidden_BSD = hidden_BSD + mixed_BSD
        y_BSD, balance, z_loss, stats = run_part(recompute, "feed_forward", self._feed_forward, hidden_BSD, with_stats)
        stats = stats | _named(("attention_input", "attention_output"), attention_stats)
        return BlockOutput(hidden_BSD + y_BSD, balance, z_loss, stats)

    def _attend(
        self,
        hidden_BSD: Tensor,
        rotation: Rotation,
        with_stats: bool,
        cache: AttentionCache | None,
        attend: Attend | None,
    ) -> tuple[Tensor, Stats, Stats]:
        # Each half begins with its norm, so that a recomputed half stores nothing but the residual stream.
        normed_BSD = self.attention_norm(hidden_BSD)
        return self.attention(normed_BSD, rotation, with_stats=with_stats, cache=cache, attend=attend)

    def _feed_forward(
        self, hidden_BSD: Tensor, with_stats: bool
    ) -> tuple[Tensor, BalanceTerms | None, Tensor | None, Stats]:
        normed_BSD = self.feed_forward_norm(hidden_BSD)
        if self.moe is not None:
            return self.moe(normed_BSD, with_stats=with_stats)
        assert self.dense is not None
        y_BSD, *stats = self.dense(normed_BSD, with_stats=with_stats)
        return y_BSD, None, None, _named(("dense_input", "dense_hidden"), stats)

    def set_sparsity(self, plan: SparsityPlan) -> None:
        """Set S, thresholds if there are any, and the number of experts per token of this layer from ``plan``."""
        for site, module in self.sites().items():
            module.set_sparsity(plan.values[self.layer, site], plan.thresholds.get((self.layer, site)))
        if self.moe is not None:
            router = self.moe.router
            number = plan.experts(self.layer, router.config.experts_per_token)
            router.use_experts(number, plan.top_p.get(self.layer, 1.0))

    def sites(self) -> dict[Site, SparseSite]:
        """Return the sparse sites of this layer by name."""
        found: dict[Site, SparseSite] = {
            "attention_input": self.attention.input_site,
            "attention_output": self.attention.output_site,
        }
        if self.dense is not None:
            found |= {"dense_input": self.dense.input_site, "dense_hidden": self.dense.hidden_site}
        if self.moe is not None:
            found |= {"expert_input": self.moe.input_site, "expert_hidden": self.moe.experts.hidden_site}
            if self.moe.shared is not None:
                found |= {"shared_input": self.moe.shared.input_site, "shared_hidden": self.moe.shared.hidden_site}
        return found


def _named(sites: tuple[str, ...], stats: list[Stats]) -> Stats:
    return site_names(dict(zip(sites, stats, strict=True)))
