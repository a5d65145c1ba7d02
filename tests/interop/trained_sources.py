"""Runs that start from the weights of a small trained run, and the settings of that run."""

from __future__ import annotations

from qsparse_moe.data.token_data import load_data
from qsparse_moe.interop.initial_weights import open_weights
from qsparse_moe.training.distributed.ranks import open_distributed
from qsparse_moe.training.initial_weights import read_initial_weights
from qsparse_moe.training.prepare import prepare_run
from tests.support.runs import tiny_config

MOE = {"num_experts": 4, "expert_hidden_size": 24, "backend": "loop", "bias_update_rate": 0.013}
DENSE = {"moe": MOE, "sparsity": {"default": 0.0, "backend": "torch"}}
SOURCES = ("run", "checkpoint", "export", "parts", "bf16")


def without_tensorboard(config):
    return config.model_copy(update={"metrics": config.metrics.model_copy(update={"tensorboard": False})})


def make(folder, output, source, *, model=DENSE, **training):
    settings = {"engine": "torch", "output_dir": str(output), "init_from": str(source)} | training
    return tiny_config(folder, "started", model=model, **settings)


def prepared(config, check):
    """Return ``check(run)`` of a prepared run that has not done a step."""
    with open_distributed("cpu") as distributed:
        data = load_data(config.data)
        initial = read_initial_weights(config, config.training.init_from, distributed, open_weights)
        run = prepare_run(config, distributed, data, resumes=False, initial=initial)
        try:
            return check(run)
        finally:
            run.engine.close()
