"""The operations' benchmark: every operation, every version that runs here, and thresholds that agree."""

from __future__ import annotations

import json

import pytest
import torch

from qsparse_moe.bench import ops
from qsparse_moe.cli.app import run
from qsparse_moe.kernels.registry import OPS
from qsparse_moe.sparsity.topk import magnitude_bits


@pytest.mark.parametrize("name", ops.THRESHOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_are_the_kth_largest_magnitude(name, dtype):
    magnitude = magnitude_bits(torch.randn(5, 33).to(dtype))
    for num_selected in (1, 17, 33):
        want = magnitude.sort(dim=-1, descending=True).values[:, num_selected - 1]
        assert torch.equal(ops.THRESHOLDS[name](magnitude, num_selected).squeeze(-1), want)


def test_every_operation_and_version_is_timed_or_its_absence_is_explained(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = ops.run_op_benchmarks({"bf16": torch.bfloat16}, device="cpu", rounds=1, case="no_rows")
    timed = {operation["name"]: operation for operation in result["operations"]}
    assert {spec.name for spec in OPS} < timed.keys()
    assert set(timed["K-th largest magnitude, plain PyTorch"]["seconds"]["forward"]) == set(ops.THRESHOLDS)
    for spec in OPS:
        operation = timed[spec.name]
        assert set(operation["seconds"]["forward"]) == {ops.REFERENCE, *spec.fast} - set(operation["left_out"])
        if "triton" in spec.fast:
            assert operation["left_out"]["triton"] == "timings under Triton's interpreter are meaningless"
    assert "forward and backward" in timed["fused_glu"]["seconds"]
    assert "forward and backward" not in timed["site_row_sums"]["seconds"]
    assert result["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(("spec", "case"), [(spec, case) for spec in OPS for case in spec.cases if case != "no_rows"])
def test_every_case_of_every_operation_is_timed_forward_and_back(spec, case):
    timed = ops.time_operation(spec, case, torch.float32, "cpu", 1)
    runs = {ops.REFERENCE, *spec.fast} - timed["left_out"].keys()
    for seconds in timed["seconds"].values():
        assert seconds.keys() == runs and min(seconds.values()) > 0
    assert "forward and backward" in timed["seconds"] or spec.name in (
        "site_row_pattern",
        "site_row_sums",
    )


@pytest.mark.slow
def test_the_verb_runs_whole(capsys):
    assert run(["bench", "ops", "--precision", "fp32", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {spec.name for spec in OPS} < {operation["name"] for operation in result["operations"]}
    assert all(operation["shape"][0] >= 2048 for operation in result["operations"])


def test_the_verb_prints_a_table_and_writes_the_results(monkeypatch, tmp_path, capsys):
    timed = {
        "benchmark": "ops",
        "device": "cpu",
        "operations": [
            {"name": "fused_glu", "shape": [3, 4], "precision": "bf16", "seconds": {"forward": {"native": 0.002}}}
        ],
    }
    monkeypatch.setattr(ops, "run_op_benchmarks", lambda dtypes, *, device, rounds: timed)
    assert run(["bench", "ops", "--precision", "bf16", "--output", str(tmp_path / "new" / "ops.json")]) == 0
    assert json.loads((tmp_path / "new" / "ops.json").read_text()) == timed
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("fused_glu", "3 x 4", "bf16", "forward", "native", "2.000"))


def test_an_unknown_precision_is_refused(capsys):
    assert run(["bench", "ops", "--precision", "bf16,int3"]) == 2
    assert "--precision 'bf16,int3' contains 'int3'; choose from fp32, bf16" in capsys.readouterr().err
