"""Count the memory of training and generation per rank: weights, gradients, optimizer, key-value cache.

It counts the state of this package's engines (``training/engines/``): in bf16 and fp16, and in fp32 under ZeRO-1 to 3,
the weights twice, in their own precision and as fp32 masters; gradients added in fp32; Adam's two moments in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsparse_moe.accounting.densities import no_zeros
from qsparse_moe.accounting.parameters import count_by_part
from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.config.shapes import cached_values

_FP32 = 4
_HALF = 2


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one rank between two steps."""

    weights: float
    """Weights in the precision of the computation."""
    gradients: float
    """Summed over micro-batches, fp32."""
    optimizer: float
    """fp32 masters, unless the weights are their own, and Adam's moments."""

    @property
    def total(self) -> float:
        """Sum of all three."""
        return self.weights + self.gradients + self.optimizer


def state_memory(config: RunConfig, world_size: int, zero_stage: int | None = None) -> StateMemory:
    """Return the model's state on one of ``world_size`` ranks under ZeRO ``zero_stage`` (None: the run's).

    Stage 1 shards the optimizer, 2 the gradients too, 3 the weights too (arXiv 1910.02054, section 3). With
    ``training.expert_parallel_size`` P a rank has 1 / P of the experts, sharded over the ranks that share them.
    """
    training = config.training
    stage = training.deepspeed.zero_stage if zero_stage is None else zero_stage
    # The torch engine replicates its state on every rank: it has no ZeRO stage.
    if training.engine == "torch":
        stage = 0
    parallel = training.expert_parallel_size
    counted = count_by_part(config.model, densities=no_zeros(config.model))  # zeros are stored too
    parts = {part: count.stored for part, count in counted.items()}
    experts = parts.pop("experts", 0)
    others = sum(parts.values())
    half = training.precision != "fp32"
    # The optimizer holds three fp32 values per weight, a master and two moments. In fp32 the weights are their own
    # masters only where nothing is sharded: DeepSpeed's ZeRO copies its share of them in any precision.
    weight = _HALF if half else _FP32
    optimizer = (3 if half or stage else 2) * _FP32

    def held(bytes_each: int, first_sharded: int) -> float:
        shards = world_size if stage >= first_sharded else 1
        # Experts are divided over the P ranks already, and ZeRO shards them over the ranks that hold the same ones.
        return bytes_each * (others / shards + experts / parallel / max(1, shards // parallel))

    return StateMemory(weights=held(weight, 3), gradients=held(_FP32, 2), optimizer=held(optimizer, 1))


def kv_cache_bytes(config: ModelConfig, tokens: int, bytes_per_value: int = _HALF) -> int:
    """Return the bytes that generation stores for the attention to ``tokens`` tokens, in all layers.

    These are keys and values; with latent attention, the vector that both are computed from and the rotated key.
    """
    return config.num_layers * cached_values(config) * tokens * bytes_per_value
