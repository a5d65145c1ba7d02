"""Multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values of all heads from one vector per token.

B batch, S sequence, K tokens that a query attends to, H heads, D width, L rank of the latent vector (key_value_rank),
N and R channels of a query or key head without and with a rotation, V channels of a value head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import LatentSizes, attended_size, latent_sizes, mixed_size
from qsparse_moe.model.attention import Attend, AttentionCache, Projection
from qsparse_moe.model.rope import Rotation, rotate
from qsparse_moe.nn.runtime import SiteRuntime
from qsparse_moe.sparsity.quantize import as_format
from qsparse_moe.sparsity.stats import Stats

# Published models have it whatever their norm_epsilon is: DeepSeek's code and transformers do not pass theirs here.
_EPSILON = 1e-6


class LatentAttention(nn.Module):
    """Latent attention with two sparse sites: before the joint projection to the ranks, and before the output.

    The projections from the ranks to the heads have no site: their inputs are a few hundred normed channels, into which
    the model has compressed the token already.
    """

    INNER = ("query_up", "latent_up")
    """Names of the projections without a site."""

    def __init__(self, config: ModelConfig, runtime: SiteRuntime) -> None:
        super().__init__()
        sizes = latent_sizes(config)
        assert sizes is not None, "this model has ordinary attention"
        self.sizes: LatentSizes = sizes
        self.num_heads = config.num_heads
        self.attended_size = attended_size(config)
        # Not the scale of SDPA, which would follow from the channels of its keys: latent or padded ones.
        self.scale = sizes.query_head_size**-0.5 * config.rope_scaling.score_factor
        queries = self.num_heads * sizes.query_head_size
        weight_format = config.sparsity.quantization.weights
        # One matrix for the queries (or their vector), the latent vector, and the rotated key, so that one product and
        # one sparse input serve all three.
        self.split = [sizes.query_rank or queries, sizes.key_value_rank, sizes.rope_head_size]
        self.down = Projection(config.hidden_size, sum(self.split), weight_format)
        self.query_latent_norm = nn.RMSNorm(sizes.query_rank, eps=_EPSILON) if sizes.query_rank else None
        self.query_up = Projection(sizes.query_rank, queries, weight_format) if sizes.query_rank else None
        self.latent_norm = nn.RMSNorm(sizes.key_value_rank, eps=_EPSILON)
        keys_and_values = self.num_heads * (sizes.nope_head_size + sizes.value_head_size)
        self.latent_up = Projection(sizes.key_value_rank, keys_and_values, weight_format)
        self.output = Projection(mixed_size(config), config.hidden_size, weight_format)
        self.input_site = runtime.make_site("attention_input", config.hidden_size, config.sparsity)
        self.output_site = runtime.make_site("attention_output", mixed_size(config), config.sparsity)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        *,
        with_stats: bool,
        cache: AttentionCache | None = None,
        attend: Attend | None = None,
    ) -> tuple[Tensor, Stats, Stats]:
        """Return the attention output ``(B, S, D)`` and the statistics of both sites; see ``Attention``.

        ``attend`` receives the keys and values of every head, of one size.
        """
        x_BSD, input_stats = self.input_site(x_BSD, with_stats=with_stats)
        query_BSX, latent_BSL, key_BSR = self.down(x_BSD).split(self.split, dim=-1)
        query_BHSX = self._queries(query_BSX, rotation)
        # One key and one vector for all heads, as if there were one.
        rotated_B1SR = rotate(key_BSR[:, None], rotation)
        stored_B1SX = torch.cat((self.latent_norm(latent_BSL)[:, None], rotated_B1SR), dim=-1)
        if attend is None:
            mixed_BHSV = self._attend_to_stored(query_BHSX, stored_B1SX, cache)
            mixed_BSX = rearrange(mixed_BHSV, "b h s v -> b s (h v)")
        else:
            mixed_BSX = attend(*self._heads(query_BHSX, stored_B1SX))
            mixed_BSHX = rearrange(mixed_BSX, "b s (h x) -> b s h x", h=self.num_heads)
            mixed_BSX = mixed_BSHX[..., : self.sizes.value_head_size].flatten(2)
        mixed_BSX, output_stats = self.output_site(mixed_BSX, with_stats=with_stats)
        return self.output(mixed_BSX), input_stats, output_stats

    def _attend_to_stored(
        self,
        query_BHSX: Tensor,
        stored_B1SX: Tensor,
        cache: AttentionCache | None,
    ) -> Tensor:
        """Return ``(B, H, S, V)``."""
        mask = None
        if cache is not None:
            assert not self.training, "a cache requires evaluation mode"
            # Values without channels: the keys hold everything that keys and values are computed from.
            stored_B1SX, _, mask = cache.update(stored_B1SX, stored_B1SX[..., :0])
        is_one_step = cache is not None and query_BHSX.shape[2] == 1
        attend = self.attend_to_latents if is_one_step else self._attend_to_heads
        return attend(query_BHSX, stored_B1SX, mask)

    def _queries(self, query_BSX: Tensor, rotation: Rotation) -> Tensor:
        """Return ``(B, H, S, N + R)``, the last R channels rotated."""
        if self.query_up is not None and self.query_latent_norm is not None:
            query_BSX = self.query_up(self.query_latent_norm(query_BSX))
        return self.heads_of_queries(query_BSX, rotation)

    def heads_of_queries(self, query_BSX: Tensor, rotation: Rotation) -> Tensor:
        """Return the queries ``(B, S, H (N + R))`` by head, ``(B, H, S, N + R)``, the last R channels rotated."""
        query_BHSX = rearrange(query_BSX, "b s (h x) -> b h s x", h=self.num_heads)
        plain_BHSN, rotated_BHSR = query_BHSX.split([self.sizes.nope_head_size, self.sizes.rope_head_size], dim=-1)
        return torch.cat((plain_BHSN, rotate(rotated_BHSR, rotation)), dim=-1)

    def _attend_to_heads(self, query_BHSX: Tensor, stored_B1KX: Tensor, mask_B1SK: Tensor | None) -> Tensor:
        """Return ``(B, H, S, V)`` from the keys and values of every head: computed once per token, for many queries."""
        query_BHSX, key_BHKX, value_BHKX = self._heads(query_BHSX, stored_B1KX)
        return self._attend(query_BHSX, key_BHKX, value_BHKX, mask_B1SK)[..., : self.sizes.value_head_size]

    def _heads(self, query_BHSX: Tensor, stored_B1KX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys, and values of every head, padded to one size."""
        sizes = self.sizes
        latent_B1KL, rotated_B1KR = stored_B1KX.split([sizes.key_value_rank, sizes.rope_head_size], dim=-1)
        up_BHKX = rearrange(self.latent_up(latent_B1KL[:, 0]), "b k (h x) -> b h k x", h=self.num_heads)
        plain_BHKN, value_BHKV = up_BHKX.split([sizes.nope_head_size, sizes.value_head_size], dim=-1)
        key_BHKX = torch.cat((plain_BHKN, rotated_B1KR.expand(-1, self.num_heads, -1, -1)), dim=-1)
        # The fused kernels take keys and values of one size only, and without them a sequence needs S x S scores per
        # head: at 192 and 128 channels and 1024 tokens that took 1.6 times as long on a CPU.
        size = self.attended_size
        return _padded(query_BHSX, size), _padded(key_BHKX, size), _padded(value_BHKV, size)

    def attend_to_latents(self, query_BH1X: Tensor, stored_B1KX: Tensor, mask_B11K: Tensor | None) -> Tensor:
        """Return the same for one query, with the halves of ``latent_up`` applied to the query and to the result.

        q · (Wk c) = (Wk^T q) · c, and the sum of a Wv c over the tokens is Wv times the sum of a c (section 2.1.2). So
        no key or value of an earlier token is computed again, which takes about (N + V) / 2 times as many operations.
        """
        sizes = self.sizes
        # The products are in the dtype of the weight, as those of a Projection are.
        weight = as_format(self.latent_up.weight, self.latent_up.weight_format)
        up_HXL = rearrange(weight, "(h x) l -> h x l", h=self.num_heads)
        key_HNL, value_HVL = up_HXL.split([sizes.nope_head_size, sizes.value_head_size], dim=1)
        plain_BH1N, rotated_BH1R = query_BH1X.split([sizes.nope_head_size, sizes.rope_head_size], dim=-1)
        absorbed_BH1L = (plain_BH1N.to(weight.dtype) @ key_HNL).to(query_BH1X.dtype)
        query_BH1X = torch.cat((absorbed_BH1L, rotated_BH1R), dim=-1)
        # The heads are the queries of one attention, because all have the same keys: nothing is repeated per head.
        latent_B1KL = stored_B1KX[..., : sizes.key_value_rank]
        mixed_B1HL = self._attend(query_BH1X.transpose(1, 2), stored_B1KX, latent_B1KL, mask_B11K)
        mixed_BH1L = mixed_B1HL.transpose(1, 2).to(weight.dtype)
        return (mixed_BH1L @ value_HVL.mT).to(query_BH1X.dtype)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=self.scale)


def _padded(x: Tensor, channels: int) -> Tensor:
    """Return ``x`` with zeros behind its channels, which change neither a score nor the other channels of a result."""
    return x if x.shape[-1] == channels else F.pad(x, (0, channels - x.shape[-1]))
