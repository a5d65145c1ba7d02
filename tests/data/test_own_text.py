"""Files of the user as sequences: the contents of the last one, and the sequences of each rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qsparse_moe.config.schema import DataConfig, SourceConfig
from qsparse_moe.data.batch import IGNORED_LABEL
from qsparse_moe.data.own_text import OwnText
from qsparse_moe.data.tokenizer import ByteTokenizer
from qsparse_moe.errors import DataError
from tests.data.corpus import write_jsonl

MakeConfig = Callable[..., DataConfig]


def own_text(data_config: MakeConfig, tmp_path: Path, *texts: str) -> OwnText:
    file = write_jsonl(tmp_path / "own.jsonl", list(texts))
    return OwnText([str(file)], data_config(SourceConfig(kind="stdlib"), sequence_length=4), ByteTokenizer())


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a", [["a", None, None, None]]),
        ("abc", [["a", "b", "c", None]]),
        # Five tokens make one row, and the one that waits is the input of no label.
        ("abcd", [["a", "b", "c", "d"]]),
        ("abcde", [["a", "b", "c", "d"], ["e", None, None, None]]),
        ("abcdefgh", [["a", "b", "c", "d"], ["e", "f", "g", "h"]]),
    ],
)
def test_every_byte_is_a_label_once_and_the_last_sequence_is_padded_with_ignored_labels(
    data_config: MakeConfig, tmp_path: Path, text: str, labels: list[list[str | None]]
) -> None:
    found = own_text(data_config, tmp_path, text)
    (batch,) = found.batches(8)
    want = [[IGNORED_LABEL if label is None else ord(label) for label in row] for row in labels]
    assert batch.targets_BS.tolist() == want
    assert (len(found), found.num_bytes) == (len(labels), len(text))


def test_ranks_take_micro_batches_in_turn_and_only_the_last_sequence_is_shorter(
    data_config: MakeConfig, tmp_path: Path
) -> None:
    found = own_text(data_config, tmp_path, "abcdefghijklmnopqr")  # 4 rows of 4 labels and one of 2
    firsts = [[batch.targets_BS[:, 0].tolist() for batch in found.batches(2, rank=r, world_size=2)] for r in (0, 1)]
    assert firsts == [[[ord("a"), ord("e")], [ord("q")]], [[ord("i"), ord("m")]]]
    counts = [
        int((batch.targets_BS != IGNORED_LABEL).sum())
        for r in (0, 1)
        for batch in found.batches(2, rank=r, world_size=2)
    ]
    assert counts == [8, 2, 8]
    # A batch that ends with the last row holds the cut as well.
    assert [int((batch.targets_BS != IGNORED_LABEL).sum()) for batch in found.batches(5)] == [18]


def test_a_document_without_text_has_no_token_and_its_neighbours_are_separate(
    data_config: MakeConfig, tmp_path: Path
) -> None:
    found = own_text(data_config, tmp_path, "ab", "", "c")
    assert found.batches(1)[0].targets_BS.tolist() == [[ord("a"), ord("b"), 256, ord("c")]]
    assert (len(found), found.num_bytes) == (1, 3)
    with pytest.raises(DataError, match="no file holds text"):
        own_text(data_config, tmp_path, "")
