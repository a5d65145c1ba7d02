"""A run whose tokens use fewer experts than its router chooses, through the verbs that read it."""

from __future__ import annotations

import json

import pytest
import torch

from qsparse_moe.cli.app import run
from qsparse_moe.interop.state_dict import load_export
from qsparse_moe.kernels import native
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.training.evaluate import load_run
from qsparse_moe.training.loop import train
from tests.support.runs import tiny_config, write_text

MODEL = {
    "moe": {"num_experts": 4, "experts_per_token": 3, "expert_hidden_size": 24, "backend": "loop"},
    "sparsity": {
        "default": 0.5,
        "backend": "torch",
        "experts_per_token": 2,
        "routing_overrides": [{"layers": 1, "experts_per_token": 3, "top_p": 0.6}],
    },
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fewer")
    write_text(folder / "text")
    config = tiny_config(folder, "run", engine="torch", steps=4, model=MODEL)
    return train(config, [Recorder(config)]).run_dir


@pytest.fixture(scope="module")
def plan(run_dir):
    return load_run(run_dir)[1].sparsity_plan


def said(capsys, *arguments):
    assert run([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def answer(capsys, *arguments):
    return json.loads(said(capsys, *arguments, "--json"))


def test_the_run_has_the_plan_of_its_settings_and_logs_what_its_tokens_use(run_dir, plan, capsys):
    assert plan.experts_per_token == {0: 2, 1: 3} and plan.top_p == {1: 0.6}
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["router/experts_per_token/layer_0"] == 2 and 1 <= last["router/experts_per_token/layer_1"] < 3
    planned, measured = (one for one in answer(capsys, "describe", run_dir)["experts_per_token"])
    assert planned == {"layer": 0, "most": 2, "top_p": 1.0, "measured": 2.0}
    assert measured["measured"] == last["router/experts_per_token/layer_1"]


def test_both_engines_evaluate_the_same_under_a_plan_with_other_experts(run_dir, plan, capsys, tmp_path):
    plan.with_experts({0: 0, 1: 1}).save(tmp_path / "fewer.json")
    arguments = ["evaluate", run_dir, "--rows", 2]
    own, fewer = (answer(capsys, *arguments, *given) for given in ([], ["--plan", tmp_path / "fewer.json"]))
    assert fewer["loss"] != pytest.approx(own["loss"], abs=1e-4)
    for given, want in (([], own), (["--plan", tmp_path / "fewer.json"], fewer)):
        found = answer(capsys, *arguments, *given, "--engine", "inference")
        assert found["loss"] == pytest.approx(want["loss"], abs=2e-5)


def test_engines_and_an_export_generate_the_same_text(run_dir, plan, capsys, tmp_path):
    said(capsys, "export", run_dir, "--output", tmp_path / "out", "--format", "native")
    assert load_export(tmp_path / "out")[1].sparsity_plan == plan
    arguments = ["--prompt", "abc", "--max-tokens", 12, "--temperature", 0]
    engines = ["torch", "gather", *([] if native.why_not(torch.device("cpu")) else ["native"])]
    texts = {said(capsys, "generate", folder, *arguments, "--engine", engine)
             for folder in (run_dir, tmp_path / "out") for engine in engines}  # fmt: skip
    assert len(texts) == 1


def test_a_plan_with_more_experts_than_the_router_chooses_is_refused(run_dir, plan, capsys, tmp_path):
    plan.with_experts({0: 4}).save(tmp_path / "plan.json")
    assert run(["evaluate", str(run_dir), "--plan", str(tmp_path / "plan.json")]) == 2
    assert "layer 0 has experts_per_token 4, which must be at most" in capsys.readouterr().err
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"top_p": 0.6', '"top_p": -0.6'))
    assert run(["evaluate", str(run_dir), "--plan", str(tmp_path / "plan.json")]) == 2
    assert "layer 1 has top_p -0.6; it must lie in (0, 1]" in capsys.readouterr().err
