"""Measure trained models with the verbs of the command line, on one rank or on the launcher's.

deepspeed --num_gpus 2 tests/distributed/measure_ranks.py FOLDER NAME,NAME...
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from qsparse_moe.ablation.allocation.budget import Budget
from qsparse_moe.ablation.allocation.joint_run import JointOptions, allocate_budgets
from qsparse_moe.ablation.allocation.run import allocate_run
from qsparse_moe.ablation.sensitivity.measure import measure_run
from qsparse_moe.interop.export_model import export_model
from qsparse_moe.interop.trained_model import load_trained
from qsparse_moe.training import shard_weights
from qsparse_moe.training.calibrate import calibrate_run
from qsparse_moe.training.distributed.ranks import open_distributed
from qsparse_moe.training.evaluate import evaluate_run


@contextmanager
def everything_sharded(gathered: list[int]) -> Iterator[None]:
    """Divide the parameters of tiny models as well, and append the size of each one that is gathered."""
    gather = shard_weights.AllGather.__call__

    def counted(self: shard_weights.AllGather, shard: torch.Tensor) -> torch.Tensor:
        gathered.append(len(shard))
        return gather(self, shard)

    with (
        mock.patch.object(shard_weights, "SMALLEST", 0),
        mock.patch.object(shard_weights.AllGather, "__call__", counted),
    ):
        yield


def measured(run_dir: Path, text: Path, output: Path, *, shard: bool | None) -> dict[str, Any]:
    """The figures of every verb for one run: those that do not depend on the time."""
    evaluation = evaluate_run(run_dir, device="cpu", load=load_trained, shard=shard)
    on_files = evaluate_run(run_dir, device="cpu", files=[str(text)], load=load_trained, shard=shard)
    calibration = calibrate_run(run_dir, None, num_sequences=5, device="cpu", load=load_trained, shard=shard)
    sensitivity, _ = measure_run(run_dir, (0.75,), num_sequences=5, num_plans=3, shard=shard)
    joint = None
    if run_dir.name == "bf16":
        options = JointOptions(num_sequences=5, num_held_out=5, rounds=1, num_random=1, greedy=False)
        joint = allocate_budgets(run_dir, [Budget("bytes", 0.6)], options, shard=shard).results[0]
    # Continued training has tests of its own in every layout; one run shows that it starts from here.
    train_steps = 1 if run_dir.name == "fp32" else 0
    allocation = allocate_run(
        run_dir, "sparsity", 0.2, num_sequences=5, rounds=2, num_random=1, train_steps=train_steps, shard=shard
    )
    with open_distributed("cpu") as distributed:
        export_model(run_dir, output / run_dir.name, distributed=distributed)
    return {
        "evaluation": evaluation.as_dict(),
        "files": on_files.as_dict(),
        "calibrated": calibration.plan.to_json(),
        "calibration_losses": [calibration.loss_topk, calibration.loss_threshold],
        "sensitivity": {
            "loss": sensitivity.loss,
            "changes": [asdict(change) for change in sensitivity.changes],
            "agreement": [asdict(one) for one in sensitivity.agreement],
            "routing": [asdict(change) for change in sensitivity.routing],
            "plans": sensitivity.plans and asdict(sensitivity.plans),
        },
        "allocated": allocation.plan.to_json(),
        "planned": allocation.planned,
        "comparisons": [asdict(one) for one in allocation.comparisons + allocation.alternatives],
        "joint": joint and [plan.to_json() for plan in joint.plans.values()],
        "joint_comparisons": joint and [asdict(one) for one in joint.comparisons],
        "trained": [asdict(one) for one in allocation.after_training],
    }


def main(folder: Path, names: list[str]) -> None:
    """Measure the named runs, and write the figures, how often something was gathered, and the exports."""
    torch.set_num_threads(1)
    rank, ranks, found = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1")), {}
    for name in names:
        gathered: list[int] = []
        with everything_sharded(gathered):
            output = folder / f"exports-{ranks}"
            found[name] = measured(folder / "runs" / name, folder / "own.txt", output, shard=True)
        found[name]["gathered"] = len(gathered)
    (folder / f"measured-{ranks}-rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(Path(arguments[0]), arguments[1].split(","))
