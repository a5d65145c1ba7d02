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


def test_zero3_shards_a_tensor_whose_size_does_not_divide():
    from qsparse_moe.training.engines.deepspeed_engine import zero3_partition

    value = torch.arange(14.0).view(7, 2)
    parts = [zero3_partition(value, rank, size=5) for rank in range(4)]
    assert [len(part) for part in parts] == [5, 5, 5, 5]
    assert torch.cat(parts).tolist() == [*range(14), 0, 0, 0, 0, 0, 0]
