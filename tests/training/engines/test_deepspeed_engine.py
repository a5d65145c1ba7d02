"""Tests of the DeepSpeed engine in one process; its layouts are tested in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.training.loop import train
from tests.support.runs import LAYOUTS

pytest.importorskip("deepspeed")


@pytest.mark.parametrize(("layout", "precision"), [("zero1", "bf16"), ("zero3", "fp32"), ("zero0", "bf16")])
def test_a_run_compiles_nothing_and_leaves_standard_output_alone(
    make_config, tmp_path, monkeypatch, capfd, recwarn, layout, precision
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    linear = torch.nn.functional.linear
    result = train(make_config(**(LAYOUTS[layout] | {"steps": 2, "precision": precision})))
    assert result.step == 2
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "extensions").exists()
    assert torch.nn.functional.linear is linear
    assert [str(warning.message) for warning in recwarn if "torch.distributed." in str(warning.message)] == []
