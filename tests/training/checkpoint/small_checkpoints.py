"""Engines with random states, their checkpoints, and damage to the files of a checkpoint."""

from __future__ import annotations

import torch

from qsparse_moe.model.transformer import build_model
from qsparse_moe.training.checkpoint.save import CheckpointWriter
from qsparse_moe.training.checkpoint.store import RunProgress, list_checkpoints
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.torch_engine import TorchEngine
from tests.support.runs import tiny_config

ALONE = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def make_engine(tmp_path, seed, **training):
    config = tiny_config(tmp_path, "run", **({"engine": "torch"} | training))
    engine = TorchEngine(config, build_model(config.model, seed=seed), ALONE)
    generator = torch.Generator().manual_seed(seed)
    for name in engine.shapes():
        for moment in ("exp_avg", "exp_avg_sq"):
            engine.held(name, moment).uniform_(generator=generator)
    engine.adam_step = 10 * seed + 3
    return engine


def make_biased(tmp_path, rate=0.1):
    config = tiny_config(tmp_path, "run", engine="torch")
    moe = config.model.moe.model_copy(update={"bias_update_rate": rate})
    config = config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})
    return TorchEngine(config, build_model(config.model), ALONE)


def save(run_dir, engine, step, keep_last=2):
    writer = CheckpointWriter(run_dir, engine, keep_last=keep_last, is_async=False)
    return writer.save(progress(step), {"step": step})


def progress(step):
    return RunProgress(step, step * 100, step * 0.5)


def names(run_dir):
    return [path.name for path in list_checkpoints(run_dir)]


def the_file(tmp_path):
    return tmp_path / "checkpoints/step-00000001/rank-00000-of-00001.safetensors"


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
