"""The counted memory and bytes of layouts against runs: a table of all cases, in Markdown.

    python -m tests.distributed.layout_accuracy FOLDER [RANKS ...]

It starts the cases of ``tests/support/layout_cases.py`` on 1, 2 and 4 ranks, or the given ones, on CPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsparse_moe.accounting.layout_memory import rank_memory
from qsparse_moe.accounting.layout_traffic import sent_bytes
from tests.support.layout_cases import CASES, STEPS, case_config, run_cases

# The first step records the order of modules under ZeRO-3, and every second one reports.
_PLAIN_STEP = "step 3"


@dataclass(frozen=True)
class Accuracy:
    """Counted and measured bytes of one case; device and host are one memory on a CPU."""

    name: str
    ranks: int
    counted: float
    measured: float
    """Largest peak of any step and rank."""
    sent_counted: float
    sent_measured: float
    """Mean over the ranks in a step without a report."""

    @property
    def memory_error(self) -> float:
        """Relative error of the memory."""
        return self.counted / self.measured - 1

    @property
    def sent_error(self) -> float:
        """Relative error of the bytes sent; 0 on one rank, which sends none."""
        return self.sent_counted / self.sent_measured - 1 if self.sent_counted else 0.0


def accuracy(folder: Path, name: str, found: list[dict[str, Any]]) -> Accuracy:
    """Compare what the ranks of one case measured with what is counted."""
    ranks = len(found)
    config = case_config(folder, name, ranks)
    memory = rank_memory(config, ranks)
    steps = [f"step {step}" for step in range(1, STEPS + 1)]
    sent = [sum(rank["sent"].get(_PLAIN_STEP, {}).values()) for rank in found]
    return Accuracy(
        name,
        ranks,
        memory.step + memory.host,
        max(rank["peaks"][step] for rank in found for step in steps),
        sum(one.total for one in sent_bytes(config, ranks)),
        sum(sent) / ranks,
    )


def compare(folder: Path, ranks: int, names: list[str] | None = None) -> Iterator[Accuracy]:
    """Run the cases of ``ranks`` ranks in one start and yield the comparison of each."""
    names = names or [name for name, (_, _, used) in CASES.items() if ranks in used]
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in run_cases(folder, names, ranks).items():
        yield accuracy(folder, name, found)


def main(folder: Path, numbers: list[int]) -> None:
    """Print the table."""
    print("| case | ranks | MB counted | MB measured | error | MB sent, counted | measured | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for ranks in numbers:
        for one in compare(folder / f"ranks-{ranks}", ranks):
            cells = (
                one.name,
                str(ranks),
                f"{one.counted / 1e6:.1f}",
                f"{one.measured / 1e6:.1f}",
                f"{100 * one.memory_error:+.1f} %",
                f"{one.sent_counted / 1e6:.2f}",
                f"{one.sent_measured / 1e6:.2f}",
                f"{100 * one.sent_error:+.1f} %",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(text) for text in sys.argv[2:]] or [1, 2, 4])
