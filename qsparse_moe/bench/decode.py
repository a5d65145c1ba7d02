"""``bench decode``: tokens per second of generation, ours with and without zeros beside the engines that people use.

All contenders have the same shape, random weights, threads and context, and are timed in turns. L layers, B sequences.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qsparse_moe.bench.harness import Timing, fingerprint, model_sizes, ratio
from qsparse_moe.bench.llama_peer import WEIGHTS_FOLDER, LlamaCpp, find_llama_cpp, formats_beside
from qsparse_moe.bench.mixtral import DecodingMixtral
from qsparse_moe.bench.random_weights import fill_random
from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.config.shapes import vocab_size
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.inference.cached_model import prefill
from qsparse_moe.inference.engine import prepare_prefill
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.native import NativeDecode
from qsparse_moe.inference.row_costs import measure_read_bandwidth
from qsparse_moe.inference.weights import check_head, head_format, round_weights
from qsparse_moe.kernels.row_product.stored import WeightFormat
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.nn.shared_selector import SharedSelector
from qsparse_moe.sparsity.plan import SparsityPlan

OURS = "ours"
TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class DecodeBenchmark:
    """The settings of one decode benchmark."""

    model: ModelConfig
    formats: Sequence[WeightFormat]
    sparsities: Sequence[float]
    """S; 0 is always measured, as our dense path."""
    batches: Sequence[int]
    context: int
    """Tokens in the cache before the first measured one."""
    tokens: int
    """Steps per measurement."""
    rounds: int
    prompt: int
    """Tokens of the prefill that is timed; 0 leaves it out."""
    peers: Sequence[str] = (TRANSFORMERS, LLAMA_CPP)
    head: WeightFormat | None = None
    """Number format of our output head; None: that of ``generate``."""
    folder: Path = WEIGHTS_FOLDER
    """Where the weights for llama.cpp are written, one file at a time, and removed again."""
    site: Site | None = None
    """The only site with S; None: every site."""

    def plan(self, config: ModelConfig, sparsity: float) -> SparsityPlan:
        """Return the plan of a model at one S."""
        return SparsityPlan.uniform(config, 0.0).with_(sparsity=sparsity, site=self.site)


def run_decode_benchmark(
    benchmark: DecodeBenchmark, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure every number format, one after another; inside one, all contenders in turns.

    Args:
        benchmark: what to measure.
        report: called with a line before each part, for whoever waits.

    Raises:
        ConfigError: a model in this number format cannot have this head.
    """
    check_formats(benchmark)
    bandwidth = measure_read_bandwidth()
    report(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    results = {}
    for weight_format in benchmark.formats:
        report(f"{weight_format}: building the contenders")
        results[weight_format] = _run_format(benchmark, weight_format, bandwidth, report)
        # The models of a format take several GB and must be gone before those of the next are built.
        gc.collect()
    return {
        "benchmark": "decode",
        "machine": fingerprint(),
        "read_bandwidth": bandwidth,
        "shape": shape_of(benchmark),
        "formats": results,
    }


def check_formats(benchmark: DecodeBenchmark) -> None:
    """Raise ConfigError unless the models in all number formats can have the requested head."""
    for weight_format in benchmark.formats:
        check_head(benchmark.head or "auto", _model_dtype(weight_format))


def _model_dtype(weight_format: WeightFormat) -> torch.dtype:
    return torch.bfloat16 if weight_format in ("bf16", "ternary") else torch.float32


@torch.no_grad()
def random_model(config: ModelConfig, weight_format: WeightFormat, device: torch.device | str = "cpu") -> Transformer:
    """Return a model with random weights: in bf16 for the formats bf16 and ternary, in fp32 for the others."""
    # On the meta device first, so that the weights are not initialised twice.
    with torch.device("meta"):
        model = Transformer(config, device=device).to(_model_dtype(weight_format))
    model.to_empty(device=device)
    fill_random(model, config.init_std)
    # to_empty has discarded the buffers with K of every site, and the plan fills them again.
    model.set_sparsity(model.sparsity_plan)
    _draw_shared_sets(model)
    return model.eval().requires_grad_(False)


def _draw_shared_sets(model: Transformer) -> None:
    """Give every expert features of its own where its tokens share them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, SharedSelector):
            module.mean_energy_ED.copy_(torch.rand(module.mean_energy_ED.shape, generator=generator))


class _Ours:
    """Our engine at one S and batch: the requested number of steps from the same context."""

    def __init__(self, engine: NativeDecode, model: Transformer, batch: int, benchmark: DecodeBenchmark) -> None:
        self.engine = engine
        # The sequences differ, because equal tokens would need the same weights and so read fewer than a real batch.
        self.tokens_B = torch.arange(batch) + 1
        self.cache = KeyValueCache.allocate(
            model.config, batch=batch, capacity=benchmark.context + benchmark.tokens, dtype=torch.float32
        )
        # Keys and values of random prompts: what attention reads is the same whatever they are.
        for part in (self.cache.key_LBHPC, self.cache.value_LBHPC):
            part.normal_(generator=torch.Generator().manual_seed(1))
        self.context, self.steps = benchmark.context, benchmark.tokens
        self.bytes_per_step = 0.0

    def __call__(self) -> float:
        # Every measurement begins behind the same context, whatever the one before has appended.
        self.cache.positions_B.fill_(self.context)
        tokens_B, read = self.tokens_B, 0
        start = time.perf_counter()
        for _ in range(self.steps):
            tokens_B = self.engine.decode(tokens_B, self.cache).argmax(-1)
            read += self.engine.bytes_read
        seconds = time.perf_counter() - start
        self.bytes_per_step = read / self.steps
        return seconds


def seconds_in_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Return the timings of contenders that measure themselves, one after the other in each of ``rounds`` rounds.

    Each prepares what it needs (a filled cache) outside of what it measures. One round before the first is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            taken = call()
            if number:
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def trained_in(config: ModelConfig, weight_format: WeightFormat) -> ModelConfig:
    """Return ``config`` as it was trained: for ternary weights as BitNet b1.58, with activations in int8 beside them.

    llama.cpp rounds activations to int8 beside ternary weights as well.
    """
    if weight_format != "ternary":
        return config
    quantized = config.sparsity.quantization.model_copy(update={"weights": "ternary", "activations": "int8"})
    # Activations in int8 need whole rows, for their scale.
    masked = config.sparsity.shared.model_copy(update={"products": "masked"})
    trained = config.sparsity.model_copy(update={"quantization": quantized, "shared": masked})
    return config.model_copy(update={"sparsity": trained})


def _run_format(
    benchmark: DecodeBenchmark, weight_format: WeightFormat, bandwidth: float, report: Callable[[str], None]
) -> dict[str, Any]:
    config = trained_in(benchmark.model, weight_format)
    model = random_model(config, weight_format)
    round_weights(model, weight_format, benchmark.head)
    head = head_format(model, weight_format, benchmark.head)
    engines: dict[float, NativeDecode] = {}
    # S = 0 comes first: it is the dense path that all rows are compared with, and its engine stores the weights.
    for sparsity in dict.fromkeys((0.0, *benchmark.sparsities)):
        model.set_sparsity(benchmark.plan(config, sparsity))
        if not engines:
            engines[sparsity] = NativeDecode(model, weight_format, head=head, rows="auto")
        else:
            # The stored weights are shared: engines for every S would not fit into memory together.
            engines[sparsity] = engines[0.0].with_plan_of(model)
    prepare_prefill(model, engines[0.0], weight_format)
    peers = _peers(benchmark, (weight_format, head), config, report)
    rows = []
    try:
        for batch in benchmark.batches:
            ours = {f"{OURS} S {s:g}": _Ours(engine, model, batch, benchmark) for s, engine in engines.items()}
            others = _contenders(peers, batch, benchmark)
            report(f"{weight_format}, batch {batch}: {', '.join([*ours, *others])}")
            timings = seconds_in_turns({**ours, **others}, benchmark.rounds)
            rows += [_row(name, batch, timings, ours, benchmark, bandwidth) for name in timings]
        prefills = _prefill(benchmark, model, peers)
    # Also after an error: a peer is a process with a file of several GB.
    finally:
        for peer in peers.values():
            if isinstance(peer, LlamaCpp):
                peer.close()
    return {"head": head, "decode": rows, "prefill": prefills}


def _row(
    name: str,
    batch: int,
    timings: dict[str, Timing],
    ours: dict[str, _Ours],
    benchmark: DecodeBenchmark,
    bandwidth: float,
) -> dict[str, Any]:
    seconds = timings[name].median / benchmark.tokens
    row: dict[str, Any] = {
        "contender": name,
        "batch": batch,
        "tokens_per_second": batch / seconds,
        "seconds_by_round": timings[name].seconds_by_round,
        "times_ours_dense": ratio(timings[f"{OURS} S 0"], timings[name]),
    }
    if name in ours:
        row["bytes_per_step"] = ours[name].bytes_per_step
        row["share_of_limit"] = ours[name].bytes_per_step / bandwidth / seconds
        others = [peer for peer in timings if peer not in ours]
        row["times_peer"] = {peer: ratio(timings[peer], timings[name]) for peer in others}
    return row


Peer = DecodingMixtral | LlamaCpp


def _peers(
    benchmark: DecodeBenchmark,
    formats: tuple[WeightFormat, WeightFormat],
    config: ModelConfig,
    report: Callable[[str], None],
) -> dict[str, Peer]:
    """Return the peers by name for the formats of our matrices and head; those not installed are reported."""
    peers: dict[str, Peer] = {}
    weight_format = formats[0]
    # This peer multiplies in PyTorch's own dtypes, so it has no counterpart of int8 and ternary weights.
    if TRANSFORMERS in benchmark.peers and weight_format in ("fp32", "bf16"):
        try:
            peers[TRANSFORMERS] = DecodingMixtral(config, torch.float32 if weight_format == "fp32" else torch.bfloat16)
        except BackendUnavailable as error:
            report(f"left out: {error}")
    if LLAMA_CPP in benchmark.peers and formats_beside(*formats):
        python, reason = find_llama_cpp()
        if python is None:
            report(f"left out: {LLAMA_CPP}: {reason}")
            return peers
        capacity = max(benchmark.context + benchmark.tokens, benchmark.prompt)
        for beside in formats_beside(*formats):
            report(f"{beside.label}: writing the weights")
            peers[beside.label] = LlamaCpp(python, config, beside, folder=benchmark.folder, capacity=capacity)
    return peers


def _contenders(peers: dict[str, Peer], batch: int, benchmark: DecodeBenchmark) -> dict[str, Callable[[], float]]:
    """Return what measures each peer at a batch; llama.cpp is measured with one sequence."""
    size = {"context": benchmark.context, "tokens": benchmark.tokens}
    found: dict[str, Callable[[], float]] = {}
    for name, peer in peers.items():
        if isinstance(peer, DecodingMixtral):
            found[name] = partial(peer.seconds, batch, **size)
        elif batch == 1:
            found[name] = partial(peer.decode_seconds, **size)
    return found


def _prefill(benchmark: DecodeBenchmark, model: Transformer, peers: dict[str, Peer]) -> list[dict[str, Any]]:
    """Measure a prompt in turns: ours, and llama.cpp in each of its formats."""
    if not benchmark.prompt:
        return []
    # The child of llama.cpp gets the same tokens.
    tokens = (torch.arange(benchmark.prompt) % vocab_size(model.config)).tolist()
    cache = KeyValueCache.allocate(model.config, batch=1, capacity=benchmark.prompt, dtype=torch.float32)

    def ours() -> float:
        cache.positions_B.zero_()
        start = time.perf_counter()
        prefill(model, [tokens], cache)
        return time.perf_counter() - start

    contenders: dict[str, Callable[[], float]] = {OURS: ours}
    for name, peer in peers.items():
        if isinstance(peer, LlamaCpp):
            contenders[name] = partial(peer.prefill_seconds, benchmark.prompt)
    timings = seconds_in_turns(contenders, benchmark.rounds)
    return [
        {
            "contender": name,
            "tokens_per_second": benchmark.prompt / timing.median,
            "seconds_by_round": timing.seconds_by_round,
            "ours_times_faster": ratio(timing, timings[OURS]),
        }
        for name, timing in timings.items()
    ]


def shape_of(benchmark: DecodeBenchmark) -> dict[str, Any]:
    """Return the sizes that a result records."""
    return {
        **model_sizes(benchmark.model),
        "vocabulary": vocab_size(benchmark.model),
        "selection": benchmark.model.sparsity.selection,
        "site": benchmark.site,
        "context": benchmark.context,
        "tokens": benchmark.tokens,
        "prompt": benchmark.prompt,
        "rounds": benchmark.rounds,
    }
