"""``bench drop-in``: what Q-Sparse inside a model of transformers costs, in a training step and in generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from qsparse_moe.bench.harness import Timing, fingerprint, model_sizes, ratio, synchronizer, time_in_turns
from qsparse_moe.bench.mixtral import EXPERTS, build_mixtral
from qsparse_moe.bench.step import DTYPES, training_step
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import vocab_size
from qsparse_moe.interop.drop_in.model import sparsify

UNCHANGED = "unchanged"
SPARSE = "with Q-Sparse"


@dataclass(frozen=True)
class DropInBenchmark:
    """The shape, the work, and the rounds of one benchmark."""

    model: ModelConfig
    precision: str
    sparsity: float
    rows: int
    """Sequences per training step."""
    sequence_length: int
    """Tokens per sequence of a training step."""
    prompt: int
    """Tokens of the prompt of a generation."""
    new_tokens: int
    """Tokens that one generation adds to one sequence."""
    rounds: int
    device: torch.device
    clock: Callable[[], float] | None = None
    """None means the wall clock; ``time.process_time`` excludes the time of other programs."""


def run_drop_in_benchmark(benchmark: DropInBenchmark) -> dict[str, Any]:
    """Time transformers' Mixtral with and without Q-Sparse inside, in turns, with the same weights.

    The training step has a fused AdamW and the balance loss. Generation is of one sequence, whose tokens are given.
    """
    models = {name: _model(benchmark) for name in (UNCHANGED, SPARSE)}
    sparsify(models[SPARSE], benchmark.sparsity)
    # Generation first: the steps of the two models change their weights differently.
    timed = {work: _time(make, models, benchmark) for work, make in (("generate", _generation), ("step", _step))}
    return {
        "benchmark": "drop-in",
        "machine": fingerprint(),
        "shape": _shape(benchmark),
        "seconds": {work: {name: t.median for name, t in timings.items()} for work, timings in timed.items()},
        "cost": {work: ratio(timings[SPARSE], timings[UNCHANGED]) for work, timings in timed.items()},
        "seconds_by_round": {
            work: {name: t.seconds_by_round for name, t in timings.items()} for work, timings in timed.items()
        },
    }


def _model(benchmark: DropInBenchmark) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_mixtral(benchmark.model, DTYPES[benchmark.precision], benchmark.device)


def _time(
    make: Callable[[Any, DropInBenchmark], Callable[[], object]],
    models: dict[str, torch.nn.Module],
    benchmark: DropInBenchmark,
) -> dict[str, Timing]:
    calls = {name: make(model, benchmark) for name, model in models.items()}
    return time_in_turns(
        calls,
        rounds=benchmark.rounds,
        calls=1,
        synchronize=synchronizer(benchmark.device),
        clock=benchmark.clock,
    )


def _step(model: Any, benchmark: DropInBenchmark) -> Callable[[], object]:
    tokens_BS = _tokens(benchmark, benchmark.rows, benchmark.sequence_length)
    model.train()
    return training_step(model, lambda: model(input_ids=tokens_BS, labels=tokens_BS).loss)


def _generation(model: Any, benchmark: DropInBenchmark) -> Callable[[], object]:
    prompt_BS = _tokens(benchmark, 1, benchmark.prompt)
    forced = _tokens(benchmark, 1, benchmark.prompt + benchmark.new_tokens)[0]

    def force(ids_BS: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        # With tokens of its own, a model that repeats itself would find the weights of its experts in the cache.
        scores = torch.full_like(scores_BV, float("-inf"))
        scores[:, forced[ids_BS.shape[1]]] = 0.0
        return scores

    settings = {
        "logits_processor": [force],
        "max_new_tokens": benchmark.new_tokens,
        # No sequence ends early, so both generate the same number of tokens.
        "min_new_tokens": benchmark.new_tokens,
        "do_sample": False,
        "use_cache": True,
    }
    model.eval()
    return lambda: model.generate(prompt_BS, attention_mask=torch.ones_like(prompt_BS), **settings)


def _tokens(benchmark: DropInBenchmark, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # Ids that every vocabulary has: the time does not depend on the text.
    ids = torch.randint(0, min(256, vocab_size(benchmark.model)), (rows, length), generator=generator)
    return ids.to(benchmark.device)


def _shape(benchmark: DropInBenchmark) -> dict[str, Any]:
    return {
        **model_sizes(benchmark.model),
        "vocab_size": vocab_size(benchmark.model),
        "rows": benchmark.rows,
        "sequence_length": benchmark.sequence_length,
        "prompt": benchmark.prompt,
        "new_tokens": benchmark.new_tokens,
        "precision": benchmark.precision,
        "sparsity": benchmark.sparsity,
        "rounds": benchmark.rounds,
        "clock": "processor" if benchmark.clock else "wall",
        "model": f"transformers {version('transformers')} MixtralForCausalLM, experts {EXPERTS}",
    }
