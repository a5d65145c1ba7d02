"""Every setting of a run: its type, unit, range and default. Imports no torch.

The model's stand in ``model_schema.py`` and can be had from here too. The README's table of settings and
``configs/schema.json`` are made from these classes. Rules that join several settings stand in ``rules.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qsparse_moe.config.model_schema import (
    SITES,
    ActivationFormat,
    BlendConfig,
    ModelConfig,
    MoEConfig,
    QuantizationConfig,
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
    "DataConfig",
    "DeepSpeedConfig",
    "LossScaleConfig",
    "MetricsConfig",
    "MoEConfig",
    "ModelConfig",
    "QuantizationConfig",
    "Recompute",
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
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set, or of a saved one that has splits."""
    column: str = "text"
    """Column that holds the document's text (jsonl, parquet, saved, hub); the others are not looked at."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """text: where one document of a file ends and the next begins; null: a file is one document."""
    weight: PositiveFloat = 1.0
    """Share of this source's tokens in the mixture, relative to the other weights; all 1: everything once."""
    max_bytes: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = None
    """Stop reading the source after this many bytes of text; null: all of it."""


class DataConfig(Section):
    """Text to token rows."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1, strict=False)] = (SourceConfig(),)
    """Where documents come from."""
    tokenizer: str = "bytes"
    """bytes, or the folder or the hub's name (owner/name) of a Hugging Face tokenizer. A run keeps a copy of it."""
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST_WIDTH)] = 256
    """S, tokens a row."""
    attend_across_documents: bool = False
    """Attention and positions run on over document boundaries inside a row."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents held out, chosen by a hash of the text."""
    mode: Literal["table", "streaming"] = "table"
    """table: tokenise once into a memory-mapped table, exactly resumable on any number of ranks; streaming: tokenise
    while training, resumable on the same number of ranks."""
    shuffle: bool = True
    """table: rows in a new random order every epoch; streaming: files (shards) in random order, and rows within
    shuffle_window."""
    shuffle_window: PositiveInt = 1024
    """streaming with shuffle: every rank reads so many rows ahead and gives them out in random order, then the next so
    many; resumed exactly. Rows further apart do not mix but by the order of files. 1: rows in their own order."""
    max_bad_records: NonNegativeInt = 0
    """Records of one source that may be skipped in one pass: lines that are no JSON, rows without text in the column,
    files that are not UTF-8, documents that are too long. Each is counted in the log. 0: the first one ends the run."""
    max_document_bytes: PositiveInt = 50_000_000
    """Longest document (a text file, a line of JSONL, a row), which is held in memory whole, about 20 times."""
    shuffle_buffer: NonNegativeInt = 0
    """Must be 0: a shuffle buffer cannot be resumed exactly."""
    cache_dir: str = "~/.cache/qsparse_moe"
    """Where tokenised tables are kept, in the folder tables inside. Nothing removes them: while no run is at work,
    `rm -r ~/.cache/qsparse_moe/tables` does, and the next run makes the one that it needs again."""


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
    """Steps of linear warm-up; a run of fewer steps ends on its way to the peak."""
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
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of weights, data order and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """torch is the plain reference; it replicates all but spread experts and ignores training.deepspeed."""
    expert_parallel_size: PositiveInt = 1
    """P, the ranks that hold the experts of every layer between them, E / P each, and send their tokens to each other;
    it divides the number of ranks and num_experts. 1: every rank holds all experts, or ZeRO-3's part of each."""
    collective_timeout: Annotated[float, Field(gt=0, le=1e8)] = 600.0
    """Seconds after which a rank that gives no sign of life, or a collective that does not end, ends the run: longer
    than anything that one rank does while the others wait. A rank that is killed is noticed sooner."""
    resume: bool = False
    """Continue the run folder of this name, if there is one."""
    checkpoint_interval: NonNegativeInt = 0
    """Steps between checkpoints; 0: only those of checkpoint_minutes and at the end."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """A checkpoint is saved after a step when the last one is so many minutes old, by rank 0's clock; 0: never."""
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
    hyperparameters: Texts = ()
    """Settings by dotted path that get a column on the HPARAMS page, beside those that always have one. The runs of one
    page should name the same; a grid names what it varies."""
    variant: str | None = None
    """Name of the grid's point that this run is, set by the grid. With it the HPARAMS page has columns for it, S, the
    seed and hyperparameters, and no others; null: no grid."""
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
