"""The weights that ZeRO-3 gathers for the modules that compute, as DeepSpeed's coordinator of parameters decides it.

DeepSpeed records the order in which modules run in the first micro-batch, forward and backward. From then on it gathers
what a module needs and, ahead of it, parameters of the next modules while fewer than ``stage3_max_live_parameters``
elements are gathered and ``stage3_prefetch_bucket_size`` are being gathered. After a module has run it releases its
parameters unless the modules within the next ``stage3_max_reuse_distance`` elements use them again. Parameters below
``stage3_param_persistence_threshold`` elements are never released. The constants are those of
``training/engines/deepspeed_config.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qsparse_moe.accounting.layout_counts import ModuleSize, model_modules
from qsparse_moe.config.schema import ModelConfig, RunConfig

MAX_LIVE = 1_000_000_000
PERSISTENT = 100_000


@dataclass(frozen=True)
class Gathers:
    """Elements, in one micro-batch after the first."""

    dense: float
    """Elements gathered over all ranks, summed over forward and backward."""
    experts: float
    """The same for experts, over their expert data-parallel group."""
    most_live: float
    """Largest number of elements that are gathered at the same time, without those that are not copied because no other
    rank has a part of them."""
    persistent: float
    """Elements that stay gathered."""


def zero3_gathers(config: RunConfig, ranks: int) -> Gathers:
    """Return what one of ``ranks`` ranks gathers per micro-batch."""
    training = config.training
    chosen = training.deepspeed
    # With weights in files nothing is gathered ahead of its use.
    ahead = 0 if chosen.offload_parameters == "nvme" else 1
    recomputes = training.activation_checkpointing in ("full", "selective")
    parallel = training.expert_parallel_size
    # Of a group of one rank a module uses the rank's own tensor.
    copies = (ranks > 1, ranks > parallel)
    return _simulate(config.model, parallel, copies, ahead * chosen.reduce_bucket_size, ahead * MAX_LIVE, recomputes)


@functools.lru_cache(maxsize=256)
def _simulate(
    model: ModelConfig, parallel: int, copies: tuple[bool, bool], prefetch: int, max_live: int, recomputes: bool
) -> Gathers:
    modules = model_modules(model)
    sizes = [sum(module.sizes) // (parallel if module.is_experts else 1) for module in modules]
    copied = [size * copies[module.is_experts] for size, module in zip(sizes, modules, strict=True)]
    persists = [size < PERSISTENT for size in sizes]
    order = _trace(modules, recomputes)
    live: set[int] = set()
    num_live = num_copied = most = 0
    gathered = {False: 0, True: 0}
    fetched_for: dict[int, int] = {}
    position = 0
    for step, module in enumerate(order):
        wanted = [] if persists[module] or module in live else [module]
        # What is fetched now needs no prefetch any more.
        position = max(position, step + 1)
        most_ahead = min(max_live - num_live - sum(sizes[index] for index in wanted), prefetch)
        started = 0
        while position < len(order) and started < most_ahead:
            following = order[position]
            fetched_for[following] = position
            if not persists[following] and following not in live and following not in wanted:
                wanted.append(following)
                started += sizes[following]
            position += 1
        for index in wanted:
            live.add(index)
            num_live += sizes[index]
            num_copied += copied[index]
            gathered[modules[index].is_experts] += sizes[index]
        most = max(most, num_copied)
        if module in live and fetched_for.get(module, -1) <= step and not _reused(order, sizes, step, module, max_live):
            live.remove(module)
            num_live -= sizes[module]
            num_copied -= copied[module]
    persistent = sum(size for size, stays in zip(copied, persists, strict=True) if stays)
    return Gathers(gathered[False], gathered[True], most + persistent, persistent)


def _reused(order: list[int], sizes: list[int], step: int, module: int, distance: int) -> bool:
    """Return whether ``module`` runs again before ``distance`` elements have run after ``step``."""
    passed = 0
    for following in order[step + 1 :]:
        if passed >= distance:
            return False
        if following == module:
            return True
        passed += sizes[following]
    return False


def _trace(modules: tuple[ModuleSize, ...], recomputes: bool) -> list[int]:
    """Return the modules in the order in which they run: forward, then backward, each layer recomputed before it."""
    forward = list(range(len(modules)))
    backward: list[int] = []
    position = len(modules)
    while position:
        layer = modules[position - 1].layer
        first = position - 1
        while layer >= 0 and first and modules[first - 1].layer == layer:
            first -= 1
        members = list(range(first, position))
        backward += (members if recomputes and layer >= 0 else []) + members[::-1]
        position = first
    return forward + backward
