"""The experts that every token uses. B batch, S sequence, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import shared_hidden_size
from qsparse_moe.nn.feed_forward import FeedForward
from qsparse_moe.nn.runtime import SiteRuntime
from qsparse_moe.sparsity.stats import Stats


class SharedExperts(FeedForward):
    """One feed-forward for all of them, and if asked for a gate: ``sigmoid(x @ token_gate.T)`` scales a token's output.

    The gate, as in Qwen1.5-MoE and Qwen2-MoE, is a router of one expert: it too reads the dense token, in fp32 whatever
    the model's dtype.
    """

    def __init__(self, config: ModelConfig, runtime: SiteRuntime) -> None:
        super().__init__(config, "shared", shared_hidden_size(config), runtime)
        gated = config.moe.shared_expert_gate
        self.token_gate = nn.Parameter(torch.empty(1, config.hidden_size)) if gated else None

    def forward(self, x_BSD: Tensor, *, with_stats: bool) -> tuple[Tensor, Stats, Stats]:
        """``(B, S, D)`` to ``(B, S, D)``, with the sums of the input and of the hidden site."""
        y_BSD, input_stats, hidden_stats = super().forward(x_BSD, with_stats=with_stats)
        if self.token_gate is not None:
            wide = torch.promote_types(x_BSD.dtype, torch.float32)
            share_BS1 = (x_BSD.to(wide) @ self.token_gate.to(wide).T).sigmoid()
            y_BSD = y_BSD * share_BS1.to(y_BSD.dtype)
        return y_BSD, input_stats, hidden_stats
