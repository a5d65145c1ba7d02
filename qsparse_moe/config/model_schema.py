"""Every setting of the model: experts, sparsity and the decoder around them. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qsparse_moe.config.attention_schema import LatentAttentionConfig, QKNorm
from qsparse_moe.config.rotary_schema import RopeScalingConfig
from qsparse_moe.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Width,
)
from qsparse_moe.config.shared_selection_schema import SharedSelectionConfig

Site = Literal[
    "attention_input",
    "attention_output",
    "expert_input",
    "expert_hidden",
    "shared_input",
    "shared_hidden",
    "dense_input",
    "dense_hidden",
]
SITES: tuple[Site, ...] = Site.__args__  # type: ignore[attr-defined]

ActivationFormat = Literal["none", "int8", "int4"]
Sparsity = Annotated[float, Field(ge=0, lt=1)]
TopP = Annotated[float, Field(gt=0, le=1)]
# See ``section.Texts`` for tuples.
# Rules, plans and tables hold entries per layer and per expert, so these are bounded.
NumLayers = Annotated[int, Field(ge=1, le=10_000)]
NumExperts = Annotated[int, Field(ge=1, le=65_536)]
Selector = int | str | Annotated[tuple[int, ...], Field(strict=False)] | None


class MoEConfig(Section):
    """The routed feed-forward layers."""

    num_experts: NumExperts = 8
    """E, the number of routed experts per layer."""
    experts_per_token: PositiveInt = 2
    """A, the number of experts that process each token; at most num_experts."""
    expert_hidden_size: Width = 256
    """F, the hidden width of one expert."""
    num_shared_experts: Annotated[int, Field(ge=0, le=65_536)] = 0
    """Number of shared experts, which process every token in addition to the routed ones. Together they form one
    feed-forward network."""
    shared_expert_hidden_size: Width | None = None
    """Hidden width of all shared experts together; null: num_shared_experts * expert_hidden_size."""
    shared_expert_gate: bool = False
    """Scale the output of the shared experts, for each token, by the sigmoid of a learned linear map (Qwen2-MoE)."""
    router: Literal[
        "softmax_topk", "softmax_topk_renormalized", "topk_softmax", "sigmoid_topk", "sigmoid_topk_renormalized"
    ] = "softmax_topk_renormalized"
    """Computation of the weights of a token's A experts. softmax_topk: the softmax over all experts, without
    renormalization; softmax_topk_renormalized: the same, divided by the sum of the A weights; topk_softmax: a softmax
    over the A largest logits; sigmoid_topk and sigmoid_topk_renormalized: the sigmoid of each logit, without and with
    renormalization (DeepSeek-V3 uses the latter)."""
    router_input: Literal["dense", "sparse"] = "dense"
    """Input of the router. dense: the tokens before any selection; sparse: the tokens after the selection at
    expert_input, which then must be the same for all experts of a layer."""
    router_scaling_factor: PositiveFloat = 1.0
    """Factor applied to the weights of a token's experts after renormalization; DeepSeek-V3 uses 2.5."""
    fewer_experts_weights: Literal["router", "kept", "renormalized"] = "router"
    """Weights of a token's experts in a layer whose sparsity plan uses fewer than experts_per_token. router: those of
    this router if it chose that many, which are renormalized if router renormalizes; kept: as computed over all
    experts_per_token; renormalized: the same, scaled so that they have the sum of all."""
    router_noise: NonNegativeFloat = 0.0
    """Standard deviation of the normal noise that is added to the router logits in training (V-MoE uses 1 /
    num_experts); 0: no noise."""
    router_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training, multiply each element of the router's input by a uniform random number between 1 - router_jitter and
    1 + router_jitter (Switch Transformer uses 0.01); 0: no jitter."""
    num_expert_groups: PositiveInt = 1
    """Number of groups of consecutive experts; a divisor of num_experts. A token first selects groups and then experts
    within them; 1: no groups."""
    groups_per_token: PositiveInt = 1
    """Number of groups from which the experts of a token are selected; at most num_expert_groups."""
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """Score by which a token selects groups. top2_sum: the sum of the two best expert scores (DeepSeek-V3); max: the
    best expert score (DeepSeek-V2)."""
    force_uniform_routing: bool = False
    """For benchmarks: send token t of a micro-batch to the experts t * A to t * A + A - 1 (modulo E), whatever the
    scores are. The scores still give the weights, so every gradient exists."""
    # This coefficient and that of the z-loss below are those of OLMoE (arXiv 2409.02060).
    load_balance_coefficient: NonNegativeFloat = 0.01
    """Coefficient of the load-balance loss, which is 1 at even load and is averaged over the MoE layers."""
    load_balance_scope: Literal["sequence", "micro_batch", "global_batch"] = "sequence"
    """Tokens over which the load-balance loss is computed. sequence: each sequence by itself; micro_batch: the
    micro-batch; global_batch: all ranks and all micro-batches of the step so far (arXiv 2501.11873). Only sequence does
    not depend on how the batch is split into micro-batches; global_batch does not if each rank has one micro-batch per
    step."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Balancing without a loss (DeepSeek-V3 uses 0.001): each expert has a bias that is added to its score for the
    selection only. After every step the bias moves by this rate: up if the expert received fewer tokens than the mean
    of the global batch, down if it received more. 0: no biases."""
    bias_update_steps: NonNegativeInt | None = None
    """Number of steps after which the biases stay constant; null: they always move."""
    router_z_coefficient: NonNegativeFloat = 0.001
    """Coefficient of the router z-loss, which is averaged over the MoE layers."""
    activation: Literal["swiglu", "relu2glu", "reglu", "drelu", "relu2"] = "relu2glu"
    """Activation function. swiglu: silu(gate) * up; relu2glu: relu(gate)^2 * up; reglu: relu(gate) * up; drelu:
    relu(gate) * relu(up); relu2: relu(up)^2, without a gate matrix. Dense layers and shared experts use the same
    function."""
    backend: Literal["auto", "loop", "grouped", "megablocks", "native", "onednn", "blas"] = "auto"
    """Implementation of the experts' matrix products. auto: the fastest that is available, on a CPU native with AVX-512
    (onednn where bf16 has matrix registers) and blas without; loop: one expert after the other, the definition;
    grouped: torch's grouped_mm; native: CPU only, all experts in one C++ operator, which is compiled once; onednn,
    blas: CPU only, one product per expert by oneDNN (with rounded row counts) or by PyTorch's BLAS; megablocks:
    MegaBlocks' permutation around a grouped product, CUDA only (on a CPU under TRITON_INTERPRET=1, for tests)."""
    capacity_factor: PositiveFloat | None = None
    """null: no token is dropped. Otherwise an expert processes at most ceil(capacity_factor * T * A / E) of the routed
    tokens of a micro-batch of T tokens: those with the largest router weights, the first ones among equal weights. It
    outputs 0 for the others. In evaluation and generation no token is dropped."""
    num_dense_layers: NonNegativeInt = 0
    """Number of layers, from the first on, that have a dense feed-forward network instead of experts."""
    moe_layer_interval: PositiveInt = 1
    """After the first num_dense_layers layers, every n-th layer of the model has experts (with 2: the second, the
    fourth, and so on), and the others have a dense feed-forward network."""
    dense_hidden_size: Width | None = None
    """Hidden width of the dense feed-forward networks; null: experts_per_token * expert_hidden_size."""


class SitesConfig(Section):
    """S by site; null: model.sparsity.default."""

    attention_input: Sparsity | None = None
    """Input of the query, key, and value projections."""
    attention_output: Sparsity | None = None
    """Input of the attention's output projection."""
    expert_input: Sparsity | None = None
    """Input of the routed experts' gate and up projections."""
    expert_hidden: Sparsity | None = None
    """Input of the routed experts' down projection."""
    shared_input: Sparsity | None = None
    """Input of the shared experts' gate and up projections."""
    shared_hidden: Sparsity | None = None
    """Input of the shared experts' down projection."""
    dense_input: Sparsity | None = None
    """Input of a dense layer's gate and up projections."""
    dense_hidden: Sparsity | None = None
    """Input of a dense layer's down projection."""


class SparsityOverride(Section):
    """S for the layers, site and experts that it selects; later overrides win."""

    sparsity: Sparsity
    """S, the fraction of features set to zero."""
    layers: Selector = None
    """A layer, a list of layers, or a range such as "0-3" that includes both ends; null: every layer."""
    site: Site | None = None
    """A site; null: every site."""
    experts: Selector = None
    """An expert, a list, or a range such as "0-3", at expert sites only; null: every expert."""


class RoutingOverride(Section):
    """Experts per token for the layers that it selects; later overrides win."""

    layers: Selector = None
    """A layer, a list of layers, or a range such as "0-3" that includes both ends; null: every MoE layer."""
    experts_per_token: NonNegativeInt | None = None
    """Number of a token's experts that are used; null: not changed."""
    top_p: TopP | None = None
    """Share of the router weight; null: not changed."""


class ScheduleConfig(Section):
    """Schedule of S, and of the experts per token, over the steps of the run."""

    shape: Literal["constant", "linear", "cubic", "cosine"] = "constant"
    """constant: the target from the end of the warm-up on; the other shapes rise from 0 to the target within
    ramp_steps."""
    warmup_steps: NonNegativeInt = 0
    """Number of dense steps (S = 0) at the start of the run."""
    ramp_steps: NonNegativeInt = 0
    """Number of steps in which S rises from 0 to the target; 0 unless shape is linear, cubic, or cosine."""


class BlendConfig(Section):
    """Schedule of the share of the straight-through gradient if gradient is blend."""

    start: Fraction = 1.0
    """Initial share of the straight-through gradient; 1 is ste, 0 is masked."""
    end: Fraction = 0.0
    """Share from the end of the ramp on."""
    shape: Literal["linear", "cosine"] = "linear"
    """Shape of the ramp from start to end."""
    hold_steps: NonNegativeInt = 0
    """Number of steps before the ramp begins."""
    ramp_steps: NonNegativeInt = 0
    """Number of steps of the ramp."""


class QuantizationSitesConfig(Section):
    """Number format by site; null takes model.sparsity.quantization.activations."""

    attention_input: ActivationFormat | None = None
    """Input of the query, key, and value projections."""
    attention_output: ActivationFormat | None = None
    """Input of the attention's output projection."""
    expert_input: ActivationFormat | None = None
    """Input of the routed experts' gate and up projections."""
    expert_hidden: ActivationFormat | None = None
    """Input of the routed experts' down projection."""
    shared_input: ActivationFormat | None = None
    """Input of the shared experts' gate and up projections."""
    shared_hidden: ActivationFormat | None = None
    """Input of the shared experts' down projection."""
    dense_input: ActivationFormat | None = None
    """Input of a dense layer's gate and up projections."""
    dense_hidden: ActivationFormat | None = None
    """Input of a dense layer's down projection."""


class QuantizationConfig(Section):
    """Rounded activations and weights: the values are those of the format, the gradient passes straight through."""

    activations: ActivationFormat | None = None
    """Number format at every site. int8 scales each token by its largest magnitude, int4 by its mean magnitude;
    features are selected before rounding. null: the format of the preset, or none."""
    sites: QuantizationSitesConfig = QuantizationSitesConfig()
    """Number format per site."""
    weights: Literal["none", "ternary"] = "none"
    """ternary: every projection of attention, experts, and dense layers uses -1, 0, or 1 times the mean magnitude of
    its matrix. The embedding, the head, and the router are not quantized."""


class SparsityConfig(Section):
    """Q-Sparse: the fraction of the features in front of each weight matrix that is set to zero, and the method."""

    preset: Literal["paper", "a4.8", "dense"] | None = None
    """paper: S = 0.3 at every site (Q-Sparse); a4.8: int4 at the inputs, int8 with S = 0.5 at attention_output, int8 at
    the hidden sites (BitNet a4.8; for its ternary weights see quantization.weights); dense: S = 0. Values of default,
    sites, overrides, and quantization take precedence."""
    plan: str | None = None
    """JSON file with S, and the threshold if it was calibrated, for every layer, site, and expert, and the experts per
    token by layer. preset, default, sites, overrides, experts_per_token, top_p, and routing_overrides must be unset."""
    default: Sparsity | None = None
    """S at every site, the fraction of features set to zero; null: the value of the preset, or 0 (dense)."""
    sites: SitesConfig = SitesConfig()
    """S per site."""
    overrides: Annotated[tuple[SparsityOverride, ...], Field(strict=False)] = ()
    """S for selected layers, sites, and experts; applied in order, after sites."""
    experts_per_token: NonNegativeInt | None = None
    """Number of a token's experts that every MoE layer uses, the first in the order of the router: from 0, with which
    shared experts and the residual stream remain, to model.moe.experts_per_token. null: all of them."""
    top_p: TopP | None = None
    """Use the fewest first experts of a token whose router weights reach this share of the sum of all, at least one and
    at most experts_per_token; null or 1: all of them."""
    routing_overrides: Annotated[tuple[RoutingOverride, ...], Field(strict=False)] = ()
    """Experts per token for selected layers; applied in order."""
    schedule: ScheduleConfig = ScheduleConfig()
    """S over the steps of the run. experts_per_token moves from model.moe.experts_per_token with it, rounded, and top_p
    from 1."""
    selection: Literal["topk", "block", "threshold", "statistical", "relu", "shared"] = "topk"
    """Rule by which the features of a token are selected. topk: the K largest magnitudes; block: the largest magnitudes
    of every contiguous group of group_size features; threshold: all magnitudes above a calibrated threshold, which the
    plan contains; statistical: all magnitudes above mean + z * standard deviation of the token's features, where z is
    the normal quantile at S. The last two select 1 - S on average only. relu: all positive features at sites where S is
    above 0, the baseline of the paper, used with gradient masked; shared: the K features with the largest energy over
    the tokens of an expert, the same for all of them, see shared."""
    # These are the groups of Block Q-Sparse (arXiv 2407.10969), which selects 16 features of 32.
    group_size: Width = 32
    """G, the number of features per group if selection is block."""
    shared: SharedSelectionConfig = SharedSelectionConfig()
    """Sets of features if selection is shared."""
    rescale: Literal["none", "unit", "preserve"] = "none"
    """Applied after the selection. none: nothing; unit: divide by the L2 norm of the selected features; preserve:
    restore the L2 norm before the selection."""
    backend: Literal["auto", "torch", "native", "triton"] = "auto"
    """Implementation of the selection. torch: stock PyTorch; native: C++ compiled at first use, CPU only; triton: GPU
    kernels; auto: the fastest that is available."""
    # ste is the paper's choice. Short runs of small models neither show nor refute that it is better than masked
    # (docs/results.md).
    gradient: Literal["ste", "masked", "blend"] = "ste"
    """Gradient of the selection. ste: the backward pass ignores the mask (straight-through estimator); masked: only
    selected features receive a gradient; blend: a weighted mean of both, see blend."""
    blend: BlendConfig = BlendConfig()
    """Share of the straight-through gradient over the steps if gradient is blend."""
    quantization: QuantizationConfig = QuantizationConfig()
    """Number formats of the activations and of the weight matrices."""
    debug: bool = False
    """Stop at the first site whose input contains a NaN and name the site. The check synchronizes with the device at
    every site. Without it, a selection never drops a NaN, so it reaches the loss."""


class ModelConfig(Section):
    """The decoder."""

    # Token ids are stored in 32 bits.
    vocab_size: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Number of token ids, at least that of the tokenizer; null: that number, rounded up to a multiple of 8 (264 for
    bytes, which need 257). The ids beyond the tokenizer's are padding: they are never evaluated or generated."""
    hidden_size: Width = 128
    """D, the width of the model."""
    num_layers: NumLayers = 4
    """Number of decoder layers."""
    num_heads: Width = 4
    """H, the number of query heads."""
    num_kv_heads: Width | None = None
    """Number of key and value heads, a divisor of num_heads; null: num_heads."""
    head_size: Width | None = None
    """C, the number of channels per head; even. null: hidden_size / num_heads."""
    # This is the base of the original rotary embedding (arXiv 2104.09864).
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    """Scaled rotary frequencies."""
    norm_epsilon: PositiveFloat = 1e-5
    """Value added to the mean square in RMSNorm."""
    qk_norm: QKNorm = "none"
    """RMSNorm of the queries and of the keys before the rotation. per_head: the channels of every head (Qwen3);
    all_heads: the channels of all heads together (OLMoE). true is per_head and false none."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Learned biases in attention. qkv: of the query, key, and value projections (Qwen2); all: of the output projection
    too."""
    attention_backend: Literal["auto", "varlen", "blocks"] = "auto"
    """Implementation of attention that does not cross documents. varlen: PyTorch's flash attention for sequences of
    different lengths, CUDA only, in bf16 or fp16; blocks: one call per document or per few short ones, on every device;
    auto: the fastest that is available."""
    latent_attention: LatentAttentionConfig = LatentAttentionConfig()
    """Multi-head latent attention."""
    tie_embeddings: bool = False
    """Use the weight of the embedding for the output head."""
    # This suits widths of about a thousand. Narrow models need about 0.5 / sqrt(hidden_size): at 0.02 their experts
    # begin with an output near zero (docs/lab-log.md, 27 November).
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights, which are cut at three standard deviations."""
    moe: MoEConfig = MoEConfig()
    """Experts."""
    sparsity: SparsityConfig = SparsityConfig()
    """Q-Sparse."""
