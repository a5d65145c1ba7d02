"""The pages of TensorBoard: descriptions on cards, the layout of the charts, the columns of HParams."""

from __future__ import annotations

import re

import pytest
import torch
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from qsparse_moe.config.schema import MetricsConfig, ModelConfig, MoEConfig, RunConfig, SparsityOverride
from qsparse_moe.metrics.charts import chart_layout
from qsparse_moe.metrics.derive import derive_metrics
from qsparse_moe.metrics.names import describe_tag, is_layer_name, metric_of
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.metrics.tensorboard import SUMMARY_METRICS, hyperparameters
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.metrics.recorded import (
    BIAS_LE,
    CONFIG,
    VALIDATION,
    read_board,
    read_costs,
    read_part,
    read_validation,
    record,
    report,
    scalars,
)
from tests.metrics.reports import make_context, make_report, random_stats


def test_every_curve_has_its_unit_and_definition_on_its_card(tmp_path):
    record(tmp_path, [1])
    for board in (read_board(tmp_path), read_costs(tmp_path), read_validation(tmp_path)):
        assert board.Tags()["scalars"]
        for tag in board.Tags()["scalars"]:
            assert board.SummaryMetadata(tag).summary_description == describe_tag(tag)


def test_every_heat_map_and_histogram_has_its_definition_on_its_card(tmp_path):
    record(tmp_path, [1])
    board = read_board(tmp_path)
    for kind in ("images", "histograms"):
        assert board.Tags()[kind]
        for tag in board.Tags()[kind]:
            assert board.SummaryMetadata(tag).summary_description == describe_tag(tag)
    assert describe_tag("sparsity_by_expert/expert_input/zeros").startswith("**Unit: 1.** Heat map")


def test_the_load_comes_before_the_maps_that_may_be_constant(tmp_path):
    record(tmp_path, [1])
    tags = sorted(read_board(tmp_path).Tags()["images"])
    assert tags[0] == "experts/load" and len(tags) == 7
    assert {tag.split("/")[0] for tag in tags[1:]} == {"sparsity_by_expert"}
    assert describe_tag("sparsity/attention_input/zeros/layer_2").startswith("**Unit: 1.** Fraction of zeros in front")


def test_hparams_have_the_settings_once_from_the_start_and_name_every_final_metric(tmp_path):
    record(tmp_path, [1, 2], ends=False)
    record(tmp_path, [2], start_step=1)
    board = read_board(tmp_path)
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 2, "one file for each part"
    contents = {tag: board.SummaryMetadata(tag).plugin_data.content for tag in board.PluginTagToContent("hparams")}
    data = {tag: HParamsPluginData.FromString(content) for tag, content in contents.items()}
    started = data["_hparams_/session_start_info"].session_start_info
    assert {name: started.hparams[name].number_value for name in ("num_layers", "S")} == {
        "num_layers": CONFIG.model.num_layers,
        "S": hyperparameters(CONFIG)["S"],
    }
    infos = data["_hparams_/experiment"].experiment.metric_infos
    assert [info.display_name or info.name.tag for info in infos] == list(SUMMARY_METRICS)
    # The page reads each from the folder below the run that the group names.
    for info in infos:
        assert info.name.tag in read_part(tmp_path, info.name.group).Tags()["scalars"]
    assert "_hparams_/session_end_info" in data


def test_hparams_have_a_column_per_requested_setting_named_by_the_end_of_its_path():
    requested = ["model.init_std", "training.learning_rate", "model.sparsity.schedule.shape", "training.steps"]
    requested += ["model.sparsity.plan", "model.moe.num_dense_layers"]
    config = CONFIG.model_copy(
        update={"metrics": CONFIG.metrics.model_copy(update={"hyperparameters": tuple(requested)})}
    )
    plain, more = hyperparameters(CONFIG), hyperparameters(config)
    assert plain.items() <= more.items() and "quantization.weights" in plain
    assert {name: more[name] for name in more.keys() - plain.keys()} == {
        "init_std": CONFIG.model.init_std,
        "shape": CONFIG.model.sparsity.schedule.shape,
        "steps": CONFIG.training.steps,
        "plan": "null",
        "num_dense_layers": CONFIG.model.moe.num_dense_layers,
    }


def test_a_run_of_a_grid_has_columns_only_for_its_variant_and_the_settings_that_the_grid_varies():
    override = SparsityOverride(layers=2, experts="0-1", site="expert_hidden", sparsity=0.9)
    requested = {"variant": "first", "hyperparameters": ("model.sparsity.overrides", "model.hidden_size")}
    config = CONFIG.model_copy(
        update={
            "metrics": CONFIG.metrics.model_copy(update=requested),
            "model": CONFIG.model.model_copy(
                update={"sparsity": CONFIG.model.sparsity.model_copy(update={"overrides": (override,)})}
            ),
        }
    )
    assert hyperparameters(config) == {
        "variant": "first",
        "S": SparsityPlan.from_config(config.model).mean,
        "seed": config.training.seed,
        "overrides": "layer 2 experts 0-1 expert_hidden S=0.9",
        "hidden_size": config.model.hidden_size,
    }


def charts(run_dir) -> dict[str, list[str]]:
    (event,) = read_board(run_dir).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}


def test_a_chart_shows_what_its_title_says(tmp_path):
    record(tmp_path, [1])
    shown = {title: [pattern.replace("\\", "") for pattern in tags] for title, tags in charts(tmp_path).items()}
    one = {
        "Entropy of the router's probabilities, nats": "router/choice_entropy",
        "Weight of the first expert": "router/first_weight",
        "Routing choices unchanged since the previous evaluation": "router/choice_agreement",
        "z-loss": "train/router_z_loss",
        "Loss over executed GFLOPs": "cost/lm_loss_by_executed_gflops",
        "Loss over GFLOPs left if every zero is skipped": "cost/lm_loss_by_kept_gflops",
        "Tokens per second": "throughput/tokens_per_second",
        "Seconds per step": "throughput/step_seconds",
        "Validation loss, bits per byte": "validation/bits_per_byte",
        "Gradient norm": "train/grad_norm",
        "Learning rate": "train/learning_rate",
        "Load of the busiest expert over the mean": "router/load_imbalance",
        "Experts without a token in the whole window": "router/dead_experts_window",
        "Experts that a token uses": "router/experts_per_token",
        "Load-balance loss": "train/load_balance_loss",
        "Range of the balancing biases": "router/bias_range",
        "S of the plan": "train/sparsity",
    }
    assert {title: shown[title] for title in one} == {title: [f"{name}$"] for title, name in one.items()}
    assert shown["Loss, nats per token"] == ["train/lm_loss$", "validation/loss$"]
    assert shown["Load of the busiest expert over the mean, by layer"] == ["router/load_imbalance/layer_"]
    assert shown["Experts without a token, by layer"] == ["router/dead_experts/layer_"]
    sites = ["attention_input", "attention_output", "expert_input", "expert_hidden", "shared_input", "shared_hidden"]
    sites += ["dense_input", "dense_hidden"]
    by_site = {
        "Zeros in front of the matrices": "zeros",
        "Energy after the selection": "kept_energy",
        "Features unused in ten logged steps": "dead_features",
        "Non-zero in the next token as well": "overlap",
        "Threshold: smallest selected magnitude": "threshold",
        "Drift of the threshold": "threshold_drift",
    }
    for title, name in by_site.items():
        assert sorted(shown[title]) == sorted(f"sparsity/{site}/{name}$" for site in sites), title
    for site in sites:
        assert shown[f"Zeros by layer, {site}"] == [f"sparsity/{site}/zeros/layer_"]
        assert shown[f"Energy after the selection by layer, {site}"] == [f"sparsity/{site}/kept_energy/layer_"]


def test_two_settings_of_one_name_have_columns_of_their_own():
    requested = ("training.warmup_steps", "model.sparsity.schedule.warmup_steps")
    update = {"training": CONFIG.training.model_copy(update={"warmup_steps": 7})}
    update |= {"metrics": CONFIG.metrics.model_copy(update={"hyperparameters": requested})}
    found = hyperparameters(CONFIG.model_copy(update=update))
    assert (found["warmup_steps"], found["schedule.warmup_steps"]) == (7, 0)


def test_a_run_without_balancing_biases_has_no_chart_for_them():
    titles = {title for group in chart_layout(RunConfig()).values() for title in group}
    with_biases = {title for group in chart_layout(CONFIG).values() for title in group}
    assert {title for title in with_biases - titles if "bias" in title} and not [t for t in titles if "bias" in t]


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_every_chart_has_a_tag_and_every_tag_is_in_a_chart(tmp_path, capacity_factor):
    moe = CONFIG.model.moe.model_copy(update={"capacity_factor": capacity_factor})
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"moe": moe})})
    memory = dict.fromkeys(("resident", "peak_resident", "allocated", "peak_allocated"), 1.0)
    recorder = Recorder(config)
    recorder.begin(make_context(tmp_path, config))
    stats = random_stats(config.model)
    for step in range(1, 12):  # metrics of a window of ten steps begin with the tenth
        recorder(
            make_report(
                step,
                memory=memory,
                stats=stats,
                router_bias_LE=BIAS_LE,
                validation=VALIDATION,
                choice_agreement_L=torch.tensor([0.5, 1.0]),
            )
        )
    tags = [tag for part in ("", "cost", "validation") for tag in read_part(tmp_path, part).Tags()["scalars"]]
    patterns = [pattern for chart in charts(tmp_path).values() for pattern in chart]
    for pattern in patterns:
        assert [tag for tag in tags if re.match(pattern, tag)], pattern
    not_charted = {tag for tag in tags if not any(re.match(pattern, tag) for pattern in patterns)}
    # These repeat what a chart shows, or are means of what it shows by layer.
    router = {"router/load_entropy", "router/busiest_share", "router/dead_experts"}
    without_chart = {"train/loss", "validation/perplexity", "throughput/rows_per_second"} | router
    without_chart |= {"efficiency/total_training_flops", "efficiency/total_kept_training_flops"}
    assert {tag for tag in not_charted if not tag.endswith("/zeros_chosen")} == without_chart


def test_chart_of_one_tag_matches_no_other_tag(tmp_path):
    record(tmp_path, [1])
    (pattern,) = charts(tmp_path)["Load of the busiest expert over the mean"]
    tags = read_board(tmp_path).Tags()["scalars"]
    assert [tag for tag in tags if re.match(pattern, tag)] == ["router/load_imbalance"]


def test_gradient_norms_by_layer_have_a_chart_if_they_are_recorded(tmp_path):
    config = CONFIG.model_copy(update={"metrics": MetricsConfig(layer_gradients=True)})
    recorder = Recorder(config)
    recorder.begin(make_context(tmp_path, config))
    recorder(report(1, layer_grad_norms=(3.0, 2.0, 1.0)))
    board = read_board(tmp_path)
    shown = charts(tmp_path)
    (pattern,) = shown["Gradient norm by layer"]
    found = {tag: scalars(board, tag)[1] for tag in board.Tags()["scalars"] if re.match(pattern, tag)}
    assert found == {"train/grad_norm/layer_0": 3.0, "train/grad_norm/layer_1": 2.0, "train/grad_norm/layer_2": 1.0}
    (pattern,) = shown["Gradient norm"]
    assert [tag for tag in board.Tags()["scalars"] if re.match(pattern, tag)] == ["train/grad_norm"]


def test_deep_model_stays_below_a_thousand_tags():
    moe = MoEConfig(num_experts=256, num_shared_experts=1, num_dense_layers=3, capacity_factor=1.0)
    model = ModelConfig(num_layers=61, moe=moe)
    full = make_report(stats=random_stats(model), validation=VALIDATION, layer_grad_norms=(1.0,) * 61)
    metrics = derive_metrics(full, model)
    assert len([n for n in metrics if not is_layer_name(n) or metric_of(n).layers == "chart"]) < 1000
