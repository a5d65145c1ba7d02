"""``bench moe``: one MoE feed-forward layer, forward and backward, compared with peers and with dense products.

T tokens, D width, E experts, A experts per token, F expert width, N = T * A routed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.bench import routing, trace
from qsparse_moe.bench.harness import fingerprint, ratio, synchronizer, time_in_turns
from qsparse_moe.bench.moe_peers import PEERS, Build, Contender, LayerShape, LayerWeights, layer_config, leaf
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import onednn
from qsparse_moe.moe.backends.registry import BackendSpec, Matmul, fastest_first
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.moe.permutation import TokenCounts
from qsparse_moe.moe.runtime import Runtime, resolve_runtime
from qsparse_moe.nn.activations import ACTIVATIONS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# On a GPU the layer is that of OLMoE-1B-7B (arXiv 2409.02060).
SHAPES = {"cpu": LayerShape(4096, 512, 768, 16, 2), "cuda": LayerShape(16384, 2048, 1024, 64, 8)}
OUR_CHAIN = "dense, our products"
LOSS_WEIGHTS = (0.01, 0.001)
"""Upstream gradients of the losses that a layer returns, with the coefficients of training."""
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the square matrices with which the matrix peak is measured."""


@dataclass(frozen=True)
class MoEBenchmark:
    """The shape, the contenders' settings, and the rounds of one benchmark."""

    shape: LayerShape
    precisions: tuple[str, ...]
    loads: tuple[str, ...]
    sparsity: float
    rounds: int
    calls: int
    device: torch.device
    clock: Callable[[], float] | None = None
    """A clock in seconds; None means the wall clock."""


def run_moe_benchmark(benchmark: MoEBenchmark, peers: Mapping[str, Build] = PEERS) -> dict[str, Any]:
    """Time the contenders in turns for every precision and load, then profile one step of some of them.

    Returns:
        The machine, the shape, ``peak`` (FLOP/s of a large square product by precision), and ``layers`` with one entry
        per precision and load: tokens per expert, seconds and FLOP/s by contender, the speed-up of our layers over the
        others, bytes per step, the reason why a contender is left out, and the profiles of our layers.
    """
    peak = {name: matrix_peak(name, benchmark.device, clock=benchmark.clock) for name in benchmark.precisions}
    cases = [(precision, load) for precision in benchmark.precisions for load in benchmark.loads]
    return {
        "benchmark": "moe",
        "machine": fingerprint(),
        "device": benchmark.device.type,
        "shape": asdict(benchmark.shape) | {"activation": "swiglu", "flops": benchmark.shape.flops},
        "sparsity": benchmark.sparsity,
        "rounds": benchmark.rounds,
        "calls": benchmark.calls,
        "clock": "wall" if benchmark.clock is None else "processor",
        "peak": peak,
        "layers": [_layer(benchmark, precision, load, peers, peak[precision]) for precision, load in cases],
    }


def matrix_peak(
    precision: str, device: torch.device, *, clock: Callable[[], float] | None = None, rounds: int = 5
) -> float:
    """Return the FLOP/s of a square product, the fastest of ``rounds``, as the peak of this machine."""
    size = PEAK_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    # Preallocated, so that the product is timed without the allocator.
    out = torch.empty_like(a)
    products = {"torch": lambda: onednn.torch_gemm(a, b, out)}
    if onednn.why_not(device) is None:
        products["oneDNN"] = lambda: onednn.gemm(a, b, out)
    timings = time_in_turns(products, rounds=rounds, calls=1, synchronize=synchronizer(device), clock=clock)
    # The faster library counts: on some AMD processors PyTorch's MKL reaches half the speed of oneDNN
    # (docs/lab-log.md).
    return 2 * size**3 / min(min(timing.seconds_by_round) for timing in timings.values())


def make_weights(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> LayerWeights:
    """Return normal weights scaled by 1/sqrt(fan-in), and a router that reads the logits of ``routed_input``."""
    # A seed other than those of the inputs in routing.py, which use 0 and 1.
    generator = torch.Generator().manual_seed(2)
    experts, width, hidden = shape.num_experts, shape.hidden_size, shape.expert_hidden_size
    sizes = ((experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    stacks = [torch.randn(size, generator=generator) * size[1] ** -0.5 for size in sizes]
    router_ED = routing.router_weight(experts, width)
    return LayerWeights(*(weight.to(device, dtype) for weight in (router_ED, *stacks)))


def build_contenders(
    shape: LayerShape, weights: LayerWeights, x_TD: Tensor, sparsity: float, peers: Mapping[str, Build]
) -> tuple[dict[str, Contender], dict[str, Contender], dict[str, str]]:
    """Build our layer with each backend, dense and sparse, and the peers; return them and the reasons for omissions.

    The peers include ``OUR_CHAIN``: one expert over all N rows with the first of our backends.
    """
    ours, others, left_out = {}, {}, {}
    for name, build in peers.items():
        try:
            others[name] = build(shape, weights, x_TD)
        except BackendUnavailable as error:
            left_out[name] = str(error)
    for backend in fastest_first():
        config = layer_config(shape, backend.name)
        if reason := _why_left_out(backend, config, x_TD.device):
            left_out[our_name(backend.name)] = reason
            continue
        if OUR_CHAIN not in others:
            others[OUR_CHAIN] = _our_chain(shape, weights, x_TD, backend.matmul)
        runtime = _resolve(config, x_TD.device)
        # dict.fromkeys drops the duplicate if the benchmark runs at S = 0.
        for s in dict.fromkeys((0.0, sparsity)):
            ours[our_name(backend.name, s)] = _our_layer(config, runtime, weights, x_TD, s)
    return ours, others, left_out


def our_name(backend: str, sparsity: float = 0.0) -> str:
    """Return the name of one of our layers in the result."""
    return f"ours, {backend}, S {sparsity:g}" if sparsity else f"ours, {backend}"


def training_step(contender: Contender) -> Callable[[], object]:
    """Return a step: forward, then backward to the input and every parameter with a random upstream gradient."""
    x = leaf(contender.x)
    leaves = (x, *contender.parameters)
    upstream = torch.randn_like(x)

    def step() -> None:
        # Losses of a layer get the gradient that they have in training; without it their backward would be free.
        y, *losses = contender.forward(x)
        grads = [loss.new_tensor(weight) for loss, weight in zip(losses, LOSS_WEIGHTS, strict=False)]
        torch.autograd.grad([y, *losses], leaves, [upstream, *grads])

    return step


def _layer(
    benchmark: MoEBenchmark, precision: str, load: str, peers: Mapping[str, Build], peak: float
) -> dict[str, Any]:
    shape, device, dtype = benchmark.shape, benchmark.device, DTYPES[precision]
    expert_ids_TA = routing.choose_experts(load, shape.tokens, shape.num_experts, shape.experts_per_token)
    # The choices come first and the input is made for them, so that every library routes alike.
    x_TD = routing.routed_input(expert_ids_TA, shape.num_experts, shape.hidden_size).to(device, dtype)
    weights = make_weights(shape, dtype, device)
    ours, others, left_out = build_contenders(shape, weights, x_TD, benchmark.sparsity, peers)
    return {
        "precision": precision,
        "load": load,
        # The key of earlier results.
        "rows_per_expert": expert_ids_TA.flatten().bincount(minlength=shape.num_experts).tolist(),
        "left_out": left_out,
    } | _measure(benchmark, ours, others, peak)


def _measure(
    benchmark: MoEBenchmark, ours: Mapping[str, Contender], others: Mapping[str, Contender], peak: float
) -> dict[str, Any]:
    device, flops = benchmark.device, benchmark.shape.flops
    steps = {name: training_step(contender) for name, contender in (*others.items(), *ours.items())}
    timings = time_in_turns(
        steps, rounds=benchmark.rounds, calls=benchmark.calls, synchronize=synchronizer(device), clock=benchmark.clock
    )
    # The backend that auto chooses, dense and sparse, and the dense chain with the same products.
    profiled = (*list(ours)[:2], OUR_CHAIN)
    return {
        "seconds": {name: timing.median for name, timing in timings.items()},
        "seconds_by_round": {name: timing.seconds_by_round for name, timing in timings.items()},
        "flops_per_second": {name: flops / timing.median for name, timing in timings.items()},
        "share_of_peak": {name: flops / timing.median / peak for name, timing in timings.items()},
        "times_as_fast_as": {name: {other: ratio(timings[other], timings[name]) for other in others} for name in ours},
        "peak_bytes": {name: trace.peak_bytes(step, device=device) for name, step in steps.items()},
        "profile": {name: trace.profile(steps[name], device=device) for name in profiled},
    }


def _why_left_out(backend: BackendSpec, config: ModelConfig, device: torch.device) -> str | None:
    if backend.name == "megablocks" and device.type == "cpu":
        return "timings under Triton's interpreter are meaningless"
    return backend.why_not(config, device)


@cache  # resolve_runtime logs its choice, which should appear once
def _resolve(config: ModelConfig, device: torch.device) -> Runtime:
    return resolve_runtime(config, device)


def _our_layer(
    config: ModelConfig, runtime: Runtime, weights: LayerWeights, x_TD: Tensor, sparsity: float
) -> Contender:
    # MoELayer moves to the dtype and device of the input; all layers get the same weights below.
    layer = MoELayer(config, runtime).to(x_TD)
    for site in (layer.input_site, layer.experts.hidden_site):
        site.set_sparsity([sparsity] * config.moe.num_experts)
    experts = layer.experts
    assert experts.w_gate is not None
    named = (layer.router.weight, experts.w_gate, experts.w_up, experts.w_down)
    with torch.no_grad():
        for parameter, weight in zip(named, weights, strict=True):
            parameter.copy_(weight)

    def forward(x_1TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The other libraries compute no statistics.
        output = layer(x_1TD, with_stats=False)
        return output.y_BSD, output.load_balance_loss, output.router_z_loss

    return Contender(x_TD[None], forward, tuple(layer.parameters()))


def _our_chain(shape: LayerShape, weights: LayerWeights, x_TD: Tensor, matmul: Matmul) -> Contender:
    w_gate_1DF, w_up_1DF, w_down_1FD = (leaf(stack[:1]) for stack in weights[1:])
    counts = TokenCounts(torch.tensor([shape.rows], device=x_TD.device))

    def forward(x_ND: Tensor) -> tuple[Tensor]:
        gate_NF, up_NF = matmul(x_ND, w_gate_1DF, counts), matmul(x_ND, w_up_1DF, counts)
        return (matmul(ACTIVATIONS["swiglu"](gate_NF, up_NF), w_down_1FD, counts),)

    return Contender(x_TD.repeat(shape.experts_per_token, 1), forward, (w_gate_1DF, w_up_1DF, w_down_1FD))
