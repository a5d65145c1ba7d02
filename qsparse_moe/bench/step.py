"""``bench step``: one training step (forward, backward, optimizer) with and without Q-Sparse, against a peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.bench.harness import Timing, fingerprint, model_sizes, ratio, synchronizer, time_in_turns
from qsparse_moe.bench.mixtral import EXPERTS, build_mixtral
from qsparse_moe.config.schema import ModelConfig, Site, SparsityConfig
from qsparse_moe.config.shapes import vocab_size
from qsparse_moe.model.transformer import Transformer, build_model, measured_energies
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.freed_memory import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEER = "transformers Mixtral"
DENSE = "without Q-Sparse"
SPARSE = "with Q-Sparse"
MEASURING = "with Q-Sparse, a step that measures"
"""A step in which a shared selection measures the energies of all features."""


@dataclass(frozen=True)
class StepBenchmark:
    """The model shape, batch, and precision of one benchmark."""

    model: ModelConfig
    precision: str
    sparsity: float
    rows: int
    sequence_length: int
    rounds: int
    device: torch.device
    clock: Callable[[], float] | None = None
    """A clock in seconds; None means the wall clock."""
    selection: str = "topk"
    """``model.sparsity.selection`` of the model with Q-Sparse: ``topk`` or ``shared``."""
    gradient: str = "ste"
    """``model.sparsity.gradient`` of the same."""
    site: Site | None = None
    """The only site with S; None: every site."""

    @property
    def tokens(self) -> int:
        """Number of tokens per step."""
        return self.rows * self.sequence_length


def run_step_benchmark(benchmark: StepBenchmark) -> dict[str, Any]:
    """Time the three contenders in turns and profile one step with Q-Sparse.

    All three have the same shape, tokens, threads, and optimizer (fused AdamW), and include the balance loss.
    """
    # Ids that every vocabulary has: the time of a step does not depend on the text.
    tokens_BS = torch.randint(
        0, min(256, vocab_size(benchmark.model)), (benchmark.rows, benchmark.sequence_length), device=benchmark.device
    )
    steps = _contenders(benchmark, tokens_BS)
    if benchmark.device.type == "cpu":
        # As in a run. It serves all contenders, which share the heap of this process.
        keep_freed_memory()
    timings = time_in_turns(
        steps, rounds=benchmark.rounds, synchronize=synchronizer(benchmark.device), clock=benchmark.clock
    )
    found: dict[str, Any] = {
        "benchmark": "step",
        "machine": fingerprint(),
        "shape": _shape(benchmark),
        "clock": "wall" if benchmark.clock is None else "processor",
        "seconds": {name: timing.median for name, timing in timings.items()},
        "tokens_per_second": {name: benchmark.tokens / timing.median for name, timing in timings.items()},
        "times_faster_than_peer": {name: ratio(timings[PEER], timings[name]) for name in (DENSE, SPARSE)},
        "cost_of_q_sparse": ratio(timings[SPARSE], timings[DENSE]),
        "seconds_by_round": {name: timing.seconds_by_round for name, timing in timings.items()},
        "profile": {name: _profile(steps[name], benchmark.device) for name in steps},
    }
    if MEASURING in timings:
        interval = benchmark.model.sparsity.shared.measure_interval
        mean = _mean_step(timings[SPARSE], timings[MEASURING], interval)
        found["measure_interval"] = interval
        found["shared_sets"] = {"seconds": mean.median, "times_faster_than_dense": ratio(timings[DENSE], mean)}
    return found


def _mean_step(plain: Timing, measuring: Timing, interval: int) -> Timing:
    """Return the mean time of a step if one in ``interval`` measures."""
    pairs = zip(plain.seconds_by_round, measuring.seconds_by_round, strict=True)
    return Timing(tuple(((interval - 1) * one + other) / interval for one, other in pairs))


def _contenders(benchmark: StepBenchmark, tokens_BS: Tensor) -> dict[str, Callable[[], object]]:
    dtype = DTYPES[benchmark.precision]
    # Built once, so that the timing contains only steps.
    peer = build_mixtral(benchmark.model, dtype, benchmark.device)
    models = {DENSE: _ours(benchmark, 0.0, "topk"), SPARSE: _ours(benchmark, benchmark.sparsity, benchmark.selection)}
    if benchmark.selection == "shared":
        models[SPARSE].update_shared_sets(measured_energies(models[SPARSE](tokens_BS, with_stats=False).stats))
        models[SPARSE].measure_energies(False)
        models[MEASURING] = _ours(benchmark, benchmark.sparsity, benchmark.selection)
        models[MEASURING].load_state_dict(models[SPARSE].state_dict())
    steps = {PEER: training_step(peer, lambda: peer(input_ids=tokens_BS, labels=tokens_BS).loss)}
    for name, model in models.items():
        # These labels are not shifted and would train an identity; the time of a step does not depend on them.
        steps[name] = training_step(model, partial(_loss, model, tokens_BS))
    return steps


def _loss(model: Transformer, tokens_BS: Tensor) -> Tensor | None:
    return model(tokens_BS, tokens_BS, with_stats=False).loss


def _ours(benchmark: StepBenchmark, sparsity: float, selection: str) -> Transformer:
    # Validated again, because model_copy would accept any name.
    chosen = benchmark.model.sparsity.model_dump() | {"selection": selection, "gradient": benchmark.gradient}
    config = benchmark.model.model_copy(update={"sparsity": SparsityConfig.model_validate(chosen)})
    model = build_model(config, device=benchmark.device, dtype=DTYPES[benchmark.precision])
    model.set_sparsity(SparsityPlan.uniform(config, 0.0).with_(sparsity=sparsity, site=benchmark.site))
    return model


def training_step(model: torch.nn.Module, loss: Callable[[], Tensor | None]) -> Callable[[], object]:
    """Return a function that makes one step: forward, backward, and the optimizer."""
    # Fused for all contenders: the optimizer is no subject of the comparison and must not dominate it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        value = loss()
        assert value is not None
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _shape(benchmark: StepBenchmark) -> dict[str, Any]:
    return {
        **model_sizes(benchmark.model),
        "vocab_size": vocab_size(benchmark.model),
        "rows": benchmark.rows,
        "sequence_length": benchmark.sequence_length,
        "precision": benchmark.precision,
        "sparsity": benchmark.sparsity,
        "selection": benchmark.selection,
        "gradient": benchmark.gradient,
        "site": benchmark.site,
        "rounds": benchmark.rounds,
        "peer": f"transformers {_version('transformers')} MixtralForCausalLM, experts {EXPERTS}",
    }


def _profile(step: Callable[[], object], device: torch.device, top: int = 8) -> dict[str, float]:
    """Return the share of the time of one step that each of the ``top`` operators spends in itself on ``device``."""
    step()  # warms up, so that the profile has no compilation in it
    with torch.profiler.profile() as profiler:
        step()
    own = {
        event.key: event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    total = sum(own.values())
    largest = sorted(own, key=lambda name: own[name], reverse=True)[:top]
    return {name: round(own[name] / total, 4) for name in largest}


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
