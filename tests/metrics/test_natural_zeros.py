"""Warnings for an S below the fraction of zeros that the activation function produces."""

from __future__ import annotations

import json
import logging

from qsparse_moe.cli.app import run
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.metrics.natural_zeros import NaturalZeros, natural_zeros, natural_zeros_warning, warn_of_natural_zeros

ROW = {
    "step": 20,
    "sparsity/expert_hidden/zeros": 0.675,
    "sparsity/expert_hidden/zeros_chosen": 0.5,
    "sparsity/expert_input/zeros": 0.51,
    "sparsity/expert_input/zeros_chosen": 0.5,
}


def test_only_sites_with_more_zeros_than_the_selection_chose_are_named():
    assert natural_zeros(ROW) == [NaturalZeros("expert_hidden", (), 0.675, 0.5)]
    (sentence,) = map(natural_zeros_warning, natural_zeros(ROW))
    assert sentence.startswith("expert_hidden: 0.675 of the features are zero")
    assert "only 0.500" in sentence and "below about 0.68" in sentence
    assert natural_zeros({"step": 1}) == []


def test_a_single_layer_below_its_natural_zeros_is_named_though_the_mean_hides_it():
    row = {"sparsity/expert_hidden/zeros": 0.895, "sparsity/expert_hidden/zeros_chosen": 0.88}
    for layer in range(12):
        chosen, zeros = (0.5, 0.68) if layer in (3, 10) else (0.95, 0.95)
        row |= {f"sparsity/expert_hidden/zeros_chosen/layer_{layer}": chosen}
        row |= {f"sparsity/expert_hidden/zeros/layer_{layer}": zeros}
    assert natural_zeros(row) == [NaturalZeros("expert_hidden", (3, 10), 0.68, 0.5)]
    assert natural_zeros_warning(natural_zeros(row)[0]).startswith("layers 3,10 expert_hidden: 0.680")
    everywhere = row | {f"sparsity/expert_hidden/zeros/layer_{layer}": 0.99 for layer in range(12)}
    assert natural_zeros(everywhere)[0].layers == ()


def test_layers_are_named_in_order_and_one_without_a_value_is_not_counted():
    names = ("sparsity/expert_hidden/zeros", "sparsity/expert_hidden/zeros_chosen")
    by_layer = {10: (0.75, 0.5), 2: (0.625, 0.5), 1: (None, None), 4: (0.9, None)}
    row = {f"{name}/layer_{layer}": pair[i] for layer, pair in by_layer.items() for i, name in enumerate(names)}
    (found,) = natural_zeros(row)
    assert found == NaturalZeros("expert_hidden", (2, 10), 0.6875, 0.5)
    assert natural_zeros_warning(found) == (
        "layers 2,10 expert_hidden: 0.688 of the features are zero, but S asks for only 0.500: the activation function "
        "produces the others, so an S below about 0.69 changes little there"
    )


def test_a_run_warns_of_its_last_logged_step(tmp_path, caplog):
    early = {"step": 10, "sparsity/expert_input/zeros": 0.75, "sparsity/expert_input/zeros_chosen": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(early) + "\n" + json.dumps(ROW) + "\n")
    with caplog.at_level(logging.WARNING, logger="qsparse_moe"):
        warn_of_natural_zeros(tmp_path)
    assert [record.message.split(":")[0] for record in caplog.records] == ["expert_hidden"]


def test_describe_warns_of_the_natural_zeros_of_a_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(config_to_yaml(RunConfig()))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    assert run(["describe", str(tmp_path), "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("changes little there" in warning for warning in warnings)


def test_a_site_is_named_from_a_margin_of_two_hundredths_on_with_the_means_of_the_layers_named():
    names = ("sparsity/expert_hidden/zeros", "sparsity/expert_hidden/zeros_chosen")
    assert natural_zeros(dict(zip(names, (0.52, 0.5), strict=True))) == []
    assert natural_zeros(dict(zip(names, (0.5201, 0.5), strict=True))) == [
        NaturalZeros("expert_hidden", (), 0.5201, 0.5)
    ]
    by_layer = {0: (0.75, 0.5), 1: (0.875, 0.875), 2: (0.5, 0.25)}
    row = {f"{name}/layer_{layer}": pair[i] for layer, pair in by_layer.items() for i, name in enumerate(names)}
    assert natural_zeros(row) == [NaturalZeros("expert_hidden", (0, 2), 0.625, 0.375)]
