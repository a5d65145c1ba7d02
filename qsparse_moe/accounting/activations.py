"""Count the bytes of activations that training saves from a forward pass for its backward pass.

Numbers of values per token and layer (the tensors that autograd saves, as a test counts them), with D width, C channels
per head, H heads, G key-value heads, F hidden width, E experts, and A experts per token:

- the inputs of attention and feed-forward: D each;
- attention: its norm's output and what the projections read of it (2 D); query and key before and after their rotation,
  value, the attention's output and what the output projection reads (4 H C + 3 G C); with norms of queries and keys
  what they read (H C + G C) and a scale per norm;
- latent attention with ranks L and Q of keys and queries, N and R channels without and with a rotation, V of a value
  and P = max(N + R, V): 2 D likewise; the first product (Q + L + R; H (N + R) in place of Q without a rank of queries),
  its normed parts before and after their scale, and the rotated key (2 Q + 2 L + R); query, key, value and result
  (4 H P, where the value takes H (N + V) if V = P) and what the output projection reads (H V);
- feed-forward: its norm's output and what the first matrices read of it (2 D); gate, up and what the last matrix reads
  (3 F; without a gate 2 F). With experts in place of F: A times 2 D + 3 F, and for the router 2 E + 8 A in
  fp32, in half precision D in fp32 more for its input. Shared experts add D and 3 F of their own.

Beside the layers: embedding, last norm and head (3 D), and the log-probabilities (V, fp32).

The count is exact for exact top-K and for sites that select every feature. Where the sparsity plan uses fewer experts
per token, A is their number in the layer, and under ``top_p`` the largest, an upper limit. Masks of other selections,
rounded copies of number formats, the norms of ``rescale: preserve`` and the copies that a backend makes for its
products are not counted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qsparse_moe.accounting.experts_per_token import most_experts
from qsparse_moe.config.schema import ModelConfig, Recompute, RunConfig
from qsparse_moe.config.shapes import (
    LatentSizes,
    dense_hidden_size,
    has_experts,
    has_gate,
    head_size,
    latent_sizes,
    num_kv_heads,
    shared_hidden_size,
    vocab_size,
)

_FP32 = 4
_HALF = 2
FEW_LOGITS = 2**23
"""Number of logits below which the loss computes all of them at once, as in ``model/output_head.py``."""
PARTS = 4
"""Number of parts in which it computes more than these."""
_KEEPS_ATTENTION: tuple[Recompute, ...] = ("none", "feed_forward")
_KEEPS_FEED_FORWARD: tuple[Recompute, ...] = ("none", "attention")


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes on one rank, of one micro-batch."""

    saved: float
    """Bytes held from the forward pass until the backward pass."""
    recomputed: float
    """The largest number of bytes that the backward pass recomputes at once, held while it is in that layer."""
    log_probabilities: float
    """Bytes of the log-probabilities of the loss, which ``saved`` includes."""

    @property
    def total(self) -> float:
        """Sum of both, as in the first layer of the backward pass."""
        return self.saved + self.recomputed


def activation_memory(config: RunConfig, recompute: Recompute | None = None) -> ActivationMemory:
    """Return the activation memory of one micro-batch under ``recompute`` (None: the setting of the run)."""
    training = config.training
    chosen = training.activation_checkpointing if recompute is None else recompute
    tokens = training.micro_batch_size * config.data.sequence_length
    saved, recomputed, log_probabilities = _per_token(config.model, training.precision == "fp32", chosen)
    return ActivationMemory(tokens * saved, tokens * recomputed, tokens * log_probabilities)


@functools.lru_cache(maxsize=64)
def _per_token(model: ModelConfig, is_fp32: bool, chosen: Recompute) -> tuple[float, float, float]:
    """Return the bytes per token that are saved, recomputed at once, and saved of log-probabilities."""
    width = _FP32 if is_fp32 else _HALF
    saved, recomputed = [], []
    for layer in range(model.num_layers):
        attention, feed_forward = _attention(model) * width, _feed_forward(model, layer, width)
        again = (0.0 if chosen in _KEEPS_ATTENTION else attention) + (
            0.0 if chosen in _KEEPS_FEED_FORWARD else feed_forward
        )
        # The results of products are stored beside the graph, and what is made of them is recomputed.
        kept = _products(model, layer) * width if chosen == "selective" else 0.0
        # A part that is recomputed keeps its input; if both parts are, they need the layer's input only.
        inputs = {"none": 2, "attention": 2, "feed_forward": 2}.get(chosen, 1) * model.hidden_size * width
        saved.append(inputs + attention + feed_forward - again + kept)
        recomputed.append(again)
    # The loss takes the log-probabilities in fp32 whatever the precision of the run.
    log_probabilities = float(vocab_size(model) * _FP32)
    beside = 3 * model.hidden_size * width + log_probabilities
    # Layers are recomputed one after the other, so only the largest is there at any time.
    return sum(saved) + beside, max(recomputed), log_probabilities


def _products(model: ModelConfig, layer: int) -> float:
    """Return the number of values per token that matrix products and attention return in a layer."""
    latent = latent_sizes(model)
    if latent:
        mixed = model.num_heads * max(latent.query_head_size, latent.value_head_size)
        down = (latent.query_rank or model.num_heads * latent.query_head_size) + latent.cached_size
        up = model.num_heads * (latent.nope_head_size + latent.value_head_size)
        up += model.num_heads * latent.query_head_size if latent.query_rank else 0
        attention = down + up + mixed
    else:
        attention = (2 * model.num_heads + 2 * num_kv_heads(model)) * head_size(model)
    hidden = 2 if has_gate(model) else 1
    if not has_experts(model, layer):
        return attention + 2 * model.hidden_size + hidden * dense_hidden_size(model)
    moe = model.moe
    rows = most_experts(model)[layer] * (model.hidden_size + hidden * moe.expert_hidden_size)
    shared = model.hidden_size + hidden * shared_hidden_size(model) if moe.num_shared_experts else 0
    return attention + model.hidden_size + rows + shared + moe.num_experts


@dataclass(frozen=True)
class LogitsMemory:
    """Bytes on one rank, of one micro-batch."""

    peak: float
    """Largest number of bytes of logits and of what is computed from them at once."""
    kept: float
    """Bytes that the backward pass holds after the loss, beside the activations: gradients that the loss has made."""


def logits_memory(config: RunConfig) -> LogitsMemory:
    """Return the memory of the loss (``model/output_head.py``)."""
    tokens = config.training.micro_batch_size * config.data.sequence_length
    logits = float(tokens * vocab_size(config.model))
    width = _FP32 if config.training.precision == "fp32" else _HALF
    if logits < FEW_LOGITS or config.training.precision == "fp16":
        # Log-probabilities, their gradient, and the gradient of the logits, in fp32.
        return LogitsMemory(3 * _FP32 * logits, 0.0)
    # The gradients of the head and of its input, which the loss makes together with its value.
    kept = _FP32 * vocab_size(config.model) * config.model.hidden_size + width * tokens * config.model.hidden_size
    # The logits of a part in fp32, two temporaries of their log-sum, and the gradient of the part before.
    part = (3 * _FP32 + width) * logits / PARTS
    # Or the gradient of the head by one part, beside that part's gradient.
    of_head = width * (logits / PARTS + vocab_size(config.model) * config.model.hidden_size)
    return LogitsMemory(max(part, of_head) + kept, kept)


def layer_work(config: RunConfig) -> float:
    """Return the bytes that the backward pass of the largest layer computes with, beside what was saved.

    These are the gradients of its hidden features and routed tokens, and the gradient of one matrix before it is added
    to the sum.
    """
    model = config.model
    width = _FP32 if config.training.precision == "fp32" else _HALF
    tokens = config.training.micro_batch_size * config.data.sequence_length
    most = 0.0
    for layer in range(model.num_layers):
        if has_experts(model, layer):
            rows, hidden = most_experts(model)[layer], model.moe.expert_hidden_size
        else:
            rows, hidden = 1, dense_hidden_size(model)
        most = max(most, rows * (2.0 * model.hidden_size + 3 * hidden))
    return width * tokens * most


def _attention(model: ModelConfig) -> float:
    """Return the number of values per token, without the layer's input."""
    latent = latent_sizes(model)
    if latent:
        return 2 * model.hidden_size + _latent_attention(model.num_heads, latent)
    channels = head_size(model)
    heads, kv_heads = model.num_heads, num_kv_heads(model)
    normed = {
        "none": 0,
        "per_head": (heads + kv_heads) * (channels + 1),
        "all_heads": (heads + kv_heads) * channels + 2,
    }
    return 2 * model.hidden_size + (4 * heads + 3 * kv_heads) * channels + normed[model.qk_norm]


def _latent_attention(heads: int, sizes: LatentSizes) -> float:
    padded = max(sizes.query_head_size, sizes.value_head_size)
    down = (sizes.query_rank or heads * sizes.query_head_size) + sizes.cached_size
    # A value as wide as the padded heads is not copied, and the product that it is a part of stays whole.
    is_part = sizes.value_head_size == padded
    value = sizes.nope_head_size + sizes.value_head_size if is_part else padded
    per_head = 3 * padded + value + sizes.value_head_size
    normed = 2 * (sizes.query_rank or 0) + sizes.key_value_rank + sizes.cached_size
    return down + normed + heads * per_head


def _feed_forward(model: ModelConfig, layer: int, width: int) -> float:
    """Return the bytes per token, without the input."""
    hidden = 3 if has_gate(model) else 2
    if not has_experts(model, layer):
        return width * (2 * model.hidden_size + hidden * dense_hidden_size(model))
    moe = model.moe
    experts = most_experts(model)[layer]
    rows = experts * (2 * model.hidden_size + hidden * moe.expert_hidden_size)
    router = _FP32 * (2 * moe.num_experts + 8 * experts)
    # The router computes in fp32, so its input is saved a second time as an fp32 copy.
    if width != _FP32:
        router += _FP32 * model.hidden_size
    shared = model.hidden_size + hidden * shared_hidden_size(model) if moe.num_shared_experts else 0
    return width * (2 * model.hidden_size + rows + shared) + router
