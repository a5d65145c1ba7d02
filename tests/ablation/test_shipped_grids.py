"""The grids in configs/ablations: what they vary, and what they hold equal."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.search import samples
from qsparse_moe.ablation.grid.verdicts import decide, verdict_label
from qsparse_moe.accounting.parameters import count_by_part, count_parameters
from tests.ablation.search_runs import stages


def nameless(config):
    training = config.training.model_copy(update={"name": "", "seed": 0})
    return config.model_copy(update={"training": training})


REPOSITORY = Path(__file__).parents[2]
GRIDS = sorted((REPOSITORY / "configs" / "ablations").glob("*.yaml"))


# A grid of hundreds of runs takes seconds to load.
@functools.cache
def shipped(name):
    return load_grid(next(path for path in GRIDS if path.stem == name))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_shipped_grid_describes_complete_runs_with_at_least_three_seeds(path):
    grid = shipped(path.stem)
    assert len({run.seed for run in grid.runs}) >= 3
    assert len({nameless(run.config).model_dump_json() for run in grid.runs}) == len(grid.variants)
    assert not any(run.config.metrics.tensorboard and run.config.metrics.interval < 10 for run in grid.runs)


def test_the_ablation_page_contains_valid_grids_and_the_numbers_of_runs(tmp_path):
    page = (REPOSITORY / "docs" / "ablation.md").read_text("utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "mine.yaml").write_text(example.replace("../recipes", str(GRIDS[0].parents[1] / "recipes")))
    ids = [run.id for run in load_grid(tmp_path / "mine.yaml").runs]
    assert "masked-S0.6-large-seed1" in ids and len(ids) == 7 * 2 + 2 * 2
    for example, num_runs in zip(page.split("```yaml\n")[2:], (2 * 3 * 6 + 2 * 3 * 3, 12, 9), strict=True):
        (tmp_path / "mine.yaml").write_text(
            example.split("```")[0].replace("../recipes", str(GRIDS[0].parents[1] / "recipes"))
        )
        assert load_grid(tmp_path / "mine.yaml").num_needed == num_runs
    for path in GRIDS:
        assert f"| `{path.stem}` | {shipped(path.stem).num_needed} |" in page


def test_the_promised_grids_are_shipped():
    promised = {"sparsity", "experts", "joint", "sites", "estimator", "rescale", "router", "law"}
    assert promised <= {path.stem for path in GRIDS}
    assert len(shipped("sparsity").runs) == 12


@pytest.mark.parametrize(
    ("name", "part"),
    [("experts", lambda parts: parts["experts"].active), ("joint", lambda parts: parts["experts"].needed)],
)
def test_runs_of_a_grid_at_equal_cost_have_equal_cost(name, part):
    runs = shipped(name).runs
    costs = {part(count_by_part(run.config.model)) for run in runs}
    assert len(costs) == 1
    assert len({(run.config.model.moe.num_experts, run.config.model.moe.experts_per_token) for run in runs}) >= 6


def test_the_grid_of_orders_has_every_claim_at_two_sizes_and_three_lengths_of_one_run():
    grid = shipped("orders")
    active = {run.place["size"]: count_parameters(run.config.model).active for run in grid.runs}
    assert active == {"1M": pytest.approx(1e6, rel=0.1), "8M": pytest.approx(8e6, rel=0.1)}
    assert len(dict.fromkeys(grid.cell(run) for run in grid.runs)) == 6
    # Every run has all three lengths, but for the five further seeds, which some variants have at two or one of them.
    usual = [run for run in grid.runs if run.seed < 5]
    assert len({run.config.training.name for run in usual}) * 3 == len(usual)
    claimed = {variant for claim in grid.comparisons for variant in claim.variants}
    assert claimed == {run.entry for run in grid.runs} and all(claim.source for claim in grid.comparisons)
    rates = {
        size: {run.place["training.learning_rate"] for run in usual if run.place["size"] == size} for size in active
    }
    assert rates == {"1M": {6e-4, 1.5e-3, 4e-3}, "8M": {2.4e-4, 6e-4, 1.5e-3}}
    # The smallest size and the shortest length come first, and five seeds at the best of three rates.
    assert grid.cell(grid.runs[0]) == '{"size": "1M", "training.steps": 100}'
    further = [run for run in grid.runs if run.seed >= 5]
    assert {run.place["size"] for run in further} == {"1M"} and len(further) == 100
    numbers = [sum(run.seed < 5 for run in stage) for stage in stages(grid)]
    assert numbers == [6, 9] * 13 * 6 and grid.num_needed == 13 * 6 * 9 + 100


def test_the_stored_results_of_the_orders_decide_the_smaller_size_over_its_lengths():
    records = [json.loads(line) for line in (REPOSITORY / "results/orders/results.jsonl").read_text().splitlines()]
    bits = {record["id"]: record["bits_per_byte"] for record in records if record["finished"]}
    grid = shipped("orders")
    decided = {one.claim.name: one for one in decide(grid, samples(grid, bits))}
    small = decided["60 % zeros cost something"].by_axis[0]
    assert verdict_label(small) == "1M, mean over steps" and (small.cells, small.verdict) == (3, "holds")
    (pair,) = small.pairs
    assert (pair.mean, *pair.interval) == pytest.approx((0.0243, 0.0046, 0.0440), abs=5e-5) and len(pair.by_seed) == 10


def test_the_law_grid_varies_every_quantity_of_the_law():
    grid = shipped("law")
    assert (len(grid.runs), len(grid.variants)) == (208, 144)
    models = [run.config.model for run in grid.runs]
    assert len({model.hidden_size for model in models}) == 4
    assert len({model.moe.experts_per_token / model.moe.num_experts for model in models}) == 3
    assert len({model.sparsity.default for model in models}) == 4
    assert sum(run.seed > 0 for run in grid.runs) == 64
    # Every length decays to its own end; evaluations on the way would be of no length.
    assert {run.config.training.learning_rate_schedule for run in grid.runs} == {"cosine"}
    assert {run.config.training.steps for run in grid.runs} == {80, 160, 320}
