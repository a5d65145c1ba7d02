"""Calibration of a finished run: the sequences and weights that determine the plan, and its measured quality."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.data.loader import sample_train_sequences
from qsparse_moe.data.token_data import load_data
from qsparse_moe.model.thresholds import calibrate
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.calibrate import SiteCalibration, _site, calibrate_run, default_num_sequences
from qsparse_moe.training.evaluate import evaluate_run, load_run
from qsparse_moe.training.loop import train
from tests.support.runs import tiny_config

WIDTHS = {"attention_input": 40, "attention_output": 20, "expert_input": 40, "expert_hidden": 24}
BY_THRESHOLD = [
    "model.sparsity.selection=threshold",
    "model.sparsity.default=null",
    "model.sparsity.schedule={shape: constant, warmup_steps: 0, ramp_steps: 0}",
]


@pytest.fixture(scope="module")
def text_config(text_folder, tmp_path_factory):
    return tiny_config(text_folder, "run", engine="torch", output_dir=str(tmp_path_factory.mktemp("calibrated")))


@pytest.fixture(scope="module")
def run_dir(text_config):
    return train(text_config).run_dir


def batches_of(data, rows, size=2):
    return [data.batch(rows[begin : begin + size]) for begin in range(0, len(rows), size)]


@torch.no_grad()
def outputs(model, batches):
    return [
        model(b.tokens_BS, targets_BS=b.targets_BS, positions_BS=b.positions_BS, documents_BS=b.documents_BS)
        for b in batches
    ]


def summed(outputs, name):
    return sum(output.stats[name] for output in outputs)


def zeros_by_layer(outputs, site):
    """Return the fraction of zeros in front of the matrices behind ``site``, from the model's sums."""
    rows_LE, nonzero_LE = (summed(outputs, f"sparsity/{site}/{name}_LE") for name in ("rows", "nonzero"))
    return 1 - nonzero_LE.sum(-1) / (rows_LE.sum(-1) * WIDTHS[site])


def test_the_plan_is_made_from_training_sequences_and_measured_on_validation_sequences(run_dir, tmp_path):
    config, model, step = load_run(run_dir)
    found = calibrate_run(run_dir, model.sparsity_plan, num_sequences=15)
    data = load_data(config.data)
    shown = batches_of(data, sample_train_sequences(config, data, 15))
    assert found.plan == calibrate(model, shown)
    assert (found.step, found.rows, found.held_out_rows) == (step, 15, 11) == (6, 15, 11)
    unseen = int((summed(outputs(model, shown), "router/routed_LE") == 0).sum())
    table, indices = data.evaluation_sequences(11)
    held_out = batches_of(data, table.tokens(indices))
    found.plan.save(tmp_path / "plan.json")
    _, other, _ = load_run(run_dir, overrides=[*BY_THRESHOLD, f"model.sparsity.plan={tmp_path / 'plan.json'}"])
    by_rank, by_threshold = outputs(model, held_out), outputs(other, held_out)
    assert found.sites.keys() == WIDTHS.keys()
    for site, measured in found.sites.items():
        topk_L, threshold_L = zeros_by_layer(by_rank, site), zeros_by_layer(by_threshold, site)
        assert measured.zeros_topk == float(topk_L.mean())
        assert measured.zeros_threshold == float(threshold_L.mean())
        assert measured.largest_gap == float((topk_L - threshold_L).abs().max())
        assert 0 < measured.largest_gap < 0.1
        assert (measured.layers, measured.sparsity) == (2, 0.5)
        assert measured.experts_without_rows == (unseen if site.startswith("expert") else 0)
        if site != "expert_hidden":  # squared ReLU has zeros of its own there
            assert measured.zeros_topk == 0.5
    assert found.loss_topk == pytest.approx(evaluate_run(run_dir).loss, rel=1e-6)
    (whole,) = outputs(other, batches_of(data, table.tokens(indices), 11))
    assert found.loss_threshold == pytest.approx(whole.losses["lm_loss"].item(), rel=1e-5)
    assert found.loss_threshold != found.loss_topk


def test_features_are_ranked_over_the_whole_row_whatever_the_selection_of_the_run(make_config, run_dir):
    config = make_config("blocks", steps=2)
    sparsity = config.model.sparsity.model_copy(update={"selection": "block", "group_size": 4})
    config = config.model_copy(update={"model": config.model.model_copy(update={"sparsity": sparsity})})
    blocks = train(config).run_dir
    plan = SparsityPlan.uniform(config.model, 0.3)
    found = calibrate_run(blocks, plan, num_sequences=4)
    _, ranked, _ = load_run(blocks, overrides=["model.sparsity.selection=topk"])
    data = load_data(config.data)
    assert found.plan == calibrate(ranked, batches_of(data, sample_train_sequences(config, data, 4)), plan)
    # 28 of 40 are selected, 14 of 20, 17 of 24: of a group of four, three would be.
    assert [found.sites[site].zeros_topk for site in ("attention_input", "attention_output")] == pytest.approx(
        [0.3] * 2
    )


def test_experts_that_received_no_token_are_counted(run_dir):
    def load_unbalanced(*arguments, **keywords):
        config, model, step = load_run(*arguments, **keywords)
        with torch.no_grad():
            for block in model.blocks():
                block.moe.router.weight.zero_()  # ties: the first two experts take every token
        return config, model, step

    plan = SparsityPlan.uniform(load_run(run_dir)[0].model, 0.5)
    found = calibrate_run(run_dir, plan, num_sequences=3, load=load_unbalanced)
    unseen = {site: measured.experts_without_rows for site, measured in found.sites.items()}
    assert unseen == {"attention_input": 0, "attention_output": 0, "expert_input": 4, "expert_hidden": 4}


def test_by_default_every_expert_receives_some_thousand_tokens(text_config):
    # 4 experts, 2 per token, 24 tokens per sequence.
    assert default_num_sequences(text_config) == 342
    assert 342 * 24 * 2 / 4 >= 4096 > 341 * 24 * 2 / 4


def test_fractions_of_zeros_are_means_over_the_layers_and_the_gap_is_the_largest_of_one():
    plan = SparsityPlan(
        {(0, "expert_hidden"): (0.5, 0.25), (2, "expert_hidden"): (0.75, 0.5), (0, "dense_hidden"): (0,)}
    )

    def sums(nonzero):
        rows_LE = torch.tensor([[2.0, 2.0], [1.0, 9.0]], dtype=torch.float64)
        used_LED = torch.ones(2, 2, 4, dtype=torch.bool)
        name = "sparsity/expert_hidden"
        nonzero_LE = torch.tensor(nonzero, dtype=torch.float64)
        return {f"{name}/rows_LE": rows_LE, f"{name}/nonzero_LE": nonzero_LE, f"{name}/used_LED": used_LED}

    seen = {place: [SimpleNamespace(num_seen=count) for count in (0, 3)] for place in plan.values}
    # Of 16 features in layer 0 and 40 in layer 2, 8 and 10 are zero by rank, 4 and 20 by threshold.
    found = _site("expert_hidden", plan, seen, sums([[4.0, 4.0], [3.0, 27.0]]), sums([[6.0, 6.0], [2.0, 18.0]]))
    assert found == SiteCalibration(
        layers=2, sparsity=0.5, zeros_topk=0.375, zeros_threshold=0.375, largest_gap=0.25, experts_without_rows=2
    )
