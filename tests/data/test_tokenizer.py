from __future__ import annotations

import json
import pickle
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    byte_offsets,
    check_vocabulary,
    load_tokenizer,
    meaningless_ids,
    with_vocabulary,
)
from qsparse_moe.errors import ConfigError, DataError

SPELLED = "a<|end|>b <|begin|> naïve 漢字 😀\n"


def save_tokenizer(folder: Path, *, vocabulary: list[str], unknown: str, settings: dict[str, object]) -> Path:
    """A word-level tokenizer: its words, special spellings included, are found in text as they stand."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_decode_to_the_text_they_encode(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode([256, *ids, 256, 263]) == text
    (document,) = tokenizer.tokenize([text])
    assert document.tokens.tolist() == [256, *ids]
    assert document.num_bytes.tolist() == [0] + [1] * len(ids)


def test_bytes_that_are_no_utf8_decode_to_the_replacement_character() -> None:
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a�b"


def test_a_hugging_face_folder_begins_documents_with_its_end_token(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_folder))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.document_token, tokenizer.vocab_size) == (1, 400)
    (document,) = tokenizer.tokenize([SPELLED])
    assert document.tokens[0] == 1
    assert document.tokens[1:].tolist() == tokenizer.encode(SPELLED)


def test_special_tokens_spelled_in_text_are_ordinary_text(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_folder))
    ids = tokenizer.encode(SPELLED)
    assert not {0, 1} & set(ids)
    assert len(ids) > 8, "neither the file's truncation nor its padding may apply"
    assert tokenizer.decode([1, *ids, 1]) == SPELLED
    assert 0 < len(tokenizer.encode("half")) < 8


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_bytes_of_the_tokens_add_up_to_the_text(bpe_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(bpe_folder))
    (document,) = tokenizer.tokenize([text])
    assert len(document.num_bytes) == len(document.tokens) and (document.num_bytes >= 0).all()
    assert document.num_bytes.sum() == len(text.encode("utf-8"))


def test_bytes_are_those_of_each_tokens_own_text(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_folder))
    (document,) = tokenizer.tokenize(["expert é漢 zz"])
    whole = [tokenizer.decode([token]) for token in document.tokens[1:].tolist()]
    for text, num_bytes in zip(whole, document.num_bytes[1:].tolist(), strict=True):
        if "�" not in text:  # a token that is a part of a character has no text of its own
            assert num_bytes == len(text.encode("utf-8"))
    assert sum("�" not in text for text in whole) >= 4


def test_ids_that_a_tokenizer_does_not_have_are_left_out(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_folder))
    assert tokenizer.decode([*tokenizer.encode("half"), 407, 1]) == "half"


def test_a_word_that_is_the_document_token_is_cut_in_two(tmp_path: Path) -> None:
    folder = save_tokenizer(
        tmp_path / "words",
        vocabulary=["<unk>", "</s>", "<", "/s>", "one", "two"],
        unknown="<unk>",
        settings={"eos_token": "</s>"},
    )
    tokenizer = load_tokenizer(str(folder))
    (document,) = tokenizer.tokenize(["one </s> two </s>"])
    assert document.tokens.tolist() == [1, 4, 2, 3, 5, 2, 3]
    assert document.num_bytes.sum() == len("one </s> two </s>")


def test_the_last_token_accounts_for_the_text_that_the_tokenizer_drops_after_it(tmp_path: Path) -> None:
    folder = save_tokenizer(
        tmp_path / "words", vocabulary=["<unk>", "</s>", "one"], unknown="<unk>", settings={"eos_token": "</s>"}
    )
    (document,) = load_tokenizer(str(folder)).tokenize(["  one one\n\n"])
    assert document.tokens.tolist() == [1, 2, 2]
    assert document.num_bytes.tolist() == [0, 5, 6]


def test_text_that_becomes_the_document_token_is_refused(tmp_path: Path) -> None:
    folder = save_tokenizer(
        tmp_path / "words", vocabulary=["</s>", "one"], unknown="</s>", settings={"eos_token": "</s>"}
    )
    with pytest.raises(DataError, match=r"encodes ordinary text as its document token '</s>' \('one two'\).*choose"):
        load_tokenizer(str(folder)).tokenize(["one two"])


def test_the_begin_token_serves_where_there_is_no_end_token(bpe_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bpe_folder, tmp_path / "copy"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|begin|>"}))
    assert load_tokenizer(str(folder)).document_token == 0


def test_tokenizer_config_has_the_last_word_and_the_end_token_comes_before_the_begin_token(
    bpe_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bpe_folder, tmp_path / "copy"))
    # Either file may write a token as an object.
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|begin|>", "bos_token": "<|end|>"}))
    assert load_tokenizer(str(folder)).document_token == 1
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|end|>"}))
    assert load_tokenizer(str(folder)).document_token == 0


def test_a_tokenizer_without_either_token_is_refused(bpe_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bpe_folder, tmp_path / "copy"))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"data\.tokenizer \(.*copy\).*neither eos_token nor bos_token.*set eos_token"):
        load_tokenizer(str(folder))


def test_an_end_token_outside_the_vocabulary_is_refused(bpe_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bpe_folder, tmp_path / "copy"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|stop|>"}))
    with pytest.raises(DataError, match=r"'<\|stop\|>' is not in its vocabulary.*correct eos_token"):
        load_tokenizer(str(folder))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist.*save_pretrained"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match=r"data\.tokenizer \(\./nowhere\).*does not exist"):
        load_tokenizer("./nowhere")


def test_a_broken_tokenizer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read.*save it again"):
        load_tokenizer(str(tmp_path))


def test_a_broken_settings_file_is_refused(bpe_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bpe_folder, tmp_path / "copy"))
    (folder / "tokenizer_config.json").write_text("{not json")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON.*save it again"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("has_template", [True, False])
def test_a_hub_name_is_fetched_file_by_file(
    bpe_folder: Path, monkeypatch: pytest.MonkeyPatch, has_template: bool
) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    requested = []

    def fetch(name: str, file: str) -> str:
        requested.append((name, file))
        if file == "chat_template.jinja" and not has_template:
            raise EntryNotFoundError("404")
        return str(bpe_folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    tokenizer = load_tokenizer("owner/name")
    files = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert requested == [("owner/name", file) for file in files]
    assert [file.name for file in tokenizer.files] == files[: 2 + has_template]
    assert tokenizer.fingerprint == load_tokenizer(str(bpe_folder)).fingerprint


def test_a_hub_name_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, file: str) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    with pytest.raises(DataError, match=r"data\.tokenizer \(owner/name\).*ConnectionError: no route; .*local folder"):
        load_tokenizer("owner/name")


def test_the_fingerprint_distinguishes_tokenizers(bpe_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bpe_folder, tmp_path / "copy"))
    same = load_tokenizer(str(folder)).fingerprint
    assert same == load_tokenizer(str(bpe_folder)).fingerprint != ByteTokenizer().fingerprint
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|begin|>"}))
    assert load_tokenizer(str(folder)).fingerprint != same


def test_a_vocabulary_with_gaps_counts_to_its_largest_id(tmp_path: Path) -> None:
    folder = save_tokenizer(
        tmp_path / "words", vocabulary=["<unk>", "</s>"], unknown="<unk>", settings={"eos_token": "</s>"}
    )
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["model"]["vocab"]["far"] = 70
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.vocab_size, tokenizer.absent_ids) == (71, tuple(range(2, 70)))
    # A model has rows for gaps and for the padding behind the last id, and neither is ever generated.
    assert meaningless_ids(ModelConfig(vocab_size=72), tokenizer) == (*range(2, 70), 71)
    assert meaningless_ids(ModelConfig(vocab_size=71), tokenizer) == tuple(range(2, 70))
    assert meaningless_ids(ModelConfig(vocab_size=264), ByteTokenizer()) == tuple(range(257, 264))


def test_a_model_with_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    check_vocabulary(ModelConfig(vocab_size=257), ByteTokenizer())
    with pytest.raises(ConfigError, match=r"model\.vocab_size \(256\) must be at least the tokenizer's \(257\).*264"):
        check_vocabulary(ModelConfig(vocab_size=256), ByteTokenizer())


@pytest.mark.parametrize(("given", "used"), [(None, 264), (257, 257), (300, 300)])
def test_the_vocabulary_is_the_one_that_is_set_or_the_multiple_of_8_that_the_tokenizer_needs(
    given: int | None, used: int
) -> None:
    config = with_vocabulary(RunConfig(model=ModelConfig(vocab_size=given)))
    assert (config.model.vocab_size, config.data.tokenizer) == (used, "bytes")
    with pytest.raises(ConfigError, match=r"model\.vocab_size \(256\) must be at least"):
        with_vocabulary(RunConfig(model=ModelConfig(vocab_size=256)))


def test_byte_tokens_need_no_tokenizers_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer("bytes").tokenize(["é"])[0].tokens.dtype == np.int32


@pytest.mark.parametrize(
    "name", ["tok_hff", "./tok", "x/y/z", "other.json", "spm.model", "none/", "sub/tok_h", "sub/none", "~/none"]
)
def test_a_name_like_a_path_is_not_requested_from_the_hub(
    bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bpe_folder, "tok_hf")
    shutil.copytree(bpe_folder, "sub/tok_hf")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("requested"))
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist; .*The hub is not asked for a path\. Correct"):
        load_tokenizer(name)
    if "tok_h" in name:
        with pytest.raises(DataError, match=r"\(did you mean (sub/)?tok_hf\?\)"):
            load_tokenizer(name)
    assert load_tokenizer("tok_hf/tokenizer.json").fingerprint == load_tokenizer("tok_hf").fingerprint


def test_a_slow_hub_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("qsparse_moe.data.hub_wait.SILENT_SECONDS", 0.05)

    def fetch(name: str, file: str) -> str:
        time.sleep(0.3)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    with pytest.raises(DataError):
        load_tokenizer("owner/name")
    assert "waiting for the hub's answer about the tokenizer owner/name (data.tokenizer)" in caplog.text


def test_a_copy_of_a_tokenizer_is_the_same_one(bpe_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_folder))
    tokenizer.save(tmp_path / "run" / "tokenizer")
    tokenizer.save(tmp_path / "run" / "tokenizer")
    assert load_tokenizer(str(tmp_path / "run" / "tokenizer")).fingerprint == tokenizer.fingerprint
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]
    tokenizer.save(tmp_path / "run" / "tokenizer", "{{ messages }}")
    copied = load_tokenizer(str(tmp_path / "run" / "tokenizer"))
    assert [file.name for file in copied.files] == [*(file.name for file in tokenizer.files), "chat_template.jinja"]
    assert (tmp_path / "run" / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer"], "nothing is left beside it"
    ByteTokenizer().save(tmp_path / "bytes")
    assert not (tmp_path / "bytes").exists()


def test_bytes_before_every_character_are_counted_at_the_limits_of_utf_8():
    # The last character of one byte and the first of two, and so on: U+7F, U+80, U+7FF, U+800, U+FFFF, U+10000.
    text = "\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff"
    assert byte_offsets(text).tolist() == [len(text[:place].encode()) for place in range(len(text) + 1)]
    assert byte_offsets(text).tolist() == [0, 1, 3, 5, 8, 11, 15, 19]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_ids_without_bytes_are_those_of_documents(bpe_folder: Path, text: str) -> None:
    for tokenizer in (load_tokenizer(str(bpe_folder)), ByteTokenizer()):
        texts = [text, SPELLED, text * 2]
        want = [document.tokens.tolist() for document in tokenizer.tokenize(texts)]
        found = tokenizer.token_ids(texts)
        assert [ids.tolist() for ids in found] == want and all(ids.dtype == np.int32 for ids in found)


def test_ids_without_bytes_cut_and_refuse_the_same_words(tmp_path: Path) -> None:
    settings = {"eos_token": "</s>"}
    words = ["<unk>", "</s>", "<", "/s>", "one", "two"]
    tokenizer = load_tokenizer(
        str(save_tokenizer(tmp_path / "words", vocabulary=words, unknown="<unk>", settings=settings))
    )
    (ids,) = tokenizer.token_ids(["one </s> two </s>"])
    assert ids.tolist() == [1, 4, 2, 3, 5, 2, 3]
    folder = save_tokenizer(tmp_path / "unknown", vocabulary=["</s>", "one"], unknown="</s>", settings=settings)
    with pytest.raises(DataError, match=r"encodes ordinary text as its document token '</s>' \('one two'\)"):
        load_tokenizer(str(folder)).token_ids(["one two"])


def test_another_process_gets_the_same_tokenizer(bpe_folder: Path) -> None:
    """The library's own pickling would parse special tokens out of text again."""
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer(str(bpe_folder))))
    assert tokenizer.fingerprint == load_tokenizer(str(bpe_folder)).fingerprint
    assert tokenizer.encode(SPELLED) == load_tokenizer(str(bpe_folder)).encode(SPELLED)
    assert isinstance(pickle.loads(pickle.dumps(ByteTokenizer())), ByteTokenizer)
