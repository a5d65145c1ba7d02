"""Rules about the vocabulary and the sources: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest

from tests.config.settings_by_path import messages
from tests.support.messages import assert_one_message

# Broken settings; the parts of the message in order (settings with values, the numbers of the rule, the way out); and a
# change that repairs them.
CASES = {
    "vocabulary too small for bytes": (
        {"model.vocab_size": 256},
        (
            "model.vocab_size (256)",
            "257",
            "data.tokenizer",
            "256",
            "remove",
        ),
        {"model.vocab_size": None},
    ),
    "standard library with a path": (
        {"data.sources": [{"path": "x.py"}]},
        (
            'data.sources.0.path ("x.py")',
            "null",
            "stdlib",
            "remove",
        ),
        {"data.sources": [{"path": "x.py", "kind": "text"}]},
    ),
    "text without a path": (
        {"data.sources": [{}, {"kind": "text"}]},
        (
            "data.sources.1.path (null)",
            "text",
        ),
        {"data.sources": [{}, {"kind": "text", "path": "texts/*.txt"}]},
    ),
    "JSONL with an empty list": (
        {"data.sources": [{"kind": "jsonl", "path": []}]},
        (
            "data.sources.0.path ([])",
            "jsonl",
            "jsonl",
        ),
        {"data.sources": [{"kind": "jsonl", "path": ["a.jsonl"]}]},
    ),
    "hub with two names": (
        {"data.sources": [{"kind": "hub", "path": ["a/b", "c/d"]}]},
        (
            'data.sources.0.path (["a/b", "c/d"])',
            "hub",
        ),
        {"data.sources": [{"kind": "hub", "path": "a/b"}]},
    ),
    "column of plain text": (
        {"data.sources": [{"kind": "text", "path": "a", "column": "body"}]},
        (
            'data.sources.0.column ("body")',
            "text",
            "remove",
        ),
        {"data.sources": [{"kind": "jsonl", "path": "a", "column": "body"}]},
    ),
    "conversations in plain text": (
        {"data.sources": [{"kind": "text", "path": "a", "format": "chat"}], "data.tokenizer": "some/model"},
        (
            'data.sources.0.format ("chat")',
            "text",
            "jsonl",
        ),
        {"data.sources": [{"kind": "jsonl", "path": "a", "format": "chat"}]},
    ),
    "conversations as bytes": (
        {"data.sources": [{"kind": "jsonl", "path": "a", "format": "chat"}]},
        (
            'data.tokenizer ("bytes")',
            "special tokens",
            "Hugging Face tokenizer",
        ),
        {"data.tokenizer": "some/model"},
    ),
    "conversations that attend to each other": (
        {
            "data.sources": [{"kind": "jsonl", "path": "a", "format": "chat"}],
            "data.tokenizer": "some/model",
            "data.attend_across_documents": True,
        },
        (
            "data.attend_across_documents (true)",
            "false",
            "chat",
        ),
        {"data.attend_across_documents": False},
    ),
    "conversations with a vocabulary that leaves no room for marks": (
        {
            "data.sources": [{"kind": "jsonl", "path": "a", "format": "chat"}],
            "data.tokenizer": "some/model",
            "model.vocab_size": 2**28 + 1,
        },
        (
            "model.vocab_size (268435457)",
            "268435456",
            "chat",
        ),
        {"model.vocab_size": 2**28},
    ),
    "separator of JSONL": (
        {"data.sources": [{"kind": "jsonl", "path": "a", "separator": "--"}]},
        (
            'data.sources.0.separator ("--")',
            "jsonl",
            "remove",
        ),
        {"data.sources": [{"kind": "text", "path": "a", "separator": "--"}]},
    ),
    "subset of local files": (
        {"data.sources": [{"kind": "parquet", "path": "a", "subset": "x"}]},
        (
            'data.sources.0.subset ("x")',
            "parquet",
            "remove",
            "hub",
        ),
        {"data.sources": [{"kind": "hub", "path": "a", "subset": "x"}]},
    ),
    "split of local files": (
        {"data.sources": [{"split": "test"}]},
        (
            'data.sources.0.split ("test")',
            "stdlib",
            "remove",
            "hub",
            "saved",
        ),
        {"data.sources": [{"kind": "hub", "path": "a", "split": "test"}]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_setting_value_rule_and_way_out(case):
    settings, parts, _ = CASES[case]
    assert_one_message(messages(settings), parts)


@pytest.mark.parametrize("case", CASES)
def test_way_out_repairs_the_settings(case):
    settings, _, repaired = CASES[case]
    assert messages(settings | repaired) == []
