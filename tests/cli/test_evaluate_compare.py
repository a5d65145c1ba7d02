"""``qsparse-moe evaluate --compare`` on a run and an export: tables, JSON, TensorBoard, refusals."""

from __future__ import annotations

import json

import pytest
import yaml

from qsparse_moe.cli.app import run
from qsparse_moe.config.load import load_config
from qsparse_moe.inference.comparison.run import compare_folder
from qsparse_moe.interop.state_dict import export_run
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.loop import train
from tests.support.runs import tiny_config, write_text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained run with 2 layers of 4 experts and S = 0.5."""
    folder = tmp_path_factory.mktemp("evaluate compare")
    write_text(folder / "text")
    return train(tiny_config(folder, "run", engine="torch")).run_dir


def compared(capsys, *arguments):
    assert run(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    values = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return values, events.Tags()["images"]


def test_differences_from_the_dense_model_are_printed_written_and_charted(trained, capsys):
    arguments = (trained, "--compare", "dense", "--rows", "5", "--prompts", "2", "--batch-size", "2")
    # Twice: the second evaluation of a step replaces the first.
    compared(capsys, *arguments)
    found = compared(capsys, *arguments)
    assert (found["step"], found["sparsity"], found["reference"], found["reference_sparsity"]) == (6, 0.5, "dense", 0.0)
    assert (found["num_sequences"], found["num_tokens"], found["moe_layers"]) == (5, 120, [0, 1])
    assert 0 < found["choices_changed"] < 1 and found["kl_divergence"] > 0 and found["top1_agreement"] < 1
    first, last = (layer["routing"] for layer in found["layers"])
    assert found["choices_changed"] == pytest.approx((first["choices_changed"] + last["choices_changed"]) / 2)
    assert sum(first["reference_choices_E"]) == 2 * 120
    assert found["continuations"]["num_prompts"] == 2 and found["continuations"]["new_tokens"] == 12
    assert json.loads((trained / "evaluation" / "comparison-run-against-dense.json").read_text()) == found
    board = trained / "tensorboard" / "comparison" / "run-against-dense"
    values, images = events_of(board)
    assert images == ["comparison/choices_lost", "comparison/choices_gained"]
    assert values["comparison/choices_changed"] == [(6, pytest.approx(found["choices_changed"]))]
    assert values["comparison/choices_changed/layer_1"] == [(6, pytest.approx(last["choices_changed"]))]
    assert values["comparison/kl_divergence"] == [(6, pytest.approx(found["kl_divergence"]))]
    curves, _ = events_of(board / "positions")
    wanted = [
        (place, pytest.approx(value)) for place, value in enumerate(found["continuations"]["agreement_by_position"])
    ]
    assert curves["comparison/greedy_agreement"] == wanted
    assert [step for step, _ in curves["comparison/drift_agreement"]] == [0, 2, 3, 4, 6, 8, 9, 10]
    assert run(["evaluate", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert "after step 6, mean S 0.5000, against dense with mean S 0.0000, on 120 tokens of 5 sequences" in printed
    assert f"KL divergence      {found['kl_divergence']:.4f} nats per token" in printed
    assert f"{first['choices_changed']:.4f}" in printed and "greedy text" in printed


def test_the_reference_may_be_a_plan_or_another_folder(trained, capsys, tmp_path):
    plan = tmp_path / "other.json"
    SparsityPlan.uniform(load_config(trained / "config.yaml").model, 0.3).save(plan)
    export_run(trained, tmp_path / "export")
    short = ("--rows", "3", "--prompts", "0", "--output", tmp_path)
    by_plan = compared(capsys, trained, "--compare", plan, *short)
    assert by_plan["reference_sparsity"] == pytest.approx(0.3) and by_plan["continuations"] is None
    assert (tmp_path / "comparison-run-against-other.json").is_file()
    # The export has the weights of the run, so only the plan of the command line is another.
    by_folder = compared(capsys, tmp_path / "export", "--sparsity", "0.3", "--compare", trained, *short)
    assert by_folder["reference_sparsity"] == 0.5 and by_folder["kl_divergence"] > 0
    same = compared(capsys, trained, "--compare", tmp_path / "export", *short)
    assert (same["kl_divergence"], same["choices_changed"], same["top1_agreement"]) == (0.0, 0.0, 1.0)
    sparser = compared(capsys, trained, "--sparsity", "0.9", "--compare", "dense", *short)
    assert sparser["choices_changed"] > by_plan["choices_changed"]
    assert (tmp_path / "comparison-S0.9-against-dense.json").is_file()


def test_the_text_may_be_the_users(trained, capsys, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("abcdefgh " * 10)
    found = compared(capsys, trained, "--compare", "dense", "--data", own, "--prompts", "1", "--new-tokens", "3")
    # 91 tokens with the one that begins the document are 90 labels, in sequences of 24.
    assert (found["num_sequences"], found["num_tokens"]) == (4, 90)
    assert len(found["continuations"]["agreement_by_position"]) == 3


def test_the_engine_that_decodes_gives_the_same_text(trained):
    settings = {"num_sequences": 3, "num_prompts": 2, "new_tokens": 8}
    torch_text = compare_folder(trained, engine="torch", **settings).comparison.continuations
    gathered = compare_folder(trained, engine="gather", **settings).comparison.continuations
    assert gathered.first_differences == torch_text.first_differences
    assert gathered.drift_log_probability == pytest.approx(torch_text.drift_log_probability, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "dense", "--tasks", "x"], "--tasks and --compare are two evaluations"),
        (["--compare", "dense", "--shots", "1"], "--shots (1) has no effect with --compare"),
        (["--prompts", "3"], "--prompts (3) applies to --compare only; add it"),
        (["--batch-size", "3"], "--batch-size (3) applies to --tasks and --compare only"),
        (["--compare", "dens"], "--compare (dens) must be dense, a plan file, or the folder of another model"),
        (
            ["--compare", "dense", "--prompt-tokens", "20"],
            "--prompt-tokens (20) and --new-tokens (12) must together be",
        ),
        (["--compare", "dense", "--rows", "0"], "Invalid value for '--rows'"),
        (["--compare", "."], "is not a run folder"),
    ],
)
def test_what_cannot_be_compared_is_refused(trained, capsys, arguments, message):
    assert run(["evaluate", str(trained), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_plan_file_of_another_model_is_named(trained, capsys, tmp_path):
    plan = tmp_path / "other.json"
    SparsityPlan({(9, "attention_input"): (0.5,)}).save(plan)
    assert run(["evaluate", str(trained), "--compare", str(plan)]) == 2
    assert f"{plan}: sparsity plan: layer 0, attention_input has 0 values" in capsys.readouterr().err


def test_a_plan_without_effect_on_the_selection_is_refused(trained, capsys, tmp_path):
    other = tmp_path / "export"
    export_run(trained, other)
    config = other / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["model"]["sparsity"] |= {"selection": "relu", "schedule": {}}
    config.write_text(yaml.safe_dump(settings))
    assert run(["evaluate", str(other), "--compare", "dense"]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"--compare (dense) changes nothing on {other}: model.sparsity.selection is relu" in printed
    assert not (other / "evaluation").exists()
