"""Every setting of a run: its type, unit, range and default, in one place. Imports no torch.

The README's table of settings and ``configs/schema.json`` are made from these classes. Rules that join several
settings stand in ``rules.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ActivationFormat = Literal["none", "int8", "int4"]
Sparsity = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Lists in YAML, tuples here: a frozen section must not hold a list that can be changed. strict=False admits the list;
# the items stay strict.
Selector = int | str | Annotated[tuple[int, ...], Field(strict=False)] | None


Recompute = Literal["none", "full", "selective", "attention", "feed_forward"]
RECOMPUTE: tuple[Recompute, ...] = Recompute.__args__  # type: ignore[attr-defined]


class Section(BaseModel):
    """A group of settings: frozen, and strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class MoEConfig(Section):
    """The routed feed-forward layers."""

    num_experts: PositiveInt = 8
    """E, routed experts a layer."""
    experts_per_token: PositiveInt = 2
    """A, experts that each token uses; at most num_experts."""
    expert_hidden_size: PositiveInt = 256
    """F, hidden width of one expert."""
    num_shared_experts: NonNegativeInt = 0
    """Experts that every token uses, beside the routed ones; together they are one feed-forward."""
    shared_expert_hidden_size: PositiveInt | None = None
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
    dense_hidden_size: PositiveInt | None = None
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
    group_size: PositiveInt = 32
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

    vocab_size: PositiveInt = 264
    """Rows of the embedding; at least the tokenizer's. Bytes need 257; 264 is the next multiple of 8."""
    hidden_size: PositiveInt = 128
    """D, model width."""
    num_layers: PositiveInt = 4
    """Decoder layers."""
    num_heads: PositiveInt = 4
    """H, query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads, a divisor of num_heads; null: num_heads."""
    head_size: PositiveInt | None = None
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


class SourceConfig(Section):
    """One source of documents."""

    kind: Literal["stdlib", "text", "jsonl", "parquet", "hub"] = "stdlib"
    """stdlib: the .py files of the running Python's standard library; text, jsonl, parquet: local files; hub: a data
    set of the Hugging Face hub."""
    path: str | Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Files or globs for text, jsonl and parquet; the data set's name for hub."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    column: str = "text"
    """Column that holds the document's text (jsonl, parquet, hub)."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """text: where one document of a file ends and the next begins; null: a file is one document."""
    weight: PositiveFloat = 1.0
    """Share of this source's tokens in the mixture, relative to the other weights; all 1: everything once."""
    max_bytes: PositiveInt | None = None
    """Stop reading the source after this many bytes of text; null: all of it."""


class DataConfig(Section):
    """Text to token rows."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1, strict=False)] = (SourceConfig(),)
    """Where documents come from."""
    tokenizer: str = "bytes"
    """bytes, or the name or folder of a Hugging Face tokenizer."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """S, tokens a row."""
    attend_across_documents: bool = False
    """Attention and positions run on over document boundaries inside a row."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents held out, chosen by a hash of the text."""
    mode: Literal["table", "streaming"] = "table"
    """table: tokenise once into a memory-mapped table, exactly resumable on any number of ranks; streaming: tokenise
    while training, resumable on the same number of ranks."""
    shuffle: bool = True
    """table: rows in a new random order every epoch; streaming: files (shards) in random order."""
    shuffle_buffer: NonNegativeInt = 0
    """Must be 0: a shuffle buffer cannot be resumed exactly."""
    cache_dir: str = "~/.cache/qsparse_moe"
    """Where tokenised tables are kept."""


class DeepSpeedConfig(Section):
    """What of DeepSpeed's own settings a run may choose; the whole dictionary is derived from it."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """0: replicated; 1: optimizer state sharded; 2: gradients too; 3: parameters too."""
    reduce_bucket_size: PositiveInt = 50_000_000
    """Elements reduced at once."""
    allgather_bucket_size: PositiveInt = 50_000_000
    """Elements gathered at once."""
    overlap_communication: bool = False
    """Reduce gradients while the backward runs."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where a rank keeps its fp32 weights and Adam's moments, and AdamW steps in host memory on them: none: on the
    device; cpu: host memory (ZeRO 1 to 3); nvme: files below nvme_path, read for the step and written back (ZeRO-3)."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where a rank keeps its part of the weights that compute until a layer needs them (ZeRO-3): none: on the device;
    cpu: host memory; nvme: files below nvme_path."""
    nvme_path: str | None = None
    """Folder on a local disk for what nvme offloads; every run makes a folder of its own in it and removes it."""


class LossScaleConfig(Section):
    """What every micro-batch's mean loss is multiplied by in fp16; the defaults are DeepSpeed's."""

    initial_power: Annotated[int, Field(ge=0, le=32)] = 16
    """The scale begins at two to this power."""
    window: PositiveInt = 1000
    """Steps in a row without an overflow after which the scale is doubled."""
    hysteresis: PositiveInt = 2
    """Overflows until the scale is halved for the first time, and again after it was doubled; each skips its step."""
    minimum: PositiveInt = 1
    """The scale goes no lower: an overflow there ends the run."""


class TrainingConfig(Section):
    """The run itself."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run folder: letters, digits, '.', '_' and '-'."""
    output_dir: str = "runs"
    """Folder of run folders."""
    steps: PositiveInt = 300
    """Optimizer steps."""
    global_batch_size: PositiveInt = 16
    """Rows a step over all ranks; a multiple of micro_batch_size times the ranks."""
    micro_batch_size: PositiveInt = 8
    """Rows that one rank sends through the model at once."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    learning_rate_schedule: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = "cosine"
    """Shape after the warm-up; warmup_stable_decay falls linearly over the last decay_steps."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    decay_steps: NonNegativeInt = 0
    """Last steps that decay under warmup_stable_decay; else 0."""
    min_learning_rate_ratio: Fraction = 0.1
    """Final learning rate over the peak."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's decay of matrices; norms have none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's second moment."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 keep fp32 master weights and optimizer state; fp16 scales the loss, and skips a step whose
    gradient overflows. Many CPUs have no fp16 product: it runs there, slowly."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    """Dynamic loss scaling, when precision is fp16."""
    activation_checkpointing: Recompute = "none"
    """What the backward computes again instead of keeping it: full: every layer; attention, feed_forward: this half of
    every layer, its norm included; selective: every layer but its matrix products and attention, which are kept."""
    seed: NonNegativeInt = 0
    """Seed of weights, data order and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """torch is the plain reference; it replicates all but spread experts and ignores training.deepspeed."""
    expert_parallel_size: PositiveInt = 1
    """P, the ranks that hold the experts of every layer between them, E / P each, and send their tokens to each other;
    it divides the number of ranks and num_experts. 1: every rank holds all experts, or ZeRO-3's part of each."""
    collective_timeout: PositiveFloat = 600.0
    """Seconds after which a rank that gives no sign of life, or a collective that does not end, ends the run: longer
    than anything that one rank does while the others wait. A rank that is killed is noticed sooner."""
    resume: bool = False
    """Continue the run folder of this name, if there is one."""
    checkpoint_interval: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: PositiveInt = 2
    """Checkpoints kept."""
    evaluation_interval: NonNegativeInt = 0
    """Steps between evaluations; 0: only at the end."""
    evaluation_rows: PositiveInt = 64
    """Validation rows used, the same ones in every layout; fewer where there are fewer."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """DeepSpeed."""


class MetricsConfig(Section):
    """What is written about a run."""

    interval: PositiveInt = 10
    """Steps between logged steps."""
    dead_expert_window: NonNegativeInt = 100
    """A warning names the experts that got no row in so many steps, looked at in logged steps; 0: never."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    hyperparameters: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Settings by dotted path that get a column on the HPARAMS page, beside those that always have one. The runs of one
    page should name the same; a grid names what it varies."""
    image_interval: NonNegativeInt = 200
    """Steps between heat maps of layers and experts in TensorBoard, drawn in the next logged step; 0: none."""
    peak_tflops: PositiveFloat | None = None
    """TFLOP/s that one device can reach in the run's precision, for the model FLOPs utilisation; null: from a table by
    the device's name, and no utilisation where that does not know it."""
    layer_gradients: bool = False
    """Record the gradient norm of each layer's matrices in logged steps. Each rank reads its part of the gradient once
    more in those steps; the sums travel with the other statistics."""
    profile_steps: NonNegativeInt = 0
    """Profile so many steps on rank 0: a trace for Perfetto and a table in the run folder's profile/; 0: none."""
    profile_from: PositiveInt = 11
    """The first of the profiled steps, counted from 1. Compilers and caches have settled after a few."""


class RunConfig(Section):
    """One complete run."""

    model: ModelConfig = ModelConfig()
    """The decoder."""
    data: DataConfig = DataConfig()
    """Text to token rows."""
    training: TrainingConfig = TrainingConfig()
    """The run itself."""
    metrics: MetricsConfig = MetricsConfig()
    """What is written about a run."""
