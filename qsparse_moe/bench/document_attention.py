"""Time attention inside of documents against a mask of whole sequences, and measure the memory of a training step.

``python -m qsparse_moe.bench.document_attention times`` prints a table; ``memory`` one row per length, each of a
process of its own. B sequences, S tokens per sequence.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.bench.harness import ratio, time_in_turns
from qsparse_moe.config.schema import ModelConfig, MoEConfig
from qsparse_moe.model.attention import Attend
from qsparse_moe.model.document_attention import DocumentAttention
from qsparse_moe.model.documents import document_mask
from qsparse_moe.model.transformer import build_model

SHAPES = ((256, 4), (1024, 2), (4096, 1))
"""Tokens per sequence, and sequences."""
DOCUMENTS = (1, 2, 8, 64)
"""Documents per sequence."""
LENGTHS = (8192, 16384, 32768)
# With the mask, a longer sequence takes more memory than most machines have.
_LONGEST_WITH_MASK = 16384
_HEADS, _CHANNELS = 8, 64
_USAGE = "usage: python -m qsparse_moe.bench.document_attention times|memory"


def random_documents(num_sequences: int, length: int, num_documents: int) -> Tensor:
    """Return ids ``(B, S)`` of documents that end at random places."""
    generator = torch.Generator().manual_seed(num_documents)
    cuts_BS = torch.zeros(num_sequences, length, dtype=torch.long)
    for cuts_S in cuts_BS:
        cuts_S[1 + torch.randperm(length - 1, generator=generator)[: num_documents - 1]] = 1
    return cuts_BS.cumsum(1)


def masked(documents_BS: Tensor) -> Attend:
    """Return attention with a mask of all pairs of tokens of a sequence, as versions up to 0.9 had it."""
    mask_B1SS = document_mask(documents_BS)

    def attend(query_BHSC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(query_BHSC, key_BHSC, value_BHSC, mask_B1SS)
        return mixed.transpose(1, 2).flatten(2)

    return attend


def in_blocks(documents_BS: Tensor) -> Attend:
    """Return the attention of this package on a CPU."""
    return DocumentAttention(documents_BS, _CHANNELS**-0.5, "blocks")


def step(make: Callable[[Tensor], Attend], documents_BS: Tensor, joint_BSX: Tensor) -> None:
    """Compute two layers of attention, forward and backward, with one preparation for both."""
    attend = make(documents_BS)
    for _ in range(2):
        joint_BSX = joint_BSX.detach().requires_grad_()
        parts = joint_BSX.unflatten(2, (3, _HEADS, _CHANNELS)).permute(2, 0, 3, 1, 4)
        mixed_BSX = attend(*parts)
        mixed_BSX.backward(mixed_BSX.detach())


def print_times(shapes: Sequence[tuple[int, int]] = SHAPES, *, rounds: int = 5) -> None:
    """Print a table of processor times, old and new in turn."""
    print("| precision | S | sequences | documents | mask, ms | blocks, ms | mask / blocks |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for length, num_sequences in shapes:
            joint_BSX = torch.randn(num_sequences, length, 3 * _HEADS * _CHANNELS, dtype=dtype)
            for count in DOCUMENTS:
                cells = _times(random_documents(num_sequences, length, count), joint_BSX, rounds)
                precision = str(dtype).removeprefix("torch.")
                print(f"| {precision} | {length} | {num_sequences} | {count} | {' | '.join(cells)} |", flush=True)


def _times(documents_BS: Tensor, joint_BSX: Tensor, rounds: int) -> list[str]:
    """Return the milliseconds of the mask and of the blocks, and their ratio."""
    contenders = {make.__name__: functools.partial(step, make, documents_BS, joint_BSX) for make in (masked, in_blocks)}
    times = time_in_turns(contenders, rounds=rounds, calls=1, clock=time.process_time)
    gain = ratio(*times.values())
    spread = f"{gain['median']:.2f} ({gain['min']:.2f} to {gain['max']:.2f})"
    return [*(f"{timing.median * 1e3:.1f}" for timing in times.values()), spread]


def print_memory(lengths: Sequence[int] = LENGTHS) -> None:
    """Print the peak memory that a training step adds, per length and implementation."""
    for length in lengths:
        for way in ("blocks", "mask") if length <= _LONGEST_WITH_MASK else ("blocks",):
            command = [sys.executable, "-m", "qsparse_moe.bench.document_attention", "step", str(length), way]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


def print_step(length: int, way: str) -> None:
    """Run one training step of a small model and print the memory that it added to that of the process, at its peak."""
    model = build_model(
        ModelConfig(hidden_size=64, num_layers=2, num_heads=4, moe=MoEConfig(num_experts=4, expert_hidden_size=64))
    )
    tokens_BS = torch.randint(0, 256, (1, length))
    # One document of half of the sequence, one of a quarter, and short ones.
    ends = [length // 2, length * 3 // 4, *range(length * 3 // 4 + 100, length, 100), length]
    lengths = torch.tensor([end - start for start, end in pairwise((0, *ends))])
    documents_BS = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    attends = [masked(documents_BS) if way == "mask" else DocumentAttention(documents_BS, 0.25, "blocks")] * 2
    hidden_BSD = model.embed(tokens_BS)
    before = _status("VmRSS")
    hidden_BSD, _ = model.run_layers(hidden_BSD, None, with_stats=False, attends=attends)
    hidden_BSD.square().mean().backward()
    print(f"S {length}, {way}: {(_status('VmHWM') - before) / 1024:.0f} MiB")


def _status(field: str) -> int:
    """Return a size of this process in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main(arguments: list[str]) -> None:
    """Print what ``arguments`` name."""
    match arguments:
        case ["times"]:
            print_times()
        case ["memory"]:
            print_memory()
        case ["step", length, way]:
            print_step(int(length), way)
        case _:
            sys.exit(_USAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
