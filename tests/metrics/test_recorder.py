"""The recorder as training uses it; its event files are read back with TensorBoard's Python reader."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.config.schema import MetricsConfig, ModelConfig, MoEConfig, RunConfig, SparsityOverride
from qsparse_moe.metrics.charts import chart_layout
from qsparse_moe.metrics.derive import derive_metrics
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.names import describe_tag, is_layer_name, metric_of
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.metrics.tensorboard import SUMMARY_METRICS, hyperparameters
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.metrics.reports import make_context, make_report, random_stats

MOE = MoEConfig(num_dense_layers=1, num_shared_experts=1, bias_update_rate=0.001)
CONFIG = RunConfig(model=ModelConfig(num_layers=3, moe=MOE))
BIAS_LE = torch.linspace(-0.01, 0.02, 16).view(2, 8)
VALIDATION = {"loss": 2.5, "perplexity": 12.2, "bits_per_byte": 3.6}


def report(step: int, **changes):
    stats = random_stats(CONFIG.model, seed=step)
    return make_report(step, stats=stats, router_bias_LE=BIAS_LE, validation=VALIDATION, **changes)


def record(run_dir, steps, *, start_step=0, ends=True, config=CONFIG):
    recorder = Recorder(config)
    recorder.begin(make_context(run_dir, config, start_step=start_step))
    for step in steps:
        recorder(report(step))
    if ends:
        recorder.end(SimpleNamespace())


def read_board(run_dir):
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return board


def read_part(run_dir, part):
    board = EventAccumulator(str(run_dir / "tensorboard" / part))
    board.Reload()
    return board


def read_costs(run_dir):
    return read_part(run_dir, "cost")


def read_validation(run_dir):
    return read_part(run_dir, "validation")


def scalars(board, tag):
    return {event.step: event.value for event in board.Scalars(tag)}


def test_both_files_hold_the_same_numbers(tmp_path):
    record(tmp_path, [1, 2])
    board = read_board(tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for step, row in zip([1, 2], rows, strict=True):
        assert {"step": step, "tokens": step * 512, "seconds": step * 0.5}.items() <= row.items()
        assert derive_metrics(report(step), CONFIG.model).items() <= row.items()
        expected = {name: value for name, value in row.items() if name not in ("step", "tokens", "seconds", "experts")}
        charted = {n for n in expected if not is_layer_name(n) or metric_of(n).layers == "chart"}
        for name in charted:
            found = read_validation(tmp_path) if name.startswith("validation/") else board
            assert scalars(found, name)[step] == pytest.approx(expected[name], rel=1e-6), name


def test_validation_is_a_tensorboard_run_with_a_colour_of_its_own(tmp_path):
    record(tmp_path, [1, 2])
    tags = {"validation/loss", "validation/perplexity", "validation/bits_per_byte"}
    board, validation = read_board(tmp_path), read_validation(tmp_path)
    assert set(validation.Tags()["scalars"]) == tags
    assert "train/loss" in board.Tags()["scalars"] and not tags & set(board.Tags()["scalars"])
    assert scalars(validation, "validation/bits_per_byte") == {1: pytest.approx(3.6), 2: pytest.approx(3.6)}


def test_tensorboard_has_the_configuration_as_text(tmp_path):
    record(tmp_path, [1])
    (event,) = read_board(tmp_path).Tensors("config/text_summary")
    assert event.tensor_proto.string_val[0].decode() == f"```yaml\n{config_to_yaml(CONFIG)}```"


def test_killed_run_loses_no_report(tmp_path):
    record(tmp_path, [1, 2, 3], ends=False)
    assert set(scalars(read_board(tmp_path), "train/loss")) == {1, 2, 3}
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("start_step", [0, 2])
def test_resumed_run_replaces_the_values_after_its_step(tmp_path, start_step):
    record(tmp_path, [1, 2, 3, 4], ends=False)
    record(tmp_path, [start_step + 1, 9], start_step=start_step)
    expected = {*range(1, start_step + 2), 9}
    assert {row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")} == expected
    board = read_board(tmp_path)
    for tag in ("train/loss", "router/load_imbalance/layer_1"):
        assert set(scalars(board, tag)) == expected, tag
    validation = read_validation(tmp_path)
    for tag in validation.Tags()["scalars"]:
        assert set(scalars(validation, tag)) == expected, tag
    # The texts that the first part wrote are still there.
    assert board.Tensors("config/text_summary")[0].step == 0


def test_a_resumed_run_of_an_earlier_version_has_its_whole_validation_curve(tmp_path):
    record(tmp_path, [1, 2, 3], ends=False)
    shutil.rmtree(tmp_path / "tensorboard" / "validation")  # earlier versions wrote these values with all others
    record(tmp_path, [3], start_step=2)
    assert scalars(read_validation(tmp_path), "validation/loss") == {1: 2.5, 2: 2.5, 3: 2.5}


def test_event_files_of_one_second_are_read_in_the_order_of_their_creation(tmp_path):
    for part in range(3):
        record(tmp_path, [1, 2], ends=part == 2)
        seconds = [int(path.name.split(".")[3]) for path in (tmp_path / "tensorboard").glob("events.out.tfevents.*")]
        assert len(set(seconds)) == len(seconds) == part + 1


@pytest.mark.parametrize("tag", ["cost/lm_loss_by_executed_gflops", "cost/lm_loss_by_kept_gflops"])
def test_resumed_run_keeps_its_curves_over_a_cost(tmp_path, tag):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    record(tmp_path / "whole", [1, 2, 3])
    record(tmp_path / "parts", [1, 2, 3], ends=False)
    record(tmp_path / "parts", [3], start_step=2)
    whole, parts = (
        [(event.step, event.value) for event in read_costs(tmp_path / name).Scalars(tag)] for name in ("whole", "parts")
    )
    assert len(whole) == 3 and parts == whole
    flops = "efficiency/total_kept_training_flops" if "kept" in tag else "efficiency/total_training_flops"
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [step for step, _ in whole] == [round(row[flops] / 1e9) for row in rows], "the x of the curve is GFLOPs"


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


@pytest.mark.parametrize(
    ("interval", "start_step", "steps", "expected"),
    [
        (200, 0, [10, 20, 30], [10, 30]),
        (20, 0, [10, 20, 30, 40], [10, 30, 40]),
        (200, 30, [40], [40]),
        (0, 0, [10], []),
    ],
)
def test_heat_maps_are_drawn_first_then_at_the_interval_and_at_the_end(tmp_path, interval, start_step, steps, expected):
    metrics = CONFIG.metrics.model_copy(update={"image_interval": interval})
    record(tmp_path, steps, start_step=start_step, config=CONFIG.model_copy(update={"metrics": metrics}))
    board = read_board(tmp_path)
    drawn = [event.step for event in board.Images("experts/load")] if expected else board.Tags()["images"]
    assert drawn == expected


@pytest.mark.parametrize("stop", [20, 30, 40])
def test_a_resumed_run_draws_on_the_steps_that_have_values_of_experts(tmp_path, stop):
    metrics = CONFIG.metrics.model_copy(update={"image_interval": 20})
    config = CONFIG.model_copy(update={"metrics": metrics})
    steps = [10, 20, 30, 40, 50]
    record(tmp_path, [step for step in steps if step <= stop], ends=False, config=config)
    record(tmp_path, [step for step in steps if step > stop], start_step=stop, ends=False, config=config)
    drawn = [event.step for event in read_board(tmp_path).Images("experts/load")]
    having = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "experts" in row]
    assert drawn == having == [10, 30, 50]


@pytest.mark.parametrize(("window", "first"), [(30, 3), (25, 3), (10, 1), (0, None)])
def test_the_setting_governs_the_window_of_dead_experts(tmp_path, window, first):
    metrics = CONFIG.metrics.model_copy(update={"interval": 10, "dead_expert_window": window})
    record(tmp_path, [10, 20, 30, 40], config=CONFIG.model_copy(update={"metrics": metrics}))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    having = [row["step"] for row in rows if "router/dead_experts_window" in row]
    assert having == ([] if first is None else list(range(10 * first, 50, 10)))


def test_sequences_per_second_by_hand(tmp_path):
    record(tmp_path, [1])
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["throughput/rows_per_second"] == report(1).tokens_per_second / CONFIG.data.sequence_length


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
    asked = ["model.init_std", "training.learning_rate", "model.sparsity.schedule.shape", "training.steps"]
    asked += ["model.sparsity.plan", "model.moe.num_dense_layers"]
    config = CONFIG.model_copy(update={"metrics": CONFIG.metrics.model_copy(update={"hyperparameters": tuple(asked)})})
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
    asked = {"variant": "first", "hyperparameters": ("model.sparsity.overrides", "model.hidden_size")}
    config = CONFIG.model_copy(
        update={
            "metrics": CONFIG.metrics.model_copy(update=asked),
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


def test_without_tensorboard_only_metrics_jsonl_is_written(tmp_path):
    record(tmp_path, [1], config=CONFIG.model_copy(update={"metrics": MetricsConfig(tensorboard=False)}))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_report_before_begin_is_an_assertion():
    with pytest.raises(AssertionError, match="begin comes before"):
        Recorder(CONFIG)(report(1))
