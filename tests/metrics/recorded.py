"""A run of a few reports as the recorder writes it, and its event files as TensorBoard reads them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsparse_moe.config.schema import ModelConfig, MoEConfig, RunConfig
from qsparse_moe.metrics.recorder import Recorder
from tests.metrics.reports import make_context, make_report, random_stats

MOE = MoEConfig(num_dense_layers=1, num_shared_experts=1, bias_update_rate=0.001)


CONFIG = RunConfig(model=ModelConfig(num_layers=3, moe=MOE))


BIAS_LE = torch.linspace(-0.01, 0.02, 16).view(2, 8)


VALIDATION = {"loss": 2.5, "perplexity": 12.2, "bits_per_byte": 3.6}


def report(step: int, **changes):
    stats = random_stats(CONFIG.model, seed=step)
    return make_report(step, stats=stats, router_bias_LE=BIAS_LE, validation=VALIDATION, **changes)


def record(run_dir, steps, *, start_step=0, ends=True, config=CONFIG):
    recorder = Recorder(config)
    recorder.begin(make_context(run_dir, config, start_step=start_step))
    for step in steps:
        recorder(report(step))
    if ends:
        recorder.end(SimpleNamespace())


def read_board(run_dir):
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return board


def read_part(run_dir, part):
    board = EventAccumulator(str(run_dir / "tensorboard" / part))
    board.Reload()
    return board


def read_costs(run_dir):
    return read_part(run_dir, "cost")


def read_validation(run_dir):
    return read_part(run_dir, "validation")


def scalars(board, tag):
    return {event.step: event.value for event in board.Scalars(tag)}
