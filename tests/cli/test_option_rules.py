"""The checks of options and of packages, at the edge of each rule."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from qsparse_moe.cli import calibrate, checks, evaluate, fit_law
from qsparse_moe.cli.evaluation_options import (
    check_combinations,
    check_formats,
    check_one_process,
    plan_label,
    report_progress,
)
from qsparse_moe.cli.option_values import check_folder, check_shard, check_sparsity, listed_names
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.cli.test_printed_tables import refusal, run_config


def test_settings_for_a_plan_unset_every_other_way_to_set_s():
    def settings(to="threshold", **sparsity):
        return list(calibrate.settings_for(run_config(**sparsity), Path("p.json"), selection=to))

    plan = "model.sparsity.plan=p.json"
    assert settings("topk", default=0.5) == [plan, "model.sparsity.default=null"]
    assert settings("topk", selection="threshold", plan="x.json")[0] == "model.sparsity.selection=topk"
    several = {
        "sites": {"expert_hidden": 0.5, "attention_input": 0.0},
        "overrides": [{"layers": 0, "sparsity": 0.5}],
        "schedule": {"ramp_steps": 3},
    }
    assert settings(**several) == [
        "model.sparsity.selection=threshold",
        plan,
        "model.sparsity.sites.attention_input=null",
        "model.sparsity.sites.expert_hidden=null",
        "model.sparsity.overrides=[]",
        "model.sparsity.schedule.ramp_steps=0",
        "model.sparsity.schedule.shape=constant",
    ]
    assert settings("topk", schedule={"ramp_steps": 3}) == [plan], "S may rise where K is exact"


def test_s_to_calibrate_for_is_given_in_one_way_and_only_by_settings_of_s():
    check = calibrate._check_one_way
    assert refusal(check, ["x=1"], 0.5, None) == (
        "--sparsity and settings both give the S to calibrate for; keep one of them"
    )
    assert refusal(check, [], 0.5, Path("p")).startswith("--sparsity and --plan both")
    assert refusal(check, ["model.sparsity.default=0.5", "model.sparsity.defaults=1"], None, None) == (
        "model.sparsity.defaults does not set S, and only S may differ from the run; choose from "
        "model.sparsity.preset, model.sparsity.plan, model.sparsity.default, model.sparsity.sites, "
        "model.sparsity.overrides"
    )
    assert "--sparsity (1.0) must be in [0, 1)" in refusal(check, [], 1.0, None)
    for fine in ("model.sparsity.sites.expert_hidden=0.5", " model.sparsity.default =0.5", "no equals sign"):
        check([fine], None, None)


def test_a_value_of_s_and_a_list_of_names_are_checked_at_their_ends():
    for value in (None, 0.0, 0.999):
        check_sparsity("--sparsity", value)
    for value in (-0.001, 1.0, float("nan")):
        assert refusal(check_sparsity, "--s", value) == (
            f"--s ({value}) must be in [0, 1): it is the fraction of features set to zero"
        )
    assert listed_names("--kinds", "b,a", ("a", "b")) == ["b", "a"]
    assert refusal(listed_names, "--kinds", "a,c,d", ("a", "b")) == "--kinds 'a,c,d' contains 'c'; choose from a, b"


def test_options_of_another_evaluation_are_refused_with_their_values():
    given = {"--limit": 3}
    assert refusal(check_combinations, given, mode="") == (
        "--limit (3) applies to --tasks only; add it, or leave it out"
    )
    assert refusal(check_combinations, {"--batch-size": 2}, mode="") == (
        "--batch-size (2) applies to --tasks and --compare only; add it, or leave it out"
    )
    assert refusal(check_combinations, given, mode="--compare") == (
        "--limit (3) has no effect with --compare; leave out one of them"
    )
    # 0 is a number that was given.
    assert "--prompts (0)" in refusal(check_combinations, {"--prompts": 0}, mode="--tasks")
    check_combinations({"--limit": None, "--chat": False, "--data": []}, mode="--compare")
    check_combinations({"--rows": 4, "--batch-size": 2, "--new-tokens": 1}, mode="--compare")
    assert refusal(check_combinations, {"--rows": 4, "--data": ["a"]}, mode="") == (
        "--rows (4) limits the validation data, but --data reads all text of its files; keep one of them"
    )


def test_formats_belong_to_the_engine_of_generation_and_one_process_to_tasks(monkeypatch):
    assert refusal(check_formats, "int8", "auto", "training") == (
        "--weights (int8) applies to generation only; add --engine inference"
    )
    assert refusal(check_formats, "auto", "bf16", "training").startswith("--head (bf16) applies")
    check_formats("int8", "bf16", "inference")
    check_formats("auto", "auto", "training")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(check_one_process, "--tasks").startswith(
        "--tasks runs in one process, and the launcher started 2 (WORLD_SIZE); start"
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_one_process("--tasks")


def test_weights_are_divided_over_several_ranks_and_by_evaluations_that_can(monkeypatch):
    for verb in ("evaluate", "allocate"):
        assert refusal(check_shard, True, verb) == (
            "--shard divides the weights over the ranks of a launcher, and this process is the only one; start several "
            f"with deepspeed --num_gpus N --module qsparse_moe {verb} ..., or leave out --shard"
        )
    for fine in (None, False):
        check_shard(fine, "evaluate")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_shard(True, "evaluate")
    monkeypatch.setattr(evaluate, "find_model", lambda run: SimpleNamespace(path=run))
    assert refusal(evaluate.evaluate, Path("runs/x"), shard=True, engine="inference") == (
        "--shard has no effect with --engine inference, which copies all weights of a layer into the layout of "
        "generation on every rank; leave out one of them"
    )
    assert refusal(evaluate.evaluate, Path("runs/x"), shard=True, tasks="arc_easy") == (
        "--shard has no effect with --tasks; leave out one of them"
    )


def test_progress_is_reported_now_and_then_and_at_the_end(capsys):
    for done in range(1, 46):
        report_progress(done, 45)
    assert capsys.readouterr().err.splitlines() == ["evaluated 20/45", "evaluated 40/45", "evaluated 45/45"]


def test_a_plan_in_place_of_that_of_the_run_has_a_name_for_files():
    assert plan_label(None, None) is None and plan_label(0.0, None) == "S0" and plan_label(0.25, None) == "S0.25"
    assert plan_label(None, Path("a/b.c.json")) == "b.c"


@pytest.mark.parametrize(
    ("selection", "given", "message"),
    [
        ("relu", {"sparsity": 0.5}, "--sparsity changes nothing on RUN: model.sparsity.selection is relu"),
        ("relu", {"plan_file": Path("p")}, "--plan changes nothing on RUN: model.sparsity.selection is relu"),
        ("threshold", {"sparsity": 0.0}, "--sparsity (0.0) needs thresholds, because model.sparsity.selection is "),
        ("topk", {"sparsity": 0.5, "plan_file": Path("p")}, "--sparsity and --plan both give the S to evaluate with"),
    ],
)
def test_an_s_without_effect_or_without_thresholds_is_refused(monkeypatch, selection, given, message):
    config = run_config(selection=selection)
    monkeypatch.setattr(evaluate, "find_model", lambda path: SimpleNamespace(config_folder=path))
    monkeypatch.setattr(evaluate, "load_run_config", lambda folder: config)
    monkeypatch.setattr(SparsityPlan, "load", lambda path: SparsityPlan({}))
    both = {"sparsity": None, "plan_file": None}
    assert refusal(evaluate.requested_plan, Path("RUN"), **both | given).startswith(message)
    assert evaluate.requested_plan(Path("RUN"), **both) is None


def test_a_plan_changes_the_experts_of_a_model_whose_s_has_no_effect_and_an_s_leaves_the_experts(monkeypatch, tmp_path):
    config = run_config(selection="relu", experts_per_token=1)
    monkeypatch.setattr(evaluate, "find_model", lambda path: SimpleNamespace(config_folder=path))
    monkeypatch.setattr(evaluate, "load_run_config", lambda folder: config)
    plan = SparsityPlan.uniform(config.model, 0.5).with_experts({0: 0})
    plan.save(tmp_path / "plan.json")
    assert evaluate.requested_plan(Path("RUN"), sparsity=None, plan_file=tmp_path / "plan.json") == plan
    plan.with_experts({0: 9}).save(tmp_path / "plan.json")
    message = refusal(evaluate.requested_plan, Path("RUN"), sparsity=None, plan_file=tmp_path / "plan.json")
    assert message.startswith(f"{tmp_path / 'plan.json'}: sparsity plan: layer 0 has experts_per_token 9, which must")
    config = run_config(default=0.5, experts_per_token=1)
    found = evaluate.requested_plan(Path("RUN"), sparsity=0.25, plan_file=None)
    assert found.mean == 0.25 and set(found.experts_per_token.values()) == {1}


def test_a_requested_s_is_that_of_every_site_and_0_is_one(monkeypatch):
    config = run_config(default=0.5)
    monkeypatch.setattr(evaluate, "find_model", lambda path: SimpleNamespace(config_folder=path))
    monkeypatch.setattr(evaluate, "load_run_config", lambda folder: config)
    for value in (0.0, 0.75):
        found = evaluate.requested_plan(Path("RUN"), sparsity=value, plan_file=None)
        assert found == SparsityPlan.uniform(config.model, value)


def test_a_law_that_exists_is_replaced_only_by_force_and_folders_are_made_only_where_one_may_write(tmp_path):
    fit_law.check_no_law(tmp_path / "new" / "er", force=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "law.json").write_text("{}")
    assert refusal(fit_law.check_no_law, tmp_path, force=False) == (
        f"--output ({tmp_path}) contains a law.json; name another folder, or add --force"
    )
    fit_law.check_no_law(tmp_path, force=True)


def test_a_folder_for_results_is_checked_before_it_is_made(tmp_path):
    check_folder("--folder", tmp_path / "new" / "er")
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    assert refusal(check_folder, "--folder", file) == f"--folder ({file}) is a file; name a folder"
    below = file / "new" / "er"
    assert refusal(check_folder, "--folder", below) == (
        f"--folder ({below}) is below {file}, which is a file; name a folder"
    )


@pytest.mark.parametrize(
    ("installed", "runs", "detail"),
    [
        ("2.10.0+cpu", True, "2.10.0+cpu"),
        ("2.9.1", False, '2.9.1 is older than 2.10; pip install "torch>=2.10"'),
        (None, False, 'not installed; pip install "torch>=2.10"'),
    ],
)
def test_a_needed_package_has_at_least_its_version_number_by_number(monkeypatch, installed, runs, detail):
    monkeypatch.setattr(checks, "NEEDED_PACKAGES", {"torch": "2.10"})
    monkeypatch.setattr(checks, "installed_version", lambda package: installed)
    (found,) = checks._needed_packages()
    assert found == checks.Finding("needed", "torch", runs, True, detail)
    assert checks._numbers("2.13.0+cu126.4") == (2, 13, 0) and checks._numbers("1.2.3.4") == (1, 2, 3)


def test_packages_of_extras_name_their_extra(monkeypatch):
    monkeypatch.setattr(checks, "installed_version", lambda package: "1.0" if package == "scipy" else None)
    assert [(one.name, one.runs, one.needed, one.detail) for one in checks._extras()] == [
        ("transformers", False, False, 'not installed; pip install "qsparse-moe[hf]"'),
        ("safetensors", False, False, 'not installed; pip install "qsparse-moe[hf]"'),
        ("scipy", True, False, "1.0"),
    ]
