"""Rules that join settings: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.config.model_rules import divisors, sparse_sites
from qsparse_moe.config.rules import broken_rules, check_config, check_model, check_world_size
from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.config.shapes import has_experts, layer_sites, moe_layers
from qsparse_moe.errors import ConfigError
from tests.support.messages import assert_one_message


def build(settings: dict[str, object]) -> RunConfig:
    """A config from dotted paths, its single values checked and no rule."""
    tree: dict = {}
    for path, value in settings.items():
        *sections, name = path.split(".")
        holder = tree
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = value
    return RunConfig.model_validate(tree)


def messages(settings):
    return [problem.message for problem in broken_rules(build(settings))]


DS = "training.deepspeed"
HEADS = "into heads of an even size when model.head_size is null; "
BLOCK = {"model.sparsity.selection": "block", "model.sparsity.default": 0.5}
EXPERT_SITES = "expert_hidden or expert_input"
MOE_LAYER = "attention_input, attention_output, expert_input, expert_hidden"
DENSE_LAYER = "attention_input, attention_output, dense_input, dense_hidden"


def override(**settings):
    return {"model.sparsity.overrides": [{"sparsity": 0.5} | settings]}


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
    "a column for what is no setting": (
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
    "heads that do not divide": (
        {"model.num_heads": 3},
        (
            "model.num_heads (3)",
            "model.hidden_size (128)",
            "model.head_size",
            "null",
            "2",
            "4",
            "model.head_size",
        ),
        {"model.num_heads": 4},
    ),
    "heads of an odd size": (
        {"model.hidden_size": 12, "model.num_heads": 4},
        (
            "model.num_heads (4)",
            "model.hidden_size (12)",
            "model.head_size",
            "null",
            "2",
            "3",
            "model.head_size",
        ),
        {"model.num_heads": 6},
    ),
    "a width without even heads": (
        {"model.hidden_size": 15, "model.num_heads": 3},
        (
            "model.num_heads (3)",
            "model.hidden_size (15)",
            "model.head_size",
            "null",
            "model.head_size",
        ),
        {"model.head_size": 4},
    ),
    "odd head size": (
        {"model.head_size": 31},
        (
            "model.head_size (31)",
            "32",
        ),
        {"model.head_size": 32},
    ),
    "key-value heads": (
        {"model.num_kv_heads": 3},
        (
            "model.num_kv_heads (3)",
            "model.num_heads (4)",
            "2",
            "4",
        ),
        {"model.num_kv_heads": 2},
    ),
    "key-value heads of one head": (
        {"model.num_heads": 1, "model.num_kv_heads": 2},
        (
            "model.num_kv_heads (2)",
            "model.num_heads (1)",
            "1",
        ),
        {"model.num_kv_heads": 1},
    ),
    "experts a token": (
        {"model.moe.experts_per_token": 9},
        (
            "model.moe.experts_per_token (9)",
            "model.moe.num_experts (8)",
        ),
        {"model.moe.experts_per_token": 8},
    ),
    "dense layers": (
        {"model.moe.num_dense_layers": 5},
        (
            "model.moe.num_dense_layers (5)",
            "model.num_layers (4)",
            "4",
            "dense",
        ),
        {"model.moe.num_dense_layers": 4},
    ),
    "an interval beyond the last layer": (
        {"model.moe.moe_layer_interval": 5},
        (
            "model.moe.moe_layer_interval (5)",
            "none",
            "model.num_layers (4)",
            "model.moe.num_dense_layers (0)",
            "1",
            "4",
            "num_dense_layers=4",
            "none",
        ),
        {"model.moe.moe_layer_interval": 4},
    ),
    "an interval whose layers are all dense": (
        {"model.moe.moe_layer_interval": 3, "model.moe.num_dense_layers": 3},
        (
            "model.moe.moe_layer_interval (3)",
            "none",
            "model.num_layers (4)",
            "model.moe.num_dense_layers (3)",
            "1",
            "4",
            "num_dense_layers=4",
            "none",
        ),
        {"model.moe.num_dense_layers": 4},
    ),
    "width of no shared experts": (
        {"model.moe.shared_expert_hidden_size": 512},
        (
            "model.moe.shared_expert_hidden_size (512)",
            "model.moe.num_shared_experts",
            "0",
            "remove",
        ),
        {"model.moe.num_shared_experts": 1},
    ),
    "gate of no shared experts": (
        {"model.moe.shared_expert_gate": True},
        (
            "model.moe.shared_expert_gate (true)",
            "model.moe.num_shared_experts",
            "0",
            "remove",
        ),
        {"model.moe.num_shared_experts": 1},
    ),
    "site of shared experts without any": (
        {"model.sparsity.sites.shared_input": 0.5},
        (
            "model.sparsity.sites.shared_input (0.5)",
            "model.moe.num_shared_experts",
            "0",
            "remove",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        {"model.moe.num_shared_experts": 1},
    ),
    "site of dense layers without any": (
        {"model.sparsity.sites.dense_hidden": 0.5},
        (
            "model.sparsity.sites.dense_hidden (0.5)",
            "model.moe.num_dense_layers",
            "0",
            "model.moe.moe_layer_interval",
            "1",
            "remove",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        {"model.moe.moe_layer_interval": 2},
    ),
    "site of experts without any": (
        {"model.sparsity.sites.expert_input": 0.5, "model.moe.num_dense_layers": 4},
        (
            "model.sparsity.sites.expert_input (0.5)",
            "dense",
            "model.moe.num_dense_layers",
            "4",
            "model.moe.moe_layer_interval",
            "1",
            "remove",
            "attention_input",
            "attention_output",
            "dense_input",
            "dense_hidden",
        ),
        {"model.moe.num_dense_layers": 3},
    ),
    "override of a layer that is not there": (
        override(layers=4),
        (
            "model.sparsity.overrides.0.layers (4)",
            "4",
            "0-3",
        ),
        override(layers=3),
    ),
    "override of a range that leaves the model": (
        override(layers="2-99999999999"),
        (
            'model.sparsity.overrides.0.layers ("2-99999999999")',
            "99999999999",
            "0-3",
        ),
        override(layers="2-3"),
    ),
    "override of a negative layer": (
        override(layers=[-1, 2]),
        (
            "model.sparsity.overrides.0.layers ([-1, 2])",
            "-1",
            "0-3",
        ),
        override(layers=[1, 2]),
    ),
    "override of no layer": (
        override(layers=[]),
        (
            "model.sparsity.overrides.0.layers ([])",
            "0-3",
        ),
        override(layers=[0]),
    ),
    "override of an empty range": (
        override(layers="3-1"),
        (
            'model.sparsity.overrides.0.layers ("3-1")',
            "0-3",
        ),
        override(layers="1-3"),
    ),
    "override with a selector that is none": (
        override(layers="all"),
        (
            'model.sparsity.overrides.0.layers ("all")',
            "2",
            "0-3",
        ),
        override(layers="2"),
    ),
    "override of an expert that is not there": (
        override(experts="4-8"),
        (
            'model.sparsity.overrides.0.experts ("4-8")',
            "8",
            "0-7",
        ),
        override(experts="4-7"),
    ),
    "override of experts at a site that has none": (
        override(experts=0, site="attention_input"),
        (
            "model.sparsity.overrides.0.experts (0)",
            "model.sparsity.overrides.0.site (attention_input)",
            "remove",
            "expert_hidden",
            "expert_input",
        ),
        override(experts=0, site="expert_hidden"),
    ),
    "override of a site that the layers lack": (
        override(layers=0, site="expert_input") | {"model.moe.num_dense_layers": 1},
        (
            'model.sparsity.overrides.0 ({"sparsity": 0.5, "layers": 0, "site": "expert_input"})',
            "0",
            "attention_input",
            "attention_output",
            "dense_input",
            "dense_hidden",
            "1",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        override(layers=1, site="expert_input"),
    ),
    "override of the layers between those with experts": (
        override(layers="0-2", site="expert_hidden") | {"model.moe.moe_layer_interval": 4},
        (
            'model.sparsity.overrides.0 ({"sparsity": 0.5, "layers": "0-2", "site": "expert_hidden"})',
            "0",
            "attention_input",
            "attention_output",
            "dense_input",
            "dense_hidden",
            "3",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        {"model.moe.moe_layer_interval": 2},
    ),
    "override of experts in dense layers": (
        override(layers=0, experts=[0]) | {"model.moe.num_dense_layers": 1},
        (
            'model.sparsity.overrides.0 ({"sparsity": 0.5, "layers": 0, "experts": [0]})',
            "0",
            "attention_input",
            "attention_output",
            "dense_input",
            "dense_hidden",
            "1",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        override(layers=1, experts=[0]),
    ),
    "ramp of a constant schedule": (
        {"model.sparsity.schedule.ramp_steps": 10},
        (
            "model.sparsity.schedule.ramp_steps (10)",
            "0",
            "model.sparsity.schedule.shape",
            "constant",
            "remove",
            "linear",
            "cubic",
            "cosine",
        ),
        {"model.sparsity.schedule.shape": "cubic"},
    ),
    "schedule without its ramp": (
        {"model.sparsity.schedule.shape": "linear"},
        (
            "model.sparsity.schedule.ramp_steps (0)",
            "1",
            "model.sparsity.schedule.shape",
            "linear",
            "constant",
        ),
        {"model.sparsity.schedule.ramp_steps": 10},
    ),
    "ramp beyond the end": (
        {
            "model.sparsity.schedule.shape": "linear",
            "model.sparsity.schedule.ramp_steps": 80,
            "model.sparsity.schedule.warmup_steps": 30,
            "training.steps": 100,
        },
        (
            "model.sparsity.schedule.warmup_steps (30)",
            "model.sparsity.schedule.ramp_steps (80)",
            "training.steps (100)",
            "110",
        ),
        {"training.steps": 110},
    ),
    "groups that do not divide the width": (
        BLOCK | {"model.sparsity.group_size": 48, "model.moe.expert_hidden_size": 192},
        (
            "model.sparsity.group_size (48)",
            "model.hidden_size (128)",
            "attention_input",
            "attention_output",
            "expert_input",
            "32",
            "64",
        ),
        {"model.sparsity.group_size": 64},
    ),
    "groups that do not divide an expert": (
        BLOCK | {"model.moe.expert_hidden_size": 200},
        (
            "model.sparsity.group_size (32)",
            "model.moe.expert_hidden_size (200)",
            "expert_hidden",
            "25",
            "40",
        ),
        {"model.sparsity.sites.expert_hidden": 0},
    ),
    "groups that do not divide the heads": (
        BLOCK | {"model.head_size": 20},
        (
            "model.sparsity.group_size (32)",
            "model.num_heads",
            "model.head_size (80)",
            "attention_output",
            "20",
            "40",
        ),
        {"model.sparsity.overrides": [{"sparsity": 0.0, "site": "attention_output"}]},
    ),
    "groups that do not divide the shared experts": (
        BLOCK
        | {"model.sparsity.group_size": 128, "model.moe.num_shared_experts": 3, "model.moe.expert_hidden_size": 64}
        # Only the shared experts are sparse.
        | {"model.sparsity.default": 0.0, "model.sparsity.sites.shared_hidden": 0.5},
        (
            "model.sparsity.group_size (128)",
            "model.moe.num_shared_experts",
            "model.moe.expert_hidden_size (192)",
            "shared_hidden",
            "64",
            "96",
        ),
        {"model.moe.num_shared_experts": 2},
    ),
    "groups that do not divide the shared experts of their own width": (
        BLOCK | {"model.moe.num_shared_experts": 1, "model.moe.shared_expert_hidden_size": 100},
        (
            "model.sparsity.group_size (32)",
            "model.moe.shared_expert_hidden_size (100)",
            "shared_hidden",
            "20",
            "25",
        ),
        {"model.moe.shared_expert_hidden_size": 96},
    ),
    "groups that do not divide a dense layer": (
        BLOCK | {"model.moe.num_dense_layers": 1, "model.moe.dense_hidden_size": 100},
        (
            "model.sparsity.group_size (32)",
            "model.moe.dense_hidden_size (100)",
            "dense_hidden",
            "20",
            "25",
        ),
        {"model.moe.dense_hidden_size": 96},
    ),
    "groups of which nothing stays": (
        BLOCK | {"model.sparsity.default": 0.99},
        (
            "model.sparsity.default (0.99)",
            "0.32",
            "32",
            "model.sparsity.group_size",
            "1",
            "0.96875",
        ),
        {"model.sparsity.default": 0.96875},
    ),
    "groups of which nothing stays at a site": (
        BLOCK | {"model.sparsity.group_size": 4, "model.sparsity.sites.expert_hidden": 0.9},
        (
            "model.sparsity.sites.expert_hidden (0.9)",
            "0.4",
            "4",
            "model.sparsity.group_size",
            "1",
            "0.75",
        ),
        {"model.sparsity.group_size": 8},
    ),
    "groups of which nothing stays in an override": (
        BLOCK | {"model.sparsity.overrides": [{"sparsity": 0.99}]},
        (
            "model.sparsity.overrides.0.sparsity (0.99)",
            "0.32",
            "32",
            "model.sparsity.group_size",
            "1",
            "0.96875",
        ),
        {"model.sparsity.selection": "topk"},
    ),
    "vocabulary too small for bytes": (
        {"model.vocab_size": 256},
        (
            "model.vocab_size (256)",
            "257",
            "data.tokenizer",
            "256",
            "remove",
        ),
        {"model.vocab_size": None},
    ),
    "standard library with a path": (
        {"data.sources": [{"path": "x.py"}]},
        (
            'data.sources.0.path ("x.py")',
            "null",
            "stdlib",
            "remove",
        ),
        {"data.sources": [{"path": "x.py", "kind": "text"}]},
    ),
    "text without a path": (
        {"data.sources": [{}, {"kind": "text"}]},
        (
            "data.sources.1.path (null)",
            "text",
        ),
        {"data.sources": [{}, {"kind": "text", "path": "texts/*.txt"}]},
    ),
    "JSONL with an empty list": (
        {"data.sources": [{"kind": "jsonl", "path": []}]},
        (
            "data.sources.0.path ([])",
            "jsonl",
            "jsonl",
        ),
        {"data.sources": [{"kind": "jsonl", "path": ["a.jsonl"]}]},
    ),
    "hub with two names": (
        {"data.sources": [{"kind": "hub", "path": ["a/b", "c/d"]}]},
        (
            'data.sources.0.path (["a/b", "c/d"])',
            "hub",
        ),
        {"data.sources": [{"kind": "hub", "path": "a/b"}]},
    ),
    "column of plain text": (
        {"data.sources": [{"kind": "text", "path": "a", "column": "body"}]},
        (
            'data.sources.0.column ("body")',
            "text",
            "remove",
        ),
        {"data.sources": [{"kind": "jsonl", "path": "a", "column": "body"}]},
    ),
    "separator of rows": (
        {"data.sources": [{"kind": "jsonl", "path": "a", "separator": "--"}]},
        (
            'data.sources.0.separator ("--")',
            "jsonl",
            "remove",
        ),
        {"data.sources": [{"kind": "text", "path": "a", "separator": "--"}]},
    ),
    "subset of local files": (
        {"data.sources": [{"kind": "parquet", "path": "a", "subset": "x"}]},
        (
            'data.sources.0.subset ("x")',
            "parquet",
            "remove",
            "hub",
        ),
        {"data.sources": [{"kind": "hub", "path": "a", "subset": "x"}]},
    ),
    "split of local files": (
        {"data.sources": [{"split": "test"}]},
        (
            'data.sources.0.split ("test")',
            "stdlib",
            "remove",
            "hub",
            "saved",
        ),
        {"data.sources": [{"kind": "hub", "path": "a", "split": "test"}]},
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
    "no experts to spread": (
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
def test_broken_rule_says_setting_value_rule_and_way_out(case):
    settings, parts, _ = CASES[case]
    assert_one_message(messages(settings), parts)


@pytest.mark.parametrize("case", CASES)
def test_way_out_leads_out(case):
    settings, _, mended = CASES[case]
    assert messages(settings | mended) == []


def test_defaults_break_no_rule():
    assert broken_rules(RunConfig()) == []


# Settings that lie exactly at the border of a rule, on the side that it allows.
BORDERS = {
    "warm-up and decay take the whole run": {
        "training.steps": 100,
        "training.warmup_steps": 60,
        "training.learning_rate_schedule": "warmup_stable_decay",
        "training.decay_steps": 40,
    },
    "S reaches its target with the last step": {
        "training.steps": 100,
        "model.sparsity.default": 0.5,
        "model.sparsity.schedule.shape": "linear",
        "model.sparsity.schedule.warmup_steps": 60,
        "model.sparsity.schedule.ramp_steps": 40,
    },
    "the blend ends with the last step": {
        "training.steps": 100,
        "model.sparsity.gradient": "blend",
        "model.sparsity.blend.hold_steps": 60,
        "model.sparsity.blend.ramp_steps": 40,
    },
    "the profile ends with the last step": {
        "training.steps": 100,
        "metrics.profile_from": 91,
        "metrics.profile_steps": 10,
    },
    "the loss scale begins at its minimum": {
        "training.precision": "fp16",
        "training.loss_scale.initial_power": 4,
        "training.loss_scale.minimum": 16,
    },
    "a vocabulary of all bytes and the document token": {"model.vocab_size": 257},
    "every expert for every token": {"model.moe.num_experts": 4, "model.moe.experts_per_token": 4},
    "every layer is dense": {"model.num_layers": 3, "model.moe.num_dense_layers": 3},
    "every group for every token": {
        "model.moe.num_experts": 8,
        "model.moe.num_expert_groups": 4,
        "model.moe.groups_per_token": 4,
    },
    "the chosen groups hold the experts of a token and no more": {
        "model.moe.num_experts": 8,
        "model.moe.num_expert_groups": 4,
        "model.moe.groups_per_token": 2,
        "model.moe.experts_per_token": 4,
    },
    "groups of two experts, of which the two best count": {
        "model.moe.num_experts": 8,
        "model.moe.num_expert_groups": 4,
        "model.moe.groups_per_token": 2,
        "model.moe.group_score": "top2_sum",
    },
    "groups that keep one feature": BLOCK
    | {"model.sparsity.default": 0.9, "model.sparsity.group_size": 8, "model.moe.expert_hidden_size": 64},
}


@pytest.mark.parametrize("case", BORDERS)
def test_settings_at_the_border_of_a_rule_are_accepted(case):
    assert messages(BORDERS[case]) == []


def test_rules_do_not_stop_at_one_another():
    assert len(messages({"model.num_kv_heads": 3, "model.moe.experts_per_token": 9, "model.vocab_size": 1})) == 3


def test_config_made_in_python_can_be_checked():
    check_config(RunConfig())
    with pytest.raises(ConfigError, match=r"^the config breaks 2 rules:\n  model\.vocab_size .*\n  training"):
        check_config(build({"model.vocab_size": 256, "training.global_batch_size": 3}))


def test_model_made_in_python_can_be_checked():
    check_model(ModelConfig())
    with pytest.raises(ConfigError, match=r"^model\.num_kv_heads \(3\) must divide"):
        check_model(ModelConfig(num_kv_heads=3))


def test_zero_at_a_site_that_is_not_there_is_no_problem():
    assert messages({"model.sparsity.sites.shared_input": 0.0}) == []


def test_groups_matter_only_where_something_is_selected():
    dense = {"model.sparsity.selection": "block", "model.sparsity.group_size": 7}
    assert messages(dense) == []
    assert messages(dense | {"model.sparsity.sites.expert_hidden": 0.5, "model.moe.expert_hidden_size": 21}) == []


def test_sparse_sites_follow_default_sites_and_overrides():
    config = build(
        {
            "model.sparsity.sites.expert_input": 0.0,
            "model.sparsity.default": 0.5,
            "model.sparsity.overrides": [
                {"sparsity": 0.0, "site": "attention_input"},
                {"sparsity": 0.0, "site": "attention_output", "layers": 0},
                {"sparsity": 0.3, "site": "expert_input", "experts": 1},
            ],
        }
    ).model
    assert sparse_sites(config) == ("attention_output", "expert_input", "expert_hidden")


@pytest.mark.parametrize(
    ("interval", "num_dense", "layers"),
    [
        (1, 0, (0, 1, 2, 3, 4, 5)),
        (1, 2, (2, 3, 4, 5)),
        (2, 0, (1, 3, 5)),
        (2, 2, (3, 5)),
        (3, 1, (2, 5)),
        (6, 5, (5,)),
        (1, 6, ()),
    ],
)
def test_every_nth_layer_beyond_the_first_dense_ones_has_experts(interval, num_dense, layers):
    settings = {
        "model.num_layers": 6,
        "model.moe.moe_layer_interval": interval,
        "model.moe.num_dense_layers": num_dense,
    }
    config = build(settings).model
    assert broken_rules(build(settings)) == []
    assert moe_layers(config) == layers
    for layer in range(6):
        assert ("expert_input" in layer_sites(config, layer)) == (layer in layers) == has_experts(config, layer)
        assert ("dense_input" in layer_sites(config, layer)) != (layer in layers)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_world_size_that_divides_the_batch_is_accepted(world_size):
    check_world_size(build({"training.global_batch_size": 16, "training.micro_batch_size": 4}), world_size)


@pytest.mark.parametrize(
    ("world_size", "way_out"), [(3, "the nearest multiples are 12 and 24"), (8, "the smallest is 32")]
)
def test_world_size_that_does_not_is_refused(world_size, way_out):
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


@pytest.mark.parametrize(
    ("world_size", "size", "others"),
    [(1, 2, "only one that does is 1"), (12, 8, "nearest that do are 2 and 4"), (2, 8, "nearest that do are 1 and 2")],
)
def test_ranks_that_do_not_are_refused(world_size, size, others):
    config = build({"training.expert_parallel_size": size})
    expected = (
        f"training.expert_parallel_size ({size}) must divide the number of ranks ({world_size}); start a multiple of "
        f"{size} ranks, or choose another size: the {others}"
    )
    with pytest.raises(ConfigError) as caught:
        check_world_size(config, world_size)
    assert str(caught.value) == expected


@given(st.integers(1, 5000))
def test_divisors_are_all_and_rising(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
