"""The reporter by itself: every field of a report, the context of the run, and errors of listeners that write."""

from __future__ import annotations

import errno
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.errors import CheckpointError
from qsparse_moe.runs.report import LateEvaluation, RunContext
from qsparse_moe.training import reporting
from qsparse_moe.training.checkpoint.store import RunProgress
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.listeners import Listeners
from qsparse_moe.training.reporting import EvaluationResult, Reporter
from qsparse_moe.training.step import StepResult

DISTRIBUTED = Distributed(rank=0, world_size=3, local_rank=0, device=torch.device("cpu"))
FULL = OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")


class Lock:
    """A lock that is held, or that another process has taken over."""

    def __init__(self):
        self.error = None

    def check(self):
        if self.error is not None:
            raise self.error


class Recording:
    """A listener that keeps what it is given and fails where it is told to."""

    def __init__(self, state_name="mine"):
        self.state_name, self.seen, self.error = state_name, [], None

    def keep(self, kind, value):
        self.seen.append((kind, value))
        if self.error is not None:
            raise self.error

    def __call__(self, report):
        self.keep("report", report)

    def begin(self, context):
        self.keep("begin", context)

    def late_evaluation(self, evaluation):
        self.keep("late", evaluation)

    def end(self, result):
        self.keep("end", result)

    def state_dict(self):
        return {"seen": len(self.seen)}

    def load_state_dict(self, state):
        self.keep("state", state)


def prepared(scaler=None, bias=None):
    model = SimpleNamespace(
        router_bias_LE=bias, sparsity_plan=SimpleNamespace(mean=0.625), runtime=SimpleNamespace(names={})
    )
    shapes = {"one": torch.Size((3, 4)), "other": torch.Size((5,))}
    engine = SimpleNamespace(model=model, loss_scaler=scaler, name="torch", shapes=lambda: shapes)
    return SimpleNamespace(
        folder=Path("runs/mine"),
        config="the config",
        start=RunProgress(step=4, tokens=400, seconds=2.0),
        report_state=SimpleNamespace(listeners={"mine": {"kept": 1}, "gone": {"kept": 2}}),
        engine=engine,
        distributed=DISTRIBUTED,
        tokens_per_step=100,
    )


def reporter_of(run):
    listener, lock = Recording(), Lock()
    return Reporter(run, Listeners([listener]), lock), listener, lock


def outcome(**changes):
    values = {
        "losses": {"loss": 3.0}, "stats": {"rows": torch.ones(1)}, "routed_LE": None, "routed_since_report_LE": None,
        "grad_norm": 0.5, "layer_grad_norms": (0.25,), "loss_scale": 64.0, "stop": 0,
    }  # fmt: skip
    return StepResult(**(values | changes))


def report(reporter, *progress, **changes):
    values = {"learning_rate": 0.01, "evaluation": None, "phase_seconds": {"data": 0.125}, "checkpoint_seconds": 0.375}
    reporter.report(RunProgress(*progress), outcome(), **(values | changes))


def test_a_report_has_means_since_the_previous_one_and_the_values_of_its_own_step(monkeypatch):
    monkeypatch.setattr(reporting, "memory_in_use", lambda device: {"resident": 7.0, "device": str(device)})
    bias = torch.tensor([[0.5, -0.5]])
    reporter, listener, _ = reporter_of(prepared(SimpleNamespace(skipped_steps=2), bias))
    agreement = torch.tensor([0.75])
    report(reporter, 6, 640, 5.0)
    report(reporter, 16, 2640, 9.0, evaluation=EvaluationResult({"loss": 2.5}, agreement))
    first, second = (value for _, value in listener.seen)
    common = {
        "losses": {"loss": 3.0}, "grad_norm": 0.5, "layer_grad_norms": (0.25,), "learning_rate": 0.01,
        "sparsity": 0.625, "memory": {"resident": 7.0, "device": "cpu"}, "phase_seconds": {"data": 0.125},
        "loss_scale": 64.0, "skipped_steps": 2, "checkpoint_seconds": 0.375,
    }  # fmt: skip
    own = {"step": 6, "tokens": 640, "seconds": 5.0, "step_seconds": 1.5, "tokens_per_second": 80.0}
    assert (common | own | {"validation": None, "choice_agreement_L": None}).items() <= vars(first).items()
    own = {"step": 16, "tokens": 2640, "seconds": 9.0, "step_seconds": 0.4, "tokens_per_second": 500.0}
    assert (common | own | {"validation": {"loss": 2.5}}).items() <= vars(second).items()
    assert second.choice_agreement_L is agreement and first.router_bias_LE.tolist() == bias.tolist()
    assert first.stats["rows"].tolist() == [1.0] and reporter.failure is None


@pytest.mark.parametrize(("of_scale", "of_filter", "want"), [(2, 3, 5), (2, None, 2), (None, 3, 3), (None, 0, 0)])
def test_skipped_steps_are_those_of_the_loss_scale_and_of_the_filter(of_scale, of_filter, want):
    scaler = None if of_scale is None else SimpleNamespace(skipped_steps=of_scale)
    reporter, listener, _ = reporter_of(prepared(scaler))
    report(reporter, 5, 500, 3.0, skipped_steps=of_filter)
    assert listener.seen[0][1].skipped_steps == want


def test_without_biases_and_a_loss_scale_their_fields_are_absent():
    reporter, listener, _ = reporter_of(prepared())
    report(reporter, 5, 500, 3.0, checkpoint_seconds=None)
    found = listener.seen[0][1]
    assert found.router_bias_LE is None and found.skipped_steps is None and found.checkpoint_seconds is None


def test_listeners_begin_with_the_context_of_the_run_and_the_states_of_their_names():
    run = prepared()
    run.engine.model.runtime.names = {"model.moe.backend": "loop", "model.sparsity.backend": "torch"}
    reporter, listener, _ = reporter_of(run)
    reporter.begin()
    context = RunContext(
        run_dir=Path("runs/mine"), config="the config", start_step=4, start_tokens=400, start_seconds=2.0,
        world_size=3, tokens_per_step=100, num_parameters=17, engine="torch", device="cpu", device_name="",
        backend="loop",
    )  # fmt: skip
    assert listener.seen == [("begin", context), ("state", {"kept": 1})]
    assert reporter.state_dict() == {"mine": {"seen": 2}}
    dense, other, _ = reporter_of(prepared())
    dense.begin()
    assert other.seen[0][1].backend == ""


def test_a_late_evaluation_has_the_progress_of_the_checkpoint():
    reporter, listener, lock = reporter_of(prepared())
    agreement = torch.tensor([0.5])
    reporter.late_evaluation(RunProgress(4, 400, 2.0), EvaluationResult({"loss": 2.5}, agreement))
    ((kind, found),) = listener.seen
    assert kind == "late" and asdict(found) == asdict(LateEvaluation(4, 400, 2.0, {"loss": 2.5}, agreement))
    lock.error = CheckpointError("taken over")
    with pytest.raises(CheckpointError, match="taken over"):
        reporter.late_evaluation(RunProgress(4, 400, 2.0), EvaluationResult({}, None))
    assert len(listener.seen) == 1


@pytest.mark.parametrize("moment", ["begin", "late_evaluation"])
def test_a_full_disk_before_the_first_step_is_raised(moment):
    reporter, listener, _ = reporter_of(prepared())
    listener.error = FULL
    with pytest.raises(CheckpointError, match=r"^metrics\.jsonl: cannot be written \(No space left on device\)"):
        if moment == "begin":
            reporter.begin()
        else:
            reporter.late_evaluation(RunProgress(4, 400, 2.0), EvaluationResult({}, None))


def test_a_failure_of_a_report_is_kept_for_the_other_ranks_and_the_first_one_stays():
    reporter, listener, lock = reporter_of(prepared())
    lock.error = CheckpointError("taken over")
    report(reporter, 5, 500, 3.0)
    assert reporter.failure is lock.error and listener.seen == [], "nothing is written into another's folder"
    listener.error = FULL
    reporter.end("the result")
    assert reporter.failure is lock.error and listener.seen == [("end", "the result")]
    reporter, listener, _ = reporter_of(prepared())
    listener.error = OSError(errno.EROFS, "Read-only file system")
    report(reporter, 5, 500, 3.0)
    assert str(reporter.failure).startswith("runs/mine: cannot be written (Read-only file system)")
    reporter, listener, _ = reporter_of(prepared())
    listener.error = FULL
    reporter.end("the result")
    assert str(reporter.failure).startswith("metrics.jsonl: cannot be written")


def test_listeners_are_called_in_order_and_states_need_names_of_their_own():
    calls = []
    listeners = Listeners([lambda report: calls.append(("a", report)), lambda report: calls.append(("b", report))])
    listeners.begin("context", {"mine": {}})
    listeners.report("first")
    assert calls == [("a", "first"), ("b", "first")] and listeners.state_dict() == {}
    with pytest.raises(ValueError) as caught:
        Listeners([Recording("same"), Recording("other"), Recording("same")])
    assert str(caught.value) == (
        "listeners: their states have the names ['other', 'same', 'same'], but names must be unique, because a "
        "checkpoint stores states by name; give each listener another state_name, or pass only one of them"
    )
    first, second = Recording("first"), Recording("second")
    both = Listeners([first, second])
    both.begin("context", {"second": {"kept": 2}})
    assert first.seen == [("begin", "context")]
    assert second.seen == [("begin", "context"), ("state", {"kept": 2})]
    assert both.state_dict() == {"first": {"seen": 1}, "second": {"seen": 2}}
