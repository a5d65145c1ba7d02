"""Searches over an axis, further seeds at the best value, and runs that are trained on from one length to the next."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qsparse_moe.ablation.grid.comparison_report import comparisons_dict
from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.report import markdown, write_results
from qsparse_moe.ablation.grid.run import run_grid
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.ablation.grid.search import Sample, is_needed, results_so_far, samples
from qsparse_moe.cli.app import run as run_verb
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.errors import ConfigError
from tests.ablation.grid_files import finished_run
from tests.ablation.search_runs import SEARCH, evaluated, fake_children, loss_of, stages

TWO, FOUR = '{"training.steps": 2}', '{"training.steps": 4}'


@pytest.fixture
def grid(write, tmp_path):
    return load_grid(write(SEARCH), output_dir=str(tmp_path / "out"))


@pytest.fixture
def trained(grid, monkeypatch):
    """The ids of the runs that ``grid`` trains, in order."""
    return fake_children(monkeypatch, grid)


def results_of(grid):
    """The results of all runs that the grid needs, as if they had been trained."""
    known = samples(grid, {run.id: loss_of(run) for run in grid.runs})
    needed = [run for run in grid.runs if is_needed(grid, run, known)]
    one = result_of(grid, needed[0])
    return [
        replace(one, id=run.id, variant=run.variant, seed=run.seed, finished=True, bits_per_byte=loss_of(run))
        for run in needed
    ]


def test_a_length_shares_its_folder_with_the_next_and_every_variant_ends_its_search_before_its_other_seeds(grid):
    ids = [run.id for run in grid.runs]
    assert ids[0] == "a-steps-2-learning_rate-0.001-seed0"
    assert grid.runs[0].config.training.name == "a-learning_rate-0.001-seed0"
    assert len(ids) == 2 * 2 * 3 * 3 and len({run.config.training.name for run in grid.runs}) == 2 * 3 * 3
    order = [(stage[0].entry, grid.cell(stage[0]), stage[0].only_best, len(stage)) for stage in stages(grid)]
    assert order == [
        (variant, cell, only_best, 3 if only_best else 6)
        for cell in (TWO, FOUR)
        for variant in ("a", "b")
        for only_best in (False, True)
    ]
    assert grid.num_needed == 2 * 2 * (6 + 1)


def test_the_best_value_has_the_lowest_mean_over_the_search_and_an_edge_is_marked(grid):
    bits = {run.id: loss_of(run) for run in grid.runs}
    # The seed that only a best value needs does not take part in the search.
    bits["a-steps-2-learning_rate-0.001-seed5"] = -50.0
    found = samples(grid, bits)
    assert found["a", TWO] == Sample({0: 1.0, 1: 1.01, 5: 1.05}, 0.002, None)
    assert found["b", FOUR] == Sample({0: 5.0, 1: 5.01, 5: 5.05}, 0.004, "highest")
    bits["a-steps-2-learning_rate-0.001-seed0"] = 0.5
    bits["a-steps-2-learning_rate-0.001-seed1"] = 1.4
    assert samples(grid, bits)["a", TWO].value == 0.001 and samples(grid, bits)["a", TWO].edge == "lowest"
    del bits["a-steps-2-learning_rate-0.004-seed1"]
    assert set(samples(grid, bits)) == {("a", FOUR), ("b", TWO), ("b", FOUR)}


def test_extra_seeds_of_one_value_do_not_favour_it(write):
    extra = SEARCH + "extra_seeds: [{seeds: [3], points: ['a-*-learning_rate-0.001']}]\n"
    grid = load_grid(write(extra))
    bits = {run.id: -90.0 if run.seed == 3 else loss_of(run) for run in grid.runs}
    assert samples(grid, bits)["a", TWO].value == 0.002


def test_values_can_be_excluded_from_the_search_of_a_cell_and_one_value_alone_has_no_edge(write):
    excluded = 'exclude: ["a-steps-2-*-0.002", "b-steps-4-*-0.00[24]"]\n'
    grid = load_grid(write(SEARCH + excluded))
    found = samples(grid, {run.id: loss_of(run) for run in grid.runs})
    assert (found["a", TWO].value, found["a", TWO].edge) == (0.001, "lowest")
    assert (found["a", FOUR].value, found["a", FOUR].edge) == (0.002, None)
    assert found["b", FOUR] == Sample({0: 7.0, 1: 7.01, 5: 7.05}, 0.001, None)
    assert grid.num_needed == 4 * (6 + 1) - 2 - 4


def test_the_second_stage_trains_only_the_best_values_and_a_second_call_trains_nothing(grid, trained):
    results, _ = run_grid(grid)
    assert len(trained) == len(results) == grid.num_needed
    assert [name for name in trained if name.endswith("seed5")] == [
        f"{variant}-steps-{steps}-learning_rate-{rate}-seed5"
        for steps in (2, 4)
        for variant, rate in (("a", 0.002), ("b", 0.004))
    ]
    # The lengths of one folder have the results of their own evaluations.
    by_id = {result.id: result for result in results}
    short, long = (by_id[f"a-steps-{steps}-learning_rate-0.002-seed0"] for steps in (2, 4))
    assert (short.steps, short.bits_per_byte, len(short.curve)) == (2, 1.0, 1)
    assert (long.steps, long.bits_per_byte, len(long.curve)) == (4, 0.0, 2)
    del trained[:]
    assert run_grid(grid).results == results == results_so_far(grid) and not trained


def test_a_length_whose_evaluation_is_missing_is_reported_and_does_not_count(grid):
    short = next(run for run in grid.runs if run.id == "a-steps-2-learning_rate-0.001-seed0")
    long = next(run for run in grid.runs if run.id == "a-steps-4-learning_rate-0.001-seed0")
    finished_run(long, [evaluated(long)])
    assert result_of(grid, long).finished
    result = result_of(grid, short)
    assert not result.finished and result.bits_per_byte is None and result.curve == []
    assert "has been trained beyond step 2 without an evaluation there" in result.error
    assert "choose another --output-dir, or remove this length" in result.error


def test_list_names_what_a_search_still_decides(write, tmp_path, capsys, grid):
    arguments = ["ablate", str(write(SEARCH)), "--output-dir", str(tmp_path / "out"), "--list", "--json"]

    def states():
        assert run_verb(arguments) == 0
        return {one["id"]: one["state"] for one in json.loads(capsys.readouterr().out)["runs"]}

    before = states()
    assert before["a-steps-2-learning_rate-0.001-seed0"] == "to do"
    assert {before[name] for name in before if name.endswith("seed5")} == {"waits for the search"}
    for search in stages(grid)[0]:
        finished_run(search, [evaluated(search)])
    after = states()
    own = {rate: after[f"a-steps-2-learning_rate-{rate}-seed5"] for rate in ("0.001", "0.002", "0.004")}
    assert own == {"0.001": "not best", "0.002": "to do", "0.004": "not best"}
    assert after["b-steps-2-learning_rate-0.004-seed5"] == "waits for the search"


def test_a_task_is_trained_also_if_the_search_does_not_need_it(write, tmp_path, capsys, grid, trained):
    index = next(i for i, one in enumerate(grid.runs) if one.only_best)
    assert run_verb(["ablate", str(write(SEARCH)), "--output-dir", str(tmp_path / "out"), "--task", str(index)]) == 0
    assert trained == [grid.runs[index].id] and "Comparisons" not in capsys.readouterr().out


def test_the_report_and_the_json_have_verdicts_differences_and_best_values(grid, tmp_path):
    results = results_of(grid)
    report = markdown(grid, results)
    assert "| claim | source | steps 2 | steps 4 | all |" in report
    assert "| a below b | section 4 | holds | holds | holds |" in report
    assert "| a below b | steps 2 | 1 | a | b | +5.0000 | +5.0000 to +5.0000 | 3 | holds | – | – |" in report
    assert "of 3 differences without any effect, about 0 would seem decided" in report
    assert "| a | 0.002 | 0.002 |\n| b | 0.004 (highest) | 0.004 (highest) |" in report
    write_results(grid, results, tmp_path / "results")
    # Figures over the whole search would mix its values.
    assert [path.name for path in (tmp_path / "results").glob("*.png")] == ["comparisons.png"]
    assert (
        "![Differences of the claims, with intervals](comparisons.png)" in (tmp_path / "results/report.md").read_text()
    )
    found = json.loads((tmp_path / "results" / "comparisons.json").read_text())
    assert found == json.loads(json.dumps(comparisons_dict(grid, results)))
    (claim,) = found["claims"]
    assert (claim["name"], claim["source"], claim["order"]) == ("a below b", "section 4", ["a", "b"])
    assert [cell["cell"] for cell in claim["cells"]] == [{"training.steps": 2}, {"training.steps": 4}, None]
    pair = claim["cells"][2]["pairs"][0]
    assert pair["by_seed"] == pytest.approx({"0": 5.0, "1": 5.0, "5": 5.0}) and pair["difference"] == pytest.approx(5)
    assert found["best"][0] == {"variant": "a", "cell": {"training.steps": 2}, "value": 0.002, "edge": None}


def test_a_report_of_an_unfinished_grid_says_what_has_no_runs_and_counts_what_is_left(grid):
    report = markdown(grid, results_so_far(grid))
    assert "| a below b | section 4 | no runs yet | no runs yet | no runs yet |" in report
    assert "24 of 24 runs did not finish:\n\n- 24 runs: not started, or stopped" in report
    for one in stages(grid)[0] + stages(grid)[2]:
        finished_run(one, [evaluated(one)])
    report = markdown(grid, results_so_far(grid))
    assert "| a below b | section 4 | holds | no runs yet | holds |" in report
    assert "| b | 0.004 (highest) | – |" in report


def test_a_claim_about_a_gap_has_no_verdict_at_the_first_value_of_its_axis(write):
    more = "  - {name: less, source: section 3, order: [a, b], gap_shrinks_over: training.steps}\n"
    grid = load_grid(write(SEARCH + more))
    # b - a shrinks by 0.5, 0.51, and 0.55 from 2 to 4 steps.
    results = [
        replace(one, bits_per_byte=one.bits_per_byte - 0.5 - one.seed / 100) if one.id.startswith("b-steps-4") else one
        for one in results_of(grid)
    ]
    report = markdown(grid, results)
    assert "| less | section 3 | – | holds | holds |" in report
    assert "| less | steps 4 | 2 | a | b | +0.5200 | +0.4543 to +0.5857 | 3 | holds | – | – |" in report


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("order: [a, b]", "order: [a, c]", r'names "c", which is no variant of this grid; its variants are a, b'),
        ("order: [a, b]", "order: [a]", r"comparisons.0.order \(\[\"a\"\]\): List should have at least 2 items"),
        ("order: [a, b]", "order: [a, b, a]", r'comparisons.0 \(a below b\) names "a" twice'),
        ("order: [a, b]", "order: [a, b], close: [a, b], within: 1.0", "must have either order .* or close"),
        (", order: [a, b]", "", "must have either order .* or close"),
        ("order: [a, b]", "close: [a, b]", "must have close and within .* together"),
        ("order: [a, b]", "order: [a, b], within: 0.1", "must have close and within .* together"),
        ("order: [a, b]", "close: [a, b], within: 0.0", "within .*greater than 0"),
        (
            "order: [a, b]",
            "order: [a, b], gap_grows_over: size",
            r'a gap over "size", which is no axis .*training.steps',
        ),
        (
            "order: [a, b]",
            "order: [a, b], gap_shrinks_over: training.learning_rate",
            "is about a gap over .*no axis of the cells",
        ),
        ("order: [a, b]", "close: [a, b], within: 1.0, gap_grows_over: training.steps", "needs an order of two var"),
        (
            "order: [a, b]",
            "order: [a, b], gap_grows_over: training.steps, gap_shrinks_over: training.steps",
            "has both gap_shrinks_over and gap_grows_over; give one",
        ),
        ("source: section 4, ", "", "comparisons.0.source .*Field required"),
        ("order: [a, b]}", "order: [a, b]}\n  - {name: a below b, source: s, order: [b, a]}", "name of an earlier"),
        ("variants: {a: , b: {model.sparsity.default: 0.5}}\n", "", "its variants are none, because the file has no"),
        ("axis: training.learning_rate", "axis: training.rate", r"best_over.axis \(training.rate\) is no axis of this"),
        ("[0.001, 0.002, 0.004]", "[0.001]", "a search needs a list of at least two numbers"),
        ("axis: training.learning_rate", "axis: size", "best_over.axis .size. is no axis"),
        ("seeds: [5]", "seeds: [5, 1]", r"best_over.seeds \(\[5, 1\]\) must be different and not among the seeds"),
        ("seeds: [5]", "seeds: [5, 5]", "must be different"),
        ("training.steps: [2, 4]", "training.steps: [4, 2]", "needs the axis training.steps with an ascending list"),
        ("  training.steps: [2, 4]\n", "", "needs the axis training.steps with an ascending list of lengths"),
        ("learning_rate_schedule: constant", "learning_rate_schedule: cosine", "a-steps-2.*-seed0 has cosine; set it"),
        ("continue_over_steps: true", "continue_over_steps: true\ncompare_dense: 2", "remove one of them"),
    ],
)
def test_a_claim_a_search_or_lengths_that_cannot_be_are_refused(write, tmp_path, old, new, message):
    assert old in SEARCH
    with pytest.raises(ConfigError, match=message) as error:
        load_grid(write(SEARCH.replace(old, new)), output_dir=str(tmp_path / "out"))
    assert str(tmp_path / "mini.yaml") in str(error.value) and not (tmp_path / "out").exists()


def test_a_run_that_is_trained_on_ends_with_the_loss_of_an_unbroken_one(grid, write, tmp_path):
    def train(run):
        (tmp_path / "run.yaml").write_text(config_to_yaml(run.config))
        assert run_verb(["train", str(tmp_path / "run.yaml")]) == 0

    ids = [f"b-steps-{steps}-learning_rate-0.002-seed1" for steps in (2, 4)]
    short, long = (next(run for run in grid.runs if run.id == one) for one in ids)
    train(short)
    train(long)
    other = load_grid(write(SEARCH), output_dir=str(tmp_path / "unbroken"))
    unbroken = next(run for run in other.runs if run.id == long.id)
    train(unbroken)
    assert result_of(grid, short).steps == 2
    assert result_of(grid, long).loss == result_of(other, unbroken).loss
    assert [tokens for tokens, _, _ in result_of(grid, long).curve] == [2 * 2 * 32, 4 * 2 * 32]
