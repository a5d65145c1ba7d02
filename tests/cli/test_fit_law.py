"""``fit-law``: from results files to constants, S*, files and figures; every message, with nothing written."""

from __future__ import annotations

import json
import os

import pytest

from qsparse_moe.ablation.law.joint import PRODUCT
from qsparse_moe.ablation.law.published import FINE_GRAINED
from qsparse_moe.cli.app import run
from qsparse_moe.cli.fit_law import _optimum_table
from tests.ablation.law_runs import observations_of, rows_of, write_rows

CONSTANTS = {"E": 1.0, "B": 0.2, "C": 0.7, "b": 0.6, "alpha": 0.3, "delta": 0.12, "beta": 0.15, "nu": 0.5}


def rows(**settings):
    return rows_of(observations_of(PRODUCT, CONSTANTS, noise=0.002, **settings))


def fit(capsys, *arguments):
    code = run(["fit-law", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_a_law_is_fitted_printed_and_written_with_its_figures(tmp_path, capsys):
    broken = rows()[0] | {"id": "broken", "finished": False, "loss": None, "curve": []}
    file, output = write_rows(tmp_path / "results.jsonl", [*rows(), broken]), tmp_path / "law"
    arguments = (tmp_path, "--form", "product", "--form", "kept", "--bootstrap", 20, "--output", output)
    code, printed, errors = fit(capsys, *arguments, "--json")
    assert (code, errors) == (0, "fitting product\nfitting kept\n")
    found = json.loads(printed)
    assert json.loads((output / "law.json").read_text()) == found
    assert (found["runs"], found["points"], found["left_out"], found["unit"]) == (48, 240, 1, "nats per token")
    assert found["best"] == "product"
    assert found["forms"]["product"]["held_out_error"] < found["forms"]["kept"]["held_out_error"]
    nu = found["forms"]["product"]["constants"]["nu"]
    assert nu["interval"][0] < nu["value"] < nu["interval"][1] and nu["value"] == pytest.approx(0.5, abs=0.05)
    (best,) = found["forms"]["product"]["optima"]
    # alpha ln(1−S) + ln(B + C exp(beta/(1−S))) is least there.
    assert best["sparsity"] == pytest.approx(0.579, abs=0.02)
    assert best["interval"][0] < best["sparsity"] < best["interval"][1]
    assert best["band"][0] < best["interval"][0] and best["band"][1] > best["interval"][1]
    assert sorted(path.name for path in output.iterdir()) == sorted(["law.json", *found["figures"]])
    for figure in found["figures"]:
        assert (output / figure).read_bytes().startswith(b"\x89PNG")

    code, _, message = fit(capsys, *arguments)
    assert code == 2 and f"--output ({output}) contains a law.json; name another folder, or add --force" in message
    assert file.exists()


def test_tables_show_units_and_intervals_and_say_that_printed_constants_are_rounded(tmp_path, capsys):
    file = write_rows(tmp_path / "runs.jsonl", rows())
    settings = ("--form", "q-sparse", "--bootstrap", 20, "--unit", "bits-per-byte", "--points", "last")
    code, printed, _ = fit(capsys, file, *settings)
    assert code == 0
    assert "48 evaluations of 48 runs" in printed and "Loss in bits per byte" in printed
    points = observations_of(PRODUCT, CONSTANTS)
    sizes = (points.total, points.needed)
    total, needed = (f"{values.min():,.0f} to {values.max():,.0f}" for values in sizes)
    assert f"N {total}, needed {needed}, A/E " in printed
    assert "no configuration has two seeds" in printed
    assert "in its paper (" in printed
    assert "the constants that the Q-Sparse paper prints are rounded: they give S* 50.2%" in printed
    assert "45.58%" in printed


def test_units_scale_the_losses(tmp_path, capsys):
    file = write_rows(tmp_path / "runs.jsonl", rows())
    largest = {}
    for unit in ("nats", "bits", "bits-per-byte"):
        _, printed, _ = fit(capsys, file, "--form", "kept", "--bootstrap", 20, "--unit", unit, "--json")
        largest[unit] = json.loads(printed)["ranges"]["loss"][1]
    assert largest["bits"] == pytest.approx(largest["nats"] / 0.6931471805599453)
    assert largest["bits-per-byte"] == pytest.approx(largest["bits"])


def test_published_forms_that_the_runs_do_not_determine_are_named_with_the_reason(tmp_path, capsys):
    few = rows(widths=(64, 96, 144), experts=((4, 2), (8, 2)), sparsities=(0.0, 0.4, 0.7))
    code, printed, _ = fit(capsys, write_rows(tmp_path / "runs.jsonl", few), "--bootstrap", 20, "--points", "all")
    assert code == 0
    assert (
        f"not fitted: {FINE_GRAINED.name}: G takes 2 values in the runs, and its constants need at least 3" in printed
    )
    assert "not fitted: joint-moe: E/A takes 2 values" in printed
    assert all(f"\n{name}: L = " in printed for name in ("product", "kept", "additive", "q-sparse"))


def changed(number: int, **changes):
    def change(found):
        found[number] = found[number] | changes
        return found

    return change


BAD_ROWS = {
    "another version": (changed(3, version=1), "line 4"),
    "diverged": (changed(2, curve=[[1000, None, None]]), "run run2: an evaluation is [1000, None, None]; it must be"),
    "sparsity": (changed(2, sparsity=1.0), "run run2: sparsity (1.0) must lie in [0, 1)"),
    "experts": (changed(0, experts_per_token=9), "experts_per_token (9) must be at most num_experts (4)"),
    "no number": (changed(1, total_parameters="many"), "total_parameters (many) must be a number above 0"),
    "no parts": (changed(1, active_weights_by_part={}), "active_weights_by_part ({}) must map parts to numbers"),
    "kept": (changed(1, kept_parameters=10.0), "kept_parameters (10.0) is less than what Q-Sparse does not change"),
    "vocabulary": (changed(5, embedding_parameters=64 * 1000.0), "a law needs runs with one vocabulary"),
    "tokenizer": (changed(5, bits_per_byte=0.5), "a law needs runs with one tokenizer and one validation text"),
    "twice": (lambda found: [*found, found[0]], "run run0: the run also occurs in"),
    "nothing finished": (lambda found: [row | {"finished": False} for row in found], "no finished run"),
    "one S": (lambda found: [row for row in found if row["sparsity"] == 0.5], "S takes 1 value in the runs"),
    "too few": (
        lambda found: found[::7],
        "product cannot be fitted: it has 8 constants and there are 7 runs; at least 9 are needed",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_results_that_determine_no_law_are_refused_and_nothing_is_written(case, tmp_path, capsys):
    change, message = BAD_ROWS[case]
    file, output = write_rows(tmp_path / "runs.jsonl", change(rows())), tmp_path / "law"
    code, printed, errors = fit(capsys, file, "--output", output)
    assert (code, printed) == (2, "")
    assert message in errors and "Traceback" not in errors
    assert not output.exists()
    if "line" in message or "run run" in message or "nothing" in case:
        assert str(file) in errors


def test_a_truncated_or_missing_file_is_refused(tmp_path, capsys):
    file = write_rows(tmp_path / "runs.jsonl", rows())
    file.write_text(file.read_text()[:-200])
    assert f"{file}, line 48" in fit(capsys, file)[2]
    code, _, errors = fit(capsys, tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl cannot be read" in errors


def test_a_reason_names_the_forms_that_the_runs_determine(tmp_path, capsys):
    file = write_rows(tmp_path / "runs.jsonl", rows(sparsities=(0.5,), widths=(32, 48, 64, 96, 128)))
    errors = fit(capsys, file)[2]
    assert "the form product cannot be fitted: S takes 1 value in the runs, and its constants need at least 3" in errors
    assert (
        "add such runs, or name another --form (forms that these runs can determine: fine-grained-moe, joint-moe,"
        in errors
    )
    errors = fit(capsys, write_rows(tmp_path / "few.jsonl", rows()[:3]), "--form", "kept")[2]
    assert "(forms that these runs can determine: none)" in errors


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys, monkeypatch):
    file = write_rows(tmp_path / "runs.jsonl", rows())
    asked = (file, "--form", "kept", "--bootstrap", 20, "--output", "/proc/law")
    assert "--output (/proc/law) cannot be written (No such file or directory); name another" in fit(capsys, *asked)[2]
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    assert "--output (/proc/law) is in a folder without write permission; name another" in fit(capsys, *asked)[2]


def test_impossible_choices_are_refused_before_anything_is_read(tmp_path, capsys):
    file = write_rows(tmp_path / "runs.jsonl", rows())
    assert (
        "--form (chinchilla) is not a form; choose from product, kept, additive, length, q-sparse"
        in fit(capsys, file, "--form", "chinchilla")[2]
    )
    assert f"--output ({file}) is a file; name a folder" in fit(capsys, file, "--output", file)[2]
    assert (
        "no evaluation after 99000000 tokens (--min-tokens); lower it"
        in fit(capsys, file, "--min-tokens", 99_000_000)[2]
    )


def test_only_an_optimum_beyond_every_s_of_the_runs_is_marked():
    def optimum(sparsity, share):
        ends = {"interval": [0.1, 0.9], "band": [0.2, 0.8], "band_interval": [0.15, 0.85]}
        others = {"dense_excess": 0.031, "worse_than_dense_beyond": None, "at_edge_share": 0.25}
        return {"sparsity": sparsity, "expert_share": share} | ends | others

    summary = {
        "level": 0.95,
        "tolerance": 0.01,
        "ranges": {"sparsity": [0.0, 0.7], "total": [1.0, 1.0]},
        "forms": {"kept": {"optima": [optimum(0.699, 0.5), optimum(0.7, 0.25), optimum(0.701, 0.125)]}},
        "printed": {"sparsity": 0.9, "rounding": (0.4, 0.6), "band": (0.3, 0.7)},
    }
    of_column = {column.header: list(column.cells) for column in _optimum_table(summary).columns}
    assert of_column["form"] == ["kept"] * 3 + ["q-sparse, printed"]
    assert of_column["A/E"] == ["0.5", "0.25", "0.125", "any"]
    # The last row is of the paper's runs and not of these.
    assert of_column["S*"] == ["0.699", "0.700", "0.701 !", "0.900"]
    assert of_column["at edge"] == ["25%"] * 3 + [""]
