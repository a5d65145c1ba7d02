"""Measurements of our decode engine: each begins behind the same context, and its reads are a mean over its steps."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from qsparse_moe.bench.decode import DecodeBenchmark, _Ours
from qsparse_moe.config.schema import ModelConfig


class CountingEngine:
    """Records the positions before each step, and reads 100 bytes more in every one."""

    def __init__(self):
        self.positions, self.bytes_read = [], 0

    def decode(self, tokens_B, cache):
        self.positions.append(cache.positions_B.tolist())
        cache.positions_B += 1
        self.bytes_read += 100
        return torch.zeros(len(tokens_B), 5)


def test_every_measurement_begins_behind_the_same_context():
    model = ModelConfig.model_validate({"hidden_size": 16, "num_layers": 1, "num_heads": 2})
    benchmark = DecodeBenchmark(
        model, formats=("fp32",), sparsities=(), batches=(2,), context=4, tokens=3, rounds=1, prompt=0
    )
    engine = CountingEngine()
    measure = _Ours(engine, SimpleNamespace(config=model), 2, benchmark)
    assert measure.cache.capacity == 7
    for total in (100 + 200 + 300, 400 + 500 + 600):
        assert measure() > 0
        assert measure.bytes_per_step == total / 3
    assert engine.positions == [[4, 4], [5, 5], [6, 6]] * 2
