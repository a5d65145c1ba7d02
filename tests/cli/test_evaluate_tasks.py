"""``qsparse-moe evaluate --tasks`` on a run, a checkpoint, and an export: table, JSON, TensorBoard, refusals."""

from __future__ import annotations

import json

import pytest

from qsparse_moe.cli.app import run
from qsparse_moe.config.load import load_config
from qsparse_moe.interop.state_dict import export_run
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.loop import train
from tests.support.runs import tiny_config, write_text
from tests.support.tasks import write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A trained run and the folder of the tasks."""
    folder = tmp_path_factory.mktemp("evaluate tasks")
    write_text(folder / "text")
    return train(tiny_config(folder, "run", engine="torch")).run_dir, write_tasks(folder / "tasks")


def evaluated(capsys, *arguments):
    assert run(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scores_are_printed_written_and_charted(folders, capsys):
    run_dir, tasks = folders
    arguments = (run_dir, "--tasks", "local_choice", "--task-folder", tasks)
    found = evaluated(capsys, *arguments, "--batch-size", "3")
    assert (found["run_dir"], found["step"], found["sparsity"]) == (str(run_dir), 6, 0.5)
    accuracy = next(one for one in found["results"] if one["metric"] == "acc")
    assert accuracy["task"] == "local_choice" and accuracy["num_samples"] == 5 and accuracy["version"] == "3"
    assert accuracy["value"] in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) and accuracy["higher_is_better"] is True
    # Other tasks of the same model join the file and the charts.
    other = evaluated(capsys, run_dir, "--tasks", "local_perplexity", "--task-folder", tasks)
    stored = json.loads((run_dir / "evaluation" / "tasks.json").read_text())
    assert stored["results"] == [*found["results"], *other["results"]]
    charted = scalars(run_dir / "tensorboard" / "tasks")
    assert charted["tasks/local_choice/acc"] == [(6, pytest.approx(accuracy["value"]))]
    assert charted["tasks/local_perplexity/bits_per_byte"] == [(6, pytest.approx(other["results"][0]["value"]))]
    assert run(["evaluate", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    # The context of one of two long choices: 1 + 11 + 20 - 1 tokens for a model of 24.
    assert found["truncated_requests"] == 1 and "lost their first tokens: 1" in printed
    assert "After step 6, mean S 0.5000" in printed and "local_choice" in printed
    assert f"{accuracy['value']:.4f}" in printed and f"{accuracy['standard_error']:.4f}" in printed


def test_another_plan_engine_and_limit_have_results_of_their_own(folders, capsys, tmp_path):
    run_dir, tasks = folders
    arguments = ("--tasks", "local_perplexity", "--task-folder", tasks)
    dense = evaluated(capsys, run_dir, *arguments, "--sparsity", "0")
    assert (run_dir / "evaluation" / "tasks-S0.json").is_file()
    assert scalars(run_dir / "tensorboard" / "tasks" / "S0")
    plan = tmp_path / "other.json"
    SparsityPlan.uniform(load_config(run_dir / "config.yaml").model, 0.0).save(plan)
    again = evaluated(capsys, run_dir, *arguments, "--plan", plan, "--output", tmp_path / "here")
    assert json.loads((tmp_path / "here" / "tasks-other.json").read_text())["results"] == again["results"]
    own = evaluated(capsys, run_dir, *arguments)
    assert dense["results"] == again["results"] != own["results"]
    decoded = evaluated(capsys, run_dir, *arguments, "--engine", "inference", "--output", tmp_path)
    assert decoded["results"][0]["value"] == pytest.approx(own["results"][0]["value"], abs=1e-4)
    assert own["truncated_requests"] == 0
    assert evaluated(capsys, run_dir, *arguments, "--limit", "1")["results"][0]["num_samples"] == 1


def test_a_checkpoint_and_an_export_have_the_scores_of_their_run(folders, capsys, tmp_path):
    run_dir, tasks = folders
    export_run(run_dir, tmp_path / "export")
    arguments = ("--tasks", "local_choice,local_generation", "--task-folder", tasks)
    own = evaluated(capsys, run_dir, *arguments)
    assert evaluated(capsys, tmp_path / "export", *arguments)["results"] == own["results"]
    assert json.loads((tmp_path / "export" / "evaluation" / "tasks.json").read_text())["results"] == own["results"]
    assert not (tmp_path / "export" / "tensorboard").exists()
    checkpoint = next((run_dir / "checkpoints").glob("step-*6"))
    assert evaluated(capsys, checkpoint, *arguments)["results"] == own["results"]
    assert json.loads((run_dir / "evaluation" / f"tasks-{checkpoint.name}.json").read_text())["results"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "x", "--rows", "3"], "--rows (3) has no effect with --tasks; leave out one of them"),
        (["--chat"], "--chat (True) applies to --tasks only; add it"),
        (["--limit", "3"], "--limit (3) applies to --tasks only; add it"),
        (["--tasks", "x", "--limit", "0"], "Invalid value for '--limit': Input should be greater than or equal to 1"),
        (["--tasks", "x", "--weights", "int8"], "--weights (int8) applies to generation only; add --engine inference"),
        (["--tasks", "x", "--task-folder", "/none"], "--task-folder (/none) must be a folder with YAML files of tasks"),
        (["--tasks", ","], "--tasks (none) must name at least one task"),
    ],
)
def test_options_without_effect_are_refused(folders, capsys, arguments, message):
    run_dir, _ = folders
    assert run(["evaluate", str(run_dir), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_model_of_bytes_has_no_chat_template(folders, capsys):
    run_dir, tasks = folders
    assert run(["evaluate", str(run_dir), "--tasks", "local_choice", "--task-folder", str(tasks), "--chat"]) == 2
    assert "data.tokenizer (bytes) has no chat template" in " ".join(capsys.readouterr().err.split())


def test_several_processes_and_a_folder_that_cannot_be_written_are_refused(folders, capsys, monkeypatch, tmp_path):
    run_dir, tasks = folders
    arguments = ["evaluate", str(run_dir), "--tasks", "local_choice", "--task-folder", str(tasks)]
    (tmp_path / "file").write_text("")
    assert run([*arguments, "--output", str(tmp_path / "file")]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'file'} must be a folder to which the results can be written" in printed
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(arguments) == 2
    assert "--tasks runs in one process, and the launcher started 2" in " ".join(capsys.readouterr().err.split())
