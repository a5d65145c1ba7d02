"""Training with the readers of all formats of initial weights."""

from __future__ import annotations

from collections.abc import Sequence

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.interop.initial_weights import open_weights
from qsparse_moe.interop.upcycling import upcycled_for_run
from qsparse_moe.runs.report import Listener, TrainingResult
from qsparse_moe.training import loop


def train(config: RunConfig, listeners: Sequence[Listener] = ()) -> TrainingResult:
    """Train the run that ``config`` describes, in this process and the other ranks that its launcher started.

    All ranks must call it with the same config. It writes ``config.yaml``, ``manifest.json``, and ``checkpoints/`` into
    the run folder, and calls the listeners on rank 0 with every logged step. With ``training.init_from`` it starts from
    the weights of a run, of one checkpoint, of an export, or of a Hugging Face model; if only the new run has experts,
    they are made of the dense layers. SIGTERM, SIGUSR1, or Ctrl-C ends the run after the current step with a
    checkpoint; before the end of the first step, signals have the effect that they had before the call.

    Args:
        config: a complete run; with ``training.resume`` an existing run folder is continued.
        listeners: called with every ``StepReport``; see ``runs.report``.

    Raises:
        ValueError: two listeners have the same ``state_name``.
        ConfigError: a rule is broken, the run to resume was made with other settings, or the initial weights do not fit
            the run.
        CheckpointError: the run folder is in use or was taken over, a checkpoint or export is damaged, or a file cannot
            be written.
        DataError: the data cannot be used, or differs from the checkpoint's. If a stream fails in the middle of a run,
            the completed steps are saved first.
        BackendUnavailable: the device, or a backend requested by name, is not available.
        TrainingDiverged: a loss, an activation, or a gradient is not finite; earlier checkpoints remain.
        RankLost: another rank is gone; every remaining rank logs its name and raises the error.
    """
    return loop.train(config, listeners, open_weights=lambda name: upcycled_for_run(open_weights(name), config))
