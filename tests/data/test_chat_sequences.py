"""Conversations in sequences: packed without a cut, too long ones, resumed exactly, and mixed with text."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsparse_moe.config.schema import ChatConfig, DataConfig, RunConfig, SourceConfig, TrainingConfig
from qsparse_moe.data.batch import IGNORED_LABEL
from qsparse_moe.data.conversations import messages_json
from qsparse_moe.data.loader import TrainLoader, evaluation_batches, evaluation_num_bytes
from qsparse_moe.data.marks import begins_document, mark, token_ids
from qsparse_moe.data.packing import Document, Packer, is_validation, text_digest
from qsparse_moe.data.token_data import load_data
from qsparse_moe.errors import DataError
from tests.data.conversations import BOT, END, IDS, MARKED, USER, chat, make_chats, save_chat_tokenizer, write_chats
from tests.data.corpus import write_jsonl

LENGTH = 15


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_chat_tokenizer(tmp_path_factory.mktemp("words") / "tok"))


def conversation(size: int, first: int = 1) -> Document:
    """Return ``size`` tokens from ``first`` on, of which the last is the only target, of two bytes."""
    targets = np.arange(size) == size - 1
    return Document(mark(np.arange(first, first + size), targets=targets), (2 * targets).astype(np.int32), True)


def test_conversations_go_where_they_leave_the_least_room_and_are_never_cut():
    packer = Packer(9)
    # Ten tokens a sequence: 6 is open, 8 opens another, 2 fits best behind 8 and fills it, 4 behind 6.
    assert not len(packer.add([conversation(6), conversation(8, 11)]).tokens)
    first = packer.add([conversation(2, 21)])
    assert token_ids(first.tokens).tolist() == [[*range(11, 19), 21, 22]]
    second = packer.add([conversation(4, 31), conversation(3, 41)])
    assert token_ids(second.tokens).tolist() == [[*range(1, 7), *range(31, 35)]]
    rest = packer.finish()
    assert token_ids(rest.tokens).tolist() == [[41, 42, 43, *[0] * 7]]
    # The bytes of the targets.
    assert [part.num_bytes.tolist() for part in (first, second, rest)] == [[4], [4], [2]]
    assert not len(packer.finish().tokens)


def test_a_conversation_behind_which_nothing_fits_is_closed_at_once():
    packer = Packer(9)
    # One place is left behind 9 tokens, and a conversation has at least two; behind 8 there are two.
    found = packer.add([conversation(8, 11), conversation(9, 21), conversation(10, 31)])
    assert token_ids(found.tokens).tolist() == [[*range(21, 30), 0], [*range(31, 41)]]
    assert token_ids(packer.finish().tokens).tolist() == [[*range(11, 19), 0, 0]]


def test_of_open_sequences_with_the_same_room_the_first_is_filled():
    packer = Packer(9)
    packer.add([conversation(6, 11), conversation(6, 21), conversation(5, 31)])
    found = packer.add([conversation(4, 41)])
    assert token_ids(found.tokens).tolist() == [[*range(11, 17), *range(41, 45)]]


def test_text_and_conversations_of_one_call_are_packed_apart_and_the_text_comes_first():
    packer = Packer(3)
    text = Document(np.arange(50, 58, dtype=np.int32), np.array([0, 1, 2, 3, 4, 5, 6, 7], np.int32))
    found = packer.add([conversation(4, 1), text, conversation(3, 11)])
    assert token_ids(found.tokens).tolist() == [[50, 51, 52, 53], [53, 54, 55, 56], [1, 2, 3, 4], [11, 12, 13, 0]]
    assert found.num_bytes.tolist() == [1 + 2 + 3, 4 + 5 + 6, 2, 2]
    assert packer.state_dict() == {"tokens": [56, 57], "num_bytes": [6, 7]}


def test_padding_is_a_document_of_its_own_without_a_target():
    from qsparse_moe.data.batch import make_batch

    packer = Packer(9)
    packer.add([conversation(3), conversation(4, 11)])
    batch = make_batch(packer.finish().tokens, document_token=1, attend_across_documents=False)
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 11, 12, 13, 14, 0, 0]]
    assert batch.documents_BS.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2]]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1]]
    ignored = IGNORED_LABEL
    assert batch.targets_BS.tolist() == [[ignored, 3, *[ignored] * 3, 14, *[ignored] * 3]]


def test_the_fullest_sequence_is_closed_when_no_more_may_be_opened():
    packer = Packer(99)
    assert not len(packer.add([conversation(60 + index) for index in range(16)]).tokens)
    closed = packer.add([conversation(50)])
    assert (token_ids(closed.tokens)[0] > 0).sum() == 75
    assert sorted((token_ids(packer.finish().tokens) > 0).sum(axis=1)) == [50, *range(60, 75)]


@pytest.mark.parametrize("place", [0, 1, 17, 50])
def test_a_packer_resumes_with_its_open_sequences(place):
    sizes = np.random.default_rng(0).integers(2, 12, 60)
    documents = [conversation(int(size), 10 * index) for index, size in enumerate(sizes)]
    whole, first, second = Packer(11), Packer(11), Packer(11)
    want = [whole.add([document]).tokens for document in documents]
    for document in documents[:place]:
        first.add([document])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found = [second.add([document]).tokens for document in documents[place:]]
    assert np.concatenate(found).tolist() == np.concatenate(want[place:]).tolist()
    # Every token once, in the sequences closed and the open ones.
    tokens = np.concatenate([*want, whole.finish().tokens]).ravel()
    every = np.concatenate([document.tokens for document in documents])
    assert Counter(token_ids(tokens[token_ids(tokens) > 0]).tolist()) == Counter(
        token_ids(every[token_ids(every) > 0]).tolist()
    )


def test_sequences_of_conversations_of_usual_lengths_are_nearly_full():
    # Log-normal, as lengths of conversations are; the figure is in docs/data.md.
    sizes = np.random.default_rng(0).lognormal(5.5, 0.8, 4000).astype(int).clip(2, 2049)
    packer = Packer(2048)
    packed = packer.add([conversation(int(size)) for size in sizes])
    assert sizes.sum() / (len(packed.tokens) * 2049) > 0.98


def make_data(tmp_path: Path, tokenizer: str, *, chats: int = 60, **settings: Any) -> DataConfig:
    file = write_chats(tmp_path / "chats.jsonl", make_chats(chats))
    source = SourceConfig(kind="jsonl", path=str(file), format="chat")
    defaults = {
        "sources": (source,),
        "tokenizer": tokenizer,
        "sequence_length": LENGTH,
        "validation_fraction": 0.2,
        "cache_dir": str(tmp_path / "cache"),
    }
    return DataConfig(**(defaults | settings))


def run_config(data: DataConfig) -> RunConfig:
    return RunConfig(data=data, training=TrainingConfig(global_batch_size=4, micro_batch_size=2))


def conversations_of(batch: Any) -> list[tuple[int, ...]]:
    """Return the words of every conversation in a batch, whole."""
    found = []
    for tokens, documents in zip(batch.tokens_BS.tolist(), batch.documents_BS.tolist(), strict=True):
        for document in range(max(documents) + 1):
            words = [token for token, own in zip(tokens, documents, strict=True) if own == document]
            found += [tuple(words)] if any(words) else []
    return found


def test_an_epoch_of_a_table_holds_every_conversation_once_and_cuts_none(tmp_path, tokenizer):
    data = load_data(make_data(tmp_path, tokenizer, sequence_length=60))
    tokens = np.concatenate([table.tokens(range(len(table))) for table in (data.train, data.validation)]).ravel()
    parts = np.split(token_ids(tokens), np.flatnonzero(begins_document(tokens, 1)))
    found = [tuple(part.tolist()) for part in parts if part.any()]
    roles = {"user": USER, "assistant": BOT}
    want = [
        tuple(token for m in messages for token in (roles[m["role"]], *(IDS[w] for w in m["content"].split()), END))
        for messages in make_chats(60)
    ]
    assert Counter(found) == Counter(want)
    assert data.conversations == {"data.sources.0": {"conversations": 60, "cut": 0, "dropped": 0}}


@pytest.mark.parametrize(("too_long", "cut"), [("cut", True), ("drop", False)])
@pytest.mark.parametrize("mode", ["table", "streaming"])
def test_a_conversation_that_is_too_long_is_cut_or_left_out_and_counted(
    tmp_path, tokenizer, caplog, mode, too_long, cut
):
    long = chat("u:a a a a", "a:b", "u:a a a a a", "a:c")
    # The answer of the second does not begin in the part that is kept.
    late = chat("u:a a a a a a a a a a a a a a a a a", "a:b")
    short = [chat(f"u:{a}", f"a:{b}") for a in "defg" for b in "defghij"]
    file = write_chats(tmp_path / "c.jsonl", [long, late, *short])
    source = SourceConfig(kind="jsonl", path=str(file), format="chat")
    config = make_data(
        tmp_path, tokenizer, sources=(source,), chat=ChatConfig(too_long=too_long), mode=mode, shuffle=False
    ).model_copy(update={"validation_fraction": 0.1})
    with caplog.at_level(logging.WARNING):
        data = load_data(config)
        loader = TrainLoader(run_config(config), data, 0, 1)
        batches = [batch for step in range(12) for batch in loader.batches(step)]
    left_out = 1 if cut else 2
    counts = f"of 30 conversations, {int(cut)} are longer than data.sequence_length + 1 = 16 tokens and were cut, and"
    assert f"{counts} {left_out} were left out (data.chat.too_long)" in caplog.text
    if mode == "table":
        assert data.conversations["data.sources.0"] == {"conversations": 30, "cut": int(cut), "dropped": left_out}
    found = {one for batch in batches for one in conversations_of(batch)}
    first = tuple(i for i in [USER, *[IDS["a"]] * 4, END, BOT, IDS["b"], END, USER, *[IDS["a"]] * 5])
    assert (first in found) == cut
    assert all(len(one) <= LENGTH for one in found) and len(found) > 20


def test_a_conversation_of_as_many_tokens_as_a_sequence_and_one_more_is_kept_whole(tmp_path, tokenizer):
    # A word has one token, and the turns have four more and the answer.
    chats = [chat("u:" + " ".join("a" * words), "a:b") for words in (11, 12)]
    short = [chat(f"u:{a}", f"a:{b}") for a in "cdefg" for b in "cdefg"]
    file = write_chats(tmp_path / "c.jsonl", [*chats, *short])
    source = SourceConfig(kind="jsonl", path=str(file), format="chat")
    data = load_data(make_data(tmp_path, tokenizer, sources=(source,)))
    assert data.conversations["data.sources.0"] == {"conversations": 27, "cut": 1, "dropped": 0}


def test_a_source_whose_conversations_are_all_left_out_is_refused(tmp_path, tokenizer):
    file = write_chats(tmp_path / "c.jsonl", [chat("u:" + "a " * 20, f"a:{word}") for word in "abcdefghij"])
    source = SourceConfig(kind="jsonl", path=str(file), format="chat")
    for mode, message in (
        ("table", "too little text for one training"),
        ("streaming", "too little text for one valid"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(make_data(tmp_path, tokenizer, sources=(source,), mode=mode))


def test_a_stream_that_leaves_out_all_its_training_conversations_ends_with_a_message(tmp_path, tokenizer):
    def is_held_out(messages: list[dict[str, Any]]) -> bool:
        return is_validation(text_digest(messages_json(messages, "", "")[0].encode()), 0.2)

    short = [chat(f"u:{a} {b}", f"a:{c}") for a in "abcdefghij" for b in "abcdefghij" for c in "ab"]
    long = [chat("u:" + f"{a} " * 20, f"a:{b}") for a in "abcde" for b in "abcdefgh"]
    chats = [one for one in short if is_held_out(one)] + [one for one in long if not is_held_out(one)]
    source = SourceConfig(kind="jsonl", path=str(write_chats(tmp_path / "c.jsonl", chats)), format="chat")
    data = load_data(make_data(tmp_path, tokenizer, sources=(source,), mode="streaming"))
    stream = data.open_stream(range(1), num_parts=1, seed=None)
    with pytest.raises(DataError, match=r"\(jsonl\) holds no training document for part 0 of 1"):
        stream.take(1)


def mixed(tmp_path: Path, tokenizer: str, **settings: Any) -> DataConfig:
    """Conversations beside text, which gets twice their tokens."""
    texts = [" ".join(one["content"] for one in messages) for messages in make_chats(80, seed=1, words=9)]
    text = SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "t.jsonl", texts)), weight=2.0)
    chats = SourceConfig(kind="jsonl", path=str(write_chats(tmp_path / "c.jsonl", make_chats(60))), format="chat")
    return make_data(tmp_path, tokenizer, sources=(chats, text), **settings)


@pytest.mark.parametrize("settings", [{"mode": "table"}, {"mode": "streaming", "shuffle_window": 8}])
@pytest.mark.parametrize("make", [make_data, mixed])
def test_a_resumed_run_reads_the_same_sequences(tmp_path, tokenizer, settings, make):
    config = run_config(make(tmp_path, tokenizer, **settings))

    def loader() -> TrainLoader:
        return TrainLoader(config, load_data(config.data), 0, 1)

    whole, first, second = loader(), loader(), loader()
    want = [[b.targets_BS.tolist() for b in whole.batches(step)] for step in range(30)]
    for step in range(13):
        first.batches(step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [[b.targets_BS.tolist() for b in second.batches(step)] for step in range(13, 30)] == want[13:]
    assert whole.has_ignored_targets


@pytest.mark.parametrize("mode", ["table", "streaming"])
def test_every_token_of_text_beside_conversations_is_a_target(tmp_path, tokenizer, mode):
    config = run_config(mixed(tmp_path, tokenizer, mode=mode))
    loader = TrainLoader(config, load_data(config.data), 0, 1)
    targets = np.concatenate([b.targets_BS.numpy() for step in range(30) for b in loader.batches(step)])
    text = (targets != IGNORED_LABEL).all(axis=1)
    # Two thirds of the sequences are text.
    assert 0.55 < text.mean() < 0.75
    assert ((targets == IGNORED_LABEL).sum(axis=1)[~text] > 3).all()


@pytest.mark.parametrize("mode", ["table", "streaming"])
def test_validation_counts_the_bytes_of_the_answers(tmp_path, tokenizer, mode):
    data = load_data(make_data(tmp_path, tokenizer, mode=mode, sequence_length=60))
    (batch,) = evaluation_batches(data, num_sequences=64, micro_batch_size=64, rank=0, world_size=1)
    answers = batch.targets_BS[(batch.targets_BS != IGNORED_LABEL) & (batch.targets_BS != END)]
    # A word of one letter per target, and a space before each but the first of an answer.
    num_answers = (batch.targets_BS == END).sum()
    assert evaluation_num_bytes(data, 64) == 2 * len(answers) - num_answers
    assert data.validation.byte_counts.sum() == evaluation_num_bytes(data, 64)


def test_tables_and_resumption_depend_on_everything_that_changes_the_targets(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(MARKED)
    plain = make_data(tmp_path, tokenizer)
    saved = TrainLoader(run_config(plain), load_data(plain), 0, 1).state_dict()
    changes = {"template": str(tmp_path / "t.jinja"), "loss": "all", "too_long": "drop"}
    for number, (name, value) in enumerate(changes.items(), 2):
        config = plain.model_copy(update={"chat": ChatConfig(**{name: value})})
        loader = TrainLoader(run_config(config), load_data(config), 0, 1)
        assert len(list((tmp_path / "cache" / "tables").glob("*[!k]"))) >= number
        with pytest.raises(DataError, match=rf"differs from the checkpoint's \(data\.chat\.{name}: was "):
            loader.load_state_dict(saved)


def test_max_bytes_ends_between_two_conversations(tmp_path, tokenizer):
    config = make_data(tmp_path, tokenizer)
    sizes = [len(json.dumps(m, sort_keys=True, ensure_ascii=False)) for m in make_chats(60)]
    limit = sum(sizes[:40]) + sizes[40] - 1
    source = config.sources[0].model_copy(update={"max_bytes": limit})
    data = load_data(config.model_copy(update={"sources": (source,)}))
    assert data.conversations["data.sources.0"]["conversations"] == 40
