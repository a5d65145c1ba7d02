"""Running a grid, and the result that each finished run yields."""

from __future__ import annotations

import json

import pytest

from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.run import run_grid
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.accounting.densities import planned_densities
from qsparse_moe.accounting.flops import training_flops
from qsparse_moe.model.transformer import build_model
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.grid_files import BASE, GRID, finished_run


@pytest.mark.slow
def test_finished_runs_are_reused_and_a_broken_run_does_not_stop_the_others(write, tmp_path):
    broken = GRID.replace("half: {", "half: {data.cache_dir: /proc/none, ").replace("[0, 3]", "[0]")
    grid = load_grid(write(broken), output_dir=str(tmp_path / "out"))
    notified = []
    outcomes, stopped_by = run_grid(grid, notify=notified.append)
    assert stopped_by == 0
    assert [outcome.finished for outcome in outcomes] == [True, False]
    assert outcomes[0].bits_per_byte > 0
    assert (outcomes[0].steps, outcomes[0].tokens) == (2, 2 * 2 * 32)
    assert outcomes[0].curve == [(2 * 2 * 32, outcomes[0].loss, outcomes[0].bits_per_byte)]
    last = json.loads((grid.folder / "dense-seed0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert outcomes[0].layer_grad_norms == [last["train/grad_norm/layer_0"]]
    assert "exit code 2" in outcomes[1].error
    assert notified == outcomes
    before = (grid.folder / "dense-seed0" / "metrics.jsonl").stat().st_mtime_ns
    again, _ = run_grid(load_grid(write(GRID.replace("[0, 3]", "[0]")), output_dir=str(tmp_path / "out")))
    assert [outcome.finished for outcome in again] == [True, True]
    assert (grid.folder / "dense-seed0" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(("steps", "mean"), [(4, [3.5, 35.0]), (5, [4.0, 40.0])])
def test_a_runs_gradient_norms_are_the_means_over_its_second_half(write, tmp_path, steps, mean):
    path = write(base=BASE.replace("num_layers: 1", "num_layers: 2"))
    grid = load_grid(path, [f"training.steps={steps}"], output_dir=str(tmp_path / "out"))
    run = grid.runs[0]
    names = ("train/grad_norm", "train/grad_norm/layer_0", "train/grad_norm/layer_1")
    finished_run(run, [{"step": s} | dict(zip(names, (100 * s, s, 10 * s), strict=True)) for s in range(1, steps + 1)])
    assert result_of(grid, run).layer_grad_norms == mean


def test_a_run_that_stopped_logging_gradient_norms_before_its_second_half_has_none(write, tmp_path):
    grid = load_grid(write(), output_dir=str(tmp_path / "out"))
    run = grid.runs[0]
    finished_run(run, [{"step": 1, "train/grad_norm/layer_0": 1.0}, {"step": 2, "train/grad_norm": 1.0}])
    assert result_of(grid, run).layer_grad_norms is None


def test_a_folder_made_with_other_settings_is_one_failed_run_among_finished_ones(write, tmp_path):
    path, out = write(GRID.replace("[0, 3]", "[0]")), str(tmp_path / "out")
    dense, half = load_grid(path, output_dir=out).runs
    finished_run(dense, [{"step": 2, "tokens": 128, "validation/loss": 1.0, "validation/bits_per_byte": 1.4}])
    finished_run(load_grid(path, ["training.beta1=0.5"], output_dir=out).runs[1], [])
    outcomes, _ = run_grid(load_grid(path, output_dir=out))
    assert [outcome.finished for outcome in outcomes] == [True, False]
    assert (outcomes[0].loss, outcomes[0].curve) == (1.0, [(128, 1.0, 1.4)])
    assert "was made with other settings" in outcomes[1].error and "training.beta1 was 0.5" in outcomes[1].error


def test_costs_of_relu_follow_the_zeros_that_the_run_measured(write, tmp_path):
    text = GRID.replace("0.5}", "0.5, model.sparsity.selection: relu, model.sparsity.gradient: masked}")
    grid = load_grid(write(text), output_dir=str(tmp_path / "out"))
    dense, relu = grid.runs[0], grid.runs[2]
    sites = ("attention_input", "attention_output", "expert_input", "expert_hidden")
    measured = {f"sparsity/{site}/zeros/layer_0": 0.0 for site in sites}
    validated = {"step": 2, "tokens": 128, "validation/loss": 1.0, "validation/bits_per_byte": 1.4}
    finished_run(relu, [validated | measured])
    assert result_of(grid, relu).kept_parameters == result_of(grid, dense).kept_parameters
    assert result_of(grid, relu).sparsity == 0.5


def test_a_result_names_the_sites_whose_s_is_below_the_zeros_of_the_activation(write, tmp_path):
    path = write(GRID.replace("[0, 3]", "[0]"))
    dense, half = load_grid(path, output_dir=str(tmp_path / "out")).runs
    validated = {"step": 2, "tokens": 128, "validation/loss": 1.0, "validation/bits_per_byte": 1.4}
    level = {"sparsity/expert_hidden/zeros": 0.675, "sparsity/expert_hidden/zeros_chosen": 0.5}
    above = {"sparsity/expert_hidden/zeros": 0.51, "sparsity/expert_hidden/zeros_chosen": 0.5}
    finished_run(dense, [validated | {"step": 1} | level, validated | above])
    finished_run(half, [validated | {"step": 1} | above, validated | level])
    grid = load_grid(path, output_dir=str(tmp_path / "out"))
    assert result_of(grid, dense).natural_zeros == []
    assert result_of(grid, half).natural_zeros == [("expert_hidden", [], 0.675, 0.5)]


def test_a_result_contains_the_last_evaluation_the_median_speed_and_the_bytes_of_the_precision(write, tmp_path):
    path = write(GRID.replace("[0, 3]", "[0]"))
    logged = [
        {"step": 1, "tokens": 64, "validation/loss": 3.0, "validation/bits_per_byte": 4.0},
        {"step": 2, "tokens": 128, "validation/loss": 1.0, "validation/bits_per_byte": 1.5},
    ]
    rates = (90.0, 10.0, 20.0)
    logged += [{"step": 3 + i, "tokens": 192, "throughput/tokens_per_second": rate} for i, rate in enumerate(rates)]
    found = {}
    for precision in ("fp32", "bf16"):
        changed = [f"training.precision={precision}"]
        grid = load_grid(path, changed, output_dir=str(tmp_path / precision))
        finished_run(grid.runs[0], logged)
        found[precision] = result_of(grid, grid.runs[0])
    one = found["fp32"]
    assert one.curve == [(64, 3.0, 4.0), (128, 1.0, 1.5)]
    assert (one.steps, one.tokens, one.loss, one.bits_per_byte) == (2, 128, 1.0, 1.5)
    assert one.tokens_per_second == 20.0
    finished_run(grid.runs[1], [*logged, {"step": 6, "tokens": 256, "throughput/tokens_per_second": 30.0}])
    assert result_of(grid, grid.runs[1]).tokens_per_second == 25.0, "between the middle two of four"
    assert one.weight_bytes_1 == 2 * found["bf16"].weight_bytes_1 > 0
    assert one.weight_bytes_16 == 2 * found["bf16"].weight_bytes_16 > 0


def test_a_result_counts_the_parameters_of_the_built_model_and_those_that_a_token_uses(write, tmp_path):
    base = BASE.replace(
        "num_experts: 2, experts_per_token: 2", "num_experts: 5, experts_per_token: 2, num_shared_experts: 1"
    )
    grid = load_grid(write(base=base), output_dir=str(tmp_path / "out"))
    dense, half = (result_of(grid, grid.runs[index]) for index in (0, 2))
    sizes = {name: p.numel() for name, p in build_model(grid.runs[0].config.model).named_parameters()}
    tables = sizes.pop("embedding.weight") + sizes.pop("head.weight")
    assert tables == 2 * 264 * 16
    total, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".moe.experts." in name)
    assert experts == 5 * 3 * 16 * 16
    assert (dense.total_parameters, dense.embedding_parameters) == (half.total_parameters, tables) == (total, tables)
    # 2 of 5 experts; of the tables the head and one row of the embedding.
    assert dense.active_parameters == half.active_parameters == total - experts * 3 // 5 + tables // 2 + 16
    by_part = {"attention": 4 * 16 * 16, "router": 5 * 16, "experts_active": 2 * 3 * 16 * 16, "shared": 3 * 16 * 16}
    assert dense.active_weights_by_part == half.active_weights_by_part == by_part
    # Every matrix but the router's and the head stands behind a site: half of its rows meet a zero.
    assert dense.kept_parameters == dense.active_parameters
    behind_sites = by_part["attention"] + by_part["experts_active"] + by_part["shared"]
    assert half.kept_parameters == half.active_parameters - behind_sites / 2


VALIDATED = {"step": 2, "tokens": 128, "validation/loss": 1.0, "validation/bits_per_byte": 1.4}


def test_an_unfinished_run_has_its_costs_and_no_losses_whatever_it_has_logged(write, tmp_path):
    grid = load_grid(write(GRID + "compare_dense: 3\n"), output_dir=str(tmp_path / "out"))
    run = grid.runs[0]
    finished_run(run, [VALIDATED | {"throughput/tokens_per_second": 10.0, "train/grad_norm/layer_0": 1.0}])
    (grid.folder / run.id / "checkpoints" / "step-00000002").rmdir()
    compared = grid.folder / run.id / "evaluation" / "rows-3"
    compared.mkdir(parents=True)
    (compared / "comparison-run-against-dense.json").write_text('{"kl_divergence": 1.0}')
    found = result_of(grid, run, "lost power")
    assert (found.finished, found.error, found.steps, found.tokens, found.curve) == (False, "lost power", 0, 0, [])
    measured = (found.loss, found.bits_per_byte, found.tokens_per_second, found.layer_grad_norms, found.against_dense)
    assert measured == (None,) * 5
    assert found.total_parameters > 0


def test_the_reason_why_a_run_ended_comes_before_that_of_its_folder(write, tmp_path):
    path, out = write(GRID.replace("[0, 3]", "[0]")), str(tmp_path / "out")
    finished_run(load_grid(path, ["training.beta1=0.5"], output_dir=out).runs[0], [])
    grid = load_grid(path, output_dir=out)
    assert result_of(grid, grid.runs[0], "exit code 7").error == "exit code 7"
    assert "was made with other settings" in result_of(grid, grid.runs[0]).error


def test_costs_of_a_selection_by_rank_are_those_of_the_plan_and_not_of_measured_zeros(write, tmp_path):
    block = GRID.replace("0.5}", "0.5, model.sparsity.selection: block, model.sparsity.group_size: 8}")
    grid = load_grid(write(block), output_dir=str(tmp_path / "out"))
    topk = load_grid(write(), output_dir=str(tmp_path / "topk"))
    sites = ("attention_input", "attention_output", "expert_input", "expert_hidden")
    measured = {f"sparsity/{site}/zeros/layer_0": 0.9 for site in sites}
    for one in (grid, topk):
        finished_run(one.runs[2], [VALIDATED | measured])
    found, ranked = result_of(grid, grid.runs[2]), result_of(topk, topk.runs[2])
    assert found.kept_parameters == ranked.kept_parameters
    assert found.kept_parameters == found.active_parameters - (4 + 2 * 3) * 16 * 16 / 2, "behind the sites, half of all"
    model = grid.runs[2].config.model
    flops = training_flops(model, 32, densities=planned_densities(model))
    assert (found.training_flops_per_token, found.kept_training_flops_per_token) == (flops.routed, flops.needed)
    assert flops.needed < flops.routed
    dense = result_of(grid, grid.runs[0])
    for name in ("weight_bytes_1", "weight_bytes_16"):
        assert getattr(found, name) < getattr(dense, name)
    assert found.weight_bytes_1 < found.weight_bytes_16


def test_a_result_lists_groups_of_experts_in_the_order_of_the_experts_and_the_weights_of_dense_layers(write, tmp_path):
    base = BASE.replace("num_layers: 1", "num_layers: 2").replace(
        "num_experts: 2", "num_experts: 4, num_dense_layers: 1"
    )
    overrides = "[{layers: 1, site: expert_hidden, experts: [0, 2], sparsity: 0.9}]"
    text = "base: base.yaml\nseeds: [0]\nvariants:\n  dense:\n  one: {model.sparsity.overrides: " + overrides + "}\n"
    grid = load_grid(write(text, base), output_dir=str(tmp_path / "out"))
    found = result_of(grid, grid.runs[1])
    assert found.varied_sparsity == [(1, "expert_hidden", [0, 2], 0.9), (1, "expert_hidden", [1, 3], 0.0)]
    assert (found.num_experts, found.experts_per_token, found.num_layers) == (4, 2, 2)
    assert found.sparsity == SparsityPlan.from_config(grid.runs[1].config.model).mean > 0.0
    sizes = {name: p.numel() for name, p in build_model(grid.runs[1].config.model).named_parameters()}
    dense = sum(size for name, size in sizes.items() if "layers.0" in name and "attention" not in name and size > 16)
    assert found.active_weights_by_part["dense"] == dense > 0
