"""The start of an engine in every layout: the bits of the weights, what a rank draws, and the memory that it needs."""

from __future__ import annotations

import json
import math

import pytest

from qsparse_moe.model.transformer import build_empty
from tests.distributed.start_ranks import config_of
from tests.support.launch import REPOSITORY, end, start

pytest.importorskip("deepspeed")

LAYOUTS = {
    1: ["torch-fp32-ep1", "zero0-bf16-ep1", "zero2-fp32-ep1", "zero3-bf16-ep1"],
    2: [
        *(f"torch-{precision}-ep{size}" for precision in ("fp32", "bf16") for size in (1, 2)),
        *(f"zero{stage}-bf16-ep1" for stage in (0, 1, 2)),
        *(f"zero3-{precision}-ep{size}" for precision in ("fp32", "bf16") for size in (1, 2)),
        *("zero2-fp32-ep2", "zero3_cpu-bf16-ep1"),
    ],
}
EVERYWHERE = [(layout, ranks) for ranks in (1, 2) for layout in LAYOUTS[ranks]]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The outcomes of every rank, by the number of ranks."""
    # Memory that glibc keeps after it is freed is none that the build needs; blocks of this size are returned.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 * 1024))
        return {ranks: _start(tmp_path_factory.mktemp(f"start{ranks}"), ranks) for ranks in (1, 2)}


def _start(folder, ranks):
    arguments = [str(REPOSITORY / "tests/distributed/start_ranks.py"), str(folder), ",".join(LAYOUTS[ranks])]
    with (folder / "log.txt").open("w") as output:
        process = start(arguments, ranks=ranks, output=output)
        try:
            code = process.wait(300)
        finally:
            end([process])
    assert code == 0, (folder / "log.txt").read_text()[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(("layout", "ranks"), EVERYWHERE)
def test_every_layout_starts_with_the_bits_of_the_whole_model(started, layout, ranks):
    assert [outcome[layout]["differing"] for outcome in started[ranks]] == [[]] * ranks


@pytest.mark.parametrize(("layout", "ranks"), EVERYWHERE)
def test_a_rank_draws_only_what_it_keeps(started, tmp_path, layout, ranks):
    matrices = {
        name: math.prod(parameter.shape)
        for name, parameter in build_empty(config_of(tmp_path, layout).model).named_parameters()
        if not ("norm" in name or name.endswith("bias"))
    }
    engine, _, experts = layout.split("-")
    if engine.startswith("zero3"):
        want = sum(size // ranks for size in matrices.values())
    else:
        want = sum(size // (int(experts[2:]) if ".experts." in name else 1) for name, size in matrices.items())
    assert [outcome[layout]["drawn"] for outcome in started[ranks]] == [want] * ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_peak_of_a_zero3_build_is_the_ranks_share_and_a_layer(started, ranks):
    for outcome in started[ranks]:
        memory = outcome["memory"]
        # Weights, master weights, gradients, and two moments, all of them in fp32.
        assert memory["state"] == 20 * memory["parameters"] // ranks
        assert memory["peak"] < 1.3 * (memory["state"] + memory["largest_layer"])
        assert memory["peak"] > 0.9 * memory["state"], "else the measurement has missed the state"
