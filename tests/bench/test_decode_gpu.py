"""``bench decode --device cuda``: the contenders, on a tiny model under Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.bench.decode import DecodeBenchmark
from qsparse_moe.bench.decode_gpu import run_gpu_decode_benchmark
from qsparse_moe.errors import BackendUnavailable
from tests.inference.models import config
from tests.inference.test_triton_engine import on_devices


def benchmark(**changed):
    settings = {"formats": ["bf16"], "sparsities": [0.5], "batches": [1], "context": 2, "tokens": 1, "rounds": 1}
    return DecodeBenchmark(config(num_layers=1), **settings | changed, prompt=0, peers=())


@pytest.mark.slow
@on_devices
def test_every_contender_is_measured_for_every_format_and_batch(device):
    lines = []
    measured = benchmark(formats=["bf16", "ternary"], batches=[2])
    result = run_gpu_decode_benchmark(measured, torch.device(device), lines.append)
    assert list(result["formats"]) == ["bf16", "ternary"] and len(lines) == 2
    for found in result["formats"].values():
        assert [(row["batch"], row["contender"]) for row in found["decode"]] == [
            (2, name) for name in ("training modules", "ours S 0", "ours S 0.5")
        ]
        assert all(row["tokens_per_second"] > 0 for row in found["decode"])
        assert found["decode"][1]["times_ours_dense"]["median"] == 1.0


def test_every_contender_has_its_own_s(monkeypatch):
    from qsparse_moe.bench import decode_gpu

    seen = {}
    monkeypatch.setattr(decode_gpu.triton_engine, "why_not", lambda model: None)
    monkeypatch.setattr(
        decode_gpu, "_Steps", lambda engine, *rest: seen.setdefault(id(engine), engine) and (lambda: 1.0)
    )
    run_gpu_decode_benchmark(benchmark(), torch.device("cpu"))
    _, dense, sparse = seen.values()
    kept = [engine._model._model.layers[0].moe.input_site.ranking.largest_num_selected for engine in (dense, sparse)]
    assert kept == [64, 32]
    assert dense._weights is sparse._weights
    weights = [engine._model._model.layers[0].moe.experts.w_up for engine in (dense, sparse)]
    assert weights[0] is weights[1]


def test_a_missing_device_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="--device \\(cuda\\) needs a CUDA device.* use --device cpu"):
        run_gpu_decode_benchmark(benchmark(), torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        BackendUnavailable, match="engine \\(triton\\) cannot run on cpu: the Triton kernels run on CUDA"
    ):
        run_gpu_decode_benchmark(benchmark(), torch.device("cpu"))
