"""The peer of the step and decode benchmarks: transformers' Mixtral of the same shape, with its fastest experts.

B sequences, V vocabulary.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.bench.random_weights import fill_random
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
    settings, model_class = _mixtral(config)
    return model_class._from_config(settings, dtype=dtype).to(device)


class DecodingMixtral:
    """A ``MixtralForCausalLM`` on the CPU that decodes from a static cache."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Build it with random weights.

        Raises:
            BackendUnavailable: transformers is not installed.
        """
        settings, model_class = _mixtral(config)
        # Generation has no balance loss, for which build_mixtral asks for the logits of the router.
        settings.output_router_logits, settings.use_cache = False, True
        with torch.device("meta"):
            model = model_class._from_config(settings, dtype=dtype)
        self._model = model.to_empty(device="cpu").eval()
        # Its table of frequencies is no parameter, and to_empty leaves it empty.
        self._model.model.rotary_emb = type(self._model.model.rotary_emb)(config=settings)
        fill_random(self._model, config.init_std)

    @torch.inference_mode()
    def seconds(self, batch: int, *, context: int, tokens: int) -> float:
        """Return the seconds of ``tokens`` greedy steps of ``batch`` sequences behind ``context`` tokens."""
        from transformers import StaticCache

        # This cache is allocated once, as ours is; the default one is copied in every step to grow.
        cache = StaticCache(config=self._model.config, max_cache_len=context + tokens)
        prompt_BS = torch.arange(batch * context).view(batch, context) % self._model.config.vocab_size
        tokens_B1 = self._step(prompt_BS, cache)
        start = time.perf_counter()
        for _ in range(tokens):
            tokens_B1 = self._step(tokens_B1, cache)
        return time.perf_counter() - start

    def _step(self, tokens_BS: Tensor, cache: Any) -> Tensor:
        # Without logits_to_keep the prompt would be multiplied with the head at every position.
        logits = self._model(input_ids=tokens_BS, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


def _mixtral(config: ModelConfig) -> tuple[Any, Any]:
    """Return the settings and the class of the peer.

    Raises:
        BackendUnavailable: transformers is not installed.
    """
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError:
        raise BackendUnavailable("the peer needs transformers; pip install 'qsparse-moe[hf]'") from None
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
        # The attention of our model is computed by the same function of PyTorch.
        attn_implementation="sdpa",
        experts_implementation=EXPERTS,
    )
    return settings, MixtralForCausalLM
