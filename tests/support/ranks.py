"""Train the runs of a plan one after the other, as one rank of the launcher or alone.

    python tests/support/ranks.py PLAN.json
    deepspeed --num_gpus 2 tests/support/ranks.py PLAN.json

Processes take seconds to start and a tiny run takes one, so the runs of a test session share their processes. The plan
is a list of ``tests.support.launch.entry``, with a ``calibration`` among them where one is wanted; every rank writes
``LABEL.rankN.json`` beside it with what its run reported or raised.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from qsparse_moe.config.load import load_config
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.interop.initial_weights import open_weights
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.runs.folder import CONFIG_FILE, run_folder
from qsparse_moe.runs.report import StepReport
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training import loop, start
from qsparse_moe.training.calibrate import calibrate_run
from qsparse_moe.training.checkpoint import save as checkpoint_module
from qsparse_moe.training.checkpoint.store import Checkpoint
from qsparse_moe.training.engines import deepspeed_config as ds_config
from qsparse_moe.training.engines.protocol import StateKind

SLOW_DISK = {"place": "disk"}
"""A fault: saving takes so long that one can be interrupted."""
NOTHING_PERSISTS = {"place": "zero3"}
"""No fault: ZeRO-3 keeps no parameter whole between two steps, which it does with parameters as small as here."""


class Listener:
    """Record the numbers of every report; send SIGTERM to the own process after a step, if the plan says so."""

    def __init__(self, stop_after: int | None) -> None:
        self.reports: list[dict[str, Any]] = []
        self.context: dict[str, Any] = {}
        self.phase_seconds: dict[str, float] = {}
        self._stop_after = stop_after

    def begin(self, context: Any) -> None:
        self.context = {"start_step": context.start_step, "world_size": context.world_size}

    def __call__(self, report: StepReport) -> None:
        # The time of parts is another in every run.
        left_out = {"stats", "memory", "phase_seconds", "choice_agreement_L"}
        numbers = {key: value for key, value in asdict(report).items() if key not in left_out}
        self.phase_seconds = report.phase_seconds
        agreement_L = report.choice_agreement_L
        numbers["choice_agreement_L"] = None if agreement_L is None else agreement_L.tolist()
        if report.router_bias_LE is not None:
            numbers["router_bias_LE"] = report.router_bias_LE.tolist()
        self.reports.append(numbers | {"stats": {name: value.tolist() for name, value in report.stats.items()}})
        # Noticed in the step that follows, by all ranks, and acted upon after it.
        if self._stop_after is not None and report.step == self._stop_after - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def broken(fault: dict[str, Any] | None) -> Iterator[None]:
    """A model that in one step and on one rank computes something that is not finite in one place, or another fault.

    ``{"place": "routing", "experts": [...]}`` sends the rows for expert ``e`` to ``experts[e]``, in every step.
    ``{"place": "full_disk", "rank": r}``: there is no space for the first checkpoint of rank r.
    ``{"place": "settings", "rank": r, "training": {...}}``: rank r has other settings, see ``run``.
    """
    if fault is None:
        yield
        return
    if fault == SLOW_DISK:
        flush = os.fsync
        with mock.patch.object(os, "fsync", lambda file: (time.sleep(0.05), flush(file))):
            yield
        return
    if fault == NOTHING_PERSISTS:
        settings = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 20_000}
        make = ds_config._zero
        with mock.patch.object(ds_config, "_zero", lambda *given: make(*given) | settings):
            yield
        return
    if fault["place"] == "settings":
        yield
        return
    if fault["place"] == "full_disk":
        with _full_disk(fault["rank"]):
            yield
        return
    # A parameter receives its memory when the engine is built, and loses the hooks that it had before.
    name = "build_engine" if fault["place"] in ("parameter", "expert") else "build_empty"
    build = getattr(start, name)

    def build_broken(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        model = built.model if name == "build_engine" else built
        if fault["place"] == "routing":
            _reroute(model, torch.tensor(fault["experts"]))
        else:
            _break(model, **fault)
        return built

    with mock.patch.object(start, name, build_broken):
        yield


@contextlib.contextmanager
def _full_disk(rank: int) -> Iterator[None]:
    """Refuse the first file of a checkpoint that ``rank`` writes."""
    write = checkpoint_module.write_tensors
    errors = [OSError(28, "No space left on device")] if int(os.environ.get("RANK", "0")) == rank else []

    def write_or_fail(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return write(*arguments)

    with mock.patch.object(checkpoint_module, "write_tensors", write_or_fail):
        yield


def _reroute(model: torch.nn.Module, experts: torch.Tensor) -> None:
    for block in model.blocks():
        block.moe.router.register_forward_hook(
            lambda module, inputs, routing: routing._replace(expert_ids_TA=experts[routing.expert_ids_TA])
        )


def _break(model: torch.nn.Module, *, place: str, layer: int, forward: int, rank: int) -> None:
    """Multiply by infinity in the ``forward``-th forward pass that has gradients, or in its backward, on ``rank``."""
    passes = 0

    def is_time() -> bool:
        nonlocal passes
        passes += 1
        return passes == forward and int(os.environ.get("RANK", "0")) == rank

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled() or not is_time():
            return output
        if place == "output":
            return output * torch.inf
        output.register_hook(lambda grad: grad * torch.inf)
        return output

    if place in ("parameter", "expert"):
        # Past every layer's output: only the norm of the gradient can show it.
        moe = model.layers[layer].moe
        weight = moe.router.weight if place == "parameter" else moe.experts.w_up
        weight.register_hook(lambda grad: grad * torch.inf if is_time() else grad)
    else:
        model.layers[layer].attention_norm.register_forward_hook(spoil)


def run(label: str, config: dict[str, Any], stop_after: int | None, fault: dict[str, Any] | None) -> dict[str, Any]:
    """Train one run; what it reported and how it ended."""
    rank = int(os.environ.get("RANK", "0"))
    if fault is not None and fault["place"] == "settings" and fault["rank"] == rank:
        config = config | {"training": config["training"] | fault["training"]}
    listener = Listener(stop_after if rank == 0 else None)
    outcome: dict[str, Any] = {"label": label, "error": None, "result": None}
    elements_read: Counter[str] = Counter()
    try:
        with broken(fault), counting_reads(elements_read):
            settings = RunConfig.model_validate(config)
            result = loop.train(settings, [_recorder(settings), listener], open_weights=open_weights)
        outcome["result"] = {"step": result.step, "stopped_by": result.stopped_by, "validation": result.validation}
    except Exception as error:  # handed to the test, which knows what it expects
        outcome |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return outcome | {
        "reports": listener.reports,
        "context": listener.context,
        "phase_seconds": listener.phase_seconds,
        "elements_read": elements_read,
    }


@contextlib.contextmanager
def counting_reads(elements: Counter[str]) -> Iterator[None]:
    """Count the elements that this rank reads from a checkpoint, by the kind of state."""
    read = Checkpoint.read

    def counted(self: Checkpoint, kind: StateKind, name: str, start: int, stop: int) -> torch.Tensor:
        elements[kind] += stop - start
        return read(self, kind, name, start, stop)

    with mock.patch.object(Checkpoint, "read", counted):
        yield


def _recorder(config: RunConfig) -> Recorder:
    """Write ``metrics.jsonl`` alone, because the files of TensorBoard take seconds."""
    metrics = config.metrics.model_copy(update={"tensorboard": False})
    return Recorder(config.model_copy(update={"metrics": metrics}))


def calibrated(label: str, *, run_dir: str, num_sequences: int, max_values: int) -> dict[str, Any]:
    """Calibrate one run for its target S; the plan and the figures that this rank got."""
    outcome: dict[str, Any] = {"label": label, "error": None}
    try:
        plan = SparsityPlan.from_config(load_config(Path(run_dir) / CONFIG_FILE).model)
        found = calibrate_run(Path(run_dir), plan, num_sequences=num_sequences, max_values=max_values)
        return outcome | {"found": asdict(found) | {"plan": found.plan.to_json()}}
    except Exception as error:  # as in run
        return outcome | {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def leave_modules_out_of_garbage() -> None:
    """Import what the runs need and exclude it from every later search for garbage, of which DeepSpeed makes several.

    ZeRO-1 in bf16 makes six at each start: 1.4 of 2.6 s of a run.
    """
    import deepspeed  # noqa: F401
    import torch._dynamo  # noqa: F401

    gc.collect()
    gc.freeze()


def main(plan_file: Path) -> None:
    """Train every run of the plan."""
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    (plan_file.parent / f"rank{rank}.pid").write_text(str(os.getpid()))
    plan = json.loads(plan_file.read_text())
    if any(entry.get("config", {}).get("training", {}).get("engine") == "deepspeed" for entry in plan):
        leave_modules_out_of_garbage()
    for entry in plan:
        if "calibrate" in entry:
            outcome = calibrated(entry["label"], **entry["calibrate"])
        else:
            if entry["copy_of"] and rank == "0":
                shutil.copytree(entry["copy_of"], run_folder(RunConfig.model_validate(entry["config"])))
            outcome = run(entry["label"], entry["config"], entry["stop_after"], entry["fault"])
        (plan_file.parent / f"{entry['label']}.rank{rank}.json").write_text(json.dumps(outcome))
    # Libraries report what is left at the end of a process as leaks.
    gc.unfreeze()


if __name__ == "__main__":
    main(Path([argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")][0]))
