"""Shared experts, which every token uses. B batch, S sequence, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import shared_hidden_size
from qsparse_moe.nn.feed_forward import FeedForward
from qsparse_moe.nn.runtime import SiteRuntime
from qsparse_moe.sparsity.stats import Stats


class SharedExperts(FeedForward):
    """All shared experts as one feed-forward network, with an optional gate on its output per token.

    The gate, ``sigmoid(x @ token_gate.T)``, is that of Qwen1.5-MoE and Qwen2-MoE. Like a router, it reads the dense
    token in fp32 regardless of the model's dtype.
    """

    def __init__(self, config: ModelConfig, runtime: SiteRuntime) -> None:
        super().__init__(config, "shared", shared_hidden_size(config), runtime)
        gated = config.moe.shared_expert_gate
        self.token_gate = nn.Parameter(torch.empty(1, config.hidden_size)) if gated else None

    def forward(self, x_BSD: Tensor, *, with_stats: bool) -> tuple[Tensor, Stats, Stats]:
        """Return the output ``(B, S, D)`` and the statistics of the input site and of the hidden site."""
        y_BSD, input_stats, hidden_stats = super().forward(x_BSD, with_stats=with_stats)
        if self.token_gate is not None:
            wide = torch.promote_types(x_BSD.dtype, torch.float32)
            gate_BS1 = (x_BSD.to(wide) @ self.token_gate.to(wide).T).sigmoid()
            # The gate is rounded last, so that the product has the dtype of the model.
            y_BSD = y_BSD * gate_BS1.to(y_BSD.dtype)
        return y_BSD, input_stats, hidden_stats
