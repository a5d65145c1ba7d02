"""The memory that generation needs and that is free, to the byte."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.errors import ConfigError
from qsparse_moe.inference import memory
from qsparse_moe.inference.memory import MemoryDtypes, check_memory, free_bytes
from tests.inference.models import config

CPU = torch.device("cpu")
DTYPES = MemoryDtypes(cache=torch.float32, activations=torch.bfloat16, products=torch.bfloat16)
# 2 layers, 3 sequences of 10 slots, keys and values of 64 channels, 4 bytes.
CACHE = 2 * 3 * 10 * (64 + 64) * 4
# 3 prompts of 5 tokens, each with 8 tensors of 64 and, for 2 experts, 2 of 64 and 3 of 32, in 2 bytes.
PREFILL = 3 * 5 * (8 * 64 + 2 * (2 * 64 + 3 * 32)) * 2


@pytest.mark.parametrize(("has_cache", "needed"), [(False, CACHE + PREFILL), (True, PREFILL)])
def test_a_batch_needs_its_cache_and_its_prefill_and_may_take_all_that_is_free(monkeypatch, has_cache, needed):
    sizes = {"batch": 3, "capacity": 10, "longest_prompt": 5, "dtypes": DTYPES, "device": CPU, "has_cache": has_cache}
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    check_memory(config(), **sizes)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(
        ConfigError, match=r"prompts \(3 in one batch, with up to 10 tokens each\) need about 0\.00 GiB"
    ):
        check_memory(config(), **sizes)


def test_the_message_names_what_is_needed_what_of_it_is_the_cache_and_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    with pytest.raises(ConfigError) as raised:
        check_memory(config(), batch=3, capacity=10**7, longest_prompt=10**6, dtypes=DTYPES, device=CPU)
    # A million times CACHE are 28.61 GiB, and 200,000 times PREFILL 5.36 GiB.
    assert str(raised.value).startswith(
        "prompts (3 in one batch, with up to 10000000 tokens each) need about 33.97 GiB of memory, 28.61 GiB of it for "
        "keys and values, and cpu has 1.00 GiB free; give fewer prompts at a time, or lower max_length or max_tokens"
    )


def control_group(folder, limit, used):
    folder.mkdir()
    (folder / "limit").write_text(f"{limit}\n"), (folder / "used").write_text(f"{used}\n")
    return folder / "limit", folder / "used"


@pytest.mark.parametrize(
    ("machine", "limit", "used", "free"),
    [
        (5000, 4000, 1000, 3000),
        (2000, 4000, 1000, 2000),
        # The file cache counts as used and may be more than the limit.
        (5000, 4000, 4500, 0),
        (5000, "max", 1000, 5000),
        (None, 4000, 1000, 3000),
        (None, "max", 1000, None),
    ],
)
def test_free_is_what_both_the_machine_and_the_control_group_have(monkeypatch, tmp_path, machine, limit, used, free):
    # The first pair of files does not exist, as on a machine with version 1 of control groups.
    missing = (tmp_path / "none", tmp_path / "none")
    monkeypatch.setattr(memory, "_CGROUP_FILES", (missing, control_group(tmp_path / "v1", limit, used)))
    monkeypatch.setattr(memory, "_available_memory", lambda file: machine)
    assert free_bytes(CPU) == free


def test_the_first_version_of_control_groups_that_exists_counts(monkeypatch, tmp_path):
    groups = tuple(control_group(tmp_path / name, 4000, used) for name, used in (("v2", 1000), ("v1", 2000)))
    monkeypatch.setattr(memory, "_CGROUP_FILES", groups)
    monkeypatch.setattr(memory, "_available_memory", lambda file: 10**6)
    assert free_bytes(CPU) == 3000


def test_a_gpu_has_free_what_cuda_reports_and_what_the_allocator_has_reserved_without_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    assert free_bytes(torch.device("cuda")) == 1260


def test_a_machine_that_does_not_report_what_is_available_has_no_figure(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:   2000 kB\n")
    assert memory._available_memory(tmp_path / "meminfo") is None
