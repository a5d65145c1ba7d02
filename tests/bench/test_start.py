"""The benchmark of a start: its figures against arithmetic, and its refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qsparse_moe.bench import start
from qsparse_moe.errors import BackendUnavailable
from tests.support.runs import tiny_config

TINY = str(Path(__file__).resolve().parents[2] / "configs/tiny.yaml")
PLAIN = ["model.moe.backend=grouped", "model.sparsity.backend=torch"]


@pytest.mark.slow
def test_the_benchmark_measures_the_memory_of_a_build_and_both_draws(tmp_path):
    sizes = ["model.hidden_size=256", "model.num_layers=4", "model.num_heads=4", "model.moe.expert_hidden_size=256"]
    shape = [*sizes, "model.head_size=null", "training.engine=torch", "training.device=cpu", *PLAIN]
    output = tmp_path / "start.json"
    # In a process of its own: this one may have memory to spare, and a build in it would need no more.
    command = [sys.executable, "-m", "qsparse_moe", "bench", "start", TINY, *shape, "--values", "100000"]
    command += ["--rounds", "1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    (rank,) = result["ranks"]
    # The plain engine in fp32: the weights themselves, a gradient, and two moments.
    assert rank["state"] == 16 * result["parameters"]
    # A gradient is allocated in the first backward.
    assert 0.6 * rank["state"] < rank["peak"] < 1.3 * (rank["state"] + rank["largest_layer"])
    assert rank["seconds"] > 0 and min(result["draw"].values()) > 0
    assert f"{result['parameters']:,} parameters" in done.stdout and "per billion values" in done.stdout


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        # Bytes per parameter: weights, then masters, moments, and gradient of what the rank updates.
        ({"engine": "torch", "precision": "fp32"}, 4 + 12),
        ({"engine": "torch", "precision": "bf16"}, 2 + 16),
        ({"engine": "deepspeed", "deepspeed": {"zero_stage": 1}, "precision": "bf16"}, 2 + 16 / 2),
        ({"engine": "deepspeed", "deepspeed": {"zero_stage": 3}, "precision": "fp32"}, 20 / 2),
    ],
)
def test_what_a_rank_of_two_keeps(tmp_path, settings, want):
    config = tiny_config(tmp_path, "run", **settings)
    shapes = {"layers.0.moe.experts.w_up": (4, 8, 2), "embedding.weight": (16, 8)}
    assert start.state_bytes(config, shapes, world_size=2, experts_over=1) == want * (64 + 128)
    assert start.largest_layer(shapes, experts_over=2) == 128


def test_a_kernel_that_keeps_the_peak_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "_PEAK", tmp_path / "missing" / "clear_refs")
    with pytest.raises(BackendUnavailable, match=r"^bench start: .*clear_refs cannot be written \(No such file.*Linux"):
        start.run_start_benchmark(tiny_config(tmp_path, "run", engine="torch"), values=1, rounds=1)
