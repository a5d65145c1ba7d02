"""The verbs ``sensitivity`` and ``allocate``: the files that they write, their output, and every message."""

from __future__ import annotations

import csv
import json
import re
import shlex

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsparse_moe.ablation.cells import cells_of
from qsparse_moe.cli.allocation_files import tensorboard_of
from qsparse_moe.cli.app import run
from qsparse_moe.config.load import load_config
from qsparse_moe.kernels import native
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.support.pages import read_page
from tests.support.runs import tiny_config, write_text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from qsparse_moe.training.loop import train

    folder = tmp_path_factory.mktemp("sensitivity")
    write_text(folder / "text")
    return train(tiny_config(folder, "run", engine="torch")).run_dir


@pytest.mark.slow
def test_sensitivity_writes_json_csv_report_and_figures(trained, tmp_path, capsys):
    folder = tmp_path / "report"
    arguments = ["sensitivity", str(trained), "--values", "0.5,0.75", "--rows", "3", "--output", str(folder)]
    arguments += ["--plans", "3"]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((folder / "sensitivity.json").read_text()) == found
    assert (found["step"], found["rows"], found["mean_sparsity"]) == (6, 3, 0.5)
    cells = cells_of(SparsityPlan.uniform(load_config(trained / "config.yaml").model, 0.5))
    assert len(found["points"]) == len(cells) and found["evaluations"] == len(cells) + 1
    # Two layers, with no expert, one expert, or the second choice alone.
    assert [(one["layer"], one["change"]) for one in found["routing"]] == [
        (layer, change) for layer in (0, 1) for change in ("A 0", "A 1", "without rank 0")
    ]
    assert (
        len(found["plans"]["evaluated"]) == 3
        and "3 random plans of both sparsities" in (folder / "report.md").read_text()
    )
    for point in found["points"]:
        assert point["exact_low"] <= point["exact_high"] and point["estimate_low"] <= point["estimate_high"]
    with (folder / "sensitivity.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["exact"]) for line in lines] == [point["exact"] for point in found["points"]]
    assert {line["expert"] for line in lines if line["site"] == "attention_input"} == {""}
    names = ["estimate", "map-attention_input", "map-attention_output", "map-expert_hidden", "map-expert_input"]
    names += ["plans", "routing"]
    assert sorted(file.stem for file in folder.glob("*.png")) == names
    report = (folder / "report.md").read_text()
    assert all(f"![{name}]({name}.png)" in report for name in names) and "Spearman" in report
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    assert {f"sensitivity/{name}" for name in names} <= set(events.Tags()["images"])
    page = read_page((folder / "report.html").read_text())
    assert len(page.images) == len(names) and page.headings[0] == f"Sensitivities of {trained}"
    point = found["points"][0]
    table = page.tables[f"{point['site'].replace('_', ' ')}, S={point['sparsity']:g}, 1/1000 nats per token"]
    assert table[1 + point["layer"]] == [str(point["layer"]), f"{1000 * point['exact']:+.4f}"]


def test_sensitivity_prints_a_readable_report_of_estimates_around_another_s(trained, tmp_path, capsys):
    folder = tmp_path / "report"
    arguments = ["--estimate-only", "--at", "0.25", "--values", "0,0.25", "--rows", "2", "--output", str(folder)]
    assert run(["sensitivity", str(trained), *arguments]) == 0
    printed = capsys.readouterr().out
    assert (
        "Cells with the largest change of the loss, nats per token" in printed
        and f"written to        {folder}" in printed
    )
    found = json.loads((folder / "sensitivity.json").read_text())
    assert found["mean_sparsity"] == 0.25 and found["exact_seconds"] is None and found["agreement"] == []
    assert {(point["sparsity"], point["exact"]) for point in found["points"]} == {(0.0, None)}


@pytest.mark.slow
def test_allocate_writes_a_plan_within_the_budget_and_compares_it(trained, tmp_path, capsys):
    output, report = tmp_path / "plan.json", tmp_path / "new" / "report.md"
    arguments = ["allocate", str(trained), "--output", str(output), "--sparsity", "0.6", "--rows", "3", "--rounds", "1"]
    arguments += ["--random", "1", "--train", "1", "--report", str(report)]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = SparsityPlan.load(output)
    plan.check_fits(load_config(trained / "config.yaml").model)
    assert found["planned"] >= 0.6 and len({s for values in plan.values.values() for s in values}) > 1
    names = ["allocated", "uniform", "greedy by layer", "random 0", "dense"]
    assert [one["name"] for one in found["outcomes"]] == names == [one["name"] for one in found["after_training"]]
    assert len(found["alternatives"]) == 3
    before = {one["name"]: one["loss"] for one in found["outcomes"]}
    assert all(one["loss"] != before[one["name"]] for one in found["after_training"])
    page = read_page(report.with_suffix(".html").read_text())
    assert [row[0] for row in page.tables["Every plan less uniform S"][1:]][0] == "allocated"
    assert page.tables["S at expert hidden"][1][1:] == [f"{s:.4f}" for s in plan.values[0, "expert_hidden"]]
    text = report.read_text()
    assert "After 1 steps of training with each plan:" in text and "| allocated |" in text and "S of the plan:" in text
    # The plan is one that training takes.
    assert run(["train", str(trained / "config.yaml"), "training.name=by-plan", *_by(found), "--json"]) == 0
    capsys.readouterr()
    assert run(["allocate", str(trained), "--output", str(tmp_path / "b.json"), "--bytes", "1", "--rows", "2"]) == 2
    assert "--bytes (1) cannot be met: with S = 0.95 at every site, the model still reads" in capsys.readouterr().err


@pytest.mark.slow
def test_allocate_spends_a_budget_on_both_sparsities_at_every_point_of_a_front(trained, tmp_path, capsys):
    output, folder = tmp_path / "plan.json", tmp_path / "report"
    (trained / "tensorboard").mkdir(exist_ok=True)
    arguments = ["allocate", str(trained), "--output", str(output), "--budget", "bytes=0.6@batch=2", "--rows", "3"]
    arguments += ["--front", "0.6:0.8:0.2", "--held-out", "2", "--rounds", "1", "--random", "1", "--train-steps", "1"]
    assert run([*arguments, "--folder", str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert "compared bytes=0.6@batch=2" in captured.err and "compared bytes=0.8@batch=2" in captured.err
    # What takes long says where it is.
    assert "both sparsities, from" in captured.err and "round 1 of 1: a loss of " in captured.err
    assert json.loads((folder / "allocation.json").read_text()) == found
    assert (found["format"], found["quantity"], found["batch"]) == ("qsparse_moe.allocation/2", "bytes", 2)
    first, second = found["budgets"]
    for budget in (first, second):
        costs = {one["name"]: one["cost"] / budget["target"] for one in budget["outcomes"] if one["name"] != "dense"}
        # On held-out text, with the load that every plan has there.
        assert max(costs.values()) <= 1.02 and min(costs[name] for name in ("S alone", "joint")) >= 0.9, costs
    assert first["target"] == pytest.approx(0.6 * found["dense"]["cost"]) and second["share"] == pytest.approx(0.8)
    names = [one["name"] for one in first["outcomes"]]
    assert names == ["uniform", "S alone", "joint", "A alone", "uniform both", "greedy by layer", "random 0", "dense"]
    assert [one["name"] for one in second["outcomes"]] == [name for name in names if name != "greedy by layer"]
    assert [one["name"] for one in first["after_training"]] == [
        *("joint", "S alone", "A alone", "uniform", "uniform both", "dense")
    ]
    assert second["after_training"] == []
    plan = SparsityPlan.load(output)
    plan.check_fits(load_config(trained / "config.yaml").model)
    assert json.loads(plan.to_json()) == first["plans"]["joint"] and set(plan.experts_per_token) == {0, 1}
    kinds = ("A-alone", "S-alone", "joint", "uniform", "uniform-both")
    files = {f"bytes-{share}-{kind}.json" for share in ("0.6", "0.8") for kind in kinds}
    assert {file.name for file in (folder / "plans").iterdir()} == files | {"bytes-0.6-greedy-by-layer.json"}
    other = json.loads(SparsityPlan.load(folder / "plans" / "bytes-0.8-S-alone.json").to_json())
    assert other == second["plans"]["S alone"] != first["plans"]["S alone"]
    report = (folder / "report.md").read_text()
    assert "![front](front.png)" in report and "After 1 steps of training with each plan:" in report
    assert "## bytes=0.8@batch=2" in report and (folder / "front.png").read_bytes()[:4] == b"\x89PNG"
    page = read_page((folder / "report.html").read_text())
    assert [row[1] for row in page.tables["bytes=0.8@batch=2"][1:]] == [f"{x['loss']:.4f}" for x in second["outcomes"]]
    spent, losses = first["spent"], {one["name"]: one["loss"] for one in first["outcomes"]}
    assert spent["evaluated"] == pytest.approx(losses["joint"] - losses["dense"])
    assert spent["estimated"] == pytest.approx(sum(one["change"] for one in spent["cells"] + spent["routing"]))
    assert len(spent["cells"]) == len(cells_of(plan)) and [one["layer"] for one in spent["routing"]] == [0, 1]
    tags = EventAccumulator(str(trained / "tensorboard")).Reload().Tags()["images"]
    each = [f"{name}-bytes-{share}" for share in ("0.6", "0.8") for name in ("plan", "loss-by-layer", "loss-by-cell")]
    names = ["front", "methods", "plans-by-budget", "loss-by-budget", *each]
    assert {f"allocation/{name}" for name in names} <= set(tags)
    # What the page proposes to run runs as it stands: training, the loss, and text under the plan.
    train, evaluate, _, generate, smaller = (shlex.split(command)[1:] for command in page.commands)
    for command in ([*train, "training.engine=torch", "--json"], evaluate, [*generate, "--max-tokens", "2"]):
        assert run(command) == 0, command
    assert smaller[:4] == ["allocate", str(trained), "--budget", "bytes=0.5@batch=2"]
    capsys.readouterr()
    # The printed tables have the same rows.
    again = [*arguments[:6], "--rows", "2", "--held-out", "1", "--rounds", "1", "--random", "0", "--force"]
    assert run([*again, "--folder", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "bytes=0.6@batch=2, on 1 held-out sequences" in printed and f"plan              {output}" in printed
    assert run(["allocate", str(trained), "--output", str(tmp_path / "b.json"), "--budget", "bytes=0.01"]) == 2
    assert "--budget (bytes=0.01@batch=1) cannot be met: without routed experts" in capsys.readouterr().err


@pytest.mark.slow
def test_a_budget_that_all_experts_exceed_at_every_sparsity_is_compared_with_the_best_uniform_plan(
    trained, tmp_path, capsys
):
    arguments = ["allocate", str(trained), "--output", str(tmp_path / "plan.json"), "--rows", "2", "--held-out", "1"]
    arguments += ["--rounds", "1", "--random", "0", "--no-greedy", "--folder", str(tmp_path / "report"), "--json"]
    assert run([*arguments, "--budget", "bytes=0.01"]) == 2
    message = capsys.readouterr().err
    share = float(re.search(r"which is (\S+) of the dense", message)[1])
    assert run([*arguments, "--budget", f"bytes={share + 0.001:.4f}"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["budgets"]
    outcomes = {one["name"]: one for one in found["outcomes"]}
    assert set(found["left_out"]) >= {"uniform", "S alone"} and not {"uniform", "S alone"} & set(outcomes)
    assert outcomes["uniform both"]["against_uniform"] == 0.0 != outcomes["dense"]["against_uniform"]
    report = (tmp_path / "report" / "report.md").read_text()
    reason = "S of 0.95 everywhere exceeds the budget while all experts are used"
    assert f"No plan *uniform*: {reason}; differences and gaps are from *uniform both*." in report


@pytest.mark.slow
@pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler and ninja")
def test_allocate_predicts_the_time_of_decoding_and_measures_it(trained, tmp_path, capsys):
    arguments = ["allocate", str(trained), "--output", str(tmp_path / "plan.json"), "--budget", "ms=1", "--rows", "2"]
    arguments += ["--held-out", "1", "--rounds", "1", "--random", "0", "--no-greedy", "--folder", str(tmp_path)]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (budget,) = found["budgets"]
    assert budget["budget"] == "ms=1@batch=1" and budget["target"] == found["dense"]["cost"] > 0
    assert set(budget["decoding"]) == {one["name"] for one in budget["outcomes"]}
    for one in budget["outcomes"]:
        timed = budget["decoding"][one["name"]]
        assert timed["predicted_milliseconds"] == one["cost"] and timed["milliseconds"] > 0 < timed["bytes_read"]
    assert "Decoding of held-out text with the engine native:" in (tmp_path / "report.md").read_text()


def test_an_allocation_that_exists_is_replaced_only_by_force(trained, tmp_path, capsys, monkeypatch):
    class Began(Exception):
        pass

    def allocate(*arguments, **options):
        raise Began

    monkeypatch.setattr("qsparse_moe.ablation.allocation.joint_run.allocate_budgets", allocate)
    (tmp_path / "allocation.json").write_text("hours of work")
    plan = tmp_path / "another-plan.json"
    arguments = ["allocate", str(trained), "--output", str(plan), "--budget", "bytes=0.5@batch=1"]
    assert run([*arguments, "--folder", str(tmp_path)]) == 2
    message = f"--folder ({tmp_path}) contains an allocation.json; name another folder, or add --force"
    assert message in " ".join(capsys.readouterr().err.split())
    assert [file.name for file in tmp_path.iterdir()] == ["allocation.json"]
    with pytest.raises(Began):
        run([*arguments, "--folder", str(tmp_path), "--force"])
    with pytest.raises(Began):
        run([*arguments, "--folder", str(tmp_path / "other")])


def test_figures_go_to_the_tensorboard_of_the_run_or_of_the_report(tmp_path):
    run, report = tmp_path / "run", tmp_path / "report"
    checkpoint = run / "checkpoints" / "step-00000007"
    assert tensorboard_of(run, None) is None and tensorboard_of(run, report) == report / "tensorboard"
    (run / "tensorboard").mkdir(parents=True)
    assert tensorboard_of(run, report) == tensorboard_of(checkpoint, None) == run / "tensorboard"


def _by(found):
    """Return the output of the command: a run by the plan needs nothing else."""
    return ["training.engine=torch", *found["settings"]]


WRONG = {
    "no such run": (["sensitivity", "nothing"], "nothing does not exist; name a folder made by qsparse-moe train"),
    "no numbers": (
        ["sensitivity", "{run}", "--values", "a,0.5"],
        "--values (a,0.5) must be numbers in [0, 1) separated by commas, such as 0,0.5,0.75",
    ),
    "no fraction": (["sensitivity", "{run}", "--at", "1"], "--at (1.0) must be in [0, 1)"),
    "no budget": (
        ["allocate", "{run}", "--output", "p.json"],
        "no budget: give exactly one of --budget, for both sparsities, and --sparsity, --parameters, --flops, --bytes",
    ),
    "two budgets": (
        ["allocate", "{run}", "--output", "p.json", "--sparsity", "0.5", "--flops", "5"],
        "--sparsity and --flops: give exactly one of --budget",
    ),
    "budget is no S": (
        ["allocate", "{run}", "--output", "p.json", "--sparsity", "1"],
        "--sparsity (1.0) must be in [0, 1)",
    ),
    "both kinds of budget": (
        ["allocate", "{run}", "--output", "p.json", "--budget", "bytes=0.5", "--flops", "5"],
        "--budget (bytes=0.5) and --flops: give one budget; --budget allocates both sparsities",
    ),
    "front without a budget": (
        ["allocate", "{run}", "--output", "p.json", "--flops", "5", "--front", "0.3:0.9:0.1"],
        "--front (0.3:0.9:0.1) applies to a budget of both sparsities only; leave it out, or give --budget, such as",
    ),
    "budgets that contradict each other": (
        ["allocate", "{run}", "--output", "p.json", "--budget", "flops=0.9", "--budget", "bytes=0.0001"],
        "--budget is given 2 times (flops=0.9 and bytes=0.0001), and a call has one budget; keep one of them",
    ),
    "budgets of S alone that contradict each other": (
        ["allocate", "{run}", "--output", "p.json", "--flops", "9000", "--flops", "8000"],
        "--flops is given 2 times (9000.0 and 8000.0), and a call has one budget; keep one of them",
    ),
    "batch beside a budget": (
        ["allocate", "{run}", "--output", "p.json", "--budget", "bytes=0.5", "--batch", "8"],
        'part of its value, and only bytes has one: write --budget "bytes=0.5@batch=8"',
    ),
    "batch for a cost of one token": (
        ["allocate", "{run}", "--output", "p.json", "--flops", "5", "--batch", "8"],
        "--batch (8) has no effect on --flops, which is not counted per step; leave it out, or limit --bytes",
    ),
    "options of a budget without one": (
        ["allocate", "{run}", "--output", "p.json", "--flops", "5", "--no-greedy", "--decode", "--held-out", "3"],
        "--held-out (3) and --decode and --no-greedy apply to a budget of both sparsities only; leave them out, or",
    ),
    "a greedy plan without a budget": (
        ["allocate", "{run}", "--output", "p.json", "--flops", "5", "--greedy"],
        "--greedy applies to a budget of both sparsities only; leave it out, or give --budget",
    ),
    "folder of a budget without one": (
        ["allocate", "{run}", "--output", "p.json", "--flops", "5", "--folder", "reports"],
        "--folder (reports) applies to a budget of both sparsities only",
    ),
    "folder that is a file": (
        ["allocate", "{run}", "--output", "p.json", "--budget", "bytes=0.5", "--folder", "{run}/config.yaml"],
        "/config.yaml) is a file; name a folder",
    ),
    "report beside a folder": (
        ["allocate", "{run}", "--output", "p.json", "--budget", "bytes=0.5", "--report", "r.md"],
        "--report (r.md): with --budget the reports are written to a folder; give --folder in its place, or leave it",
    ),
    "report that is its own page": (
        ["allocate", "{run}", "--output", "p.json", "--flops", "5", "--report", "r.html"],
        "--report (r.html) names the Markdown file, and its page has the same name with .html; name a file",
    ),
    "report that is a folder": (
        ["allocate", "{run}", "--output", "p.json", "--flops", "5", "--report", "{run}"],
        ") is a folder; name a file, such as ",
    ),
    "report below a file": (
        ["allocate", "{run}", "--output", "p.json", "--flops", "5", "--report", "{run}/config.yaml/r.md"],
        "/config.yaml) is a file; name a folder",
    ),
    "report in a file": (
        ["sensitivity", "{run}", "--output", "{run}/config.yaml"],
        "/config.yaml) is a file; name a fol",
    ),
    "too few plans": (["sensitivity", "{run}", "--plans", "2"], "--plans (2) must be 0 or at least 3"),
    "budget below 0": (
        ["allocate", "{run}", "--output", "p.json", "--flops", "-1"],
        "--flops (-1.0) must be at least 0; qsparse-moe describe",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_message(name, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG[name]
    assert run([argument.format(run=trained) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [] and not (trained / "allocation").exists()


def test_a_budget_that_no_plan_meets_leaves_nothing_behind_and_its_way_out_is_accepted(trained, tmp_path, capsys):
    arguments = ["allocate", str(trained), "--output", str(tmp_path / "plan.json"), "--rows", "2", "--held-out", "1"]
    assert run([*arguments, "--budget", "bytes=0.0001@batch=8"]) == 2
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith("error: --budget (bytes=0.0001@batch=8) cannot be met: without routed")
    assert list(tmp_path.iterdir()) == [] and not (trained / "allocation").exists()
    pasted = shlex.split(re.search(r'--budget "[^"]+"', message)[0])
    arguments += ["--rounds", "1", "--random", "1", "--no-greedy", "--folder", str(tmp_path / "report"), "--json"]
    assert run([*arguments, *pasted]) == 0
    (found,) = json.loads(capsys.readouterr().out)["budgets"]
    assert found["budget"] == pasted[1] and (tmp_path / "report" / "plans").is_dir()
