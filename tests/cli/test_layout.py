"""``qsparse-moe layout``: the figures as tables and as JSON, and its messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsparse_moe.cli.app import run
from qsparse_moe.config.load import load_config

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
MIXTRAL = str(RECIPES / "mixtral-8x7b.yaml")
OPTIONS = ["--gpus", "64", "--gpu", "h100-80gb", "--nodes", "8"]


def planned(capsys, *arguments):
    assert run(["layout", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_the_figures_of_the_config_and_of_the_best_layouts(capsys):
    found = planned(capsys, MIXTRAL, *OPTIONS, "--best", "3")
    assert len(found["best"]) == 3
    assert found["machine"]["ranks"] == 64 and found["machine"]["nodes"] == 8
    asked = found["config"]
    assert asked["overrides"] == [] and asked["layout"]["training.deepspeed.zero_stage"] == 3
    assert sum(asked["device_parts"].values()) == pytest.approx(asked["device_moments"]["step"])
    assert asked["checkpoint_bytes"] == pytest.approx(12 * 46.7e9, rel=1e-3)
    assert asked["checkpoint_seconds"] == pytest.approx(asked["checkpoint_bytes"] / (8 * 2e9))
    assert asked["sent_within_node"] == pytest.approx(7 * asked["sent_between_nodes"])
    best = found["best"][0]
    assert best["fits"] and best["step_seconds"]["total"] <= asked["step_seconds"]["total"]
    assert load_config(MIXTRAL, best["overrides"]).training.deepspeed.zero_stage == 3


def test_a_slower_network_makes_steps_longer(capsys):
    times = [
        planned(capsys, MIXTRAL, *OPTIONS, *more)["config"]["step_seconds"]["collectives"]
        for more in ([], ["--bandwidth", "5e9"])
    ]
    assert times[1] > 2 * times[0]


def test_the_tables_have_overrides_to_paste(capsys):
    assert run(["layout", MIXTRAL, *OPTIONS, "--best", "2"]) == 0
    printed = capsys.readouterr().out
    assert "64 x h100-80gb in 8 nodes: 80.0 GB per device, of which 3.0 GB are reserved" in printed
    assert "the config as it is: fits, " in printed
    assert "layouts that fit, of " in printed
    assert "\n1: training." in printed and "\n2: training." in printed and "\n3:" not in printed


def test_where_nothing_fits_the_nearest_is_shown(capsys):
    assert run(["layout", MIXTRAL, "--gpu", "rtx-4090"]) == 0
    printed = capsys.readouterr().out
    assert "None of " in printed and "\n1: training." in printed
    assert "\nneeds " in printed


def test_a_config_that_these_ranks_cannot_train_is_said_so(capsys):
    assert run(["layout", MIXTRAL, "training.micro_batch_size=4", "--gpus", "128"]) == 0
    assert "the config itself is no layout of this machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h300"], "error: --gpu (h300) is not a known device; the known ones are h100-80gb, "),
        (["--gpus", "64", "--nodes", "7"], "error: --nodes (7) must divide --gpus (64)"),
        (["--gpus", "7"], "error: training.global_batch_size (256) must be a multiple of"),
    ],
)
def test_a_wrong_machine_is_one_message(arguments, message, capsys):
    assert run(["layout", MIXTRAL, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(message)
    assert printed.err.count("\n") == 1
