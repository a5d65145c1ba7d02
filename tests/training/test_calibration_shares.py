"""The batches of a calibration on each rank, against batches written out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qsparse_moe.sparsity.row_sample import RowSample
from qsparse_moe.training import calibrate
from qsparse_moe.training.calibrate import _all_gather_samples, _local_batches, _loss, _measure
from qsparse_moe.training.distributed.ranks import Distributed


class Rows:
    """A replacement for the data whose batches are the sequences themselves."""

    def batch(self, rows):
        return rows[:, 0].tolist()


@pytest.mark.parametrize(
    "rank, want",
    [
        # 11 rows of 5 tokens in batches of 2; a batch is named by its rows, and begins at 5 tokens per row.
        (0, [(0, [0, 1]), (30, [6, 7])]),
        (1, [(10, [2, 3]), (40, [8, 9])]),
        (2, [(20, [4, 5]), (50, [10])]),
    ],
)
def test_ranks_take_batches_in_turn_and_number_the_tokens_through_all_sequences(rank, want):
    rows = np.arange(11)[:, None].repeat(6, axis=1)  # one token more than labels
    distributed = Distributed(rank=rank, world_size=3, local_rank=rank, device=torch.device("cpu"))
    assert list(_local_batches(Rows(), rows, 2, distributed)) == want


class Gathered(Distributed):
    """Rank 1 of two; the other one has what the test says."""

    other = None

    def all_gather(self, value):
        return [self.other, value]


def test_a_loss_is_the_mean_over_the_labels_of_all_batches_and_ranks(monkeypatch):
    rank = Gathered(1, 2, 1, torch.device("cpu"))
    # Of this rank's batches the first has three labels that count and the second one.
    targets = {6: torch.tensor([[1, 2, 3]]), 8: torch.tensor([[4, -100, -100]])}

    class Sequences:
        def batch(self, rows):
            return SimpleNamespace(first=rows[0, 0], targets_BS=targets[rows[0, 0]])

    calls = []

    def run(model, batch, device, **settings):
        assert not torch.is_grad_enabled()
        calls.append((model, str(device), settings))
        losses = {"lm_loss": torch.tensor({6: 2.0, 8: 10.0}[batch.first])}
        return SimpleNamespace(
            losses=losses, stats={"rows": torch.tensor([float(batch.first)]), "used": torch.ones(1) > 2}
        )

    monkeypatch.setattr(calibrate, "run_model", run)
    other = {
        "rows": torch.tensor([100.0]),
        "used": torch.ones(1) > 0,
        "loss": torch.tensor(12.0),
        "labels": torch.tensor(4),
    }
    monkeypatch.setattr(Gathered, "other", other)
    sums = _measure("model", Sequences(), np.arange(5, 9)[:, None], 1, rank)
    assert calls == [("model", "cpu", {"with_stats": True, "layer_hook": None})] * 2
    assert (sums["rows"].item(), sums["used"].item(), sums["labels"].item()) == (114.0, True, 8.0)
    assert sums["loss"].item() == 12 + 3 * 2.0 + 10.0 and sums["loss"].dtype == torch.float64
    assert _loss(sums) == 28 / 8


def test_samples_of_all_ranks_are_merged_site_by_site_and_expert_by_expert(monkeypatch):
    def samples(*numbers):
        made = [RowSample(100) for _ in numbers]
        for sample, number in zip(made, numbers, strict=True):
            sample.add(torch.full((1, 2), float(number)), torch.tensor([number]))
        return made

    monkeypatch.setattr(Gathered, "other", samples(1, 2))
    merged = _all_gather_samples({(0, "expert_input"): samples(3, 4)}, Gathered(1, 2, 1, torch.device("cpu")))
    ((place, found),) = merged.items()
    assert place == (0, "expert_input") and [sample.num_seen for sample in found] == [2, 2]
    assert [sorted(set(sample.magnitudes().tolist())) for sample in found] == [[1.0, 3.0], [2.0, 4.0]]
