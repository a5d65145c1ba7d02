"""Streams in parts: which files each reads, any number of ranks, and documents held out at the beginning."""

from __future__ import annotations

import json

import pytest

from qsparse_moe.config.load import load_config
from qsparse_moe.config.schema import DataConfig, RunConfig, SourceConfig, TrainingConfig
from qsparse_moe.data.held_out import by_fraction
from qsparse_moe.data.loader import TrainLoader, combine_states, sample_train_sequences
from qsparse_moe.data.open_source import OpenSource
from qsparse_moe.data.sources import open_source
from qsparse_moe.data.streaming import SourceStream
from qsparse_moe.data.token_data import load_data, open_streams
from qsparse_moe.errors import ConfigError, DataError
from tests.data.corpus import make_texts, write_jsonl

NOTHING = by_fraction(0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five files of eight documents each."""
    path = tmp_path_factory.mktemp("parts")
    texts = make_texts(40)
    for number in range(5):
        write_jsonl(path / f"{number}.jsonl", texts[8 * number : 8 * number + 8])
    return path


def source_of(folder):
    return SourceConfig(kind="jsonl", path=f"{folder}/*.jsonl")


def one_pass(stream):
    return list(iter(stream.next_text, None))


@pytest.mark.parametrize(
    ("num_parts", "files"),
    [(2, [(0, 2, 4), (1, 3)]), (3, [(0, 3), (1, 4), (2,)]), (7, [(0,), (1,), (2,), (3,), (4,), (0,), (1,)])],
)
def test_a_part_reads_its_own_files_only(folder, num_parts, files):
    opened = open_source(source_of(folder), 0)
    all_texts = make_texts(40)
    found = []
    for part in range(num_parts):
        stream = SourceStream(opened, held_out=NOTHING, part=part, num_parts=num_parts, seed=None)
        mine = one_pass(stream)
        found += mine
        assert {all_texts.index(text) // 8 for text in mine} == set(files[part])
    assert sorted(found) == sorted(all_texts)


def test_the_files_of_a_part_are_in_another_order_in_every_pass(folder):
    opened = open_source(source_of(folder), 0)
    stream = SourceStream(opened, held_out=NOTHING, part=0, num_parts=2, seed=3)
    passes = [one_pass(stream) for _ in range(4)]
    assert len({tuple(one) for one in passes}) > 1 and len({tuple(sorted(one)) for one in passes}) == 1


def test_a_state_of_an_earlier_version_goes_on_by_documents(folder):
    """Its parts read all files and took every V-th document, and its state has no entry about it."""
    opened = open_source(source_of(folder), 0)

    def make():
        return SourceStream(opened, held_out=NOTHING, part=1, num_parts=2, seed=None)

    stream = make()
    stream.load_state_dict({"epoch": 0, "given": 0, "stream": None})
    assert [stream.next_text() for _ in range(3)] == make_texts(40)[1:7:2]
    state = json.loads(json.dumps(stream.state_dict()))
    assert "by_file" not in state
    resumed = make()
    resumed.load_state_dict(state)
    assert [resumed.next_text() for _ in range(17)] == make_texts(40)[7::2]
    assert resumed.next_text() is None and resumed.next_text() == make_texts(40)[1]


def run_config(folder, **data):
    settings = {"sources": (source_of(folder),), "mode": "streaming", "sequence_length": 16, "shuffle_window": 3}
    training = TrainingConfig(global_batch_size=8, micro_batch_size=1, steps=20)
    return RunConfig(data=DataConfig(validation_fraction=0.2, **(settings | data)), training=training)


def rows(loaders, step):
    return [row for loader in loaders for batch in loader.batches(step) for row in batch.tokens_BS.tolist()]


def test_the_sequences_of_four_parts_are_the_same_on_any_number_of_ranks_and_resume_on_any_other(folder):
    config = run_config(folder, stream_parts=4)
    data = load_data(config.data)

    def start(ranks):
        return [TrainLoader(config, data, rank, ranks) for rank in range(ranks)]

    loaders = {ranks: start(ranks) for ranks in (1, 2, 4)}
    steps, states = [], {}
    for step in range(6):
        found = {ranks: rows(loaders[ranks], step) for ranks in loaders}
        assert found[1] == found[2] == found[4]
        steps.append(found[1])
        if step == 2:
            states = {
                ranks: json.dumps(combine_states([one.state_dict() for one in loaders[ranks]])) for ranks in loaders
            }
    assert states[1] == states[2] == states[4]
    for ranks in (1, 2, 4):
        resumed = start(ranks)
        for loader in resumed:
            loader.load_state_dict(json.loads(states[4]))
        assert [rows(resumed, step) for step in (3, 4, 5)] == steps[3:]


def test_without_the_setting_a_run_resumes_on_fewer_ranks(folder):
    config = run_config(folder)
    data = load_data(config.data)
    four = [TrainLoader(config, data, rank, 4) for rank in range(4)]
    rows(four, 0)
    state = combine_states([loader.state_dict() for loader in four])
    want = [rows(four, step) for step in (1, 2)]
    two = [TrainLoader(config, data, rank, 2) for rank in range(2)]
    for loader in two:
        loader.load_state_dict(state)
    assert [rows(two, step) for step in (1, 2)] == want
    assert combine_states([loader.state_dict() for loader in two])["world_size"] == 4
    with pytest.raises(DataError, match=r"4 parts and this run has 8 ranks.*; start 1, 2, 4 ranks"):
        TrainLoader(config, data, 0, 8).load_state_dict(state)


@pytest.mark.parametrize(("parts", "ranks"), [(3, 1), (4, 8), (16, 1)])
def test_parts_that_do_not_fit_the_ranks_or_the_batch_are_refused(folder, parts, ranks):
    config = run_config(folder, stream_parts=parts)
    with pytest.raises(
        ConfigError,
        match=rf"data\.stream_parts \({parts}\) must be a multiple of the number of ranks \({ranks}\), and "
        r"training\.global_batch_size \(8\) a multiple of it; choose",
    ):
        TrainLoader(config, load_data(config.data), 0, ranks)


@pytest.mark.parametrize("setting", ["stream_parts", "validation_tokens"])
def test_settings_of_streams_are_refused_for_tables(setting):
    with pytest.raises(ConfigError, match=rf"data\.{setting} \(8\) has no meaning when data\.mode is table; remove it"):
        load_config("configs/tiny.yaml", [f"data.{setting}=8"])


def test_the_first_documents_are_held_out_and_no_more_is_read_for_them(folder, monkeypatch):
    texts = make_texts(40)
    # The third document is the first with which the held-out ones have at least this many tokens.
    num_tokens = sum(len(text.encode()) + 1 for text in texts[:3]) - 1
    config = run_config(folder, validation_tokens=num_tokens, stream_parts=2)
    seen = []
    read = OpenSource.texts

    def counted(source, dataset=None, bad=None):
        for text in read(source, dataset, bad):
            seen.append(text)
            yield text

    monkeypatch.setattr(OpenSource, "texts", counted)
    data = load_data(config.data)
    table, indices = data.evaluation_sequences(64)
    bytes_held_out = sum(len(text.encode()) for text in texts[:3])
    # And as much text of the training side, whose frequencies the loss is compared with.
    assert seen[:3] == texts[:3]
    assert sum(len(text.encode()) for text in seen[3:]) >= bytes_held_out
    assert sum(len(text.encode()) for text in seen[3:-1]) < bytes_held_out
    assert len(indices) == len(table) == (num_tokens + 1) // 16
    assert data.tokenizer.decode(table.tokens([0])[0].tolist())[: len(texts[0])].startswith(texts[0][:10])
    assert data.parts["data.validation_tokens"] == str(num_tokens) and "data.validation_fraction" not in data.parts
    streams = open_streams(config.data)
    found = [streams.train(range(2), num_parts=2, seed=None)._streams[part] for part in range(2)]
    trained = [text for one in found for text in one_pass(one._mixture._streams[0])]
    assert sorted(trained) == sorted(texts[3:])


def test_much_text_read_for_a_fraction_is_named_with_the_setting(folder, monkeypatch, caplog):
    monkeypatch.setattr("qsparse_moe.data.held_out._MUCH_TEXT", 1000)
    load_data(run_config(folder).data)
    (line,) = [record.getMessage() for record in caplog.records if "were read to hold out" in record.getMessage()]
    assert line.startswith("data.sources.0 (jsonl): 0 MB of text were read to hold out 64 sequences by data.valid")
    assert "data.validation_tokens=1024 holds out the first documents instead" in line


def test_samples_are_those_of_one_part_whatever_the_setting(folder):
    plain, parts = run_config(folder), run_config(folder, stream_parts=4)
    samples = [sample_train_sequences(config, load_data(config.data), 5).tolist() for config in (plain, parts)]
    assert samples[0] == samples[1]


def test_fewer_ranks_that_do_not_divide_the_parts_are_refused(folder):
    config = run_config(folder)
    config = config.model_copy(update={"training": config.training.model_copy(update={"global_batch_size": 12})})
    data = load_data(config.data)
    state = combine_states([TrainLoader(config, data, rank, 4).state_dict() for rank in range(4)])
    with pytest.raises(DataError, match=r"4 parts and this run has 3 ranks.*; start 1, 2, 4 ranks"):
        TrainLoader(config, data, 0, 3).load_state_dict(state)
