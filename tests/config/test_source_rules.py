"""Which settings of a source each kind takes, one at a time, and which sources a run of conversations may have."""

from __future__ import annotations

import pytest

from qsparse_moe.config.file_sources import file_sources, has_only_conversations, sources_overrides
from qsparse_moe.config.schema import DataConfig, SourceConfig
from tests.config.settings_by_path import messages

ONE_PATH = {"path": "a"}
SETTINGS = {
    "no path": {},
    "an empty path": {"path": ""},
    "no paths": {"path": []},
    "a path": ONE_PATH,
    "paths": {"path": ["a", "b"]},
    "separator": ONE_PATH | {"separator": "--"},
    "column": ONE_PATH | {"column": "body"},
    "chat": ONE_PATH | {"format": "chat"},
    "subset": ONE_PATH | {"subset": "x"},
    "split": ONE_PATH | {"split": "test"},
}
# The settings above that a kind takes; a path is removed for stdlib, which takes none.
TAKEN = {
    "stdlib": {"no path"},
    "text": {"a path", "paths", "separator"},
    "jsonl": {"a path", "paths", "column", "chat"},
    "parquet": {"a path", "paths", "column", "chat"},
    "saved": {"a path", "column", "chat", "split"},
    "hub": {"a path", "column", "chat", "subset", "split"},
}


@pytest.mark.parametrize("kind", TAKEN)
def test_a_kind_takes_its_settings_and_refuses_the_others(kind):
    taken = set()
    for name, settings in SETTINGS.items():
        settings = {"kind": kind} | settings
        if kind == "stdlib" and settings.get("path") == "a" and name != "a path":
            del settings["path"]
        found = messages({"data.sources": [{}, settings], "data.tokenizer": "some/model"})
        assert len(found) <= 1 and all(message.startswith("data.sources.1.") for message in found), found
        if not found:
            taken.add(name)
    assert taken == TAKEN[kind]


@pytest.mark.parametrize(
    ("kind", "example"), [("text", "texts/*.txt"), ("jsonl", "texts/*.jsonl"), ("parquet", "texts/*.parquet")]
)
def test_the_example_of_a_path_has_the_suffix_of_the_kind(kind, example):
    (message,) = messages({"data.sources": [{"kind": kind}]})
    expected = f"data.sources.0.path (null) must name files or globs when kind is {kind}, such as {example}"
    assert message == expected


CHAT, TEXT = {"kind": "jsonl", "path": "a", "format": "chat"}, {"kind": "jsonl", "path": "a"}


@pytest.mark.parametrize("sources", [[CHAT], [CHAT, TEXT], [TEXT, CHAT], [TEXT, CHAT, TEXT]])
def test_one_source_of_conversations_among_others_is_enough_for_their_rules(sources):
    settings = {"data.sources": sources, "data.attend_across_documents": True, "model.vocab_size": 2**28 + 1}
    starts = [message.split()[0] for message in messages(settings)]
    assert starts == ["data.tokenizer", "data.attend_across_documents", "model.vocab_size"]
    assert messages(settings | {"data.sources": [TEXT, TEXT]}) == []


@pytest.mark.parametrize(("vocabulary", "tokenizer", "number"), [(256, "bytes", 1), (256, "some/model", 0)])
def test_only_the_tokenizer_of_bytes_requires_a_vocabulary_of_all_bytes(vocabulary, tokenizer, number):
    assert len(messages({"model.vocab_size": vocabulary, "data.tokenizer": tokenizer})) == number


def chat(column="text"):
    return SourceConfig(kind="jsonl", path="run.jsonl", format="chat", column=column)


FILES = ("a.jsonl", "b.parquet", "c.txt", "d.jsonl.gz", "e.txt.gz", "jsonl", "f.parquet.jsonl", "g.jsonl.txt")
KINDS = ["jsonl", "parquet", "text", "jsonl", "text", "text", "jsonl", "text"]


def test_a_named_file_is_a_source_of_the_kind_of_its_suffix():
    found = file_sources(FILES, DataConfig())
    assert [(source.path, source.kind) for source in found] == list(zip(FILES, KINDS, strict=True))
    assert {(source.format, source.column) for source in found} == {("text", "text")}


def test_records_are_conversations_in_the_column_of_the_run_if_the_run_has_only_those():
    found = file_sources(FILES, DataConfig(sources=(chat("dialogue"), chat("turns"))))
    assert [source.kind for source in found] == KINDS
    for source in found:
        expected = ("text", "text") if source.kind == "text" else ("chat", "dialogue")
        assert (source.format, source.column) == expected


@pytest.mark.parametrize("sources", [(chat(), SourceConfig()), (SourceConfig(), chat()), (SourceConfig(),)])
def test_records_are_texts_if_the_run_has_another_source(sources):
    data = DataConfig(sources=sources)
    assert not has_only_conversations(data)
    assert [source.format for source in file_sources(["a.jsonl"], data)] == ["text"]


def test_the_sources_of_a_run_are_replaced_by_one_setting_or_left():
    assert sources_overrides([], DataConfig()) == ()
    assert sources_overrides(["a.txt", "b.jsonl"], DataConfig(sources=(chat("turns"),))) == (
        'data.sources=[{"kind": "text", "path": "a.txt", "format": "text", "column": "text"}, '
        '{"kind": "jsonl", "path": "b.jsonl", "format": "chat", "column": "turns"}]',
    )
