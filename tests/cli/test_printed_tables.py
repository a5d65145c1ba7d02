"""Tables and lines that verbs print, cell by cell, and the checks of their options at the edge of each rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from qsparse_moe.cli import calibrate, checks, comparison, describe, doctor, fit_law, task_scores
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.inference.comparison.continuations import ContinuationChange
from qsparse_moe.inference.comparison.measure import Comparison, LayerChange
from qsparse_moe.inference.comparison.run import ComparedModels
from qsparse_moe.inference.comparison.sums import HiddenChange, OutputChange, RoutingChange
from qsparse_moe.inference.tasks.scores import TaskScore


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")


def cells(text):
    return [[cell.strip() for cell in line.split("│")][1:-1] for line in text.splitlines() if line.startswith("│")]


def shown(table, capsys):
    Console(width=220).print(table)
    return cells(capsys.readouterr().out)


def refusal(call, *values, **named):
    with pytest.raises(ConfigError) as caught:
        call(*values, **named)
    return str(caught.value)


def layer(number, **figures):
    values = {"choices_changed": 0.25, "tokens_changed": 0.5, "first_changed": 0.125} | figures
    routing = RoutingChange(**values, reference_choices_E=(1,), lost_E=(0,), gained_E=(0,))
    local = RoutingChange(0.0625, 0.1, 0.2, (1,), (0,), (0,))
    return LayerChange(number, HiddenChange(0.75, 0.875), HiddenChange(0.03125, 0.9), routing, local)


def compared(first_differences=(3, None, 5), layers=None):
    texts = ContinuationChange(3, 8, (), 0.625, first_differences, (), 0.5, -1.25, -0.75)
    dense = LayerChange(0, HiddenChange(0.5, 0.25), HiddenChange(0.125, 0.1), None, None)
    found = Comparison(OutputChange(60, 0.03125, 0.9375, 2.5, 2.75), layers or (dense, layer(1)), texts)
    return ComparedModels(found, Path("runs/x"), 7, 0.5, "dense", 0.0, 12, (1,))


def test_a_comparison_is_printed_with_its_layers_and_texts(capsys):
    comparison._print_tables(compared())
    text = capsys.readouterr().out
    assert [" ".join(line.split()) for line in text.splitlines()[:7]] == [
        "after step 7, mean S 0.5000, against dense with mean S 0.0000, on 60 tokens of 12 sequences",
        "KL divergence 0.0312 nats per token",
        "top-1 agreement 0.9375",
        "loss 2.7500, reference 2.5000 nats per token",
        "greedy text 0.6250 of the tokens agree, on 3 prompts of at most 8 new tokens",
        "first difference at token 5 (median, from 0); 0.3333 of the prompts never part",
        "drift the reference would choose 0.5000 of the model's tokens, and gives them -1.2500 nats (its own: -0.7500)",
    ]
    assert cells(text) == [
        ["0", "–", "–", "–", "0.5000", "0.2500", "0.1250"],
        ["1", "0.2500", "0.1250", "0.0625", "0.7500", "0.8750", "0.0312"],
    ]
    comparison._print_tables(compared((3, None, None)))
    assert "first difference   none in most prompts; 0.6667 of the prompts never part" in capsys.readouterr().out
    named = compared().as_dict()
    assert named["run_dir"] == "runs/x" and "folder" not in named and "comparison" not in named
    assert (named["kl_divergence"], named["num_sequences"], named["moe_layers"]) == (0.03125, 12, (1,))
    assert named["layers"][0]["routing"] is None and named["layers"][0]["local_hidden"]["error"] == 0.125
    assert named["layers"][1]["local_routing"]["first_changed"] == 0.2


def score(task, **changes):
    given = {"metric": "acc", "filter": "none", "value": 0.123456, "standard_error": 0.01, "num_samples": 40}
    return TaskScore(**{"task": task, "num_shots": 5, "version": "1.0", "higher_is_better": True} | given | changes)


def test_scores_of_tasks_are_printed_with_dashes_for_what_a_group_lacks(capsys):
    scores = (
        score("one", filter="strict", num_shots=0),
        score("all", standard_error=None, num_samples=None, num_shots=None, version=None),
    )
    summary = {"step": 9, "sparsity": 0.25, "truncated_requests": 0}
    task_scores._print_table(scores, summary)
    text = capsys.readouterr().out
    assert "After step 9, mean S 0.2500" in text and "lost their first tokens" not in text
    assert cells(text) == [
        ["one", "1.0", "0", "acc/strict", "0.1235", "0.0100", "40"],
        ["all", "–", "–", "acc", "0.1235", "–", "–"],
    ]
    task_scores._print_table(scores, summary | {"truncated_requests": 3})
    assert "lost their first tokens: 3" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["step", "sparsity", "engine", "chat", "limit", "lm_eval_version"])
def test_results_of_other_tasks_stay_in_the_file_if_the_model_and_the_way_are_the_same(tmp_path, key):
    file = tmp_path / "tasks.json"
    same = {"step": 1, "sparsity": 0.5, "engine": "training", "chat": False, "limit": None, "lm_eval_version": "0.4"}
    old = [{"task": "a", "value": 1}, {"task": "b", "value": 2}]
    file.write_text(json.dumps(same | {"results": old}))
    new = same | {"results": [{"task": "b", "value": 3}, {"task": "c", "value": 4}]}
    joined = [{"task": "a", "value": 1}, {"task": "b", "value": 3}, {"task": "c", "value": 4}]
    assert task_scores._with_other_tasks(new, file) == joined
    assert task_scores._with_other_tasks(new | {key: "other"}, file) == new["results"]
    assert task_scores._with_other_tasks(new, tmp_path / "none.json") == new["results"]
    for broken in ("{", "[]", json.dumps({name: same[name] for name in same if name != key})):
        file.write_text(broken)
        assert task_scores._with_other_tasks(new, file) == new["results"]


def test_a_calibration_is_printed_by_site_with_its_losses_and_the_settings_to_use_it(capsys):
    site = {"layers": 2, "sparsity": 0.5, "zeros_topk": 0.51, "zeros_threshold": 0.49, "largest_gap": 0.0625}
    summary = {
        "step": 8,
        "held_out_rows": 5,
        "rows": 64,
        "sites": {"expert_hidden": site | {"experts_without_rows": 3}},
        "loss_topk": 2.5,
        "loss_threshold": 2.625,
        "output": "p.json",
        "settings": ["a=b", "model.sparsity.plan='x y'"],
    }
    calibrate._print_summary(summary)
    text = capsys.readouterr().out
    assert "Fraction of zeros after step 8, on 5 validation sequences" in text
    assert cells(text) == [["expert_hidden", "2", "0.5000", "0.5100", "0.4900", "0.0625", "3"]]
    assert [" ".join(line.split()) for line in text.splitlines()[-4:]] == [
        "loss 2.5000 with exact top-K, 2.6250 with thresholds, nats per token",
        "calibrated on 64 training sequences",
        "plan p.json",
        "to use it a=b 'model.sparsity.plan='\"'\"'x y'\"'\"''",
    ]


def run_config(**sparsity):
    return RunConfig.model_validate({"model": {"sparsity": sparsity}})


def described(**changes):
    counted = {"stored": 4000, "active": 3000, "kept": 2000.4}
    measured = {
        "step": 9,
        "parameters": {"kept": 1500.0},
        "parameters_by_part": {"experts": {"kept": 700.0}},
        "forward_flops_per_token": {"routed": 10, "kept": 8, "attention_scores": 3, "selection": 2},
        "bytes_read": [{"batch": 1, "stored": 8000, "routed": 4000, "kept": 1000}],
    }
    forward = {"context": 128, "routed": 1000, "kept": 800, "attention_scores": 30, "selection": 20}
    return {
        "measured": measured,
        "parameters": counted,
        "parameters_with_embedding": {"stored": 9000, "active": 8000, "kept": 7000},
        "parameters_by_part": {"experts": {"stored": 3000, "active": 1000, "kept": 500}},
        "forward_flops_per_token": forward,
        "training_flops_per_token": {name: 3 * value for name, value in forward.items()},
        "forward_flops_by_site": {"expert_hidden": {"routed": 100, "kept": 50, "selection": 7}},
        "bytes_read": [{"batch": 4, "stored": 1000, "routed": 500, "kept": 250}],
        "measured_unions": [
            {"batch": 2} | {name: {"measured": 0.5 + i / 100, "independent": 0.6} for i, name in enumerate(UNIONS)}
        ],
        "memory": {
            "ranks": 2,
            "training_state_by_zero_stage": {"0": {"weights": 1, "gradients": 2000, "optimizer": 3e6, "total": 4e9}},
            "activations": {"kept": 5000, "recomputed": 6000},
            "kv_cache_bytes_per_token": 64,
        },
        "mean_sparsity": 0.53125,
        "experts_per_token": [
            {"layer": 1, "most": 2, "top_p": 0.75, "measured": 1.625},
            {"layer": 3, "most": 0, "top_p": 1.0, "measured": None},
        ],
        "sites": {
            "expert_input": {"layers": 2, "width": 64, "least_kept": 16, "most_kept": 32},
            "expert_hidden": {"layers": 1, "width": 96, "least_kept": 48, "most_kept": 48},
        },
    } | changes


UNIONS = ("routed", "input_rows", "up_elements", "hidden_rows")


def test_tables_of_a_description_have_counts_by_routing_with_q_sparse_and_as_measured(capsys):
    given = described()
    assert shown(describe._parameter_table(given), capsys) == [
        ["experts", "3,000", "1,000", "500", "700"],
        ["all", "4,000", "3,000", "2,000", "1,500"],
        ["with the full embedding", "9,000", "8,000", "7,000", ""],
    ]
    assert shown(describe._parameter_table(described(measured=None)), capsys)[0] == ["experts", "3,000", "1,000", "500"]
    flops = describe._flops_table(given)
    assert flops.title == "FLOPs per token, 128 tokens of context"
    assert [row[1:] for row in shown(flops, capsys)] == [
        ["1,000", "3,000", "10"],
        ["800", "2,400", "8"],
        ["30", "90", "3"],
        ["20", "60", "2"],
    ]
    assert shown(describe._flops_by_site_table(given), capsys) == [["expert_hidden", "100", "50", "7"]]
    assert shown(describe._union_table(given), capsys) == [
        ["2", "50.0 % (60.0 %)", "51.0 % (60.0 %)", "52.0 % (60.0 %)", "53.0 % (60.0 %)"]
    ]
    sites = describe._site_table(given)
    assert sites.title == "Q-Sparse: mean S 0.5312"
    assert shown(sites, capsys) == [["expert_input", "2", "64", "16 to 32"], ["expert_hidden", "1", "96", "48"]]
    assert shown(describe._experts_table(given), capsys) == [["1", "2", "0.75", "1.62"], ["3", "0", "1", "–"]]
    assert shown(describe._experts_table(described(measured=None)), capsys)[0] == ["1", "2", "0.75"]


def test_bars_are_those_of_the_measured_zeros_where_there_are_some_and_memory_has_decimal_units(capsys):
    traffic = describe._traffic_table(described())
    assert traffic.title == "Weights read per step of B independent tokens, with the zeros of step 9"
    assert shown(traffic, capsys) == [["1", "█" * 5 + "░" * 15, "4 KB", "1 KB"]]
    planned = describe._traffic_table(described(measured=None))
    assert planned.title == "Weights read per step of B independent tokens"
    assert shown(planned, capsys) == [["4", "█" * 10 + "░" * 10, "500 B", "250 B"]]
    memory = describe._memory_table(described())
    assert memory.title == "Training state on one of 2 ranks"
    assert memory.caption == (
        "plus the activations of one micro-batch: 5 KB saved for the backward pass, 6 KB more while a layer is "
        "recomputed; key-value cache: 64 B per token"
    )
    assert shown(memory, capsys) == [["0", "1 B", "2 KB", "3 MB", "4 GB"]]
    assert describe._recomputed(0) == ""


def test_the_summary_of_a_law_has_its_ranges_its_noise_and_what_was_not_fitted(capsys):
    ends = {"sparsity": [0.0, 0.7], "total": [1e6, 2e6], "kept": [5e5, 1e6], "expert_share": [0.125, 0.5]}
    form = {"formula": "L = x", "source": "mine", "constants": {}, "printed_unit": None, "optima": []}
    form |= {"fit_error": 0.01, "held_out_error": None, "largest_held_out_error": 0.5}
    form["longest_held_out_error"] = None
    summary = {
        "points": 30,
        "runs": 6,
        "configurations": 3,
        "left_out": 2,
        "unit": "nats per token",
        "ranges": ends | {"tokens": [1000.0, 2e6]},
        "seed_spread": 0.0125,
        "best": "kept",
        "level": 0.9,
        "forms": {"kept": form},
        "not_fitted": {"joint-moe": "E/A takes 2 values"},
        "figures": ["fit.png"],
    }
    fit_law.print_summary(summary, Path("law"))
    text = capsys.readouterr().out
    begin = " ".join(text.split("Forms:")[0].split())
    assert begin == (
        "30 evaluations of 6 runs (3 configurations); 2 unfinished runs left out. Loss in nats per token. "
        "N 1,000,000 to 2,000,000, needed 500,000 to 1,000,000, A/E 0.125 to 0.5, S 0.00 to 0.70, D 1,000 to 2,000,000 "
        "tokens. N and needed without embedding and head."
    )
    assert "marked *; seeds of one configuration differ by 1.25%" in text and "S* at" not in text
    assert ["kept *", "0", "1.00%", "–", "50.00%", "–"] in cells(text)
    assert text.splitlines()[-2:] == ["not fitted: joint-moe: E/A takes 2 values", "written to law: law.json, fit.png"]


def test_findings_are_grouped_and_what_every_run_needs_is_named(capsys):
    findings = [
        checks.Finding("needed", "torch", True, True, "2.13"),
        checks.Finding("needed", "numpy", False, True, "not installed"),
        checks.Finding("extras", "scipy", False, False, "not installed"),
    ]
    doctor._print_tables(findings, findings[1:2])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[1:] == [
        ["needed"],
        ["torch", "yes", "2.13"],
        ["numpy", "no", "not", "installed"],
        ["extras"],
        ["scipy", "no", "not", "installed"],
        ["Not", "ready:", "numpy", "missing,", "and", "every", "run", "needs", "it."],
    ]
