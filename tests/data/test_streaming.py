from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsparse_moe.config.schema import DataConfig, RunConfig, SourceConfig, TrainingConfig
from qsparse_moe.data.held_out import by_fraction, gather
from qsparse_moe.data.loader import TrainLoader, combine_states
from qsparse_moe.data.packing import is_validation, text_digest
from qsparse_moe.data.sources import open_source
from qsparse_moe.data.streaming import MixedStream, SourceStream
from qsparse_moe.data.table import Packing
from qsparse_moe.data.token_data import load_data
from qsparse_moe.data.tokenizer import ByteTokenizer
from qsparse_moe.errors import DataError
from tests.data.corpus import make_texts, write_files, write_jsonl

MakeConfig = Callable[..., DataConfig]
FRACTION = 0.2


def train_side(texts: list[str]) -> list[str]:
    return [text for text in texts if not is_validation(text_digest(text.encode()), FRACTION)]


def make_source(tmp_path: Path, kind: str, num_files: int = 5) -> SourceConfig:
    """40 documents in ``num_files`` files, as each kind of source has them."""
    texts = make_texts(40)
    folder = tmp_path / kind
    folder.mkdir()
    if kind == "text":
        write_files(folder, texts)
        return SourceConfig(kind="text", path=f"{folder}/*.txt")
    for part in range(num_files):
        share = texts[part::num_files]
        if kind == "jsonl":
            write_jsonl(folder / f"{part}.jsonl", share)
        else:
            pq.write_table(
                pa.table({"text": share, "n": range(len(share))}), folder / f"{part}.parquet", row_group_size=3
            )
    path = str(folder) if kind == "hub" else f"{folder}/*.{kind}"
    return SourceConfig(kind=kind, path=path)  # type: ignore[arg-type]


def make_stream(source: SourceConfig, *, rank: int = 0, world_size: int = 1, seed: int | None = 0) -> SourceStream:
    return SourceStream(
        open_source(source, 0), held_out=by_fraction(FRACTION), part=rank, num_parts=world_size, seed=seed
    )


def one_pass(stream: SourceStream) -> list[str]:
    return list(iter(stream.next_text, None))


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "hub"])
# 5 files: shuffled before they are dealt to 1 and 5 parts, else dealt first; 7 parts share them.
@pytest.mark.parametrize("world_size", [1, 2, 5, 7])
def test_a_pass_gives_every_train_document_to_one_rank(tmp_path: Path, kind: str, world_size: int) -> None:
    source = make_source(tmp_path, kind)
    streams = [make_stream(source, rank=rank, world_size=world_size) for rank in range(world_size)]
    first = [one_pass(stream) for stream in streams]
    assert sorted(text for texts in first for text in texts) == sorted(train_side(make_texts(40)))
    second = [one_pass(stream) for stream in streams]
    assert sorted(text for texts in second for text in texts) == sorted(train_side(make_texts(40)))


def test_files_are_shuffled_differently_in_every_pass_and_by_seed(tmp_path: Path) -> None:
    source = make_source(tmp_path, "text")
    stream = make_stream(source)
    orders = [one_pass(stream), one_pass(stream), one_pass(make_stream(source, seed=1))]
    assert len({tuple(order) for order in orders}) == 3
    assert one_pass(make_stream(source)) == orders[0]
    plain = make_stream(source, seed=None)
    assert one_pass(plain) == one_pass(plain) == train_side(make_texts(40))


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("world_size", [1, 2, 5, 7])
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "hub"])
def test_a_stream_resumes_at_every_document(tmp_path: Path, kind: str, world_size: int, seed: int | None) -> None:
    source = make_source(tmp_path, kind)
    opened = open_source(source, 0)

    def make() -> SourceStream:
        held_out = by_fraction(FRACTION)
        return SourceStream(opened, held_out=held_out, part=world_size - 1, num_parts=world_size, seed=seed)

    uninterrupted = make()
    states, texts = [uninterrupted.state_dict()], []
    for _ in range(90 // min(world_size, 5)):  # over the border of two passes
        texts.append(uninterrupted.next_text())
        states.append(uninterrupted.state_dict())
    assert texts.count(None) >= 2
    for place in range(0, len(texts) - 8, 3):
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(states[place])))
        assert resumed.state_dict() == states[place]
        assert [resumed.next_text() for _ in range(8)] == texts[place : place + 8]


def test_a_part_without_a_train_document_is_refused(tmp_path: Path) -> None:
    source = SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "a.jsonl", train_side(make_texts(9))[:2])))
    assert len(one_pass(make_stream(source, rank=1, world_size=2))) == 1
    with pytest.raises(DataError, match=r"\(jsonl\) holds no training document for part 2 of 3.*data\.mode=table"):
        make_stream(source, rank=2, world_size=3).next_text()


def make_mixture(tmp_path: Path, weights: list[float]) -> MixedStream:
    paths = [tmp_path / "long.jsonl", tmp_path / "short.jsonl"]
    write_jsonl(paths[0], make_texts(60, words=40))
    write_jsonl(paths[1], make_texts(20, seed=1, words=5))
    streams = [make_stream(SourceConfig(kind="jsonl", path=str(path))) for path in paths]
    return MixedStream(streams, weights, ByteTokenizer())


def documents(mixture: MixedStream, count: int) -> list[str]:
    return [ByteTokenizer().decode(mixture.next_document().tokens.tolist()) for _ in range(count)]


def test_sources_of_weight_one_are_read_once_per_pass_in_turn(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path, [1, 1])
    want = sorted(train_side(make_texts(60, words=40)) + train_side(make_texts(20, seed=1, words=5)))
    first = documents(mixture, len(want))
    assert first[0] in make_texts(60, words=40), "of equals, the first source is read first"
    assert sorted(first) == want
    assert documents(mixture, len(want)) == first, "one file each: nothing to shuffle, and every pass takes turns"
    short = [i for i, text in enumerate(first) if " #1." in text]
    assert short != list(range(short[0], short[-1] + 1)), "the sources take turns"


def test_other_weights_are_fractions_of_tokens_and_sources_start_over(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path, [1, 3])
    given = documents(mixture, 900)
    short = sum(len(text.encode()) + 1 for text in given if " #1." in text)
    total = sum(len(text.encode()) + 1 for text in given)
    assert short / total == pytest.approx(0.75, abs=0.02)
    assert len(given) > len(set(given))


def test_a_mixture_resumes_at_every_document(tmp_path: Path) -> None:
    for weights in ([1.0, 1.0], [2.0, 1.0]):
        uninterrupted = make_mixture(tmp_path, weights)
        states, texts = [], []
        for _ in range(150):
            states.append(json.dumps(uninterrupted.state_dict()))
            texts += documents(uninterrupted, 1)
        for place in range(0, 140, 7):
            resumed = make_mixture(tmp_path, weights)
            resumed.load_state_dict(json.loads(states[place]))
            assert documents(resumed, 10) == texts[place : place + 10]


@pytest.fixture
def run_config(data_config: MakeConfig, tmp_path: Path) -> RunConfig:
    """Streams of two sources; documents both longer and shorter than a row of 16."""
    long = SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "a.jsonl", make_texts(30))), weight=2.0)
    short = SourceConfig(kind="text", path=f"{write_files(tmp_path / 'b', make_texts(31, seed=1, words=1))}/*.txt")
    return RunConfig(
        data=data_config(long, short, mode="streaming"),
        training=TrainingConfig(global_batch_size=4, micro_batch_size=1, seed=5),
    )


def tokens(loader: TrainLoader, steps: range) -> list[Any]:
    return [[batch.tokens_BS.tolist() for batch in loader.batches(step)] for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_resumes_exactly_on_the_same_ranks(run_config: RunConfig, world_size: int) -> None:
    def start() -> list[TrainLoader]:
        data = load_data(run_config.data)
        return [TrainLoader(run_config, data, rank, world_size) for rank in range(world_size)]

    loaders = start()
    states, rows = [], []
    for step in range(24):
        states.append(json.dumps(combine_states([loader.state_dict() for loader in loaders])))
        rows.append([tokens(loader, range(step, step + 1)) for loader in loaders])
    for place in (0, 1, 2, 3, 5, 8, 13, 20):
        resumed = start()
        for loader in resumed:
            loader.load_state_dict(json.loads(states[place]))
        for step in range(place, place + 4):
            assert [tokens(loader, range(step, step + 1)) for loader in resumed] == rows[step], (place, step)
    if world_size == 2:
        assert all(first != second for first, second in rows), "ranks read different rows"


def test_a_state_is_smaller_than_a_sequence_however_long_the_document(data_config: MakeConfig, tmp_path: Path) -> None:
    texts = [text * 400 for text in make_texts(20)]
    source = SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "a.jsonl", texts)))
    config = RunConfig(
        data=data_config(source, mode="streaming"), training=TrainingConfig(global_batch_size=4, micro_batch_size=4)
    )
    data = load_data(config.data)
    loader = TrainLoader(config, data, 0, 1)
    for step in range(30):
        loader.batches(step)
        assert len(json.dumps(loader.state_dict())) < 2500
    resumed = TrainLoader(config, data, 0, 1)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert tokens(resumed, range(30, 33)) == tokens(loader, range(30, 33))


def test_more_ranks_than_parts_are_refused_with_the_numbers_that_fit(run_config: RunConfig) -> None:
    data = load_data(run_config.data)
    state = combine_states([TrainLoader(run_config, data, rank, 2).state_dict() for rank in range(2)])
    with pytest.raises(
        DataError, match=r"streams have 2 parts and this run has 4 ranks, .*; start 1, 2 ranks, or a new"
    ):
        TrainLoader(run_config, data, 0, 4).load_state_dict(state)


def test_the_state_of_one_rank_alone_is_an_internal_error(run_config: RunConfig) -> None:
    loaders = [TrainLoader(run_config, load_data(run_config.data), rank, 2) for rank in range(2)]
    with pytest.raises(AssertionError, match="combine_states"):
        loaders[1].load_state_dict(loaders[0].state_dict())


def test_validation_sequences_of_a_stream_are_read_once(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data(run_config.data)
    table, _ = data.evaluation_sequences(3)
    monkeypatch.setattr("qsparse_moe.data.streaming.gather", None)
    assert data.evaluation_sequences(3)[0] is table and data.evaluation_sequences(64)[0] is data.validation


def test_steps_of_a_stream_come_in_order(run_config: RunConfig) -> None:
    loader = TrainLoader(run_config, load_data(run_config.data), 0, 1)
    loader.batches(0)
    with pytest.raises(AssertionError, match="gives step 1 next, not 0"):
        loader.batches(0)


def test_training_sequences_of_a_stream_contain_no_validation_text(run_config: RunConfig) -> None:
    # In their own order, so that a document's mark is whole where it crosses from one row to the next.
    run_config = run_config.model_copy(update={"data": run_config.data.model_copy(update={"shuffle_window": 1})})
    data = load_data(run_config.data)
    loader = TrainLoader(run_config, data, 0, 1)
    seen = [token for step in tokens(loader, range(100)) for batch in step for row in batch for token in row]
    text = data.tokenizer.decode(seen)
    pool = make_texts(30) + make_texts(31, seed=1, words=1)
    marks = {document.split()[-1] + "\n": document in train_side(pool) for document in pool}
    assert {mark for mark in marks if mark in text} == {mark for mark, trained in marks.items() if trained}


def test_validation_sequences_of_a_stream_are_the_first_held_out_ones(data_config: MakeConfig, tmp_path: Path) -> None:
    source = make_source(tmp_path, "text")
    data = load_data(data_config(source, mode="streaming"))
    held_out = [text for text in make_texts(40) if text not in train_side(make_texts(40))]
    documents_ = ByteTokenizer().tokenize(held_out)
    joined = [token for document in documents_ for token in document.tokens.tolist()]
    table, indices = data.evaluation_sequences(5)
    assert table.tokens(indices).tolist() == [joined[16 * row : 16 * row + 17] for row in range(5)]
    assert len(data.validation) == min(64, (len(joined) - 1) // 16)


@pytest.mark.parametrize(("num_sequences", "of_each"), [(1, 1), (4, 2), (5, 3)])
def test_every_source_of_a_stream_gives_equally_many_validation_sequences_and_together_at_least_the_requested_number(
    data_config: MakeConfig, tmp_path: Path, num_sequences: int, of_each: int
) -> None:
    sources = (make_source(tmp_path, "text"), make_source(tmp_path, "jsonl"))
    rows = []
    for source in sources:
        alone = load_data(data_config(source, mode="streaming"))
        table, indices = alone.evaluation_sequences(of_each)
        rows += table.tokens(indices).tolist()
    table, indices = load_data(data_config(*sources, mode="streaming")).evaluation_sequences(num_sequences)
    assert table.tokens(range(len(table))).tolist() == rows
    assert len(indices) == num_sequences


def test_only_as_much_of_a_stream_is_read_as_validation_needs(
    data_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_source(make_source(tmp_path, "text"), 0)
    config = data_config(SourceConfig(kind="text", path=f"{tmp_path}/text/*.txt"), mode="streaming")
    for path in sorted((tmp_path / "text").iterdir())[20:]:
        path.write_bytes(b"\xff")  # reading as far as here would fail
    monkeypatch.setattr("qsparse_moe.data.token_data._FIRST_STREAM_SEQUENCES", 4)
    assert len(load_data(config).validation) == 4
    assert len(list(islice(opened.texts(), 20))) == 20


def test_a_stream_is_read_up_to_the_document_that_fills_the_last_validation_sequence() -> None:
    texts = iter(["abc"] * 9)  # 4 tokens each, of which 5 fill the first row of 4 labels and 4 every other
    packing = Packing(ByteTokenizer(), 4, validation_fraction=1.0)
    found, train_counts = gather(
        SimpleNamespace(texts=lambda: texts, encoder=lambda tokenizer: tokenizer.tokenize), packing, 2
    )
    assert (len(found), len(list(texts))) == (2, 6)
    assert found.byte_counts[ord("a")] == 3 and not train_counts.any()


@pytest.mark.parametrize("taken", [0, 1, 4, 7, 8, 13])
def test_rows_of_one_file_are_shuffled_within_windows_and_resume_exactly(
    data_config: MakeConfig, tmp_path: Path, taken: int
) -> None:
    file = write_jsonl(tmp_path / "one.jsonl", make_texts(100))
    source = SourceConfig(kind="jsonl", path=str(file))

    def stream(seed: int | None, window: int = 4) -> Any:
        data = load_data(data_config(source, mode="streaming", shuffle_window=window))
        return data.open_stream(range(1), num_parts=1, seed=seed)

    plain, shuffled, other = (stream(seed).take(24).tolist() for seed in (None, 0, 1))
    assert shuffled != plain and other != shuffled
    for begin in range(0, 24, 4):
        assert sorted(shuffled[begin : begin + 4]) == sorted(plain[begin : begin + 4])
    first, second = stream(0), stream(0)
    if taken:
        first.take(taken)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.take(24 - taken).tolist() == shuffled[taken:]
    assert stream(0, window=1).take(8).tolist() == plain[:8]


def test_a_stream_reads_ahead_without_moving_its_state(data_config: MakeConfig, tmp_path: Path) -> None:
    good = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(40))
    (tmp_path / "a.jsonl").write_text(good + "{oops\n")
    source = SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    config = RunConfig(
        data=data_config(source, mode="streaming", shuffle=False),
        training=TrainingConfig(global_batch_size=4, micro_batch_size=4),
    )
    loader = TrainLoader(config, load_data(config.data), 0, 1)
    error, step = None, 0
    while error is None:
        before = loader.state_dict()
        error = loader.read_ahead()
        assert loader.state_dict() == before and loader.state_dict()["step"] == step
        if error is None:
            loader.batches(step)
            step += 1
    assert step > 2 and "cannot be read as jsonl" in str(error)
    with pytest.raises(DataError, match="cannot be read as jsonl"):
        loader.batches(step)
