"""Results of evaluations after training in TensorBoard."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsparse_moe.metrics.evaluation import EvaluationFigures, write_evaluation
from qsparse_moe.metrics.heatmaps import HeatMap, Scale


def values_of(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {tag: sorted((one.step, one.value) for one in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def test_an_evaluation_replaces_that_of_its_step_and_keeps_those_of_others(tmp_path):
    for step, value in ((8, 0.5), (4, 0.25), (8, 0.75)):
        write_evaluation(tmp_path, EvaluationFigures({"tasks/mine/acc": value}), step)
    assert values_of(tmp_path) == {"tasks/mine/acc": [(4, 0.25), (8, 0.75)]}


def test_a_map_is_a_picture_of_its_layers_and_experts(tmp_path):
    scale, values = Scale(0.0, 1.0, "magma", "lost"), np.linspace(0, 1, 24).reshape(2, 12)
    name = "comparison/choices_lost"
    write_evaluation(tmp_path, EvaluationFigures({}, maps={name: (scale, values)}, layers=[2, 5]), 7)
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images(name)
    found = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert np.array_equal(found, HeatMap(scale, [2, 5], 12).draw(values))


def test_curves_by_position_and_maps_are_those_of_the_newest_evaluation(tmp_path):
    scale = Scale(0.0, 1.0, "magma", "lost")
    for values in ([(0, 1.0), (3, 0.5)], [(0, 0.25)]):
        figures = EvaluationFigures(
            {"comparison/kl_divergence": 0.5},
            maps={"comparison/choices_lost": (scale, np.array([[0.5, np.nan]]))},
            layers=[2],
            curves={"comparison/greedy_agreement": values},
        )
        write_evaluation(tmp_path, figures, 7)
    assert values_of(tmp_path / "positions") == {"comparison/greedy_agreement": [(0, 0.25)]}
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [one.step for one in events.Images("comparison/choices_lost")] == [7]
    write_evaluation(tmp_path, EvaluationFigures({"comparison/kl_divergence": 0.25}), 9)
    assert values_of(tmp_path / "positions") == {"comparison/greedy_agreement": [(0, 0.25)]}, (
        "of the newest that has any"
    )
    described = events.SummaryMetadata("comparison/kl_divergence").summary_description
    assert described.startswith("**Unit: nats per token.** Kullback-Leibler")
