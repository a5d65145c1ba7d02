"""Every setting of the model: experts, sparsity and the decoder around them. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qsparse_moe.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Width,
)

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
# See ``section.Texts`` for tuples.
# Rules, plans and tables hold entries per layer and per expert, so these are bounded.
NumLayers = Annotated[int, Field(ge=1, le=10_000)]
NumExperts = Annotated[int, Field(ge=1, le=65_536)]
Selector = int | str | Annotated[tuple[int, ...], Field(strict=False)] | None


class MoEConfig(Section):
    """The routed feed-forward layers."""

    num_experts: NumExperts = 8
    """E, routed experts a layer."""
    experts_per_token: PositiveInt = 2
    """A, experts that each token uses; at most num_experts."""
    expert_hidden_size: Width = 256
    """F, hidden width of one expert."""
    num_shared_experts: Annotated[int, Field(ge=0, le=65_536)] = 0
    """Experts that every token uses, beside the routed ones; together they are one feed-forward."""
    shared_expert_hidden_size: Width | None = None
    """Hidden width of the shared experts together; null: num_shared_experts * expert_hidden_size."""
    shared_expert_gate: bool = False
    """Each token scales the shared experts' output by the sigmoid of a linear map of its own (Qwen2-MoE)."""
    router: Literal[
        "softmax_topk", "softmax_topk_renormalized", "topk_softmax", "sigmoid_topk", "sigmoid_topk_renormalized"
    ] = "softmax_topk_renormalized"
    """softmax_topk: the scores are probabilities, and those of the A experts with the largest are the weights;
    softmax_topk_renormalized: the same, divided by their sum; topk_softmax: softmax over the A largest logits only;
    sigmoid_topk and sigmoid_topk_renormalized: every score is a sigmoid of its own logit (DeepSeek-V3 has the
    renormalised one)."""
    router_input: Literal["dense", "sparse"] = "dense"
    """What the router sees: the tokens as they are, or what the selection at expert_input leaves of them, which must
    then be the same for all experts of a layer."""
    router_scaling_factor: PositiveFloat = 1.0
    """Factor of the weights of a token's experts, after they are renormalised; 2.5 in DeepSeek-V3."""
    router_noise: NonNegativeFloat = 0.0
    """Standard deviation of normal noise that is added to the logits in training, before scores, choice and losses are
    formed from them (V-MoE, which has 1 / num_experts); 0: none."""
    router_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training the router's input, and only its, is multiplied element by element with draws that are uniform
    between 1 - router_jitter and 1 + router_jitter (Switch Transformer, which has 0.01); 0: none."""
    num_expert_groups: PositiveInt = 1
    """Groups of experts that follow each other, a divisor of num_experts, among which a token first chooses; 1: every
    expert may be chosen."""
    groups_per_token: PositiveInt = 1
    """Groups from which a token's experts come; at most num_expert_groups."""
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """What a group is chosen by: top2_sum, the sum of its two best scores (DeepSeek-V3); max, the best one
    (DeepSeek-V2)."""
    force_uniform_routing: bool = False
    """For benchmarks: token t of a micro-batch uses the experts t * A to t * A + A - 1, counted round, whatever its
    scores are. They still give the weights, so every gradient is there."""
    load_balance_coefficient: NonNegativeFloat = 0.01
    """Factor of the load-balance loss, which is 1 at even load and is averaged over the MoE layers."""
    load_balance_scope: Literal["sequence", "micro_batch", "global_batch"] = "sequence"
    """The tokens whose load the load-balance loss holds against the router's mean probabilities: those of a sequence;
    of the micro-batch; or of all ranks and of the step's micro-batches so far (arXiv 2501.11873). Only sequence is the
    same however the batch is cut into micro-batches; global_batch is so where each rank has one of them a step."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Loss-free balancing: every expert has a bias, added to its score when experts are chosen and not in the weights,
    that moves by this much after every step, up where the expert had fewer rows than the mean of the step's global
    batch, down where it had more; 0: no biases. DeepSeek-V3 has 0.001."""
    bias_update_steps: NonNegativeInt | None = None
    """Steps after which the biases stay what they are; null: they always move."""
    router_z_coefficient: NonNegativeFloat = 0.001
    """Factor of the router z-loss, averaged over the MoE layers."""
    activation: Literal["swiglu", "relu2glu", "reglu", "drelu", "relu2"] = "relu2glu"
    """swiglu: silu(gate) * up; relu2glu: relu(gate)^2 * up; reglu: relu(gate) * up; drelu: relu(gate) * relu(up);
    relu2: relu(up)^2, without a gate matrix. Dense layers and shared experts use it too."""
    backend: Literal["auto", "loop", "grouped", "megablocks", "onednn", "blas"] = "auto"
    """loop: one expert after the other, the definition; grouped: torch grouped_mm; megablocks: MegaBlocks' permutation
    around a grouped product, CUDA (on a CPU under TRITON_INTERPRET=1, for tests); onednn and blas: CPU only, a product
    an expert by oneDNN, in rounded row counts, or by PyTorch's own, MKL as a rule; auto: the fastest that runs here, on
    a CPU onednn if it has AVX-512 and else blas."""
    capacity_factor: PositiveFloat | None = None
    """null: dropless. Else an expert takes at most ceil(capacity_factor * T * A / E) rows of a micro-batch's T tokens,
    those with the largest router weights (of equal ones the first); for the others its output is 0. Holds in training
    only: evaluation and generation drop nothing."""
    num_dense_layers: NonNegativeInt = 0
    """How many of the first layers have a dense feed-forward in place of experts."""
    moe_layer_interval: PositiveInt = 1
    """n: beyond the first num_dense_layers, every n-th layer of the model has experts (with 2 the second, the fourth
    and so on), each other one a dense feed-forward."""
    dense_hidden_size: Width | None = None
    """Hidden width of the dense layers; null: experts_per_token * expert_hidden_size."""


class SitesConfig(Section):
    """S by site; null takes model.sparsity.default."""

    attention_input: Sparsity | None = None
    """Input of the query, key and value projections."""
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
    """S, the fraction zeroed."""
    layers: Selector = None
    """A layer, a list, or a range such as "0-3" (both ends included); null: every layer."""
    site: Site | None = None
    """One site; null: every site."""
    experts: Selector = None
    """An expert, a list, or a range such as "0-3", at expert sites only; null: every expert."""


class ScheduleConfig(Section):
    """How S grows to its target over the steps."""

    shape: Literal["constant", "linear", "cubic", "cosine"] = "constant"
    """constant: the target from the first step after warm-up; the others rise from 0 to the target over ramp_steps."""
    warmup_steps: NonNegativeInt = 0
    """Dense steps (S = 0) at the start."""
    ramp_steps: NonNegativeInt = 0
    """Steps from S = 0 to the target; 0 unless shape is linear, cubic or cosine."""


class BlendConfig(Section):
    """How the share of the straight-through gradient moves over the steps, when gradient is blend."""

    start: Fraction = 1.0
    """Share at first; 1 is ste, 0 masked."""
    end: Fraction = 0.0
    """Share from the end of the ramp on."""
    shape: Literal["linear", "cosine"] = "linear"
    """Of the way from start to end."""
    hold_steps: NonNegativeInt = 0
    """Steps that stay at start."""
    ramp_steps: NonNegativeInt = 0
    """Steps from start to end."""


class QuantizationSitesConfig(Section):
    """Number format by site; null takes model.sparsity.quantization.activations."""

    attention_input: ActivationFormat | None = None
    """Input of the query, key and value projections."""
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
    """Format at every site: int8 scales a row by its largest magnitude, int4 by its mean magnitude; the selection still
    looks at the unrounded row. null: the preset's, or none without one."""
    sites: QuantizationSitesConfig = QuantizationSitesConfig()
    """Format by site."""
    weights: Literal["none", "ternary"] = "none"
    """ternary: -1, 0 or 1 times the mean magnitude of the matrix, in every projection of attention, experts and dense
    layers; embedding, head and router keep their precision."""


class SparsityConfig(Section):
    """Q-Sparse: what fraction of the features in front of each weight matrix is zeroed, and how."""

    preset: Literal["paper", "a4.8", "dense"] | None = None
    """paper: S = 0.3 at every site (Q-Sparse); a4.8: int4 at the inputs, int8 with S = 0.5 before the attention's
    output, int8 before down (BitNet a4.8; its weights are ternary, see quantization.weights); dense: S = 0. What
    default, sites, overrides and quantization say comes first."""
    plan: str | None = None
    """JSON file with S, and where calibrated the threshold, of every layer, site and expert; preset, default, sites and
    overrides must then be unset."""
    default: Sparsity | None = None
    """S at every site, the fraction zeroed; null: the preset's, or 0, dense, without one."""
    sites: SitesConfig = SitesConfig()
    """S by site."""
    overrides: Annotated[tuple[SparsityOverride, ...], Field(strict=False)] = ()
    """S by layer, site and expert, applied in order after sites."""
    schedule: ScheduleConfig = ScheduleConfig()
    """S over the steps."""
    selection: Literal["topk", "block", "threshold", "statistical", "relu"] = "topk"
    """topk: the K largest magnitudes of a row; block: the largest of every contiguous group of group_size features;
    threshold: all above a magnitude calibrated on data, which the plan holds; statistical: all above mean + z *
    standard deviation of the row's magnitudes, z the normal quantile at S; these two keep 1 - S only on average. relu:
    the positive features wherever S is above 0, however many they are; the paper's baseline, with gradient masked."""
    group_size: Width = 32
    """G, features a group when selection is block."""
    rescale: Literal["none", "unit", "preserve"] = "none"
    """What follows the selection: none; unit: divide by the L2 norm of the kept; preserve: restore the row's norm."""
    backend: Literal["auto", "torch", "native", "triton"] = "auto"
    """torch: stock PyTorch; native: C++ compiled at first use, CPU only; triton: GPU kernels; auto: the fastest that
    runs here."""
    gradient: Literal["ste", "masked", "blend"] = "ste"
    """ste: the backward ignores the mask; masked: only kept features receive gradient; blend: a share of the one and
    the rest of the other."""
    blend: BlendConfig = BlendConfig()
    """The share of ste over the steps, when gradient is blend."""
    quantization: QuantizationConfig = QuantizationConfig()
    """Number formats in front of and inside the weight matrices."""
    debug: bool = False
    """Stop at the first site that is given a NaN and name it; the check waits for the device at every site. Without it
    a NaN is never dropped by a selection and reaches the loss."""


class ModelConfig(Section):
    """The decoder."""

    # Token ids are stored in 32 bits.
    vocab_size: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Rows of the embedding, at least the size of the tokenizer's vocabulary; null: that size, rounded up to a multiple
    of 8 (264 for bytes, which need 257). Rows beyond the tokenizer's are padding: nothing evaluates or generates them.
    """
    hidden_size: Width = 128
    """D, model width."""
    num_layers: NumLayers = 4
    """Decoder layers."""
    num_heads: Width = 4
    """H, query heads."""
    num_kv_heads: Width | None = None
    """Key and value heads, a divisor of num_heads; null: num_heads."""
    head_size: Width | None = None
    """C, channels a head, even; null: hidden_size / num_heads."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on every head's queries and keys, before the rotation."""
    tie_embeddings: bool = False
    """The head uses the embedding's weight."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights, cut at three of them."""
    moe: MoEConfig = MoEConfig()
    """Experts."""
    sparsity: SparsityConfig = SparsityConfig()
    """Q-Sparse."""
