"""``bench decode --device cuda``: the Triton engine with and without zeros beside the modules of the training model.

All contenders have the same shape, random weights and context, and are timed in turns. B sequences.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from qsparse_moe.bench.decode import (
    OURS,
    DecodeBenchmark,
    check_formats,
    random_model,
    seconds_in_turns,
    shape_of,
    trained_in,
)
from qsparse_moe.bench.harness import fingerprint, ratio
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.inference import triton_engine
from qsparse_moe.inference.cached_model import TorchDecode
from qsparse_moe.inference.engine import DecodeEngine
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.triton_engine import TritonDecode
from qsparse_moe.inference.weights import round_weights
from qsparse_moe.kernels.row_product.stored import WeightFormat
from qsparse_moe.model.transformer import Transformer

MODULES = "training modules"


def run_gpu_decode_benchmark(
    benchmark: DecodeBenchmark, device: torch.device, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure every number format on ``device``, one after another; inside one, all contenders in turns.

    Args:
        benchmark: what to measure; its peers and its prompt are left out.
        device: a CUDA device, or a CPU where Triton is interpreted.
        report: called with a line before each part.

    Raises:
        BackendUnavailable: the device or Triton is missing.
        ConfigError: a model in this number format cannot have this head.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("--device (cuda) needs a CUDA device, and torch sees none; use --device cpu")
    check_formats(benchmark)
    return {
        "benchmark": "decode",
        "machine": fingerprint(),
        "device": str(device),
        "shape": shape_of(benchmark),
        "formats": {
            weight_format: _run_format(benchmark, weight_format, device, report) for weight_format in benchmark.formats
        },
    }


class _Steps:
    """The requested number of greedy steps of an engine, from the same context."""

    def __init__(
        self, engine: DecodeEngine, model: Transformer, batch: int, device: torch.device, benchmark: DecodeBenchmark
    ) -> None:
        self._engine, self._context, self._steps = engine, benchmark.context, benchmark.tokens
        self._tokens_B = torch.arange(batch) + 1
        self._cache = KeyValueCache.allocate(
            model.config,
            batch=batch,
            capacity=benchmark.context + benchmark.tokens,
            dtype=engine.cache_dtype or model.head.weight.dtype,
            device=device,
        )

    def __call__(self) -> float:
        self._cache.positions_B.fill_(self._context)
        tokens_B = self._tokens_B
        start = time.perf_counter()
        for _ in range(self._steps):
            # The next step needs the token on the CPU, which waits for the device: no other synchronization is needed.
            tokens_B = self._engine.decode(tokens_B, self._cache).argmax(-1).cpu()
        return time.perf_counter() - start


def _run_format(
    benchmark: DecodeBenchmark, weight_format: WeightFormat, device: torch.device, report: Callable[[str], None]
) -> dict[str, Any]:
    config = trained_in(benchmark.model, weight_format)
    model = random_model(config, weight_format, device)
    reason = triton_engine.why_not(model)
    if reason is not None:
        raise BackendUnavailable(f"engine (triton) cannot run on {device}: {reason}")
    round_weights(model, weight_format, benchmark.head)
    engines: dict[str, DecodeEngine] = {MODULES: TorchDecode(model)}
    dense = TritonDecode(model, weight_format, head=benchmark.head)
    for sparsity in dict.fromkeys((0.0, *benchmark.sparsities)):
        # Sites of its own, and the parameters of all.
        planned = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        planned.set_sparsity(benchmark.plan(config, sparsity))
        engines[f"{OURS} S {sparsity:g}"] = dense.with_plan_of(planned)
    rows = []
    for batch in benchmark.batches:
        report(f"{weight_format}, batch {batch}: {', '.join(engines)}")
        contenders = {name: _Steps(engine, model, batch, device, benchmark) for name, engine in engines.items()}
        timings = seconds_in_turns(contenders, benchmark.rounds)
        rows += [
            {
                "contender": name,
                "batch": batch,
                "tokens_per_second": batch * benchmark.tokens / timing.median,
                "seconds_by_round": timing.seconds_by_round,
                "times_ours_dense": ratio(timings[f"{OURS} S 0"], timing),
                "times_peer": {MODULES: ratio(timings[MODULES], timing)} if name != MODULES else {},
            }
            for name, timing in timings.items()
        ]
    # The engines of a format take several GB and must be gone before those of the next are built.
    gc.collect()
    return {"head": dense.figures()["head"], "decode": rows, "prefill": []}
