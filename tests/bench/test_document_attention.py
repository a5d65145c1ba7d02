"""The benchmark of attention inside of documents: both contenders compute the same, and its tables."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.bench.document_attention import in_blocks, main, masked, print_step, print_times, random_documents


def test_both_contenders_compute_the_same():
    documents = random_documents(2, 300, 8)
    assert [row.unique().numel() for row in documents] == [8, 8] and not torch.equal(*documents)
    parts = [torch.randn(2, 8, 300, 64) for _ in range(3)]
    torch.testing.assert_close(masked(documents)(*parts), in_blocks(documents)(*parts))


def test_the_table_has_a_row_per_precision_shape_and_number_of_documents(capsys):
    print_times([(65, 1)], rounds=1)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[3] for row in rows] == ["1", "2", "8", "64"] * 2 and {len(row) for row in rows} == {7}
    for *_, mask, blocks, ratio in rows:
        assert float(ratio.split()[0]) == pytest.approx(float(mask) / float(blocks), rel=0.2)


@pytest.mark.parametrize("way", ["blocks", "mask"])
def test_a_step_prints_the_memory_that_it_added(way, capsys):
    print_step(256, way)
    length, memory = capsys.readouterr().out.split(": ")
    assert length == f"S 256, {way}" and float(memory.removesuffix(" MiB\n")) >= 0


def test_other_arguments_are_refused_with_the_usage():
    with pytest.raises(SystemExit, match="usage: python -m qsparse_moe.bench.document_attention times|memory"):
        main(["time"])
