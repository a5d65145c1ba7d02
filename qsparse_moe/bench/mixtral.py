"""The peer of the step benchmark: Mixtral of transformers in the same shape, with its fastest experts."""

from __future__ import annotations

import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import vocab_size
from qsparse_moe.errors import BackendUnavailable

# The fastest expert implementation of transformers 5 on a CPU, measured earlier at 4 layers x 512, 16 experts x 768,
# and 1024 tokens. This benchmark does not repeat the comparison with the others (eager, batched_mm).
EXPERTS = "grouped_mm"


def build_mixtral(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Build a ``MixtralForCausalLM`` with the layers, widths, heads, experts, and vocabulary of ``config``.

    The weights are random.

    Raises:
        BackendUnavailable: transformers is not installed.
    """
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError:
        raise BackendUnavailable("bench step: the peer needs transformers; pip install 'qsparse-moe[hf]'") from None
    settings = MixtralConfig(
        vocab_size=vocab_size(config),
        hidden_size=config.hidden_size,
        intermediate_size=config.moe.expert_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads or config.num_heads,
        num_local_experts=config.moe.num_experts,
        num_experts_per_tok=config.moe.experts_per_token,
        output_router_logits=True,  # otherwise transformers omits the balance loss
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=EXPERTS,
    )
    return MixtralForCausalLM._from_config(settings, dtype=dtype).to(device)
