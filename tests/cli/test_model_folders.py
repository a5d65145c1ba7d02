"""Verbs that measure a model take a run, one of its checkpoints, or an export, and the user's own text."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from qsparse_moe.cli.app import run
from qsparse_moe.runs.find import find_model
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.support.runs import tiny_config, write_text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run in the middle of the ramp of its S, its checkpoint, its export, and other text."""
    pytest.importorskip("safetensors")
    from qsparse_moe.interop.state_dict import export_run
    from qsparse_moe.training.loop import train

    folder = tmp_path_factory.mktemp("folders")
    write_text(folder / "text")
    config = tiny_config(folder, "run", engine="torch", deepspeed={}, steps=6)
    schedule = config.model.sparsity.schedule.model_copy(update={"shape": "linear", "warmup_steps": 0, "ramp_steps": 6})
    sparsity = config.model.sparsity.model_copy(update={"schedule": schedule})
    config = config.model_copy(update={"model": config.model.model_copy(update={"sparsity": sparsity})})
    run_dir = train(config).run_dir
    export_run(run_dir, folder / "export")
    other = folder / "other"
    other.mkdir()
    for index, file in enumerate(sorted((folder / "text").iterdir())):
        (other / f"{index}.txt").write_text(file.read_text()[::-1])
    found = {"run": run_dir, "checkpoint": max((run_dir / "checkpoints").iterdir()), "export": folder / "export"}
    return found, str(other / "*.txt")


def measured(arguments, capsys):
    assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_calibrate_finds_the_same_thresholds_for_a_run_its_checkpoint_and_its_export(folders, kind, tmp_path, capsys):
    found, _ = folders
    # Without --sparsity it is the S of the last step, which is 5 of 6 steps up the ramp.
    for name in ("run", kind):
        summary = measured(["calibrate", found[name], "--output", tmp_path / f"{name}.json", "--rows", 9], capsys)
        assert summary["step"] == 6
    ours, want = SparsityPlan.load(tmp_path / f"{kind}.json"), SparsityPlan.load(tmp_path / "run.json")
    assert want.mean == pytest.approx(0.5 * 5 / 6)
    assert ours == want


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_sensitivity_evaluate_and_describe_measure_the_same_of_each(folders, kind, tmp_path, capsys):
    found, _ = folders
    want, ours = (
        {
            "sensitivity": measured(
                [
                    "sensitivity",
                    folder,
                    "--values",
                    "0,0.5",
                    "--estimate-only",
                    "--rows",
                    4,
                    "--output",
                    tmp_path / kind,
                ],
                capsys,
            )["loss"],
            "evaluate": measured(["evaluate", folder, "--rows", 4], capsys)["loss"],
        }
        for folder in (found["run"], found[kind])
    )
    assert ours == want
    if kind == "export":
        unions = [measured(["describe", found[name], "--measure", 4], capsys) for name in ("run", kind)]
        assert unions[0]["measured_unions"] == unions[1]["measured_unions"]


def test_allocate_makes_the_same_plan_for_an_export_and_trains_it_on(folders, tmp_path, capsys):
    found, _ = folders
    summaries = {}
    for kind in ("run", "export"):
        options = ["--output", tmp_path / f"{kind}.json", "--sparsity", 0.5, "--rows", 8, "--rounds", 1, "--random", 1]
        summaries[kind] = measured(["allocate", found[kind], *options, "--train", 2], capsys)
    assert SparsityPlan.load(tmp_path / "export.json") == SparsityPlan.load(tmp_path / "run.json")
    for name in ("outcomes", "alternatives"):
        assert summaries["export"][name] == summaries["run"][name]
    run_after, export_after = (summaries[kind]["after_training"] for kind in ("run", "export"))
    assert [row["name"] for row in export_after] == [row["name"] for row in run_after]
    # The moments of the run's optimizer are not in the export.
    assert all(a["loss"] != b["loss"] for a, b in zip(run_after, export_after, strict=True))
    # Two steps at a tenth of the rate change the loss a little, and not nothing.
    before = {row["name"]: row["loss"] for row in summaries["export"]["outcomes"]}
    for row in export_after:
        assert 0 < abs(row["loss"] - before[row["name"]]) < 0.2, row["name"]


def test_continued_training_of_an_export_is_that_of_a_run_that_starts_from_it(folders, tmp_path):
    from qsparse_moe.ablation.allocation.continued import RATE, _trained, continued_config
    from qsparse_moe.data.token_data import load_data
    from qsparse_moe.interop.trained_model import load_trained
    from qsparse_moe.interop.training import train
    from qsparse_moe.runs.folder import load_run_config
    from qsparse_moe.training.distributed.ranks import open_distributed

    found, _ = folders
    config = load_run_config(found["export"])
    plan, folder = SparsityPlan.uniform(config.model, 0.5), find_model(found["export"])
    settings = continued_config(folder, (), shard=False)
    with open_distributed("cpu") as distributed:
        engine = _trained(folder, settings, plan, 2, load_data(config.data), distributed)
        ours = engine.model
        engine.close()
    changes = {
        "steps": 2,
        "init_from": str(found["export"]),
        "learning_rate": RATE * config.training.learning_rate,
        "learning_rate_schedule": "constant",
        "warmup_steps": 0,
        "name": "again",
        "output_dir": str(tmp_path),
    }
    sparsity = config.model.sparsity.model_copy(
        update={"schedule": config.model.sparsity.schedule.model_copy(update={"shape": "constant", "ramp_steps": 0})}
    )
    training = config.training.model_copy(update=changes)
    model = config.model.model_copy(update={"sparsity": sparsity})
    run_dir = train(config.model_copy(update={"training": training, "model": model})).run_dir
    theirs = load_trained(run_dir)[1]
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_data_replaces_the_text_and_is_divided_as_that_of_a_run(folders, tmp_path, capsys):
    found, files = folders
    # The same export, with the other text as the source of its config.
    trained_on_it = shutil.copytree(found["export"], tmp_path / "other")
    config = trained_on_it / "config.yaml"
    own = str(found["run"].parent.parent / "text")
    assert own in config.read_text()
    config.write_text(re.sub(rf"{re.escape(own)}\S*", files, config.read_text()))
    results = []
    for index, (folder, data) in enumerate(
        [(found["export"], []), (found["export"], ["--data", files]), (trained_on_it, [])]
    ):
        plan = ["--output", tmp_path / f"{index}.json", "--rows", 9]
        report = ["--estimate-only", "--rows", 4, "--values", "0,0.5", "--output", tmp_path / f"report-{index}"]
        budget = ["--output", tmp_path / f"a-{index}", "--sparsity", 0.5, "--rows", 8, "--rounds", 1, "--random", 0]
        results.append(
            (
                measured(["calibrate", folder, *plan, *data], capsys)["loss_threshold"],
                measured(["sensitivity", folder, *report, *data], capsys)["loss"],
                measured(["allocate", folder, *budget, *data], capsys)["outcomes"],
            )
        )
    assert results[1] == results[2]
    assert all(other != own for other, own in zip(results[1], results[0], strict=True))


def test_an_export_without_sparsity_needs_a_requested_s(folders, tmp_path, capsys):
    found, _ = folders
    dense = shutil.copytree(found["export"], tmp_path / "dense")
    config = dense / "config.yaml"
    config.write_text(config.read_text().replace("default: 0.5", "default: 0.0"))
    assert run(["calibrate", str(dense), "--output", str(tmp_path / "plan.json")]) == 2
    assert capsys.readouterr().err == (
        f"error: {dense}: S is 0 at every site, so there is no threshold to calibrate; give another S by --sparsity, "
        "--plan or model.sparsity.default\n"
    )
    assert measured(["calibrate", dense, "--output", tmp_path / "plan.json", "--sparsity", 0.5, "--rows", 4], capsys)


def test_the_first_step_of_a_ramp_has_no_threshold(folders, tmp_path, capsys):
    """In an export the step is in the weight files, so this is found only once they are open."""
    found, _ = folders
    dense = shutil.copytree(found["export"], tmp_path / "dense")
    config = dense / "config.yaml"
    text = (
        config.read_text().replace("warmup_steps: 0\n", "warmup_steps: 100\n").replace("  steps: 6\n", "  steps: 200\n")
    )
    config.write_text(text)
    assert run(["calibrate", str(dense), "--output", str(tmp_path / "plan.json")]) == 2
    assert "S is 0 at every site" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
