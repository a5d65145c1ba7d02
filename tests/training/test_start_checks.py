"""Checks before a run starts: the same config on every rank, and memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.training import start_checks
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.loop import train
from qsparse_moe.training.start_checks import check_memory, check_same_config, host_memory
from tests.support.messages import assert_one_message
from tests.support.runs import tiny_config, write_text


@dataclass(frozen=True)
class Recorded(Distributed):
    """A rank that gathers what the other ranks have, one answer per call."""

    answers: list[list[Any]] = field(default_factory=list)

    def all_gather(self, value: Any) -> list[Any]:
        return [value, *self.answers.pop(0)]


def ranks(*others: RunConfig) -> Recorded:
    """Return rank 0 of ranks of which the others have these configs."""
    calls: list[list[Any]] = [[], []]

    class Other(Recorded):
        def all_gather(self, value: Any) -> list[Any]:
            calls[len(self.answers)].append(value)
            self.answers.append([])
            # Unlike anything, so that every rank goes on to the exchange of settings.
            return [value, object()] if len(self.answers) == 1 else [value]

    for config in others:
        # A rank alone sees equal settings and raises, after it has said what it has.
        with pytest.raises(ConfigError):
            check_same_config(config, Other(1, 2, 1, torch.device("cpu")))
    return Recorded(0, 1 + len(others), 0, torch.device("cpu"), calls)


def test_equal_configs_pass(tmp_path):
    config = tiny_config(tmp_path, "run")
    check_same_config(config, ranks(config, config))


def test_a_message_names_the_settings_that_differ_and_the_ranks(tmp_path):
    ours, theirs = (tiny_config(tmp_path, "run", learning_rate=rate) for rate in (1e-3, 2e-3))
    with pytest.raises(ConfigError) as caught:
        check_same_config(ours, ranks(ours, theirs))
    parts = [
        "training.learning_rate is 0.001 on ranks 0, 1 and 0.002 on rank 2",
        "all ranks must have the same config",
        "Start every node with the same file",
    ]
    assert_one_message([str(caught.value)], parts)


def test_only_the_first_of_many_differences_are_named(tmp_path):
    ours = tiny_config(tmp_path, "run")
    theirs = tiny_config(tmp_path, "run", beta1=0.5, beta2=0.5, epsilon=1e-3, seed=4)
    with pytest.raises(
        ConfigError, match=r"beta1 is .*beta2 is .*epsilon is .* \(4 settings differ\); all ranks"
    ) as caught:
        check_same_config(ours, ranks(theirs))
    assert "training.seed" not in str(caught.value)


ALONE = Distributed(0, 1, 0, torch.device("cpu"))


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    write_text(tmp_path / "text")
    monkeypatch.setattr(start_checks, "host_memory", lambda: 0.5e9)
    config = tiny_config(tmp_path, "run")
    with pytest.raises(ConfigError) as caught:
        train(config)
    parts = [
        "training on 1 rank needs 1.8 GB of 0.5 GB on each device (cpu)",
        "more on the device",
        "no layout of this run fits; use more ranks, a smaller model or shorter sequences",
        "qsparse-moe layout lists all layouts",
        "training.check_memory=false starts all the same",
    ]
    assert_one_message([str(caught.value)], parts)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("config.yaml"))
    check_memory(tiny_config(tmp_path, "run", check_memory=False), ALONE)


def test_the_nearest_layout_that_fits_is_named_and_passes(tmp_path, monkeypatch):
    # Logits of 16384 tokens take most of a micro-batch of 8.
    model = {"vocab_size": 30_000, "hidden_size": 128, "num_heads": 4, "head_size": 32}
    config = tiny_config(tmp_path, "run", model=model, micro_batch_size=8)
    config = config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": 2048})})
    monkeypatch.setattr(start_checks, "host_memory", lambda: 2.7e9)
    with pytest.raises(
        ConfigError, match=r"the nearest layout that fits is training.micro_batch_size=(\d)\. "
    ) as caught:
        check_memory(config, ALONE)
    micro = int(str(caught.value).split("training.micro_batch_size=")[1][0])
    smaller = config.training.model_copy(update={"micro_batch_size": micro})
    check_memory(config.model_copy(update={"training": smaller}), ALONE)


def test_the_memory_of_a_container_is_its_limit(tmp_path, monkeypatch):
    machine, container = tmp_path / "meminfo", tmp_path / "memory.max"
    machine.write_text("MemTotal:       16000000 kB\nMemFree: 5 kB\n")
    monkeypatch.setattr(start_checks, "_MEMORY", machine)
    monkeypatch.setattr(start_checks, "_CONTAINER", container)
    assert host_memory() == 16_000_000 * 1024
    container.write_text("max\n")
    assert host_memory() == 16_000_000 * 1024
    container.write_text("1000000000\n")
    assert host_memory() == 1e9
    machine.unlink()
    assert host_memory() is None
    check_memory(tiny_config(tmp_path, "run"), ALONE)


def test_the_memory_of_a_gpu_is_what_cuda_reports(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA L4", total_memory=24_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(start_checks, "host_memory", lambda: 256e9)
    found = start_checks.this_machine(torch.device("cuda", 0), 8, 2)
    assert found is not None
    assert (found.device.name, found.device.memory, found.device.is_host) == ("NVIDIA L4", 24e9, False)
    # Four ranks of a node share its host memory.
    assert (found.ranks_per_node, found.host_per_rank) == (4, 64e9)
