"""The benchmarks of the command line, each from its first word to its table, on the smallest shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsparse_moe.cli.app import run
from tests.support.runs import write_text

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


@pytest.mark.parametrize("shown", ["table", "json"])
def test_the_step_benchmark_runs_whole(shown, tmp_path, capsys):
    pytest.importorskip("transformers")
    sizes = {"layers": 1, "hidden-size": 32, "heads": 2, "experts": 4, "expert-hidden-size": 16, "rows": 2}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    output = tmp_path / "new" / "step.json"
    options = ["--sequence-length", "8", "--rounds", "1", "--precision", "fp32", "--output", str(output)]
    assert run(["bench", "step", *words, *options, *(["--json"] if shown == "json" else [])]) == 0
    written, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert len(written["fp32"]["seconds"]) >= 3 and min(written["fp32"]["seconds"].values()) > 0
    if shown == "json":
        assert json.loads(printed) == written
    else:
        assert "One training step of 16 tokens" in printed and "fp32" in printed


@pytest.mark.slow
def test_the_metrics_benchmark_runs_whole(tmp_path, capsys):
    write_text(tmp_path / "text")
    small = [
        "model.hidden_size=32",
        "model.num_layers=1",
        "model.moe.expert_hidden_size=16",
        "data.sequence_length=24",
        f'data.sources=[{{"kind": "text", "path": "{tmp_path}/text/*.txt"}}]',
        f"data.cache_dir={tmp_path}/cache",
        "training.evaluation_rows=4",
        "training.warmup_steps=0",
        "training.device=cpu",
    ]
    output = tmp_path / "cost.json"
    assert run(["bench", "metrics", TINY, *small, "--steps", "2", "--rounds", "1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "a record every" in printed and "ms per step" in printed
    assert json.loads(output.read_text())["steps"] == 2
