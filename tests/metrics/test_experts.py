"""Values of single experts: ratios by hand, and the steps that have them in metrics.jsonl, also after a resume."""

from __future__ import annotations

import math

import pytest
import torch

import qsparse_moe
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.metrics.experts import expert_ratios, expert_values
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.recorder import Recorder
from tests.metrics.reports import make_context, make_report, random_stats


def sums():
    """Return the sums of one layer of three experts, the last without a token, and two features."""
    table = {"rows": [2, 1, 0], "nonzero": [3, 1, 0], "energy": [10, 4, 0], "kept_energy": [9, 1, 0]}
    stats = {f"sparsity/expert_hidden/{name}_LE": torch.tensor([values]).double() for name, values in table.items()}
    for name in ("selected", "smallest", "pairs_nonzero", "pairs_common"):
        stats[f"sparsity/expert_hidden/{name}_LE"] = torch.zeros(1, 3).double()
    stats["sparsity/expert_hidden/used_LED"] = torch.tensor([[[True, True], [True, False], [False, False]]])
    return stats | {"router/routed_LE": torch.tensor([[2, 1, 0]]).double()}


def test_ratios_of_every_expert_by_hand():
    ratios = qsparse_moe.expert_ratios(sums())
    assert ratios["load"].tolist() == [[2.0, 1.0, 0.0]]
    assert ratios["expert_hidden/kept_energy"][0, :2].tolist() == [0.9, 0.25]
    assert ratios["expert_hidden/zeros"][0, :2].tolist() == [0.25, 0.5]
    assert ratios["expert_hidden/unused_features"][0, :2].tolist() == [0.0, 0.5]
    assert all(
        math.isnan(ratios[f"expert_hidden/{name}"][0, 2]) for name in ("kept_energy", "zeros", "unused_features")
    )
    assert "expert_input/zeros" not in ratios


def test_the_load_of_an_expert_is_relative_to_its_own_layer():
    routed_LE = torch.tensor([[3.0, 1.0], [0.0, 40.0]])
    assert expert_ratios({"router/routed_LE": routed_LE})["load"].tolist() == [[1.5, 0.5], [0.0, 2.0]]


def test_values_for_json_have_layer_numbers_and_null_for_an_expert_without_a_token():
    values = expert_values(sums(), [5])
    assert values["layers"] == [5]
    assert values["load"] == [[2.0, 1.0, 0.0]]
    assert values["expert_hidden/kept_energy"] == [[0.9, 0.25, None]]
    assert expert_values({}, [5]) == {}


def test_values_for_json_have_six_digits_and_no_infinity():
    stats = sums()
    stats["router/routed_LE"] = torch.tensor([[2.0, 4.0, 1.0]])
    stats["sparsity/expert_hidden/energy_LE"] = torch.tensor([[0.0, 3.0, 7.0]])
    values = expert_values(stats, [5])
    assert values["load"] == [[0.857143, 1.71429, 0.428571]]
    assert values["expert_hidden/kept_energy"] == [[None, 0.333333, 0.0]], "9 / 0, 1 / 3 and 0 / 7"


def record(folder, steps, *, start_step=0, last=9):
    settings = {"training": {"steps": last}, "metrics": {"image_interval": 4, "tensorboard": False, "interval": 1}}
    config = RunConfig.model_validate(settings)
    recorder = Recorder(config)
    recorder.begin(make_context(folder, config, start_step=start_step))
    for step in steps:
        recorder(make_report(step, stats=random_stats(config.model, seed=step)))
    recorder._file.close()


def with_experts(folder):
    return {row["step"]: row["experts"] for row in read_metrics(folder / "metrics.jsonl") if "experts" in row}


@pytest.mark.parametrize("stop", [3, 4, 5, 8])
def test_a_resumed_run_writes_values_of_experts_on_the_steps_of_an_uninterrupted_one(tmp_path, stop):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    record(tmp_path / "whole", range(1, 10))
    record(tmp_path / "parts", range(1, stop + 1))
    record(tmp_path / "parts", range(stop + 1, 10), start_step=stop)
    whole = with_experts(tmp_path / "whole")
    assert list(whole) == [1, 5, 9]
    assert with_experts(tmp_path / "parts") == whole
    wanted = expert_ratios(random_stats(RunConfig().model, seed=5))["load"]
    torch.testing.assert_close(torch.tensor(whole[5]["load"]).double(), wanted, rtol=1e-5, atol=1e-6)
    assert whole[5]["layers"] == list(range(RunConfig().model.num_layers))


def test_the_last_step_has_values_of_experts_at_any_interval(tmp_path):
    record(tmp_path, range(1, 8), last=7)
    assert list(with_experts(tmp_path)) == [1, 5, 7]
