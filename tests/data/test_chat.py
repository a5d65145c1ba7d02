"""Conversations as tokens and targets, written out by hand, and what their records must hold."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsparse_moe.config.schema import ChatConfig, DataConfig, SourceConfig
from qsparse_moe.data.batch import IGNORED_LABEL, make_batch
from qsparse_moe.data.chat import Chat, ChatCounts
from qsparse_moe.data.chat_template import load_chat_template
from qsparse_moe.data.conversations import messages_json
from qsparse_moe.data.open_source import Limits
from qsparse_moe.data.packing import Packer
from qsparse_moe.data.sources import open_source
from qsparse_moe.data.tokenizer import load_tokenizer
from qsparse_moe.errors import DataError
from tests.data.conversations import (
    BOT,
    END,
    EOS,
    IDS,
    MARKED,
    PLAIN,
    REWRITING,
    STRICT,
    SYS,
    USER,
    chat,
    make_chats,
    save_chat_tokenizer,
    write_chats,
)

A, B, C, D, E = (IDS[word] for word in "abcde")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """Return a function that gives the folder of the tokenizer with a template, made once."""
    root, made = tmp_path_factory.mktemp("chat"), dict[str | None, Path]()

    def get(template: str | None) -> Path:
        if template not in made:
            made[template] = save_chat_tokenizer(root / str(len(made)), template)
        return made[template]

    return get


def make_chat(folder: Path, *, length: int = 20, **settings: Any) -> Chat:
    config = DataConfig(
        sources=(SourceConfig(kind="jsonl", path="x", format="chat"),),
        tokenizer=str(folder),
        sequence_length=length,
        chat=ChatConfig(**settings),
    )
    return Chat(config, load_tokenizer(str(folder)))


def targets_of(made: Chat, messages: list[dict[str, Any]]) -> tuple[list[int], list[int], int]:
    """Return the inputs, the targets without the padding behind them, and the bytes that count."""
    text, problem = messages_json(messages, "messages", "here")
    assert not problem
    conversation, problem = made.read(text, "here")
    assert not problem
    packer = Packer(made.sequence_length)
    found = made.documents([conversation], ChatCounts())
    packed = [packer.add(found), packer.finish()]
    (one,) = [part for part in packed if len(part.tokens)]
    batch = make_batch(one.tokens, document_token=EOS, attend_across_documents=False)
    size = len(found[0].tokens)
    return (
        batch.tokens_BS[0, :size].tolist(),
        batch.targets_BS[0, : size - 1].tolist(),
        int(one.num_bytes[0]),
    )


TWO_ANSWERS = chat("s:e", "u:a b", "a:c d", "u:a", "a:b")
I = IGNORED_LABEL  # noqa: E741


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_words_of_answers_and_the_token_that_ends_them_are_targets(folder, template):
    tokens, targets, num_bytes = targets_of(make_chat(folder(template)), TWO_ANSWERS)
    # fmt: off
    assert tokens == [SYS, E, END, USER, A, B, END, BOT, C, D, END, USER, A, END, BOT, B, END]
    assert targets == [I,  I, I,   I,   I, I, I,   C, D, END, I,   I, I,  I,   B, END]
    # fmt: on
    # "c d" and "b"; special tokens encode no text, and what an answer does not hold counts nothing.
    assert num_bytes == 4


def test_the_document_token_inside_a_conversation_begins_no_document(folder):
    made = make_chat(folder(STRICT), length=15)
    tokens, targets, _ = targets_of(made, chat("u:a", "a:b", "u:c", "a:d"))
    assert tokens == [USER, A, BOT, B, EOS, USER, C, BOT, D, EOS]
    assert targets == [I, I, B, EOS, I, I, I, D, EOS]
    text, _ = messages_json(chat("u:a", "a:b"), "messages", "here")
    packer = Packer(15)
    packed = packer.add(made.documents([made.read(text, "x")[0]] * 3, ChatCounts()))
    batch = make_batch(packed.tokens, document_token=EOS, attend_across_documents=False)
    assert batch.documents_BS.tolist() == [[0] * 5 + [1] * 5 + [2] * 5]
    assert batch.positions_BS.tolist() == [[*range(5)] * 3]
    assert batch.targets_BS.tolist() == [[I, I, B, EOS, I] * 3]


def test_every_token_but_the_first_is_a_target_with_loss_all(folder):
    # The answers need not be known then, so any template will do.
    tokens, targets, num_bytes = targets_of(make_chat(folder(REWRITING), loss="all"), chat("u:a", "a:b", "u:c", "a:d"))
    assert targets == tokens[1:]
    # With the "j" that this template writes before its first answer, and a space.
    assert num_bytes == 6
    made = make_chat(folder(STRICT), length=9, loss="all")
    text, _ = messages_json(chat("u:a", "a:b"), "messages", "here")
    packed = Packer(9).add(made.documents([made.read(text, "x")[0]] * 2, ChatCounts()))
    batch = make_batch(packed.tokens, document_token=EOS, attend_across_documents=False)
    # Nor is the first token of the second one, which does not follow from the first.
    assert batch.targets_BS.tolist() == [[A, BOT, B, EOS, I, A, BOT, B, EOS]]


@pytest.mark.parametrize(("loss", "counted"), [("answers", "c db"), ("all", "ea bc dab")])
def test_the_text_that_counts_is_that_of_the_answers_or_of_all_messages(folder, loss, counted):
    text, _ = messages_json(TWO_ANSWERS, "messages", "here")
    made = make_chat(folder(PLAIN), loss=loss)
    conversation, problem = made.read(text, "here")
    assert (conversation.counted, str(conversation), problem) == (counted, text, "")
    assert (made.describe()["loss"], made.describe()["too_long"]) == (loss, "cut")


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%\n generation +%}"])
def test_answers_are_those_that_the_template_marks_however_its_tag_is_written(folder, tag):
    said = "{{ m.content + '<end>' }}"
    marked = f"{{% if m.role == 'assistant' %}}{tag}{said}{{% endgeneration %}}{{% else %}}{said}{{% endif %}}"
    # Without its marks this template does not show where the first answer is.
    template = load_chat_template(load_tokenizer(str(folder(PLAIN))), REWRITING.replace(said, marked))
    text, answers = template.render(chat("u:a", "a:b", "u:c", "a:d"))
    assert [text[slice(*span)] for span in answers] == ["b<end>", "d<end>"]


def test_white_space_behind_the_end_of_a_turn_is_no_part_of_an_answer_unless_it_is_the_end(folder):
    template = load_chat_template(load_tokenizer(str(folder(PLAIN))))
    text, answers = template.render(chat("u:a", "a:b", "u:c", "a:d"))
    assert [text[slice(*span)] for span in answers] == ["b<end>", "d<end>"]
    lines = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    text, answers = load_chat_template(load_tokenizer(str(folder(PLAIN))), lines).render(chat("u:a", "a:b"))
    assert [text[slice(*span)] for span in answers] == ["assistant: b\n"]


# Forms that templates of models have: a system message of their own, contents without white space around them, the
# first token of a text, a system message inside the first question, and a header before every turn.
FORMS = {
    "own system message": (
        "{% if messages[0].role != 'system' %}{{ '<sys>e<end>\n' }}{% endif %}"
        "{% for m in messages %}{{ m.role + '\n' + m.content | trim + '<end>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}",
        "<end>",
    ),
    "instructions": (
        "{{ '</s>' }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[ ' + m.content + ' ]' }}"
        "{% else %}{{ ' ' + m.content | trim + '<end>' }}{% endif %}{% endfor %}",
        "<end>",
    ),
    "headers": (
        "{% for m in messages %}{{ '<user>' + m.role + '<bot>\n\n' + m.content | trim + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<user>assistant<bot>\n\n' }}{% endif %}",
        "<end>",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_found_in_the_forms_that_templates_have(folder, form):
    source, end = FORMS[form]
    template = load_chat_template(load_tokenizer(str(folder(None))), source)
    text, answers = template.render(chat("u:a", "a: b c ", "u:d", "a:e"))
    assert [text[slice(*span)].strip() for span in answers] == [f"b c{end}", f"e{end}"]
    # What generation is prompted with ends where the answer begins; without a prompt of its own, a space is the
    # answer's.
    prompt = template.encode(chat("u:a", "a: b c ", "u:d"))
    assert prompt == template.tokenize([text[: answers[1][0]]])[0].ids


@pytest.mark.parametrize("template", [PLAIN, MARKED, STRICT])
def test_an_answer_ends_with_the_special_token_that_generation_stops_at(folder, template):
    end = load_chat_template(load_tokenizer(str(folder(template)))).end_of_answer()
    assert end == (EOS if template is STRICT else END)


def test_the_prompt_of_a_conversation_is_how_the_whole_begins(folder):
    template = load_chat_template(load_tokenizer(str(folder(PLAIN))))
    prompt = template.encode(TWO_ANSWERS[:2])
    assert prompt == template.tokenize([template.render(TWO_ANSWERS).text])[0].ids[: len(prompt)]


def test_tokens_and_targets_are_those_of_transformers(folder):
    from transformers import PreTrainedTokenizerFast

    made = make_chat(folder(MARKED), length=60)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder(MARKED))
    for messages in make_chats(20) + [TWO_ANSWERS]:
        found = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        tokens, targets, _ = targets_of(made, messages)
        assert tokens == found["input_ids"]
        want = [i if mask else I for i, mask in zip(found["input_ids"], found["assistant_masks"], strict=True)]
        assert targets == want[1:]


def test_all_bytes_of_a_character_that_is_several_tokens_are_targets(bpe_folder, tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}{{ m.role[0] + m.content + '<|end|>' }}{% endfor %}")
    copy = shutil.copytree(bpe_folder, tmp_path / "bpe")
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    made = make_chat(copy, length=60, template=str(file))
    tokens, targets, num_bytes = targets_of(made, chat("u:Ω", "a:é♞"))
    tokenizer = load_tokenizer(str(copy))
    answer = tokenizer.encode("aé♞")
    assert [i for i in targets if i != I] == [*answer, 1]
    assert (tokens[-1], num_bytes) == (1, len("aé♞".encode()))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "holds str, and a conversation must be a list of messages with role and content"),
        ([], "holds an empty list, and a conversation must be a list"),
        (["a"], "message 0 of column 'messages' is str, and it must be an object"),
        ([{"content": "a"}], "message 0 of column 'messages' has no role"),
        ([{"role": "user"}], r"message 0 of column 'messages' \(role user\) has no text in content"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"\(role user\) has no text in content"),
        (chat("u:a", "a: "), r"message 1 of column 'messages' \(role assistant\) is an empty answer"),
        (chat("u:a"), "no message has the role assistant, and the loss needs an answer"),
        (chat("u:a", "u:b", "a:c"), r"cannot write this conversation \(roles must alternate\)"),
        (chat("u:\ud83d", "a:b"), "half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_record_that_is_no_conversation_is_named_or_skipped(folder, tmp_path, caplog, kind, messages, message):
    good = chat("u:a", "a:b")
    if kind == "jsonl":
        file = write_chats(tmp_path / "chats.jsonl", [good, messages, good])
    else:
        try:
            pq.write_table(pa.table({"messages": [good, messages, good]}), tmp_path / "chats.parquet")
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
            pytest.skip("Parquet has no columns of several types")
        file = tmp_path / "chats.parquet"
    config, made = SourceConfig(kind=kind, path=str(file), format="chat"), make_chat(folder(STRICT))
    with pytest.raises(DataError, match=rf"data\.sources\.0 \({kind}\): .*chats\.{kind}, row 1.*{message}"):
        list(open_source(config, 0, chat=made).texts())
    with caplog.at_level(logging.WARNING):
        texts = list(open_source(config, 0, Limits(max_bad_records=1), chat=made).texts())
    assert [json.loads(text) for text in texts] == [good, good]
    assert "1 bad records skipped in this pass" in caplog.text


# The prompt for an answer is not how an answer begins.
PROMPTING = PLAIN.replace("{{ '<bot>' }}{% endif %}", "{{ '<bot> j' }}{% endif %}")


@pytest.mark.parametrize("template", [REWRITING, PROMPTING])
def test_a_template_that_hides_its_answers_is_refused_with_the_way_out(folder, tmp_path, template):
    good = [] if template is PROMPTING else [chat("u:a", "a:b")]
    file = write_chats(tmp_path / "c.jsonl", [*good, chat("u:a", "a:b", "u:c", "a:d")])
    config, made = SourceConfig(kind="jsonl", path=str(file), format="chat"), make_chat(folder(template))
    message = (
        rf"c\.jsonl, row {len(good)}: the chat template of .* does not show where answer 1 .*% generation %.*loss=all"
    )
    with pytest.raises(DataError, match=message):
        # Not a bad record: other conversations would be written wrongly too.
        list(open_source(config, 0, Limits(max_bad_records=9), chat=made).texts())
    marked = "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + PLAIN
    (tmp_path / "t.jinja").write_text(marked)
    made = make_chat(folder(PLAIN), template=str(tmp_path / "t.jinja"))
    with pytest.raises(DataError, match=r"row 0: the chat template marks no answer .* put the blocks around every"):
        list(open_source(config, 0, chat=made).texts())


def test_a_template_or_tokenizer_that_cannot_be_used_is_named(folder, bpe_folder, tmp_path):
    (tmp_path / "t.jinja").write_text(PLAIN)
    with pytest.raises(DataError, match=r"data\.tokenizer \(.*\) has no chat template, .* data\.chat\.template"):
        make_chat(folder(None))
    with pytest.raises(DataError, match=r"transformers cannot open this tokenizer \(TypeError: Special token eos"):
        make_chat(bpe_folder, template=str(tmp_path / "t.jinja"))
    with pytest.raises(DataError, match=r"data\.chat\.template \(.*none\.jinja\) cannot be read \(FileNotFound"):
        make_chat(folder(None), template=str(tmp_path / "none.jinja"))
    assert targets_of(make_chat(folder(None), template=str(tmp_path / "t.jinja")), chat("u:a", "a:b"))[1][-1] == END


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub", "saved"])
def test_every_kind_of_source_gives_the_same_conversations(folder, tmp_path, kind):
    chats = [chat("u:a", "a:b"), TWO_ANSWERS]
    path = tmp_path / "set" / f"c.{'parquet' if kind in ('hub', 'saved') else kind}"
    path.parent.mkdir()
    if kind == "jsonl":
        write_chats(path, chats, "talk")
    else:
        pq.write_table(pa.table({"talk": chats}), path)
    if kind == "saved":
        import datasets

        datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "hf")).save_to_disk(tmp_path / "saved")
    place = {"hub": tmp_path / "set", "saved": tmp_path / "saved"}.get(kind, path)
    source = SourceConfig(kind=kind, path=str(place), format="chat", column="talk")
    assert [json.loads(t) for t in open_source(source, 0, chat=make_chat(folder(PLAIN))).texts()] == chats


def test_the_forms_of_sharegpt_and_openai_are_read():
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": None}]
    assert json.loads(messages_json(shared, "conversations", "x")[0]) == chat("u:a", "a:b")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    asked = [{"role": "user", "content": parts}, call, *chat("t:c", "a:d")]
    found = json.loads(messages_json(asked, "messages", "x")[0])
    assert found[0] == {"role": "user", "content": "a b"}
    assert found[1] == {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert found[2:] == chat("t:c", "a:d")


def test_numbers_in_a_message_stay_numbers(folder, tmp_path):
    call = {"role": "assistant", "content": "b", "tool_calls": [{"arguments": {"n": 7, "x": 0.5, "y": int("9" * 50)}}]}
    file = write_chats(tmp_path / "c.jsonl", [[*chat("u:a"), call]])
    config = SourceConfig(kind="jsonl", path=str(file), format="chat")
    (text,) = open_source(config, 0, chat=make_chat(folder(PLAIN))).texts()
    assert json.loads(text)[1] == call
