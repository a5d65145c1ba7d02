"""The recorder as training uses it; its event files are read back with TensorBoard's Python reader."""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.config.schema import MetricsConfig
from qsparse_moe.metrics.derive import derive_metrics
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.names import is_layer_name, metric_of
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.metrics.tensorboard import TensorBoardFiles, write_pictures
from qsparse_moe.runs.report import LateEvaluation
from tests.metrics.recorded import CONFIG, read_board, read_costs, read_validation, record, report, scalars
from tests.metrics.reports import make_context, make_report


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


@pytest.mark.slow
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


def test_a_late_evaluation_is_added_to_the_step_that_it_belongs_to(tmp_path):
    for step, name in ((2, "last"), (7, "later")):
        (tmp_path / name).mkdir()
        record(tmp_path / name, [1], ends=False)
        recorder = Recorder(CONFIG)
        recorder.begin(make_context(tmp_path / name, CONFIG, start_step=2))
        recorder(make_report(2))
        late = LateEvaluation(step, step * 512, 1.25, {"loss": 2.0}, torch.tensor([0.5, 0.25]))
        recorder.late_evaluation(late)
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == sorted({1, 2, step})
        added = {"validation/loss": 2.0, "router/choice_agreement": 0.375}
        added |= {"router/choice_agreement/layer_1": 0.5, "router/choice_agreement/layer_2": 0.25}
        assert added.items() <= rows[-1].items()
        assert (rows[-1]["tokens"], rows[-1]["seconds"]) == (step * 512, 1.0 if step == 2 else 1.25)
        assert scalars(read_validation(tmp_path / name), "validation/loss") == {1: 2.5, step: 2.0}
        assert scalars(read_board(tmp_path / name), "router/choice_agreement") == {step: 0.375}
        recorder.end(SimpleNamespace())


def test_a_step_of_a_model_without_experts_has_no_values_of_experts(tmp_path):
    recorder = Recorder(CONFIG.model_copy(update={"metrics": MetricsConfig(tensorboard=False)}))
    recorder.begin(make_context(tmp_path, CONFIG))
    recorder(make_report(1))
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert "experts" not in row and row["train/lm_loss"] == 3.0


def test_a_row_without_a_loss_or_a_cost_is_no_point_of_a_curve_over_a_cost(tmp_path):
    loss, cost = "train/lm_loss", "efficiency/total_training_flops"
    before = [{"step": 1, loss: None, cost: 1e9}, {"step": 2, loss: 4.0, cost: None}, {"step": 3, loss: 5.0}]
    before += [{"step": 4, loss: 2.0, cost: 3.7e9, "validation/loss": None, "validation/perplexity": 7.5}]
    TensorBoardFiles(tmp_path / "tensorboard", CONFIG, start_step=4, before=before).close()
    assert scalars(read_costs(tmp_path), "cost/lm_loss_by_executed_gflops") == {4: 2.0}
    validation = read_validation(tmp_path)
    assert math.isnan(scalars(validation, "validation/loss")[4])
    assert scalars(validation, "validation/perplexity") == {4: 7.5}


def test_pictures_of_other_packages_leave_the_curves_of_the_run_as_they_are(tmp_path):
    record(tmp_path, [1, 2], ends=False)
    picture = np.full((4, 6, 3), 7, dtype=np.uint8)
    write_pictures(tmp_path / "tensorboard", {"other/map": picture}, 1)
    # A report that is written again replaces its pictures, and no others.
    for size in (3, 6):
        write_pictures(tmp_path / "tensorboard", {"plan/map": picture[:, :size]}, 2)
    assert len(list((tmp_path / "tensorboard").glob("events.*.plan.pictures"))) == 1
    board = read_board(tmp_path)
    (event,) = board.Images("plan/map")
    assert (event.step, event.width, event.height) == (2, 6, 4) and len(board.Images("other/map")) == 1
    assert set(scalars(board, "train/loss")) == {1, 2}


def test_without_tensorboard_only_metrics_jsonl_is_written(tmp_path):
    record(tmp_path, [1], config=CONFIG.model_copy(update={"metrics": MetricsConfig(tensorboard=False)}))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_report_before_begin_is_an_internal_error():
    with pytest.raises(AssertionError, match="begin comes before"):
        Recorder(CONFIG)(report(1))
