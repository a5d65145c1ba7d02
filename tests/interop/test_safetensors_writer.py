"""Files that are written part by part are those that the library reads, and little of them is in memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qsparse_moe.interop import safetensors_writer
from qsparse_moe.interop.safetensors_writer import Part, SafetensorsFile, TensorSpec


def write_safetensors(path, specs, metadata, *, parts=1):
    file = SafetensorsFile(path, specs, metadata)
    file.create()
    for part in range(parts):
        file.write(part=part, parts=parts)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape) + 1)).to(dtype)


def stacked(matrices, dtype):
    """Matrices that are stored transposed, one part each."""
    rows, columns = matrices[0].shape
    parts = tuple(Part((1, columns, rows), lambda matrix=matrix: matrix.T[None]) for matrix in matrices)
    return TensorSpec(dtype, (len(matrices), columns, rows), parts)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("written", "processes"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_the_library_reads_what_the_parts_are(tmp_path, stored, written, processes, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "_BLOCK_BYTES", 64)
    matrices = [random(70, 90 + number, dtype=stored)[:, number:] for number in range(5)]
    rows, bias, number = random(7, 3, dtype=stored), random(5), torch.tensor([3], dtype=torch.int64)
    joined = TensorSpec(written, (7, 3), (Part((3, 3), lambda: rows[:3]), Part((4, 3), lambda: rows[3:])))
    specs = {
        "bias": TensorSpec.whole(torch.float32, (5,), lambda: bias),
        "experts": stacked(matrices, written),
        "joined": joined,
        "none": TensorSpec(written, (0, 4), ()),
        "scalar": TensorSpec.whole(written, (), lambda: torch.tensor(2.5, dtype=stored)),
        "steps": TensorSpec.whole(torch.int64, (1,), lambda: number),
    }
    write_safetensors(tmp_path / "file", specs, {"format": "pt", "step": "7"}, parts=processes)
    found = load_file(tmp_path / "file")
    assert found.keys() == specs.keys()
    want = {"bias": bias, "experts": torch.stack([matrix.T for matrix in matrices]).to(written), "steps": number}
    want |= {"joined": rows.to(written), "none": torch.empty(0, 4, dtype=written)}
    want["scalar"] = torch.tensor(2.5, dtype=written)
    for name, value in want.items():
        assert found[name].dtype == value.dtype and found[name].equal(value), name
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}
    # The library writes the same header of the same tensors, apart from the order among tensors of one width.
    save_file(want, tmp_path / "theirs", metadata={"format": "pt", "step": "7"})
    assert (tmp_path / "theirs").stat().st_size == (tmp_path / "file").stat().st_size


def test_processes_write_equal_shares_of_a_file_and_each_part_once(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(safetensors_writer, "_write_part", lambda _, job: written.append(job.start))
    experts = stacked([random(4, 6) for _ in range(10)], torch.float32)
    file = SafetensorsFile(tmp_path / "file", {"experts": experts}, {})
    file.create()
    shares = []
    for part in range(4):
        file.write(part=part, parts=4)
        shares.append(sorted(written[sum(map(len, shares)) :]))
    assert [len(share) for share in shares] == [3, 2, 3, 2]
    assert len(set(sum(shares, []))) == 10 and sum(shares, []) == sorted(sum(shares, []))


def test_a_write_that_the_system_cuts_short_goes_on(tmp_path, monkeypatch):
    value, write = random(9, 11), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:13], offset))
    write_safetensors(tmp_path / "file", {"x": TensorSpec.whole(torch.float32, (9, 11), lambda: value)}, {})
    assert load_file(tmp_path / "file")["x"].equal(value)


def test_an_error_of_a_part_ends_the_others_and_is_raised(tmp_path):
    read = []

    def fails():
        raise OSError(5, "Input/output error")

    def slow(number):
        time.sleep(0.01)
        read.append(number)
        return torch.zeros(1, 2)

    parts = [Part((1, 2), lambda number=number: slow(number)) for number in range(200)]
    parts[3] = Part((1, 2), fails)
    with pytest.raises(OSError, match="Input/output error"):
        write_safetensors(tmp_path / "file", {"x": TensorSpec(torch.float32, (200, 2), parts)}, {})
    assert len(read) < 100


def test_unfinished_parts_have_at_most_the_bytes_of_the_largest_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "_NUM_THREADS", 4)
    lock, alive, most = threading.Lock(), [0], [0]
    write = safetensors_writer._write_part

    def counted(descriptor, job):
        with lock:
            alive[0] += job.nbytes
            most[0] = max(most[0], alive[0])
        time.sleep(0.002)
        write(descriptor, job)
        with lock:
            alive[0] -= job.nbytes

    monkeypatch.setattr(safetensors_writer, "_write_part", counted)
    matrices = [random(10, 10) for _ in range(6)]
    one = {f"one{number}": TensorSpec.whole(torch.float32, (10, 50), lambda: random(10, 50)) for number in range(6)}
    write_safetensors(tmp_path / "file", {"experts": stacked(matrices, torch.float32)} | one, {})
    assert 800 <= most[0] <= 2400, "several at once, and no more than the experts"


_MEASURE = """
import sys, threading, time
import torch
from qsparse_moe.interop.import_model import import_model

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    while not done:
        most[0] = max(most[0], held())
        time.sleep(0.001)

# Libraries and threads are loaded before anything is measured.
import_model(sys.argv[1], sys.argv[3], tokenizer="bytes")
done, most = [], [0]
before = held()
watcher = threading.Thread(target=watch)
watcher.start()
import_model(sys.argv[2], sys.argv[4], tokenizer="bytes", dtype=sys.argv[5])
done.append(True)
watcher.join()
print(most[0] - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells the memory without file pages")
@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_an_import_holds_no_more_than_its_largest_tensor(tmp_path, dtype):
    """Measured by the system: a model of 94 MB in bf16, whose experts' matrices of one kind have 25."""
    from tests.interop.stored_models import save_qwen3_moe

    save_qwen3_moe(tmp_path / "small", num_layers=1, num_experts=2, hidden=8)
    total, largest = save_qwen3_moe(tmp_path / "large", num_layers=1, num_experts=12, hidden=1024)
    assert total > 3 * largest
    folders = [str(tmp_path / name) for name in ("small", "large", "out-small", "out-large")]
    done = subprocess.run([sys.executable, "-c", _MEASURE, *folders, dtype], capture_output=True, text=True, check=True)
    factor = 2 if dtype == "fp32" else 1
    # The threads' stacks and the allocator's own rounding come on top.
    assert int(done.stdout) < factor * largest + 12e6
