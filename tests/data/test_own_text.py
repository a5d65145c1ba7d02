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


def own_text(data_config: MakeConfig, tmp_path: Path, *texts: str, **settings: bool) -> OwnText:
    file = write_jsonl(tmp_path / "own.jsonl", list(texts))
    config = data_config(SourceConfig(kind="stdlib"), sequence_length=4, **settings)
    return OwnText([str(file)], config, ByteTokenizer())


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
    # The second rank runs its first batch once more without labels, because a forward pass may contain collectives.
    assert firsts == [[[ord("a"), ord("e")], [ord("q")]], [[ord("i"), ord("m")], [IGNORED_LABEL] * 2]]
    counts = [
        int((batch.targets_BS != IGNORED_LABEL).sum())
        for r in (0, 1)
        for batch in found.batches(2, rank=r, world_size=2)
    ]
    assert counts == [8, 2, 8, 0]
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


def test_documents_attend_to_each_other_as_those_of_the_run_do(data_config: MakeConfig, tmp_path: Path) -> None:
    (apart,) = own_text(data_config, tmp_path, "a", "bcd", attend_across_documents=False).batches(8)
    assert apart.documents_BS is not None and apart.documents_BS.tolist() == [[0, 0, 1, 1], [0, 0, 1, 2]]
    assert apart.positions_BS.tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    (together,) = own_text(data_config, tmp_path, "a", "bcd", attend_across_documents=True).batches(8)
    assert together.documents_BS is None and together.positions_BS.tolist() == [[0, 1, 2, 3]] * 2


def test_files_are_read_in_order_and_several_records_share_a_sequence(data_config: MakeConfig, tmp_path: Path) -> None:
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", texts)) for name, texts in (("b", ["ab"]), ("a", ["cd", "e"]))]
    found = OwnText(files, data_config(SourceConfig(kind="stdlib"), sequence_length=4), ByteTokenizer())
    (batch,) = found.batches(2)
    want = [[*map(ord, "ab"), 256, ord("c")], [ord("d"), 256, ord("e"), IGNORED_LABEL]]
    assert batch.targets_BS.tolist() == want and (len(found), found.num_bytes) == (2, 5)
