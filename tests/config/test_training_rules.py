"""Rules about training, DeepSpeed, ranks and metrics: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest

from qsparse_moe.config.rules import check_world_size
from qsparse_moe.errors import ConfigError
from tests.config.settings_by_path import build, messages
from tests.support.messages import assert_one_message

DS = "training.deepspeed"


# Broken settings; the parts of the message in order (settings with values, the numbers of the rule, the way out); and a
# change that repairs them.
CASES = {
    "offload of the optimizer without ZeRO": (
        {f"{DS}.zero_stage": 0, f"{DS}.offload_optimizer": "cpu"},
        (
            "training.deepspeed.offload_optimizer (cpu)",
            "training.deepspeed.zero_stage (0)",
            "1",
            "0",
            "training.deepspeed.offload_optimizer=none",
        ),
        {f"{DS}.zero_stage": 1},
    ),
    "offload of the optimizer to files below ZeRO-3": (
        {f"{DS}.zero_stage": 2, f"{DS}.offload_optimizer": "nvme", f"{DS}.nvme_path": "/swap"},
        (
            "training.deepspeed.offload_optimizer (nvme)",
            "training.deepspeed.zero_stage (2)",
            "3",
            "none",
        ),
        {f"{DS}.zero_stage": 3},
    ),
    "offload of the weights below ZeRO-3": (
        {f"{DS}.zero_stage": 2, f"{DS}.offload_parameters": "cpu"},
        (
            "training.deepspeed.offload_parameters (cpu)",
            "training.deepspeed.zero_stage (2)",
            "3",
            "training.deepspeed.offload_parameters=none",
        ),
        {f"{DS}.offload_parameters": "none"},
    ),
    "offload to files without a folder": (
        {f"{DS}.zero_stage": 3, f"{DS}.offload_parameters": "nvme"},
        (
            "training.deepspeed.nvme_path (null)",
            "training.deepspeed.offload_parameters",
            "nvme",
            "cpu",
        ),
        {f"{DS}.nvme_path": "/swap"},
    ),
    "a folder for files that are not written": (
        {f"{DS}.nvme_path": "/swap", f"{DS}.offload_optimizer": "cpu"},
        (
            'training.deepspeed.nvme_path ("/swap")',
            "training.deepspeed.offload_optimizer",
            "training.deepspeed.offload_parameters",
            "nvme",
            "remove",
            "nvme",
        ),
        {f"{DS}.nvme_path": None},
    ),
    "a loss scale in another precision": (
        {"training.precision": "bf16", "training.loss_scale.window": 50},
        (
            "training.loss_scale.window (50)",
            "training.precision",
            "bf16",
            "remove",
            "fp16",
        ),
        {"training.precision": "fp16"},
    ),
    "a smallest loss scale above the first": (
        {"training.precision": "fp16", "training.loss_scale.initial_power": 4, "training.loss_scale.minimum": 32},
        (
            "training.loss_scale.minimum (32)",
            "training.loss_scale.initial_power (4)",
            "16",
        ),
        {"training.loss_scale.minimum": 16},
    ),
    "outliers that no limit lets skip": (
        {"training.skip_steps.sigma": 6.0},
        ("training.skip_steps.sigma (6)", "training.skip_steps.limit is 0", "training.skip_steps.window (128)"),
        {"training.skip_steps.limit": 1},
    ),
    "a window that may be skipped as a whole": (
        {"training.skip_steps.limit": 8, "training.skip_steps.window": 8},
        ("training.skip_steps.limit (8)", "less than training.skip_steps.window (8)", "would not end early"),
        {"training.skip_steps.limit": 7},
    ),
    "a column for an unknown setting": (
        {"metrics.hyperparameters": ["training.stps"]},
        (
            "metrics.hyperparameters",
            "training.stps",
            "training.steps",
        ),
        {"metrics.hyperparameters": ["training.steps"]},
    ),
    "a column for a section": (
        {"metrics.hyperparameters": ["model.moe", "data.sources"]},
        (
            "metrics.hyperparameters (model.moe)",
            "remove",
        ),
        {"metrics.hyperparameters": ["model.moe.router", "data.sources"]},
    ),
    "micro-batches that do not fit": (
        {"training.global_batch_size": 20, "training.micro_batch_size": 8},
        (
            "training.global_batch_size (20)",
            "training.micro_batch_size (8)",
            "16",
            "24",
        ),
        {"training.global_batch_size": 24},
    ),
    "micro-batch larger than the batch": (
        {"training.global_batch_size": 4, "training.micro_batch_size": 8},
        (
            "training.global_batch_size (4)",
            "training.micro_batch_size (8)",
            "8",
        ),
        {"training.global_batch_size": 8},
    ),
    "decay without its schedule": (
        {"training.decay_steps": 5},
        (
            "training.decay_steps (5)",
            "0",
            "training.learning_rate_schedule",
            "cosine",
            "remove",
            "warmup_stable_decay",
        ),
        {"training.learning_rate_schedule": "warmup_stable_decay"},
    ),
    "schedule without its decay": (
        {"training.learning_rate_schedule": "warmup_stable_decay"},
        (
            "training.decay_steps (0)",
            "1",
            "training.learning_rate_schedule",
            "warmup_stable_decay",
            "30",
        ),
        {"training.decay_steps": 30},
    ),
    "warm-up and decay beyond the end": (
        {
            "training.steps": 50,
            "training.warmup_steps": 40,
            "training.decay_steps": 20,
            "training.learning_rate_schedule": "warmup_stable_decay",
        },
        (
            "training.warmup_steps (40)",
            "training.decay_steps (20)",
            "training.steps (50)",
            "33",
            "16",
            "60",
        ),
        {"training.warmup_steps": 33, "training.decay_steps": 16},
    ),
    "experts that do not divide": (
        {"model.moe.num_experts": 10, "training.expert_parallel_size": 4},
        (
            "training.expert_parallel_size (4)",
            "model.moe.num_experts (10)",
            "2",
            "5",
        ),
        {"training.expert_parallel_size": 5},
    ),
    "no experts to shard": (
        {"model.num_layers": 2, "model.moe.num_dense_layers": 2, "training.expert_parallel_size": 2},
        (
            "training.expert_parallel_size (2)",
            "1",
            "dense",
            "model.moe.num_dense_layers",
            "2",
            "model.moe.moe_layer_interval",
            "1",
        ),
        {"training.expert_parallel_size": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_setting_value_rule_and_way_out(case):
    settings, parts, _ = CASES[case]
    assert_one_message(messages(settings), parts)


@pytest.mark.parametrize("case", CASES)
def test_way_out_repairs_the_settings(case):
    settings, _, repaired = CASES[case]
    assert messages(settings | repaired) == []


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_world_size_that_divides_the_batch_is_accepted(world_size):
    check_world_size(build({"training.global_batch_size": 16, "training.micro_batch_size": 4}), world_size)


@pytest.mark.parametrize(
    ("world_size", "way_out"), [(3, "the nearest multiples are 12 and 24"), (8, "the smallest is 32")]
)
def test_world_size_that_does_not_divide_the_batch_is_refused(world_size, way_out):
    config = build({"training.global_batch_size": 16, "training.micro_batch_size": 4})
    expected = (
        "training.global_batch_size (16) must be a multiple of training.micro_batch_size (4) times the ranks "
        f"({world_size}), {4 * world_size}; {way_out}"
    )
    with pytest.raises(ConfigError) as caught:
        check_world_size(config, world_size)
    assert str(caught.value) == expected


@pytest.mark.parametrize(("world_size", "size"), [(1, 1), (2, 2), (8, 2), (8, 8)])
def test_ranks_that_share_the_experts_evenly_are_accepted(world_size, size):
    settings = {"training.global_batch_size": 8, "training.micro_batch_size": 1, "training.expert_parallel_size": size}
    check_world_size(build(settings), world_size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_that_share_the_experts_still_have_batches_of_their_own(size):
    settings = {"training.global_batch_size": 8, "training.micro_batch_size": 4, "training.expert_parallel_size": size}
    with pytest.raises(ConfigError, match=r"times the ranks \(4\), 16; the smallest is 16$"):
        check_world_size(build(settings), 4)


@pytest.mark.parametrize(
    ("world_size", "size", "others"),
    [(1, 2, "only one that does is 1"), (12, 8, "nearest that do are 2 and 4"), (2, 8, "nearest that do are 1 and 2")],
)
def test_ranks_that_cannot_share_the_experts_evenly_are_refused(world_size, size, others):
    config = build({"training.expert_parallel_size": size})
    expected = (
        f"training.expert_parallel_size ({size}) must divide the number of ranks ({world_size}); start a multiple of "
        f"{size} ranks, or choose another size: the {others}"
    )
    with pytest.raises(ConfigError) as caught:
        check_world_size(config, world_size)
    assert str(caught.value) == expected
