"""A small trained run, and its weights in every format that a run can start from."""

from __future__ import annotations

import pytest

from qsparse_moe import train
from qsparse_moe.interop.state_dict import export_run
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.training.checkpoint.store import list_checkpoints
from tests.interop.trained_sources import DENSE, without_tensorboard
from tests.support.runs import tiny_config, write_text


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("initial") / "text").parent


@pytest.fixture(scope="package")
def sources(folder):
    """The same weights as a run, its newest checkpoint, and exports; in bf16 they are rounded."""
    config = tiny_config(folder, "dense", engine="torch", model=DENSE, checkpoint_interval=3)
    run_dir = train(config, [Recorder(without_tensorboard(config))]).run_dir
    for name, options in {"export": {}, "parts": {"part_bytes": 20_000}, "bf16": {"dtype": "bf16"}}.items():
        export_run(run_dir, folder / name, **options)
    exports = {name: folder / name for name in ("export", "parts", "bf16")}
    return {"run": run_dir, "checkpoint": list_checkpoints(run_dir)[-1]} | exports
