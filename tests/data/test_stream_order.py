"""The order of a stream is that of the run's seed, in training and in the rows that are sampled from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qsparse_moe.config.schema import DataConfig, RunConfig, SourceConfig, TrainingConfig
from qsparse_moe.data.loader import TrainLoader, sample_train_sequences
from qsparse_moe.data.token_data import load_data
from tests.data.corpus import make_texts, write_jsonl


@pytest.fixture
def rows_of(data_config: Callable[..., DataConfig], tmp_path: Path) -> Callable[..., tuple[list[int], list[int]]]:
    """The first row that a run trains on and the first that is sampled, over eight files in a stream."""
    texts = make_texts(80)
    for part in range(8):
        write_jsonl(tmp_path / f"{part}.jsonl", texts[part::8])
    source = SourceConfig(kind="jsonl", path=f"{tmp_path}/*.jsonl")

    def make(*, seed: int, shuffle: bool) -> tuple[list[int], list[int]]:
        config = RunConfig(
            data=data_config(source, mode="streaming", shuffle=shuffle),
            training=TrainingConfig(global_batch_size=1, micro_batch_size=1, seed=seed),
        )
        (batch,) = TrainLoader(config, load_data(config.data), 0, 1).batches(0)
        sampled = sample_train_sequences(config, load_data(config.data), 1)
        return batch.tokens_BS[0].tolist(), sampled[0, :-1].tolist()

    return make


def test_a_stream_is_read_in_the_order_of_the_seed_only_where_it_is_shuffled(
    rows_of: Callable[..., tuple[list[int], list[int]]],
) -> None:
    plain, shuffled = rows_of(seed=3, shuffle=False), [rows_of(seed=seed, shuffle=True) for seed in (3, 4, 5, 6)]
    assert plain == rows_of(seed=4, shuffle=False)
    assert shuffled[0] == rows_of(seed=3, shuffle=True)
    # Of eight files at least two of four seeds begin with another than the first.
    assert len({tuple(trained) for trained, _ in (plain, *shuffled)}) >= 3
    assert all(trained == sampled for trained, sampled in (plain, *shuffled))
