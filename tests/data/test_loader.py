from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsparse_moe.config.schema import DataConfig, RunConfig, SourceConfig, TrainingConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.data.loader import (
    TrainLoader,
    combine_states,
    evaluation_batches,
    evaluation_num_bytes,
    sample_train_sequences,
)
from qsparse_moe.data.sequences import train_indices
from qsparse_moe.data.token_data import TokenData, fingerprint_of, load_data
from qsparse_moe.errors import ConfigError, DataError
from tests.data.corpus import make_texts, write_jsonl

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def run_config(data_config: MakeConfig, jsonl_source: SourceConfig) -> Callable[..., RunConfig]:
    """A run over 400 documents: 12 sequences per step in micro-batches of 2 unless given otherwise."""

    def make(*, data: dict[str, Any] | None = None, **training: Any) -> RunConfig:
        settings = {"global_batch_size": 12, "micro_batch_size": 2, "seed": 3} | training
        return RunConfig(data=data_config(jsonl_source, **(data or {})), training=TrainingConfig(**settings))

    return make


MakeRun = Callable[..., RunConfig]


def global_batch(config: RunConfig, data: TokenData, step: int, world_size: int) -> list[list[int]]:
    """The tokens of all ranks' micro-batches, in order of the ranks."""
    loaders = [TrainLoader(config, data, rank, world_size) for rank in range(world_size)]
    return [row for loader in loaders for batch in loader.batches(step) for row in batch.tokens_BS.tolist()]


def test_every_layout_reads_the_same_global_batch(run_config: MakeRun) -> None:
    config = run_config()
    data = load_data(config.data)
    rows = train_indices(7, num_sequences=len(data.train), global_batch_size=12, seed=3, shuffle=True)
    want = data.train.sequences(rows).tokens_BS.tolist()
    for world_size, micro_batch_size in ((1, 12), (1, 3), (2, 2), (3, 4), (6, 1)):
        layout = run_config(micro_batch_size=micro_batch_size)
        assert global_batch(layout, data, 7, world_size) == want
        batches = TrainLoader(layout, data, 0, world_size).batches(7)
        assert [len(batch.tokens_BS) for batch in batches] == [micro_batch_size] * (
            12 // world_size // micro_batch_size
        )


def test_labels_are_the_next_tokens_and_all_count(run_config: MakeRun) -> None:
    config = run_config()
    (batch, *_) = TrainLoader(config, load_data(config.data), 0, 1).batches(0)
    assert batch.targets_BS[:, :-1].tolist() == batch.tokens_BS[:, 1:].tolist()
    assert (batch.targets_BS >= 0).all()


def test_a_global_batch_that_does_not_divide_is_refused(run_config: MakeRun) -> None:
    config = run_config()
    with pytest.raises(ConfigError, match=r"training\.global_batch_size \(12\).*times the ranks \(5\)"):
        TrainLoader(config, load_data(config.data), 0, 5)


def test_a_table_resumes_on_another_number_of_ranks(run_config: MakeRun) -> None:
    config = run_config()
    data = load_data(config.data)
    loaders = [TrainLoader(config, data, rank, 2) for rank in range(2)]
    for loader in loaders:
        for step in range(5):
            loader.batches(step)
    state = json.loads(json.dumps(combine_states([loader.state_dict() for loader in loaders])))
    assert state["step"] == 5
    resumed = TrainLoader(config, load_data(config.data), 1, 3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    rows = train_indices(5, num_sequences=len(data.train), global_batch_size=12, seed=3, shuffle=True)[4:8]
    want = data.train.sequences(rows).tokens_BS.tolist()
    assert [row for batch in resumed.batches(5) for row in batch.tokens_BS.tolist()] == want


def test_a_run_of_an_earlier_version_keeps_its_order(run_config: MakeRun) -> None:
    """Its checkpoints name no order; the run continues in the order of its version, and its next checkpoint as well."""
    config = run_config()
    data = load_data(config.data)
    loader = TrainLoader(config, data, 0, 1)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["parts"].pop("data.order") == "keyed"
    loader.load_state_dict(state | {"step": 4})
    rows = np.random.default_rng((3, 0)).permutation(len(data.train))[48:60]
    want = data.train.sequences(rows).tokens_BS.tolist()
    assert [row for batch in loader.batches(4) for row in batch.tokens_BS.tolist()] == want
    assert loader.state_dict()["parts"] == state["parts"]
    assert loader.state_dict()["fingerprint"] == fingerprint_of(state["parts"])


def test_an_order_that_this_version_does_not_know_is_refused(run_config: MakeRun) -> None:
    config = run_config()
    loader = TrainLoader(config, load_data(config.data), 0, 1)
    state = loader.state_dict()
    state = state | {"parts": state["parts"] | {"data.order": "sorted"}}
    with pytest.raises(
        DataError, match=r"random order 'sorted' \(data\.order\).*keyed, permutation; resume the run with"
    ):
        loader.load_state_dict(state)
    in_order = run_config(data={"shuffle": False})
    with pytest.raises(DataError, match=r"data\.order: was sorted, is absent; data\.shuffle: was True, is False"):
        TrainLoader(in_order, load_data(in_order.data), 0, 1).load_state_dict(state)


def test_sampled_sequences_are_training_sequences_at_even_distances_in_the_table(run_config: MakeRun) -> None:
    config = run_config()
    data = load_data(config.data)
    assert len(data.train) > 100
    rows = sample_train_sequences(config, data, 10)
    indices = [index * len(data.train) // 10 for index in range(10)]
    assert rows.tolist() == data.train.tokens(indices).tolist()
    assert sample_train_sequences(config, data, 10**6).tolist() == data.train.tokens(range(len(data.train))).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_sampled_sequences_of_a_stream_are_the_first_that_one_rank_trains_on(
    run_config: MakeRun, shuffle: bool
) -> None:
    config = run_config(data={"mode": "streaming", "shuffle": shuffle})
    rows = sample_train_sequences(config, load_data(config.data), 12)
    (first, second, *_) = TrainLoader(config, load_data(config.data), 0, 1).batches(0)
    assert rows[:4, :-1].tolist() == [*first.tokens_BS.tolist(), *second.tokens_BS.tolist()]
    assert rows.shape == (12, 17)


@pytest.mark.parametrize("mode", ["table", "streaming"])
def test_resuming_on_other_data_is_refused_with_what_changed(run_config: MakeRun, mode: str) -> None:
    config = run_config(data={"mode": mode})
    state = TrainLoader(config, load_data(config.data), 0, 1).state_dict()
    path = Path(str(config.data.sources[0].path))
    write_jsonl(path, [*make_texts(400), "one more"])
    other = run_config(data={"mode": mode, "sequence_length": 24}, seed=4)
    loader = TrainLoader(other, load_data(other.data), 0, 1)
    message = (
        r"differs from the checkpoint's \(data\.sequence_length: was 16, is 24; data\.sources\.0: was \w+, is \w+; "
        r"training\.seed: was 3, is 4\).*restore what changed"
    )
    with pytest.raises(DataError, match=message):
        loader.load_state_dict(state)


def test_a_stream_refuses_the_state_of_a_table(run_config: MakeRun) -> None:
    table, stream = run_config(), run_config(data={"mode": "streaming"})
    state = TrainLoader(table, load_data(table.data), 0, 1).state_dict()
    with pytest.raises(DataError, match=r"data\.mode: was table, is streaming"):
        TrainLoader(stream, load_data(stream.data), 0, 1).load_state_dict(state)


def evaluated_rows(batches: list[Batch]) -> list[list[int]]:
    """Tokens and last label of every row that counts; the others must count in no way."""
    rows = []
    for batch in batches:
        for tokens, labels in zip(batch.tokens_BS, batch.targets_BS, strict=True):
            counted = labels != -100
            assert counted.all() or not counted.any()
            if counted.all():
                rows.append([*tokens.tolist(), int(labels[-1])])
    return rows


@pytest.mark.parametrize("mode", ["table", "streaming"])
@pytest.mark.parametrize("num_sequences", [1, 7, 24, 100_000])
def test_evaluation_uses_the_same_sequences_in_every_layout(run_config: MakeRun, num_sequences: int, mode: str) -> None:
    data = load_data(run_config(data={"mode": mode}).data)
    table, indices = data.evaluation_sequences(num_sequences)
    assert len(indices) == min(num_sequences, len(table))
    want = table.tokens(indices).tolist()
    for world_size, micro_batch_size in ((1, 1), (1, 8), (2, 4), (3, 5)):
        ranks = [
            evaluation_batches(
                data, num_sequences=num_sequences, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size
            )
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        assert all(batch.tokens_BS.shape == (micro_batch_size, 16) for batches in ranks for batch in batches)
        assert [row for batches in ranks for row in evaluated_rows(batches)] == want


@pytest.mark.parametrize("mode", ["table", "streaming"])
def test_evaluation_bytes_are_those_of_the_labels(run_config: MakeRun, mode: str) -> None:
    data = load_data(run_config(data={"mode": mode}).data)
    (batch,) = evaluation_batches(data, num_sequences=60, micro_batch_size=64, rank=0, world_size=1)
    labels = batch.targets_BS[batch.targets_BS != -100]
    assert len(labels) == 60 * 16
    assert evaluation_num_bytes(data, 60) == int((labels < 256).sum()) < len(labels)


def test_evaluation_bytes_of_a_subword_tokenizer(run_config: MakeRun, bpe_folder: Path) -> None:
    data = load_data(run_config(data={"tokenizer": str(bpe_folder)}).data)
    (batch,) = evaluation_batches(data, num_sequences=40, micro_batch_size=40, rank=0, world_size=1)
    labels = batch.targets_BS.flatten()
    # A sequence may begin or end inside a character, and a replacement character is longer than its byte.
    text = data.tokenizer.decode(labels[labels != data.tokenizer.document_token].tolist())
    assert evaluation_num_bytes(data, 40) == pytest.approx(len(text.encode()), rel=0.02)


def test_the_model_accepts_a_padded_batch(run_config: MakeRun) -> None:
    data = load_data(run_config().data)
    (batch,) = evaluation_batches(data, num_sequences=1, micro_batch_size=4, rank=1, world_size=2)
    assert (batch.targets_BS == -100).all() and (batch.tokens_BS == data.tokenizer.document_token).all()
    assert batch.documents_BS is not None and torch.equal(batch.documents_BS[0], torch.arange(16))
