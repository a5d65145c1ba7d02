from __future__ import annotations

from pathlib import Path

import pytest

import qsparse_moe
from qsparse_moe.config.schema import SITES
from qsparse_moe.metrics.names import METRICS, is_layer_name, is_listed, layer_name, metric_of
from qsparse_moe.metrics.table import BEGIN, END, main, metrics_markdown, with_table

REPOSITORY = Path(qsparse_moe.__file__).parent.parent


def test_names_are_unique_and_every_entry_has_a_unit_and_a_definition():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.unit and metric.definition.endswith("."), metric.name


def test_recorded_names_are_found_in_the_list():
    for site in SITES:
        name = f"sparsity/{site}/zeros"
        assert metric_of(name) is metric_of(layer_name(name, 12)) is metric_of("sparsity/SITE/zeros")
    assert is_layer_name("router/dead_experts/layer_0")
    assert not is_layer_name("router/dead_experts")


@pytest.mark.parametrize("name", ["train/los", "sparsity/attention/zeros", "router/dead_experts/layer_x", "step"])
def test_other_names_are_not_listed(name):
    assert not is_listed(name)
    with pytest.raises(KeyError):
        metric_of(name)


@pytest.mark.parametrize("page", ["docs/metrics.md"])
def test_pages_have_the_current_list(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert text == with_table(text), f"run python -m qsparse_moe.metrics.table {page}"


def test_table_command_rewrites_only_the_text_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nstale words\n{END}\nafter\n", encoding="utf-8")
    main([str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n\n| Metric |") and text.endswith(f"|\n\n{END}\nafter\n")
    assert "stale words" not in text and metrics_markdown() in text


def test_table_command_needs_a_file_and_the_marks(tmp_path):
    with pytest.raises(SystemExit, match="usage"):
        main([])
    page = tmp_path / "page.md"
    page.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(ValueError, match="add both lines"):
        main([str(page)])
    assert page.read_text(encoding="utf-8") == "no marks\n"
