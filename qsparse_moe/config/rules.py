"""Rules that involve several settings. Each message names the settings, their values, the rule, and a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qsparse_moe.config.fewer_experts_rules import FEWER_EXPERTS_RULES
from qsparse_moe.config.fields import section_fields, unknown_setting, walk
from qsparse_moe.config.model_rules import MODEL_RULES, divisors, nearest
from qsparse_moe.config.problems import Problem, raise_if_any, show
from qsparse_moe.config.router_rules import ROUTER_RULES, untrained_router
from qsparse_moe.config.schema import LossScaleConfig, ModelConfig, RunConfig, SourceConfig
from qsparse_moe.config.shapes import BYTE_VOCABULARY, moe_layers
from qsparse_moe.errors import ConfigError

_FILE_KINDS = frozenset({"text", "jsonl", "parquet"})
_LARGEST_CHAT_VOCABULARY = 2**28


def broken_rules(config: RunConfig) -> list[Problem]:
    """Return the problems of ``config``; every rule is checked, whatever the others found."""
    # All of them, so that a file is corrected once and not once per message.
    return _broken_model_rules(config.model) + [problem for rule in _RUN_RULES for problem in rule(config)]


def check_config(config: RunConfig) -> None:
    """Raise ConfigError for a config made in Python that breaks a rule; ``load_config`` has checked its own."""
    raise_if_any(broken_rules(config), "the config")


def check_model(config: ModelConfig) -> None:
    """Raise ConfigError for a model section made in Python that breaks a rule."""
    raise_if_any(_broken_model_rules(config), "the model section")


def check_trainable(config: RunConfig) -> None:
    """Raise ConfigError for settings that are valid for reading an existing run but not for training a new one."""
    problem = untrained_router(config.model)
    if problem:
        raise ConfigError(problem)


def _broken_model_rules(config: ModelConfig) -> list[Problem]:
    return [problem for rule in (*MODEL_RULES, *ROUTER_RULES, *FEWER_EXPERTS_RULES) for problem in rule(config)]


def check_world_size(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError unless ``world_size`` ranks can share the experts and the global batch evenly."""
    training = config.training
    # Not among the rules: the number of ranks is no setting and is known only when a run starts.
    experts_over = training.expert_parallel_size
    if world_size % experts_over:
        fitting = [size for size in divisors(world_size) if config.model.moe.num_experts % size == 0]
        raise ConfigError(
            f"training.expert_parallel_size ({experts_over}) must divide the number of ranks ({world_size}); start a "
            f"multiple of {experts_over} ranks, or choose another size: {nearest(experts_over, fitting)}"
        )
    share = training.micro_batch_size * world_size
    if training.global_batch_size % share:
        raise ConfigError(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
            f"training.micro_batch_size ({training.micro_batch_size}) times the ranks ({world_size}), {share}; "
            f"{_nearest_multiples(training.global_batch_size, share)}"
        )


def accepts_layout(config: RunConfig, world_size: int) -> bool:
    """Return whether no rule about batches, experts and offload refuses to train ``config`` on ``world_size`` ranks."""
    if any(problem for rule in (_batch_sizes, _expert_parallelism, _offload) for problem in rule(config)):
        return False
    try:
        check_world_size(config, world_size)
    except ConfigError:
        return False
    return True


def _nearest_multiples(value: int, step: int) -> str:
    # Both neighbours, because only the user knows whether memory or the schedule allows the larger one.
    below, above = value // step * step, -(-value // step) * step
    return f"the nearest multiples are {below} and {above}" if below else f"the smallest is {above}"


def _batch_sizes(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    if training.global_batch_size % training.micro_batch_size:
        yield Problem(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
            f"training.micro_batch_size ({training.micro_batch_size}); "
            f"{_nearest_multiples(training.global_batch_size, training.micro_batch_size)}",
            ("training.global_batch_size", "training.micro_batch_size"),
        )


def _learning_rate_steps(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    paths = ("training.decay_steps", "training.learning_rate_schedule")
    decays = training.learning_rate_schedule == "warmup_stable_decay"
    if training.decay_steps and not decays:
        yield Problem(
            f"training.decay_steps ({training.decay_steps}) must be 0 when training.learning_rate_schedule is "
            f"{training.learning_rate_schedule}; remove it or choose warmup_stable_decay",
            paths,
        )
    if decays and not training.decay_steps:
        yield Problem(
            "training.decay_steps (0) must be at least 1 when training.learning_rate_schedule is warmup_stable_decay; "
            f"a tenth of the steps is {max(1, training.steps // 10)}",
            paths,
        )
    # A run without a decay may end during its warm-up: it can be the beginning of a longer run.
    together = training.warmup_steps + training.decay_steps
    if training.decay_steps and together > training.steps:
        # The proposal keeps the proportion of the two; a decay of 0 steps would break the rule above.
        warmup = training.steps * training.warmup_steps // together
        decay = max(1, training.steps * training.decay_steps // together)
        yield Problem(
            f"training.warmup_steps ({training.warmup_steps}) and training.decay_steps ({training.decay_steps}) "
            f"together must be at most training.steps ({training.steps}); shorten them, for "
            f"example to {warmup} and {decay}, or train for at least {together} steps",
            ("training.warmup_steps", "training.decay_steps", "training.steps"),
        )


def _sparsity_steps(config: RunConfig) -> Iterator[Problem]:
    schedule, steps = config.model.sparsity.schedule, config.training.steps
    needed = schedule.warmup_steps + schedule.ramp_steps
    if needed > steps:
        path = "model.sparsity.schedule"
        yield Problem(
            f"{path}.warmup_steps ({schedule.warmup_steps}) and {path}.ramp_steps ({schedule.ramp_steps}) together "
            f"must be at most training.steps ({steps}), or S never reaches its target; shorten them or train for at "
            f"least {needed} steps",
            (f"{path}.warmup_steps", f"{path}.ramp_steps", "training.steps"),
        )


def _blend_steps(config: RunConfig) -> Iterator[Problem]:
    blend, steps = config.model.sparsity.blend, config.training.steps
    needed = blend.hold_steps + blend.ramp_steps
    # With another gradient, a rule of the model reports the settings of the blend.
    if config.model.sparsity.gradient == "blend" and needed > steps:
        path = "model.sparsity.blend"
        yield Problem(
            f"{path}.hold_steps ({blend.hold_steps}) and {path}.ramp_steps ({blend.ramp_steps}) together must be at "
            f"most training.steps ({steps}), or the gradient never reaches blend.end; shorten them or train for at "
            f"least {needed} steps",
            (f"{path}.hold_steps", f"{path}.ramp_steps", "training.steps"),
        )


def _profiled_steps(config: RunConfig) -> Iterator[Problem]:
    metrics, steps = config.metrics, config.training.steps
    last = metrics.profile_from + metrics.profile_steps - 1
    if metrics.profile_steps and last > steps:
        yield Problem(
            f"metrics.profile_from ({metrics.profile_from}) and metrics.profile_steps ({metrics.profile_steps}) end "
            f"with step {last}, which must be at most training.steps ({steps}); begin earlier, profile fewer steps, or "
            f"train for at least {last} steps",
            ("metrics.profile_from", "metrics.profile_steps", "training.steps"),
        )


def _hyperparameters(config: RunConfig) -> Iterator[Problem]:
    for path in config.metrics.hyperparameters:
        parts = tuple(path.split("."))
        known, node = walk(parts)
        if len(known) < len(parts):
            yield Problem(f"metrics.hyperparameters: {unknown_setting(parts).message}", ("metrics.hyperparameters",))
        # These have no single value that a table of runs could show.
        elif section_fields(node) is not None or any(part.isdecimal() for part in parts):
            yield Problem(
                f"metrics.hyperparameters ({path}) must name settings, not a section or an item of a list; "
                "list the settings of the section, or remove it",
                ("metrics.hyperparameters",),
            )


def _expert_parallelism(config: RunConfig) -> Iterator[Problem]:
    size, path = config.training.expert_parallel_size, "training.expert_parallel_size"
    moe = config.model.moe
    if size > 1 and not moe_layers(config.model):
        yield Problem(
            f"{path} ({size}) must be 1 when every layer is dense (model.moe.num_dense_layers is "
            f"{moe.num_dense_layers}, model.moe.moe_layer_interval {moe.moe_layer_interval}): there are no experts to "
            "distribute; set it to 1",
            (path, "model.moe.num_dense_layers", "model.moe.moe_layer_interval", "model.num_layers"),
        )
    elif moe.num_experts % size:
        yield Problem(
            f"{path} ({size}) must divide model.moe.num_experts ({moe.num_experts}), so that every rank has the same "
            f"number of experts; {nearest(size, divisors(moe.num_experts))}",
            (path, "model.moe.num_experts"),
        )


def _offload(config: RunConfig) -> Iterator[Problem]:
    chosen, path = config.training.deepspeed, "training.deepspeed"
    for name, place, needed, why, way_out in _OFFLOAD_NEEDS:
        if getattr(chosen, name) == place and chosen.zero_stage < needed:
            yield Problem(
                f"{path}.{name} ({place}) needs {path}.zero_stage ({chosen.zero_stage}) to be at least {needed}: {why};"
                f" raise it, or set {path}.{name}={way_out}",
                (f"{path}.{name}", f"{path}.zero_stage"),
            )
    yield from _nvme_path(config)


_WHOLE_WEIGHTS = "below stage 3 every rank keeps all weights on the device"
_NO_FILES = "below stage 3 DeepSpeed would silently use host memory"
_OFFLOAD_NEEDS = (
    ("offload_optimizer", "cpu", 1, "stage 0 does not shard the optimizer state", "none"),
    ("offload_optimizer", "nvme", 3, _NO_FILES, "cpu (stage 1 and above) or none"),
    ("offload_parameters", "cpu", 3, _WHOLE_WEIGHTS, "none"),
    ("offload_parameters", "nvme", 3, _WHOLE_WEIGHTS, "none"),
)
"""Setting, value, the lowest ZeRO stage that supports it, the reason, and the alternative."""


def _nvme_path(config: RunConfig) -> Iterator[Problem]:
    chosen, path = config.training.deepspeed, "training.deepspeed"
    names = [name for name in ("offload_optimizer", "offload_parameters") if getattr(chosen, name) == "nvme"]
    if names and not chosen.nvme_path:
        yield Problem(
            f"{path}.nvme_path ({show(chosen.nvme_path)}) must name a folder on a local disk when {path}.{names[0]} is "
            "nvme; set it, or choose cpu",
            (f"{path}.nvme_path", *(f"{path}.{name}" for name in names)),
        )
    if chosen.nvme_path is not None and not names:
        yield Problem(
            f"{path}.nvme_path ({show(chosen.nvme_path)}) has no meaning when neither {path}.offload_optimizer nor "
            f"{path}.offload_parameters is nvme; remove it, or choose nvme",
            (f"{path}.nvme_path", f"{path}.offload_optimizer", f"{path}.offload_parameters"),
        )


def _loss_scale(config: RunConfig) -> Iterator[Problem]:
    scale, path, precision = config.training.loss_scale, "training.loss_scale", config.training.precision
    if precision != "fp16":
        # Refused rather than ignored: a changed value shows that fp16 was intended.
        for name, default in LossScaleConfig():
            if getattr(scale, name) != default:
                yield Problem(
                    f"{path}.{name} ({getattr(scale, name)}) has no meaning when training.precision is {precision}, "
                    "whose loss is not scaled; remove it, or choose fp16",
                    (f"{path}.{name}", "training.precision"),
                )
    elif scale.minimum > 2**scale.initial_power:
        yield Problem(
            f"{path}.minimum ({scale.minimum}) must be at most two to the power of {path}.initial_power "
            f"({scale.initial_power}), {2**scale.initial_power}; lower the one or raise the other",
            (f"{path}.minimum", f"{path}.initial_power"),
        )


def _streaming_only(config: RunConfig) -> Iterator[Problem]:
    if config.data.mode == "streaming":
        return
    for name in ("stream_parts", "validation_tokens"):
        value = getattr(config.data, name)
        if value is not None:
            yield Problem(
                f"data.{name} ({value}) has no meaning when data.mode is table; remove it, or set data.mode=streaming",
                (f"data.{name}", "data.mode"),
            )


def _vocabulary(config: RunConfig) -> Iterator[Problem]:
    vocab_size = config.model.vocab_size
    if config.data.tokenizer == "bytes" and vocab_size is not None and vocab_size < BYTE_VOCABULARY:
        yield Problem(
            f"model.vocab_size ({vocab_size}) must be at least {BYTE_VOCABULARY} when data.tokenizer is bytes "
            "(256 bytes and the document token); remove it, and it is derived from the tokenizer",
            ("model.vocab_size", "data.tokenizer"),
        )


def _sources(config: RunConfig) -> Iterator[Problem]:
    for index, source in enumerate(config.data.sources):
        path = f"data.sources.{index}"
        for name, message in _source_problems(source):
            yield Problem(
                f"{path}.{name} ({show(getattr(source, name))}) {message}", (f"{path}.{name}", f"{path}.kind")
            )


def _chat(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if all(source.format == "text" for source in data.sources):
        return
    if data.tokenizer == "bytes":
        yield Problem(
            'data.tokenizer ("bytes") must have special tokens for the turns of a conversation when a source has the '
            "format chat; name a Hugging Face tokenizer",
            ("data.tokenizer",),
        )
    if data.attend_across_documents:
        yield Problem(
            "data.attend_across_documents (true) must be false when a source has the format chat: conversations that "
            "share a sequence would be mixed",
            ("data.attend_across_documents",),
        )
    if (config.model.vocab_size or 0) > _LARGEST_CHAT_VOCABULARY:
        yield Problem(
            f"model.vocab_size ({config.model.vocab_size}) must be at most {_LARGEST_CHAT_VOCABULARY} when a source "
            "has the format chat, whose tokens are stored with marks in their high bits",
            ("model.vocab_size",),
        )


def _source_problems(source: SourceConfig) -> Iterator[tuple[str, str]]:
    """Yield each wrong setting of one source, with the message."""
    kind = source.kind
    if kind == "stdlib" and source.path is not None:
        yield "path", "must be null when kind is stdlib, which reads the library of this Python; remove it or set kind"
    if kind in _FILE_KINDS and not source.path:
        yield "path", f"must name files or globs when kind is {kind}, such as texts/*.{_suffix(kind)}"
    if kind == "hub" and (not isinstance(source.path, str) or not source.path):
        yield "path", "must be the name of one data set when kind is hub, such as owner/name"
    if kind == "saved" and (not isinstance(source.path, str) or not source.path):
        yield "path", "must be one folder when kind is saved, written by save_to_disk of datasets"
    # What belongs to another kind is refused rather than ignored, because it shows that another kind was meant.
    if kind != "text" and source.separator is not None:
        yield "separator", f"has no meaning when kind is {kind}; remove it"
    if kind in {"stdlib", "text"} and source.column != "text":
        yield "column", f"has no meaning when kind is {kind}, whose documents are whole files; remove it"
    if kind in {"stdlib", "text"} and source.format == "chat":
        yield "format", f"must be text when kind is {kind}, whose documents are whole files; use jsonl or parquet"
    if kind != "hub" and source.subset is not None:
        yield "subset", f"has no meaning when kind is {kind}; remove it, or set kind to hub"
    if kind not in {"hub", "saved"} and source.split != "train":
        yield "split", f"has no meaning when kind is {kind}; remove it, or set kind to hub or saved"


def _suffix(kind: str) -> str:
    return "txt" if kind == "text" else kind


def _skipped_steps(config: RunConfig) -> Iterator[Problem]:
    skip, path = config.training.skip_steps, "training.skip_steps"
    if skip.sigma and not skip.limit:
        yield Problem(
            f"{path}.sigma ({skip.sigma:g}) skips steps whose gradient is an outlier, and {path}.limit is 0, which "
            f"skips none; set {path}.limit to the number of steps of {path}.window ({skip.window}) that may be skipped",
            (f"{path}.sigma", f"{path}.limit", f"{path}.window"),
        )
    if skip.limit >= skip.window:
        yield Problem(
            f"{path}.limit ({skip.limit}) must be less than {path}.window ({skip.window}), or a run in which every "
            "step is skipped would not end early; lower the one or raise the other",
            (f"{path}.limit", f"{path}.window"),
        )


_RUN_RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    _vocabulary,
    _sources,
    _chat,
    _streaming_only,
    _batch_sizes,
    _learning_rate_steps,
    _sparsity_steps,
    _blend_steps,
    _expert_parallelism,
    _offload,
    _loss_scale,
    _skipped_steps,
    _profiled_steps,
    _hyperparameters,
)
