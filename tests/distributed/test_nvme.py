"""Optimizer and weights in files, on two ranks. It needs libaio, and compiles DeepSpeed's I/O for minutes once.

QSPARSE_MOE_NVME=/local/disk python -m pytest tests/distributed/test_nvme.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.distributed.test_layouts import assert_same_run, state_of
from tests.support.launch import entry, run_plan
from tests.support.runs import STOP_STEP, tiny_config, write_text

FOLDER = os.environ.get("QSPARSE_MOE_NVME")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="needs libaio and a folder on a disk, named by QSPARSE_MOE_NVME"),
]

# DeepSpeed leaves what is below 1 MiB in memory.
LARGE = {
    "vocab_size": 264,
    "hidden_size": 128,
    "moe": {"num_experts": 8, "expert_hidden_size": 640, "backend": "grouped"},
}
PLAIN = {"zero_stage": 3}


def test_runs_with_files_have_the_losses_of_runs_in_memory_and_resume_each_other(tmp_path):
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    states = PLAIN | {"offload_optimizer": "nvme", "nvme_path": str(folder)}
    everything = states | {"offload_parameters": "nvme"}
    write_text(tmp_path / "text")

    def make(label, deepspeed, copy_of=None, vocab_size=264, experts_over=1, **more):
        training = {"deepspeed": deepspeed, "evaluation_interval": 3, "resume": copy_of is not None}
        training["expert_parallel_size"] = experts_over
        source = None if copy_of is None else tmp_path / "runs" / copy_of
        config = tiny_config(tmp_path, label, model=LARGE | {"vocab_size": vocab_size}, **training)
        return entry(label, config, copy_of=source, **more)

    plan = [
        make("plain", PLAIN),
        make("states", states),
        make("all", everything),
        make("plain-stopped", PLAIN, stop_after=STOP_STEP),
        make("all-stopped", everything, stop_after=STOP_STEP),
        make("plain-to-all", everything, "plain-stopped"),
        make("all-to-plain", PLAIN, "all-stopped"),
        make("all-to-all", everything, "all-stopped"),
        make("states-sharded", states, experts_over=2),
        make("all-sharded", everything, experts_over=2),
        make("plain-to-all-sharded", everything, "plain-stopped", experts_over=2),
        make("misaligned", states, vocab_size=257),
    ]
    outcomes = {label: ranks[0] for label, ranks in run_plan(tmp_path / "launch", plan, ranks=2).items()}
    misaligned = outcomes.pop("misaligned")["error"]
    assert misaligned.startswith(
        "ConfigError: training.deepspeed.offload_optimizer (nvme): the rank's partition of layers.0."
    )
    assert not (tmp_path / "runs" / "misaligned").exists()
    for label, outcome in outcomes.items():
        assert outcome["error"] is None, f"{label}: {outcome['traceback']}"
    for label in ("states", "all", "states-sharded", "all-sharded"):
        assert_same_run(outcomes[label], outcomes["plain"], "fp32")
    for label in ("plain-to-all", "all-to-plain", "all-to-all", "plain-to-all-sharded"):
        assert_same_run(outcomes[label], outcomes["plain"], "fp32", since=STOP_STEP)
    want, have = (state_of(tmp_path / "runs" / label)[1] for label in ("all", "all-to-all"))
    assert [key for key in want if not have[key].equal(want[key])] == []
    assert list(folder.iterdir()) == [], "swap files stay behind"
    folder.rmdir()
