"""Shipped files: the configs load, and the schema and the table of settings are current."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qsparse_moe.config.json_schema import schema_text
from qsparse_moe.config.load import load_config
from qsparse_moe.config.settings_table import settings_markdown

REPOSITORY = Path(__file__).parents[2]
# Grids, in ablations/, are tried beside the code that reads them.
CONFIGS = sorted(p for p in (REPOSITORY / "configs").rglob("*.yaml") if p.parent.name != "ablations")


def test_the_three_sizes_are_shipped():
    assert {"tiny.yaml", "small.yaml", "base.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_loads_and_names_the_schema(path):
    config = load_config(path)
    assert config.training.name == path.stem
    first = path.read_text(encoding="utf-8").splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == REPOSITORY / "configs" / "schema.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_runs_for_a_few_steps_with_nothing_else_set(path):
    config = load_config(path)
    if config.training.decay_steps or config.model.sparsity.schedule.ramp_steps:
        pytest.skip("a decay or a ramp must lie within the run; the message says to what it may be shortened")
    assert load_config(path, ["training.steps=6"]).training.steps == 6


@pytest.mark.parametrize(
    ("module", "file", "text"),
    [
        ("json_schema", "configs/schema.json", schema_text),
        ("settings_table", "docs/settings.md", settings_markdown),
    ],
)
def test_committed_file_is_current(module, file, text):
    current = (REPOSITORY / file).read_text(encoding="utf-8") == text()
    assert current, f"{file} is not what the schema says; run python -m qsparse_moe.config.{module} {file}"


@pytest.mark.parametrize(("module", "text"), [("json_schema", schema_text), ("settings_table", settings_markdown)])
def test_command_writes_the_file(module, text, tmp_path):
    command = [sys.executable, "-m", f"qsparse_moe.config.{module}"]
    subprocess.run([*command, str(tmp_path / "out")], cwd=REPOSITORY, check=True, timeout=60)
    assert (tmp_path / "out").read_text(encoding="utf-8") == text()
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"usage: python -m qsparse_moe.config.{module} FILE")


def test_the_schema_accepts_what_the_loader_accepts():
    schema = json.loads(schema_text())
    assert schema["$defs"]["TrainingConfig"]["type"] == ["object", "null"]
    assert schema["$defs"]["SparsityOverride"]["type"] == "object"
    assert schema["additionalProperties"] is False
