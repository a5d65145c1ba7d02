"""Sizes that all figures of a layout need: the parameters that one rank computes with and those that it keeps.

A layout is a config (ZeRO stage, offload, expert-parallel size P, micro-batch, recomputation) on a number of ranks N.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qsparse_moe.accounting.densities import no_zeros
from qsparse_moe.accounting.parameters import model_weights
from qsparse_moe.config.schema import ModelConfig, RunConfig

FP32 = 4
HALF = 2


@dataclass(frozen=True)
class ModuleSize:
    """The parameters of one module that computes by itself, such as a norm, a projection, or the experts of a layer."""

    name: str
    layer: int
    """The layer, counted from 0; -1 for the embedding, the last norm and the head."""
    is_experts: bool
    sizes: tuple[int, ...]
    """Number of elements of each parameter, of all E experts."""


@dataclass(frozen=True)
class LayoutCounts:
    """Elements of one rank, on average where ranks differ."""

    stage: int
    """ZeRO stage; 0 for the plain engine, which replicates everything."""
    width: int
    """Bytes of a value in the precision of the run."""
    dense: int
    """Elements of all parameters but the experts."""
    experts: float
    """Elements of the experts of one rank of an expert-parallel group."""
    share: float
    """Elements of which this rank keeps the optimizer state if it is sharded: dense / N + experts / (N / P)."""
    largest: int
    """Elements of the largest parameter of one rank."""

    @property
    def local(self) -> float:
        """Elements of the parameters that the rank computes with."""
        return self.dense + self.experts


def layout_counts(config: RunConfig, ranks: int) -> LayoutCounts:
    """Return the counts of ``config`` on ``ranks`` ranks."""
    training = config.training
    parallel = training.expert_parallel_size
    dense, experts, largest_dense, largest_expert = _sizes(config.model)
    return LayoutCounts(
        stage=0 if training.engine == "torch" else training.deepspeed.zero_stage,
        width=FP32 if training.precision == "fp32" else HALF,
        dense=dense,
        experts=experts / parallel,
        share=(dense + experts) / ranks,
        largest=max(largest_dense, largest_expert // parallel),
    )


@functools.lru_cache(maxsize=64)
def _sizes(model: ModelConfig) -> tuple[int, int, int, int]:
    """Return the elements outside and inside of experts, and the largest parameter of each."""
    modules = model_modules(model)
    dense = [size for module in modules if not module.is_experts for size in module.sizes]
    experts = [size for module in modules if module.is_experts for size in module.sizes]
    return sum(dense), sum(experts), max(dense), max(experts, default=0)


@functools.lru_cache(maxsize=64)
def model_modules(model: ModelConfig) -> tuple[ModuleSize, ...]:
    """Return the modules in the order of the forward pass; a tied head stores nothing and is left out."""
    found: dict[str, list[int]] = {}
    for weight in model_weights(model, densities=no_zeros(model)):
        # Experts, shared experts and dense networks hold their matrices themselves, other modules one weight or two.
        found.setdefault(weight.name.rpartition(".")[0], []).append(weight.stored)
    return tuple(
        ModuleSize(name, _layer_of(name), name.endswith("moe.experts"), tuple(size for size in sizes if size))
        for name, sizes in found.items()
        if sum(sizes)
    )


def _layer_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("layers.") else -1
