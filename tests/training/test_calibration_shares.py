"""The batches of a calibration on each rank, against batches written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qsparse_moe.training.calibrate import _local_batches
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
