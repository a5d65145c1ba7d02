"""What reads the next step beside training gives what a loader without it gives, and ends with the run."""

from __future__ import annotations

import threading

import pytest

from qsparse_moe.config.schema import DataConfig, RunConfig, SourceConfig, TrainingConfig
from qsparse_moe.data.loader import TrainLoader, combine_states
from qsparse_moe.data.read_ahead import ReadStep, StepReader
from qsparse_moe.data.reader_process import ProcessStream
from qsparse_moe.data.token_data import load_data
from qsparse_moe.errors import DataError
from tests.data.corpus import make_texts, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream")
    texts = make_texts(24)
    write_jsonl(path / "one.jsonl", texts[:14])
    write_jsonl(path / "two.jsonl", texts[14:])
    return path


def run_config(folder, mode, **data):
    source = SourceConfig(kind="jsonl", path=f"{folder}/*.jsonl")
    settings = {"sources": (source,), "mode": mode, "sequence_length": 64, "validation_fraction": 0.2} | data
    training = TrainingConfig(global_batch_size=8, micro_batch_size=2, steps=20)
    return RunConfig(data=DataConfig(cache_dir=str(folder / "cache"), shuffle_window=6, **settings), training=training)


def tokens_of(batches):
    return [batch.tokens_BS.tolist() for batch in batches]


def read(loader, steps):
    return [(tokens_of(loader.batches(step)), loader.state_dict(), loader.passes()) for step in steps]


@pytest.fixture(scope="module")
def data(folder):
    return {mode: load_data(run_config(folder, mode).data) for mode in ("table", "streaming")}


@pytest.mark.parametrize(("mode", "reader"), [("table", "thread"), ("streaming", "thread"), ("streaming", "process")])
def test_batches_states_and_passes_are_those_without_a_reader(folder, data, mode, reader):
    config = run_config(folder, mode)
    plain = TrainLoader(config, data[mode], 1, 2)
    loader = TrainLoader(config, data[mode], 1, 2, reader=reader)
    try:
        assert loader.state_dict() == plain.state_dict()
        want = read(plain, range(12))
        assert read(loader, range(12)) == want
        assert mode == "table" or want[-1][2][0] >= 1, "a pass must end within these steps"
        # Back to an earlier step, while a later one is being read.
        other = TrainLoader(config, data[mode], 0, 2).state_dict()
        loader.load_state_dict(combine_states([want[4][1], other]))
        assert read(loader, range(5, 9)) == want[5:9]
    finally:
        loader.close()


def test_the_next_step_is_read_before_it_is_asked_for_and_nothing_after_the_last():
    asked = []
    first_two = threading.Event()

    def read_step(step):
        asked.append((step, threading.current_thread() is threading.main_thread()))
        if step == 4:
            first_two.set()
        return ReadStep([step], None, [])

    reader = StepReader(read_step, in_background=True)
    assert reader.take(3).batches == [3]
    assert first_two.wait(10), "step 4 is read without being asked for"
    assert reader.peek(4).batches == [4] and reader.take(4, is_last=True).batches == [4]
    reader.close()
    assert asked == [(3, True), (4, False)]


def test_without_a_background_a_step_is_read_when_it_is_asked_for():
    asked = []
    reader = StepReader(lambda step: asked.append(step) or ReadStep([step], None, []), in_background=False)
    assert [reader.take(0).batches, reader.peek(1).batches, reader.peek(1).batches] == [[0], [1], [1]]
    assert asked == [0, 1]
    assert reader.take(5).batches == [5], "any other step may be asked for"
    reader.forget()
    reader.take(5)
    reader.close()
    assert asked == [0, 1, 5, 5]


@pytest.mark.parametrize("reader", ["none", "thread", "process"])
def test_a_bad_record_is_reported_a_step_ahead_and_the_state_is_that_before_it(tmp_path, reader):
    write_jsonl(tmp_path / "one.jsonl", make_texts(140))
    lines = (tmp_path / "one.jsonl").read_text().splitlines()
    lines.insert(120, "{oops")
    (tmp_path / "one.jsonl").write_text("\n".join(lines) + "\n")
    # The 64 sequences for validation are read before the bad line.
    config = run_config(tmp_path, "streaming", shuffle=False, validation_fraction=0.7)
    loader = TrainLoader(config, load_data(config.data), 0, 1, reader=reader)
    try:
        step = 0
        while (error := loader.read_ahead()) is None:
            loader.batches(step)
            step += 1
        assert step > 0 and "one.jsonl, row 120 cannot be read" in str(error)
        assert loader.state_dict()["step"] == step
        with pytest.raises(DataError, match="row 120 cannot be read"):
            loader.batches(step)
    finally:
        loader.close()


def test_a_process_that_is_killed_is_named_with_the_way_out(folder, data):
    loader = TrainLoader(run_config(folder, "streaming"), data["streaming"], 0, 1, reader="process")
    try:
        loader.batches(0)
        process = loader._stream._process
        process.kill()
        process.wait()
        with pytest.raises(
            DataError,
            match=r"reads parts 0 to 0 of the text has ended with exit code -9, .* or set data\.reader=thread$",
        ):
            for step in range(1, 20):
                loader.batches(step)
    finally:
        loader.close()


def test_the_process_ends_in_silence_when_its_rank_has_gone(folder):
    config = run_config(folder, "streaming")
    loader = TrainLoader(config, load_data(config.data), 0, 1)
    stream = ProcessStream(config.data, range(1), num_parts=1, seed=0, begin=loader.state_dict()["streams"])
    stream.take(2)
    process = stream._process
    # What the system does with the pipes of a killed rank.
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 0


def test_the_log_of_the_process_is_that_of_the_rank(tmp_path, caplog):
    write_jsonl(tmp_path / "one.jsonl", make_texts(20))
    with (tmp_path / "one.jsonl").open("a") as file:
        file.write("{oops\n")
    config = run_config(tmp_path, "streaming", max_bad_records=1)
    loader = TrainLoader(config, load_data(config.data), 0, 1, reader="process")
    caplog.clear()
    try:
        step = 0
        while not loader.passes()[0]:
            loader.batches(step)
            step += 1
    finally:
        loader.close()
    said = [(record.name, record.getMessage()) for record in caplog.records]
    assert any(name == "qsparse_moe.data.open_source" and "skipped a bad record" in text for name, text in said), said
