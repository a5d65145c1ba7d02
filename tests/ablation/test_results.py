"""Results of runs, the results file and the report."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from qsparse_moe.ablation.grid.dense_comparison import FIGURES
from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.report import _against_dense, _cost, _natural_zeros, markdown, write_results
from qsparse_moe.ablation.grid.results import RunResult, read_results, results_text
from qsparse_moe.ablation.page.parts import Drawing
from qsparse_moe.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
COST = {
    "total_parameters": 200,
    "embedding_parameters": 40,
    "active_parameters": 100,
    "kept_parameters": 50.0,
    "hidden_size": 16,
    "num_layers": 1,
    "num_experts": 2,
    "experts_per_token": 1,
    "expert_hidden_size": 16,
    "sparsity": 0.5,
    "active_weights_by_part": {"attention": 10, "router": 2, "experts_active": 48},
    "training_flops_per_token": 6e6,
    "kept_training_flops_per_token": 3e6,
    "weight_bytes_1": 1e6,
    "weight_bytes_16": 2e6,
}
QUALITY = {
    "grid": "mini",
    "settings": {},
    "error": None,
    "steps": 2,
    "tokens": 8,
    "loss": 1.0,
    "curve": [(8, 1.0, 2.0)],
    "tokens_per_second": 10.0,
}


def two_variants(tmp_path):
    (tmp_path / "mini.yaml").write_text(
        f"base: {REPOSITORY / 'configs' / 'tiny.yaml'}\nseeds: [0, 3]\n"
        "variants: {dense: {model.sparsity.default: 0}, half: {model.sparsity.default: 0.5}}\n"
    )
    return load_grid(tmp_path / "mini.yaml")


def outcome(variant, seed, bits, layers=None):
    return RunResult(
        **COST
        | QUALITY
        | {
            "id": f"{variant}-seed{seed}",
            "variant": variant,
            "seed": seed,
            "finished": bits is not None,
            "bits_per_byte": bits,
            "layer_grad_norms": layers,
        }
    )


def test_the_table_has_the_mean_the_deviation_and_the_difference_seed_by_seed(tmp_path):
    grid = two_variants(tmp_path)
    outcomes = [outcome("dense", 0, 2.0), outcome("dense", 3, 3.0), outcome("half", 0, 2.5), outcome("half", 3, None)]
    outcomes[2:] = [replace(one, kept_parameters=40.0, tokens_per_second=12.0) for one in outcomes[2:]]
    _, quality, _, common, cost, said, broken = markdown(grid, outcomes).split("\n\n")
    assert quality.splitlines()[2:] == [
        "| dense | 2.0000 | 3.0000 | 2.5000 ± 0.7071 | +0.0000 ± 0.0000 |",
        "| half | 2.5000 | – | 2.5000 | +0.5000 |",
    ]
    assert common == (
        "The same for all variants: mean S 0.5, parameters stored 200, active 100, MFLOP executed 6.000, MFLOP needed "
        "3.000, MB at 1 1.000, MB at 16 2.000."
    )
    assert cost.splitlines() == [
        "| variant | needed | tokens/s |",
        "| --- | --- | --- |",
        "| dense | 50 | 10 |",
        "| half | 40 | 12 |",
    ]
    assert said == "1 of 4 runs did not finish:"
    assert broken.strip() == "- `half-seed3`: not started, or stopped"
    write_results(grid, outcomes, tmp_path / "results")
    lines = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    # The run that was not started has no line.
    assert [json.loads(line)["id"] for line in lines] == [o.id for o in outcomes[:3]]


def test_a_table_of_one_seed_says_that_the_deviation_over_seeds_is_unknown(tmp_path):
    grid = two_variants(tmp_path)
    begin, quality, *_ = markdown(grid, [outcome("dense", 0, 2.0), outcome("half", 0, 2.5)]).split("\n\n")
    assert "one seed: no spread known" in begin and "±" not in begin + quality
    assert quality.splitlines()[0] == "| variant | seed 0 | against dense |"
    assert quality.splitlines()[3] == "| half | 2.5000 | +0.5000 |"


def test_results_written_before_choices_and_varied_sites_were_added_are_read(tmp_path):
    row = outcome("dense", 0, 2.0).as_dict()
    del row["choices"], row["varied_sparsity"], row["natural_zeros"]
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = read_results([tmp_path])
    assert read == json.loads(json.dumps(row)) | {"choices": [], "varied_sparsity": [], "natural_zeros": []}


def test_variants_whose_s_lies_below_the_natural_zeros_are_named_with_both_figures(tmp_path):
    grid = two_variants(tmp_path)
    results = [outcome(variant, seed, 2.0) for variant in ("dense", "half") for seed in (0, 3)]
    assert "natural level" not in markdown(grid, results)
    results[2] = replace(results[2], natural_zeros=[("expert_hidden", [1], 0.66, 0.5), ("dense_hidden", [], 0.9, 0.5)])
    results[3] = replace(results[3], natural_zeros=[("expert_hidden", [2], 0.68, 0.5)])
    note, table = markdown(grid, results).split("\n\n")[-2:]
    assert note.startswith("Below the natural level of zeros")
    assert table.splitlines() == [
        "| variant | site | requested S | measured zeros |",
        "| --- | --- | --- | --- |",
        "| half | layers 1-2 expert_hidden | 0.500 | 0.670 |",
        "| half | dense_hidden | 0.500 | 0.900 |",
    ]
    write_results(grid, results, tmp_path)
    assert note in (tmp_path / "report.md").read_text()
    row = read_results([tmp_path])[2]
    assert row["natural_zeros"] == [["expert_hidden", [1], 0.66, 0.5], ["dense_hidden", [], 0.9, 0.5]]


def test_gradient_norms_by_layer_are_a_table_of_their_own(tmp_path):
    grid = two_variants(tmp_path)
    outcomes = [
        outcome("dense", 0, 2.0, [1.0, 2e-7, 0.5]),
        outcome("dense", 3, 3.0, [3.0, 4e-7, 0.5]),
        outcome("half", 0, 2.5, [0.75, 123.456]),
        outcome("half", 3, None),
    ]
    _, quality, _, _, said, *rows = markdown(grid, outcomes).split("\n\n")
    assert len(quality.splitlines()) == 4 and said.startswith("Gradient norm by layer")
    assert rows[0].splitlines() == [
        "| variant | layer 0 | layer 1 | layer 2 |",
        "| --- | --- | --- | --- |",
        "| dense | 2 ± 1.41 | 3e-07 ± 1.41e-07 | 0.5 ± 0 |",
        "| half | 0.75 | 123 | – |",
    ]
    write_results(grid, outcomes, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["layer_grad_norms"] for line in lines] == [o.layer_grad_norms for o in outcomes[:3]]
    assert said in (tmp_path / "report.md").read_text()


def test_results_are_read_back_from_files_and_folders(tmp_path):
    outcomes = [outcome("dense", 0, 2.0), outcome("half", 0, None)]
    (tmp_path / "results.jsonl").write_text(results_text(outcomes))
    rows = read_results([tmp_path, tmp_path / "results.jsonl"])
    assert rows[:2] == rows[2:] and [row["id"] for row in rows[:2]] == ["dense-seed0", "half-seed0"]
    assert rows[0]["version"] == 2 and rows[0]["curve"] == [[8, 1.0, 2.0]]


ROW = results_text(
    [RunResult(**COST, **QUALITY, id="a", variant="a", seed=0, finished=True, bits_per_byte=1.0, layer_grad_norms=None)]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            ROW + ROW[:-30],
            r"results.jsonl, line 2, is truncated or not JSON .*keeps finished runs and rewrites the file",
        ),
        (ROW + "\n", "line 2, is truncated"),
        (
            ROW + ROW.replace('"version": 2', '"version": 3'),
            "line 2, has version 3, but only version 2 can be read; run qsparse-moe",
        ),
        (ROW.replace('"version": 2, ', ""), "line 1, has version 1, but only version 2 can be read"),
        ("[1]\n", "line 1, has version null"),
        (ROW.replace('"curve"', '"kurve"'), "line 1, lacks curve; run"),
        ("", "results.jsonl is empty; run qsparse-moe ablate"),
    ],
)
def test_a_truncated_results_file_or_one_of_another_version_is_refused(tmp_path, text, message):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_results([tmp_path / "results.jsonl"])


def test_a_missing_results_file_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=re.escape(str(tmp_path / "results.jsonl")) + " cannot be read.*name a results.jsonl"
    ):
        read_results([tmp_path])


def test_one_variant_has_every_cost_in_its_row_and_equal_variants_have_a_line_without_a_table(tmp_path):
    grid = two_variants(tmp_path)
    alone = replace(grid, runs=grid.runs[:2])
    unmeasured = replace(outcome("dense", 0, 2.0), tokens_per_second=None)
    assert _cost(alone, [unmeasured]) == [
        "| variant | mean S | parameters stored | active | needed | MFLOP executed | MFLOP needed | MB at 1 | MB at 16 "
        "| tokens/s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| dense | 0.5 | 200 | 100 | 50 | 6.000 | 3.000 | 1.000 | 2.000 | – |"
    ]
    assert _cost(grid, [outcome("dense", 0, 2.0), outcome("half", 0, 9.0)]) == [
        "The same for all variants: mean S 0.5, parameters stored 200, active 100, needed 50, MFLOP executed 6.000, "
        "MFLOP needed 3.000, MB at 1 1.000, MB at 16 2.000, tokens/s 10."
    ]


def test_a_site_below_its_natural_zeros_has_no_layers_if_one_seed_has_all_of_them_and_the_means_over_seeds(tmp_path):
    grid = two_variants(tmp_path)
    results = [outcome("dense", seed, 2.0) for seed in (0, 3)]
    results[0] = replace(
        results[0], natural_zeros=[("expert_hidden", [1], 0.66, 0.5), ("dense_hidden", [3, 1], 0.7, 0.2)]
    )
    results[1] = replace(results[1], natural_zeros=[("expert_hidden", [], 0.68, 0.4)])
    _, table = _natural_zeros(grid, results)
    assert table.splitlines()[2:] == [
        "| dense | expert_hidden | 0.450 | 0.670 |",
        "| dense | layers 1,3 dense_hidden | 0.200 | 0.700 |",
    ]


def test_a_difference_of_0_from_the_dense_model_counts_in_the_mean(tmp_path):
    grid = replace(two_variants(tmp_path), compare_dense=5)
    figures = dict.fromkeys(FIGURES, 0.5)
    results = [
        replace(outcome("dense", 0, 2.0), against_dense=figures | {"kl_divergence": 0.0}),
        replace(outcome("dense", 3, 2.0), against_dense=figures | {"kl_divergence": 0.25, "choices_changed": None}),
    ]
    note, table = _against_dense(grid, results)
    assert "on 5 validation sequences" in note
    assert table.splitlines()[2:] == [
        "| dense | 0.5000 | 0.5000 ± 0.0000 | 0.1250 ± 0.1768 | 0.5000 ± 0.0000 |",
        "| half | – | – | – | – |",
    ]


def test_the_error_of_a_run_is_one_line_and_pictures_have_their_titles(tmp_path, monkeypatch):
    grid = two_variants(tmp_path)
    results = [outcome("dense", 0, 2.0), replace(outcome("dense", 3, None), error="exit code 1:\n  lost\n\tagain ")]
    drawing = Drawing("Loss by S", Figure(figsize=(1, 1)), ())
    monkeypatch.setattr("qsparse_moe.ablation.grid.report.grid_drawings", lambda *_: {"loss": drawing})
    write_results(replace(grid, runs=grid.runs[:2]), results, tmp_path)
    *_, broken, names, picture = (tmp_path / "report.md").read_text().split("\n\n")
    assert (broken, names) == ("1 of 2 runs did not finish:", "- `dense-seed3`: exit code 1: lost again")
    assert picture == "![Loss by S](loss.png)\n"


def test_a_record_that_lacks_several_fields_names_them_and_a_broken_line_is_quoted_by_its_end(tmp_path):
    file, row = tmp_path / "results.jsonl", json.loads(ROW)
    file.write_text(json.dumps({k: v for k, v in row.items() if k not in ("loss", "curve", "against_dense")}) + "\n")
    with pytest.raises(
        ConfigError, match=r"line 1, lacks loss, curve; run qsparse-moe ablate with its grid and folders"
    ):
        read_results([file])
    file.write_text('{"begin": 1, "a long line": "of which only the end-of-line-0123456789')
    with pytest.raises(ConfigError) as caught:
        read_results([file])
    assert "it ends in " in str(caught.value) and "end-of-line-0123456789" in str(caught.value)
    assert "begin" not in str(caught.value)
    del row["against_dense"]
    file.write_text(json.dumps(row | {"natural_zeros": [["expert_hidden", [1], 0.7, 0.5]]}))
    (read,) = read_results([file])
    assert read["against_dense"] is None and read["natural_zeros"] == [["expert_hidden", [1], 0.7, 0.5]]
