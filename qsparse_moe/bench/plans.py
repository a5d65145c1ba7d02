"""``bench plans``: decoding with a trained model under sparsity plans, beside llama.cpp with the same weights.

All contenders read the same held-out text token by token and are timed in turns, because tokens of another text would
use other experts. The same steps give the loss of every contender. B texts at once, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsparse_moe.ablation.routing import with_all_ranks
from qsparse_moe.bench.harness import Timing, fingerprint, model_sizes, ratio
from qsparse_moe.bench.llama_peer import WEIGHTS_FOLDER, Clock, LlamaCpp, find_llama_cpp, formats_beside
from qsparse_moe.bench.llama_weights import llama_architecture, write_llama_weights
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.loader import load_data
from qsparse_moe.data.token_data import TokenData
from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.inference import native
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.load import LoadedModel, load_model
from qsparse_moe.inference.native import NativeDecode
from qsparse_moe.inference.weights import head_format, own_format, round_weights
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import load_run_config
from qsparse_moe.sparsity.plan import SparsityPlan

DENSE = "dense"
# Pieces of one document are shorter than sequences at times, so more are read than are needed.
_READ_PER_TEXT = 4


@dataclass(frozen=True)
class PlansBenchmark:
    """The settings of one benchmark of plans."""

    folder: Path
    """A run, a checkpoint, or an export."""
    plans: Mapping[str, Path]
    """Files of plans by the name that the result gives them."""
    formats: Sequence[str] = ("auto",)
    """Number formats of the weights; ``auto``: that of training or of the export."""
    batch: int = 1
    tokens: int = 64
    """Steps per measurement, from the beginning of a text."""
    rounds: int = 9
    texts: int = 16
    """Number of held-out texts for the losses."""
    clock: Clock = "wall"
    llama_cpp: bool = True
    overrides: Sequence[str] = ()
    """Settings of the data in place of the run's."""
    llama_folder: Path = WEIGHTS_FOLDER
    """Where the weights for llama.cpp are written, and removed again."""


def run_plans_benchmark(benchmark: PlansBenchmark, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure every number format, one after another; inside one, all contenders in turns.

    Args:
        benchmark: what to measure.
        report: called with a line before each part, for whoever waits.

    Raises:
        ConfigError: a plan does not fit the model, or no held-out text is long enough.
        BackendUnavailable: the engine native cannot run the model or a plan.
        CheckpointError: the folder has no trained model.
    """
    found = find_model(benchmark.folder)
    config = load_run_config(found.config_folder, benchmark.overrides)
    # All of them before the weights are read.
    plans = {name: _plan(file, config) for name, file in benchmark.plans.items()}
    texts = held_out_texts(load_data(config.data), benchmark)
    results, step = {}, 0
    for name in benchmark.formats:
        loaded = load_model(found.path, weights=name)
        step = loaded.step
        weights = loaded.formats.weights or own_format(loaded.model)
        report(f"{weights}: {', '.join([DENSE, *plans])}")
        results[weights] = _run_format(benchmark, loaded, plans, texts, report)
    return {
        "benchmark": "plans",
        "machine": fingerprint(),
        "run": str(benchmark.folder),
        "step": step,
        "shape": model_sizes(config.model) | {"batch": benchmark.batch, "tokens": benchmark.tokens},
        "rounds": benchmark.rounds,
        "clock": benchmark.clock,
        "texts": {"number": len(texts), "labels": sum(len(text) - 1 for text in texts)},
        "formats": results,
    }


def _plan(file: Path, config: RunConfig) -> SparsityPlan:
    plan = SparsityPlan.load(file)
    plan.check_fits(config.model, file=file)
    return plan


def held_out_texts(data: TokenData, benchmark: PlansBenchmark) -> list[list[int]]:
    """Return held-out texts of one document each, as many as the losses and a batch need, or fewer if there are fewer.

    Raises:
        ConfigError: no text has a label behind each of the ``tokens`` steps.
    """
    wanted = max(benchmark.texts, benchmark.batch)
    table, indices = data.evaluation_sequences(_READ_PER_TEXT * wanted)
    pieces = [_first_piece(row, data.tokenizer.document_token) for row in table.tokens(indices)]
    texts = [piece for piece in pieces if len(piece) > benchmark.tokens]
    if not texts:
        longest = max((len(piece) for piece in pieces), default=1) - 1
        raise ConfigError(
            f"--tokens ({benchmark.tokens}) must be at most {longest}, the longest held-out text of one document in "
            "one sequence; measure fewer tokens, or give longer text by --data"
        )
    return texts[:wanted]


def _first_piece(row_S: np.ndarray, document_token: int) -> list[int]:
    """Return the tokens before the next document: the engines read one document per sequence."""
    begins = np.flatnonzero(row_S[1:] == document_token)
    return [int(token) for token in (row_S[: begins[0] + 1] if len(begins) else row_S)]


class OurEngine:
    """Our engine under one plan: reads texts token by token."""

    def __init__(self, engine: NativeDecode, model: Transformer) -> None:
        self._engine, self._config = engine, model.config
        self.bytes_per_step = 0.0

    @torch.no_grad()
    def follow_seconds(self, tokens_BT: Tensor, *, clock: Clock = "wall") -> float:
        """Return the seconds of B texts, one step per token."""
        now = time.process_time if clock == "processor" else time.perf_counter
        cache = self._cache(*tokens_BT.shape)
        # Cut before the clock starts, as for llama.cpp.
        steps, read = [step_B.contiguous() for step_B in tokens_BT.unbind(1)], 0
        start = now()
        for step_B in steps:
            self._engine.decode(step_B, cache)
            read += self._engine.bytes_read
        seconds = now() - start
        self.bytes_per_step = read / len(steps)
        return seconds

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits behind every token of a text, ``(T, V)`` fp32."""
        cache = self._cache(1, len(tokens))
        return torch.cat([self._engine.decode(torch.tensor([token]), cache).float() for token in tokens])

    def _cache(self, batch: int, capacity: int) -> KeyValueCache:
        return KeyValueCache.allocate(self._config, batch=batch, capacity=capacity, dtype=torch.float32)


def _run_format(
    benchmark: PlansBenchmark,
    loaded: LoadedModel,
    plans: Mapping[str, SparsityPlan],
    texts: Sequence[Sequence[int]],
    report: Callable[[str], None],
) -> dict[str, Any]:
    model = loaded.model
    weights = loaded.formats.weights or own_format(model)
    round_weights(model, weights, loaded.formats.head)
    head = head_format(model, weights, loaded.formats.head)
    ours = _engines(loaded, plans)
    with ExitStack() as stack:
        peers = _llama_peers(benchmark, model, (weights, head), stack, report)
        timings = _timed(benchmark, ours, peers, texts)
        losses = _losses(ours, peers, model.hidden_ids, texts[: benchmark.texts])
    rows = []
    for name, timing in timings.items():
        seconds = timing.median / benchmark.tokens
        row = {"contender": name, "tokens_per_second": benchmark.batch / seconds}
        row |= {"seconds_by_round": timing.seconds_by_round, "times_dense": ratio(timings[DENSE], timing)}
        row |= {"times_llama_cpp": {peer: ratio(timings[peer], timing) for peer in peers}}
        row |= {"bytes_per_step": ours[name].bytes_per_step} if name in ours else {}
        rows.append(row | losses[name])
    return {"head": head, "decode": rows}


def _engines(loaded: LoadedModel, plans: Mapping[str, SparsityPlan]) -> dict[str, OurEngine]:
    """Return our engine under every plan, over the same stored weights."""
    model, found = loaded.model, {}
    engine: NativeDecode | None = None
    dense = with_all_ranks(SparsityPlan.uniform(model.config, 0.0))
    for name, plan in {DENSE: dense, **plans}.items():
        model.set_sparsity(plan)
        if (reason := native.why_not(model)) is not None:
            raise BackendUnavailable(f"the engine native cannot run the plan {name}: {reason}")
        if engine is None:
            engine = NativeDecode(model, loaded.formats.weights, head=loaded.formats.head, rows="auto")
        else:
            engine = engine.with_plan_of(model)
        found[name] = OurEngine(engine, model)
    return found


def _llama_peers(
    benchmark: PlansBenchmark,
    model: Transformer,
    formats: tuple[Any, Any],
    stack: ExitStack,
    report: Callable[[str], None],
) -> dict[str, LlamaCpp]:
    """Return llama.cpp with the same weights in the formats beside ours; if there is none, that is reported."""
    if not benchmark.llama_cpp:
        return {}
    if benchmark.batch > 1:
        report("left out: llama.cpp: it is measured with one text at a time")
        return {}
    python, reason = find_llama_cpp()
    architecture, unfit = llama_architecture(model.config)
    if python is None or architecture is None:
        report(f"left out: llama.cpp: {reason or unfit}")
        return {}
    peers = {}
    benchmark.llama_folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=benchmark.llama_folder) as weights:
        write_llama_weights(model, architecture, Path(weights))
        for beside in formats_beside(*formats):
            report(f"{beside.label}: writing the weights")
            peers[beside.label] = LlamaCpp(
                python,
                model.config,
                beside,
                folder=benchmark.llama_folder,
                capacity=max(benchmark.tokens, 2048),
                weights=Path(weights),
                architecture=architecture,
            )
            stack.callback(peers[beside.label].close)
    return peers


def _timed(
    benchmark: PlansBenchmark,
    ours: Mapping[str, OurEngine],
    peers: Mapping[str, LlamaCpp],
    texts: Sequence[Sequence[int]],
) -> dict[str, Timing]:
    """Return the timings of all contenders, one round per text or batch of texts."""
    seconds: dict[str, list[float]] = {}
    for number in range(benchmark.rounds + 1):
        chosen = [texts[(number * benchmark.batch + one) % len(texts)] for one in range(benchmark.batch)]
        tokens_BT = torch.tensor([list(text[: benchmark.tokens]) for text in chosen])
        calls: dict[str, Callable[[], float]] = {
            name: partial(engine.follow_seconds, tokens_BT, clock=benchmark.clock) for name, engine in ours.items()
        }
        for name, peer in peers.items():
            calls[name] = partial(peer.follow_seconds, tokens_BT[0].tolist(), clock=benchmark.clock)
        for name, call in calls.items():
            taken = call()
            # The first round fills caches.
            if number:
                seconds.setdefault(name, []).append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _losses(
    ours: Mapping[str, OurEngine],
    peers: Mapping[str, LlamaCpp],
    hidden_ids: Tensor | None,
    texts: Sequence[Sequence[int]],
) -> dict[str, dict[str, float]]:
    """Return the mean loss of every contender, and how its choices differ from those of our dense model."""
    contenders: dict[str, OurEngine | LlamaCpp] = {**ours, **peers}
    sums: dict[str, list[Tensor]] = {}
    choices: dict[str, list[Tensor]] = {}
    for text in texts:
        for name, contender in contenders.items():
            logits_TV = contender.logits(text[:-1])
            if hidden_ids is not None:
                # As our engine does: ids that the tokenizer does not have are never generated.
                logits_TV.index_fill_(-1, hidden_ids, -torch.inf)
            labels_T1 = torch.tensor(text[1:])[:, None]
            sums.setdefault(name, []).append(logits_TV.log_softmax(-1).gather(-1, labels_T1)[:, 0])
            choices.setdefault(name, []).append(logits_TV.argmax(-1))
    dense, dense_choices = torch.cat(sums[DENSE]), torch.cat(choices[DENSE])
    return {
        name: {
            "loss": -float(torch.cat(sums[name]).mean()),
            "label_log_probability_off": float((torch.cat(sums[name]) - dense).abs().mean()),
            "same_choices_as_dense": float((torch.cat(choices[name]) == dense_choices).float().mean()),
        }
        for name in contenders
    }
