"""Measure the start of a run: the peak memory of every rank while its engine is built, and the speed of the draw."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsparse_moe.bench.harness import fingerprint
from qsparse_moe.config.rules import check_world_size
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.model.init import RandomWeights
from qsparse_moe.model.transformer import build_empty
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.engines.protocol import COMPUTE_DTYPES, Engine
from qsparse_moe.training.monitor.memory import memory_in_use
from qsparse_moe.training.start import start_engine

_PEAK = Path("/proc/self/clear_refs")
# Writing this resets VmHWM (man proc_pid_clear_refs).
_RESET = "5"
_OPTIMIZER_BYTES = 4 + 4 + 4
"""Adam's two moments and the gradient, per value that a rank updates; all are fp32."""


def run_start_benchmark(config: RunConfig, *, values: int, rounds: int) -> dict[str, Any] | None:
    """Build the engine of ``config`` on the launcher's ranks, and time the draw of its weights beside torch's.

    Args:
        config: a complete run; its data is not read, and nothing is written.
        values: number of values that are drawn to time the draw.
        rounds: number of rounds, each of which draws them once in both ways.

    Returns:
        On rank 0 ``ranks``: see ``measure_start``, by rank; ``draw``: see ``time_draw``; and the machine. None on the
        other ranks.

    Raises:
        BackendUnavailable: the kernel cannot reset the peak of a process.
        ConfigError: the batch cannot be divided among the ranks.
    """
    with open_distributed(config.training.device, timeout=config.training.collective_timeout) as distributed:
        check_world_size(config, distributed.world_size)
        _load_code(config, distributed)
        engine, measured = measure_start(config, distributed)
        engine.close()
        ranks = distributed.all_gather(measured)
    if distributed.rank:
        return None
    return {
        "benchmark": "start",
        "machine": fingerprint(),
        "parameters": measured["parameters"],
        "ranks": ranks,
        # Only now, when the other ranks have left the cores.
        "draw": time_draw(config, values, rounds),
    }


def measure_start(config: RunConfig, distributed: Distributed) -> tuple[Engine, dict[str, Any]]:
    """Build the engine of a new run, and return it with figures of this rank in bytes and seconds.

    ``peak`` is the memory above ``before``, which the process had already. ``state`` is what the rank keeps: weights,
    fp32 master weights, moments, and gradients. ``largest_layer`` is all of it, in the dtype of the weights.
    """
    before = _resident(distributed, resets=True)
    begin = time.perf_counter()
    engine = start_engine(config, distributed)
    seconds = time.perf_counter() - begin
    peak = _resident(distributed, resets=False) - before
    shapes, group = engine.shapes(), engine.model.runtime.expert_group
    return engine, {
        "seconds": seconds,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "before": before,
        "peak": peak,
        "state": state_bytes(config, shapes, world_size=distributed.world_size, experts_over=group.size),
        "largest_layer": largest_layer(shapes, experts_over=group.size) * _bytes_per_weight(config),
    }


def time_draw(config: RunConfig, values: int, rounds: int) -> dict[str, float]:
    """Return the median nanoseconds per value, of the clock and of the processor, of our draw and of torch's.

    Torch's ``trunc_normal_`` drew the weights in earlier versions. Both fill the same tensor in fp32.
    """
    out = torch.zeros(values)
    source = RandomWeights(config.model, 0)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: source.fill("embedding.weight", 0, out),
        "trunc_normal": lambda: nn.init.trunc_normal_(out, std=0.02, a=-0.06, b=0.06),
    }
    times: dict[str, list[float]] = {f"{way}_{clock}": [] for way in ways for clock in ("wall", "processor")}
    for _ in range(rounds):
        for way, draw in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            draw()
            times[f"{way}_processor"].append(time.process_time() - processor)
            times[f"{way}_wall"].append(time.perf_counter() - wall)
    return {name: 1e9 * statistics.median(found) / values for name, found in times.items()}


def _load_code(config: RunConfig, distributed: Distributed) -> None:
    """Import what the model and the engine need, so that it does not count as memory of the build."""
    # It loads the implementations that the model calls, and has no memory for weights.
    build_empty(config.model, device=distributed.device)
    # The first optimizer of a process imports PyTorch's compiler, about 70 MB.
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    if config.training.engine == "deepspeed":
        import qsparse_moe.training.engines.deepspeed_engine  # noqa: F401


def _resident(distributed: Distributed, *, resets: bool) -> float:
    """Return the peak resident bytes of this process since the last reset; with ``resets``, those it has now."""
    if resets:
        try:
            _PEAK.write_text(_RESET)
        except OSError as error:
            raise BackendUnavailable(
                f"bench start: {_PEAK} cannot be written ({error.strerror}), and the peak memory of a build is read "
                "after a reset; run it on Linux, outside of a sandbox that forbids this"
            ) from None
        return memory_in_use(distributed.device)["resident"]
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def state_bytes(config: RunConfig, shapes: Mapping[str, Sequence[int]], *, world_size: int, experts_over: int) -> float:
    """Return the bytes that a rank keeps of parameters with these global shapes.

    Args:
        config: the layout.
        shapes: the global shape of every parameter by name.
        world_size: number of ranks.
        experts_over: number of ranks that share the experts.
    """
    stage = config.training.deepspeed.zero_stage if config.training.engine == "deepspeed" else 0
    kept = updated = 0
    for name, shape in shapes.items():
        shards = _shards(name, experts_over)
        shard = math.prod(shape) // shards
        part = -(-shard // (world_size // shards))
        kept += part if stage == 3 else shard
        updated += part if stage else shard
    # DeepSpeed's partitions have separate master weights in fp32 too.
    has_masters = stage > 0 or config.training.precision != "fp32"
    return kept * _bytes_per_weight(config) + updated * (_OPTIMIZER_BYTES + 4 * has_masters)


def largest_layer(shapes: Mapping[str, Sequence[int]], *, experts_over: int) -> int:
    """Return the number of weights of the largest layer, embedding, or head on a rank; see ``state_bytes``."""
    layers: dict[str, int] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        layer = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
        layers[layer] = layers.get(layer, 0) + math.prod(shape) // _shards(name, experts_over)
    return max(layers.values())


def _shards(name: str, experts_over: int) -> int:
    return experts_over if ".experts." in name else 1


def _bytes_per_weight(config: RunConfig) -> int:
    return COMPUTE_DTYPES[config.training.precision].itemsize
