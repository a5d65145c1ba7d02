"""How alike the features of an expert's tokens are, on rows made by hand and on a small model."""

import json
import re

import pytest
import torch

from qsparse_moe.ablation.shared_features import likeness
from qsparse_moe.cli.app import run
from qsparse_moe.cli.bench_shared_features import parse_fractions
from qsparse_moe.errors import ConfigError
from qsparse_moe.training.loop import train
from tests.support.runs import tiny_config, write_text


def test_rows_that_agree_share_everything_and_rows_apart_share_nothing():
    same = torch.tensor([[3.0, -4.0, 0.0, 1.0]]).repeat(5, 1)
    found = likeness(same, 2, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert (found.union, found.overlap) == (0.5, 1.0)
    assert found.kept_per_token == found.kept_shared == found.kept_average == pytest.approx(25 / 26)
    apart = likeness(torch.eye(4), 1, torch.tensor([0.0, 9.0, 1.0, 0.0]))
    assert (apart.union, apart.overlap, apart.kept_per_token) == (1.0, 0.0, 1.0)
    assert (apart.kept_shared, apart.kept_average, apart.relative) == (0.25, 0.25, 0.25)


def test_shared_and_average_sets_are_chosen_by_energy_over_their_own_tokens():
    rows = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, -2.0]])
    found = likeness(rows, 1, torch.tensor([0.0, 5.0, 0.0]))
    # Features 0, 2, 2 per token; over the rows feature 2 has 12 of the energy 24, and feature 1, of other tokens, 3.
    assert found.union == pytest.approx(2 / 3)
    assert found.overlap == pytest.approx(1 / 3)
    assert found.kept_per_token == pytest.approx(17 / 24)
    assert (found.kept_shared, found.kept_average) == (0.5, 0.125)
    assert found.relative_average == pytest.approx(3 / 17)


def test_fractions_outside_of_the_range_are_refused():
    assert parse_fractions("0.5,0.25") == (0.5, 0.25)
    for text in ("0", "half", "1.5,0.5"):
        message = f"--fractions ({text}) must be numbers in (0, 1) separated by commas, such as 0.5,0.25"
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse_fractions(text)


def test_the_command_compares_an_expert_s_tokens_with_others_and_any_tokens_of_a_dense_layer(tmp_path, capsys):
    write_text(tmp_path / "text")
    moe = {"num_experts": 3, "expert_hidden_size": 24, "backend": "loop", "num_dense_layers": 1}
    result = train(tiny_config(tmp_path, "run", model={"moe": moe}, engine="torch", steps=1))
    options = ["--group", "8", "--rows", "6", "--fractions", "0.25", "--json"]
    capsys.readouterr()
    assert run(["bench", "shared-features", str(result.run_dir), *options, "--output", str(tmp_path / "it.json")]) == 0
    found = json.loads(capsys.readouterr().out)["measured"]
    assert json.loads((tmp_path / "it.json").read_text())["measured"] == found
    kinds = [(entry["layer"], entry["kind"], entry["site"]) for entry in found]
    sites = ("input", "hidden")
    assert kinds[:2] == [(0, "random", site) for site in sites]
    assert sorted(kinds[2:]) == sorted((1, kind, site) for kind in ("routed", "others") for site in sites)
    for entry in found:
        assert entry["kept_average"] <= entry["kept_shared"] <= entry["kept_per_token"] <= 1.0
        assert entry["groups"] >= 1
    assert run(["bench", "shared-features", str(result.run_dir), *options[:-1]]) == 0
    assert "Groups of 8 tokens, means over layers and experts" in capsys.readouterr().out
    assert run(["bench", "shared-features", str(result.run_dir), "--group", "500", "--rows", "6"]) == 2
    assert "--group (500) must be at most the number of tokens that an expert gets" in capsys.readouterr().err
