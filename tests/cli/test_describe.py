"""The figures that describe prints, as a table and as JSON, for a config and for a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsparse_moe.cli.app import run
from qsparse_moe.config.load import config_to_yaml, load_config

REPOSITORY = Path(__file__).parents[2]
TINY = str(REPOSITORY / "configs" / "tiny.yaml")
SHAPE = [
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.moe.num_experts=8",
    "model.moe.experts_per_token=2",
    "model.moe.expert_hidden_size=32",
    "model.sparsity.default=0.5",
    "data.sequence_length=128",
    "training.steps=30",
    "training.global_batch_size=16",
]


def described(capsys, *arguments):
    assert run(["describe", *arguments, "--json"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out)


def test_json_holds_the_counts(capsys):
    content = described(capsys, TINY, *SHAPE)
    experts = content["parameters_by_part"]["experts"]
    assert experts["stored"] == 2 * 8 * 3 * 64 * 32
    assert experts["active"] == experts["stored"] // 4
    assert experts["kept"] == experts["active"] / 2
    assert content["parameters"]["stored"] == sum(part["stored"] for part in content["parameters_by_part"].values())
    assert content["forward_flops_per_token"]["context"] == 128
    assert content["mean_sparsity"] == 0.5
    assert content["sites"]["expert_hidden"] == {"layers": 2, "width": 32, "least_kept": 16, "most_kept": 16}
    assert (content["tokens_per_step"], content["tokens"]) == (2048, 61440)


def test_json_shows_where_k_differs(capsys):
    override = "model.sparsity.overrides=[{sparsity: 0.75, site: expert_hidden, experts: 0, layers: 1}]"
    place = described(capsys, TINY, *SHAPE, override)["sites"]["expert_hidden"]
    assert (place["least_kept"], place["most_kept"]) == (8, 16)


def test_tables_hold_the_same_counts(capsys):
    content = described(capsys, TINY, *SHAPE)
    assert run(["describe", TINY, *SHAPE]) == 0
    printed = capsys.readouterr().out
    one_row, whole = content["parameters"], content["parameters_with_embedding"]
    for counted in (one_row, whole):
        for kind in ("stored", "active", "kept"):
            assert f"{counted[kind]:,.0f}" in printed
    assert whole["active"] - one_row["active"] == content["parameters_by_part"]["embedding"]["stored"] - 64
    assert f"{content['forward_flops_per_token']['kept']:,.0f}" in printed
    assert "mean S 0.5000" in printed


def test_run_folder_is_described_by_its_config(capsys, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_to_yaml(load_config(TINY, SHAPE)), encoding="utf-8")
    assert described(capsys, str(folder)) == described(capsys, TINY, *SHAPE)


def test_measured_zeros_are_those_of_the_last_logged_step(capsys, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_to_yaml(load_config(TINY, SHAPE)), encoding="utf-8")
    sites = ("attention_input", "attention_output", "expert_input", "expert_hidden")
    zeros = {f"sparsity/{site}/zeros/layer_{layer}": 0.75 for site in sites for layer in range(2)}
    lines = [{"step": 10}, {"step": 20, **zeros}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = described(capsys, str(folder))
    measured, experts = content["measured"], content["parameters_by_part"]["experts"]
    assert measured["step"] == 20
    assert measured["parameters_by_part"]["experts"]["kept"] == experts["active"] / 4 == experts["kept"] / 2
    assert measured["bytes_read"][0]["kept"] < content["bytes_read"][0]["kept"]
    assert run(["describe", str(folder)]) == 0
    assert "measured in step 20" in capsys.readouterr().out
    assert described(capsys, str(folder), "training.steps=31")["measured"] is None  # it is another run


def test_bytes_grow_with_the_batch_and_the_chart_shows_it(capsys):
    content = described(capsys, TINY, *SHAPE, "--ranks", "4")
    kept = [point["kept"] for point in content["bytes_read"]]
    assert kept == sorted(kept)
    assert content["bytes_read"][-1]["kept"] == pytest.approx(content["bytes_read"][-1]["stored"], rel=0.01)
    by_stage = content["memory"]["training_state_by_zero_stage"]
    # Sharded over 4 ranks, with masters beside fp32 weights.
    assert by_stage["3"]["total"] == by_stage["0"]["total"] / 4 * 20 / 16
    assert run(["describe", TINY, *SHAPE]) == 0
    bars = [line for line in capsys.readouterr().out.splitlines() if "█" in line and "with Q-Sparse" not in line]
    filled = [line.count("█") for line in bars]
    assert len(bars) == 11
    assert filled == sorted(filled) and filled[-1] == 40


MADE = "name a folder made by qsparse-moe train, such as"


@pytest.mark.parametrize(
    ("verb", "name", "problem"),
    [
        ("evaluate", "mime", "does not exist"),
        ("generate", "mime", "does not exist"),
        ("evaluate", "other", "is not a run folder: it contains no config.yaml"),
        ("generate", "other", "is not a run folder: it contains no config.yaml"),
        ("describe", "other", "is not a run folder: it contains no config.yaml"),
    ],
)
def test_folder_that_is_no_run_names_the_run_beside_it(verb, name, problem, capsys, tmp_path):
    for existing in ("mine", "other"):
        (tmp_path / existing).mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    assert run([verb, str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/{name} {problem}; {MADE} {tmp_path}/mine\n"


def test_folder_of_runs_names_the_runs_in_it(capsys, tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    assert run(["evaluate", str(tmp_path / "runs")]) == 2
    assert f"such as {tmp_path}/runs/mine" in capsys.readouterr().err


ONE_EXPERT = "model.moe.experts_per_token=1"


@pytest.mark.parametrize(
    ("settings", "way_out"),
    [
        ([], "model.moe.router=softmax_topk,"),
        (["model.moe.router=sigmoid_topk_renormalized"], "model.moe.router=sigmoid_topk,"),
    ],
)
def test_a_router_that_the_loss_does_not_train_causes_a_warning_with_the_way_out(capsys, settings, way_out):
    arguments = [TINY, *SHAPE, ONE_EXPERT, *settings]
    (warning,) = described(capsys, *arguments)["warnings"]
    assert "the loss gives the router no gradient" in warning and way_out in warning
    assert run(["describe", *arguments]) == 0
    assert capsys.readouterr().out.count(f"warning: {warning}") == 1


@pytest.mark.parametrize("trained", ["model.moe.experts_per_token=2", "model.moe.router=softmax_topk"])
def test_a_router_that_the_loss_trains_causes_no_warning(capsys, trained):
    assert described(capsys, TINY, *SHAPE, ONE_EXPERT, trained)["warnings"] == []
