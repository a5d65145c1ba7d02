"""Every setting of a run: its type, unit, range and default. Imports no torch.

The settings of the model are defined in ``model_schema.py`` and the files that it imports, and can be imported from
here too. ``docs/settings.md`` and ``configs/schema.json`` are generated from these classes. Rules that involve several
settings are in ``rules.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qsparse_moe.config.attention_schema import LatentAttentionConfig
from qsparse_moe.config.model_schema import (
    SITES,
    ActivationFormat,
    BlendConfig,
    ModelConfig,
    MoEConfig,
    QuantizationConfig,
    RoutingOverride,
    ScheduleConfig,
    Site,
    SitesConfig,
    SparsityConfig,
    SparsityOverride,
)
from qsparse_moe.config.section import (
    LARGEST_WIDTH,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Texts,
)

__all__ = [
    "RECOMPUTE",
    "SITES",
    "ActivationFormat",
    "BlendConfig",
    "ChatConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "LatentAttentionConfig",
    "LossScaleConfig",
    "MetricsConfig",
    "MoEConfig",
    "ModelConfig",
    "QuantizationConfig",
    "Recompute",
    "RoutingOverride",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "Site",
    "SitesConfig",
    "SourceConfig",
    "SparsityConfig",
    "SparsityOverride",
    "TrainingConfig",
]

Recompute = Literal["none", "full", "selective", "attention", "feed_forward"]
RECOMPUTE: tuple[Recompute, ...] = Recompute.__args__  # type: ignore[attr-defined]


class SourceConfig(Section):
    """One source of documents."""

    kind: Literal["stdlib", "text", "jsonl", "parquet", "saved", "hub"] = "stdlib"
    """stdlib: the .py files of the running Python's standard library; text, jsonl, parquet: local files, of which text
    and jsonl may be compressed with gzip; saved: a folder that datasets' save_to_disk wrote; hub: a data set of the
    Hugging Face hub, or a local folder laid out as one."""
    path: str | Texts | None = None
    """Files or globs for text, jsonl and parquet; the folder for saved; the data set's name or folder for hub."""
    subset: str | None = None
    """Name of the configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set, or of a saved one that has splits."""
    format: Literal["text", "chat"] = "text"
    """text: a record holds a text; chat: a record holds a conversation, a list of messages with role and content
    (OpenAI) or with from and value (ShareGPT), which the chat template writes (jsonl, parquet, saved, hub)."""
    column: str = "text"
    """Column with the text of the document, or with the messages of the conversation, for which text stands for
    messages (jsonl, parquet, saved, hub); other columns are not read."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """text: the string between two documents of a file; null: each file is one document."""
    weight: PositiveFloat = 1.0
    """Weight of this source in the mixture: its share of the tokens, relative to the other sources. If all weights are
    1, every document is used once per epoch."""
    max_bytes: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = None
    """Maximum number of bytes of text to read from this source; null: no limit."""

    @property
    def record_column(self) -> str:
        """The column that is read: ``column``, or by default ``messages`` if the format is chat."""
        return "messages" if self.format == "chat" and self.column == "text" else self.column


class ChatConfig(Section):
    """Conversations, from sources whose format is chat."""

    template: str | None = None
    """Jinja file with the chat template; null: that of the tokenizer."""
    loss: Literal["answers", "all"] = "answers"
    """Tokens that are targets of the loss. answers: those of the assistant's messages with the token that ends each;
    all: every token."""
    too_long: Literal["cut", "drop"] = "cut"
    """What happens to a conversation of more than sequence_length + 1 tokens. cut: its first part is kept, and it is
    left out if no answer begins there; drop: it is left out. Both are counted in the log and in the manifest."""


class DataConfig(Section):
    """The data: its sources, and how text becomes sequences of tokens."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1, strict=False)] = (SourceConfig(),)
    """Sources of documents."""
    tokenizer: str = "bytes"
    """bytes, or a Hugging Face tokenizer: a folder, or a name on the hub (owner/name). A run keeps a copy of it."""
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST_WIDTH)] = 256
    """S, the number of tokens per sequence."""
    attend_across_documents: bool = False
    """Let attention and positions continue across document boundaries within a sequence."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Fraction of the documents held out for validation, selected by a hash of the text."""
    mode: Literal["table", "streaming"] = "table"
    """table: tokenize once into a memory-mapped table; a run resumes exactly on any number of ranks. streaming:
    tokenize during training; a run resumes exactly on a number of ranks that divides stream_parts."""
    shuffle: bool = True
    """table: sequences in a new random order every epoch; streaming: files (shards) in random order, and sequences in
    random order within shuffle_window."""
    shuffle_window: PositiveInt = 1024
    """streaming with shuffle: each rank reads this number of sequences, uses them in random order, and then reads the
    next ones; this is resumed exactly. Sequences further apart mix only through the order of the files. 1: sequences
    are used in the order in which they are read."""
    stream_parts: PositiveInt | None = None
    """streaming: number of parts into which the text is divided, each read in an order of its own. It must divide
    global_batch_size, and every number of ranks on which the run may resume must divide it. null: the number of ranks
    at the start, so that the run resumes on as many, or on fewer that divide it."""
    validation_tokens: PositiveInt | None = None
    """streaming: hold out the first documents of the sources, up to this number of tokens in equal shares, in place of
    a fraction: nothing else is read for them. null: validation_fraction, for which the text is read until
    evaluation_rows sequences are held out."""
    reader: Literal["auto", "thread", "process"] = "auto"
    """What reads the data of the next step while the current one is computed. streaming: a thread of each rank, or a
    process beside each rank, which tokenizes without delaying it; auto: a process if the device is CUDA. table: always
    a thread, which only copies sequences."""
    chat: ChatConfig = ChatConfig()
    """Conversations, from sources whose format is chat."""
    max_bad_records: NonNegativeInt = 0
    """Maximum number of records of one source that may be skipped per pass: lines that are not JSON, records without
    text in the column, files that are not UTF-8, and documents that are too long. The log contains their number. 0: the
    first one ends the run."""
    max_document_bytes: PositiveInt = 50_000_000
    """Maximum size of a document (a text file, a line of JSONL, a row of Parquet). Tokenizing a document takes about 20
    times its size in memory."""
    shard_bytes: Annotated[int, Field(ge=1, le=2**63 - 1)] = 256_000_000
    """table: bytes of files that become one shard of a table. Shards are built in parallel, and finished ones are kept
    if the building is interrupted; the sequences do not depend on them. Another value makes another table."""
    cache_dir: str = "~/.cache/qsparse_moe"
    """Folder for tokenized tables, which are stored in its subfolder tables. They are never removed automatically:
    while no run is active, `rm -r ~/.cache/qsparse_moe/tables` removes them, and the next run creates its table again.
    """


class DeepSpeedConfig(Section):
    """Settings of DeepSpeed; its whole configuration is derived from them."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """ZeRO stage. 0: everything is replicated; 1: the optimizer state is sharded; 2: the gradients too; 3: the
    parameters too."""
    reduce_bucket_size: PositiveInt = 50_000_000
    """Number of elements per reduction."""
    allgather_bucket_size: PositiveInt = 50_000_000
    """Number of elements per all-gather."""
    overlap_communication: bool = False
    """Reduce gradients while the backward pass runs."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the fp32 weights and Adam's moments are stored, and where AdamW runs. none: on the device; cpu: in host
    memory (ZeRO 1 to 3); nvme: in files below nvme_path, which are read and written in every step (ZeRO-3)."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where a rank keeps its shard of the parameters until a layer needs them (ZeRO-3). none: on the device; cpu: in
    host memory; nvme: in files below nvme_path."""
    nvme_path: str | None = None
    """Folder on a local disk for offloading to files. Every run creates its own folder in it and removes it at the
    end."""


class LossScaleConfig(Section):
    """The factor of each micro-batch's mean loss in fp16; the defaults are those of DeepSpeed."""

    initial_power: Annotated[int, Field(ge=0, le=32)] = 16
    """The initial loss scale is two to this power."""
    window: PositiveInt = 1000
    """Number of consecutive steps without an overflow after which the scale is doubled."""
    hysteresis: PositiveInt = 2
    """Number of overflows before the scale is halved for the first time, and again after it was doubled. Each overflow
    skips its step."""
    minimum: PositiveInt = 1
    """Smallest scale; an overflow at this scale ends the run."""


class SkipStepsConfig(Section):
    """Steps whose gradient is not used. A skipped step changes no weight and no optimizer state, and it counts as a
    step: the run goes on with the data and the learning rate of the next one."""

    limit: NonNegativeInt = 0
    """Maximum number of skipped steps among the last window steps; one more ends the run. 0: no step is skipped, and a
    loss, an activation, or a gradient that is not finite ends the run. Steps that fp16 skips because the scaled
    gradient overflows do not count."""
    sigma: NonNegativeFloat = 0.0
    """Also skip a step whose gradient norm is above the mean of the norms in the window by more than this number of
    their standard deviations (6 is common), once half a window of norms is known; 0: outliers are not skipped."""
    window: Annotated[int, Field(ge=2, le=100_000)] = 128
    """Number of steps in the window."""


class TrainingConfig(Section):
    """The training run."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run folder; letters, digits, '.', '_', and '-'."""
    output_dir: str = "runs"
    """Folder that contains the run folders."""
    steps: PositiveInt = 300
    """Number of optimizer steps."""
    global_batch_size: PositiveInt = 16
    """Number of sequences per step over all ranks; a multiple of micro_batch_size times the number of ranks."""
    micro_batch_size: PositiveInt = 8
    """Number of sequences that one rank processes at once."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    learning_rate_schedule: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = "cosine"
    """Shape of the schedule after the warm-up; warmup_stable_decay falls linearly over the last decay_steps."""
    warmup_steps: NonNegativeInt = 0
    """Number of steps of linear warm-up; a run with fewer steps ends before the peak."""
    decay_steps: NonNegativeInt = 0
    """Number of final steps that decay under warmup_stable_decay; 0 otherwise."""
    min_learning_rate_ratio: Fraction = 0.1
    """Final learning rate divided by the peak."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of AdamW, for matrices only."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of AdamW's first moment."""
    # This rate, that of the first moment and the weight decay are those of the Q-Sparse paper (arXiv 2407.10969).
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of AdamW's second moment."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 keep fp32 master weights and optimizer state. fp16 scales the loss and skips a step whose gradient
    overflows; many CPUs have no fp16 products and are slow at it."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    """Dynamic loss scaling if precision is fp16."""
    skip_steps: SkipStepsConfig = SkipStepsConfig()
    """Skipping of steps whose gradient is not finite or is an outlier."""
    activation_checkpointing: Recompute = "none"
    """Activations that the backward pass recomputes instead of saving. full: every layer; attention, feed_forward: this
    half of every layer with its norm; selective: everything in a layer except its matrix products and attention."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of the weights, the data order, and the noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if it is available."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed, or torch: the plain reference, which replicates everything except sharded experts and ignores
    training.deepspeed."""
    expert_parallel_size: PositiveInt = 1
    """P, the number of ranks that share the experts of every layer: each holds E / P of them, and tokens are exchanged
    by all-to-all. It must divide the number of ranks and num_experts. 1: every rank holds all experts (under ZeRO-3, a
    shard of each)."""
    # Python's own timers fail above 9e9 seconds.
    collective_timeout: Annotated[float, Field(gt=0, le=1e8)] = 600.0
    """Seconds without a heartbeat of some rank, or without the end of a collective operation, after which the run ends.
    It must be longer than anything that one rank does while the others wait. A killed rank is noticed sooner."""
    check_memory: bool = True
    """Refuse a run that needs more memory than its devices or its host have, as `qsparse-moe layout` counts it. false:
    start all the same."""
    resume: bool = False
    """Continue the run of this name if its folder exists."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Start from trained weights: the folder of a run (its newest checkpoint), of one checkpoint, of an export, or of a
    Hugging Face model or its name on the hub (see docs/interop.md); experts can be made of dense layers. The routers'
    biases come with them; the optimizer, the schedules, and the data start from scratch. A resumed run continues from
    its own checkpoint and does not read them again. null: start from random weights."""
    checkpoint_interval: NonNegativeInt = 0
    """Number of steps between checkpoints; 0: only those by checkpoint_minutes and at the end."""
    # Steps take milliseconds or minutes. With a limit in time, a crash loses about this much work whatever the model.
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Save a checkpoint after a step if the last one is this number of minutes old, by rank 0's clock; 0: never."""
    checkpoint_async: bool = True
    """Write checkpoints in the background while training goes on, from a copy of each rank's share of the state in host
    memory (12 bytes per parameter over all ranks); false: training waits for the disk, and no copy is made."""
    # If the newest one turns out to be damaged, the run can continue from the one before.
    keep_last: PositiveInt = 2
    """Number of checkpoints to keep."""
    evaluation_interval: NonNegativeInt = 0
    """Number of steps between evaluations; 0: only at the end."""
    evaluation_rows: PositiveInt = 64
    """Number of validation sequences, the same ones in every layout; fewer if there are fewer."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Settings of DeepSpeed."""


class MetricsConfig(Section):
    """Metrics and logging."""

    # At this interval metrics cost 2.5 % of the time of a step of configs/tiny.yaml (docs/results.md).
    interval: PositiveInt = 10
    """Number of steps between logged steps."""
    dead_expert_window: NonNegativeInt = 100
    """A warning names the experts that received no token in this number of steps, checked in logged steps; 0: never."""
    tensorboard: bool = True
    """Write TensorBoard event files in addition to metrics.jsonl."""
    hyperparameters: Texts = ()
    """Settings, by dotted path, with a column on TensorBoard's HPARAMS page in addition to the standard columns. All
    runs on one page should list the same settings; a grid lists the settings that it varies."""
    variant: str | None = None
    """Name of this run's variant in a grid, set by the grid. With it, the HPARAMS page has columns for the variant, S,
    the seed, and hyperparameters only; null: not part of a grid."""
    image_interval: NonNegativeInt = 200
    """Number of steps between TensorBoard's heat maps of layers and experts, drawn in the next logged step; 0: none."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one device in the precision of the run, for the model FLOPs utilization; null: looked up by the
    name of the device, and not reported for an unknown device."""
    layer_gradients: bool = False
    """Record the gradient norm of each layer's matrices in logged steps. Each rank then reads its shard of the gradient
    once more."""
    profile_steps: NonNegativeInt = 0
    """Number of steps to profile on rank 0; writes a trace for Perfetto and a table to profile/ in the run folder. 0:
    none."""
    profile_from: PositiveInt = 11
    """First profiled step, counted from 1. Compilers and caches have settled after a few steps."""


class RunConfig(Section):
    """One complete run."""

    model: ModelConfig = ModelConfig()
    """The model."""
    data: DataConfig = DataConfig()
    """The training data."""
    training: TrainingConfig = TrainingConfig()
    """The training run."""
    metrics: MetricsConfig = MetricsConfig()
    """Logging."""
