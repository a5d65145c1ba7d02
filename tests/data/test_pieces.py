"""Files divided into parts: the documents of all parts are those of the whole files, wherever they are cut."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_moe.data import pieces
from qsparse_moe.data.local_files import cut_mark, read_files, read_pieces
from qsparse_moe.data.pieces import Part, Piece, divide, document_start
from tests.data.corpus import make_texts, write_files, write_jsonl


def texts_of(parts: list[Part], kind: str, separator: str | None = None) -> list[str]:
    records = [record for part in parts for record in read_pieces(part.pieces, kind, "text", separator, "it", 10**6)]
    assert not [record["problem"] for record in records if record["problem"]]
    return [record["text"] for record in records if record["text"]]


def whole(files: list[str], kind: str, separator: str | None = None) -> list[str]:
    return [record["text"] for record in read_files(files, kind, "text", separator, "it", 10**6) if record["text"]]


@settings(max_examples=300)
@given(
    text=st.text("ab\n", max_size=40),
    separator=st.sampled_from(["\n", "\n\n", "aa", "aba", "\n\n\n"]),
    shard_bytes=st.integers(1, 12),
    block=st.integers(3, 8),
)
def test_a_file_cut_anywhere_has_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, text: str, separator: str, shard_bytes: int, block: int
) -> None:
    file = str(tmp_path_factory.getbasetemp() / "cut.txt")
    Path(file).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_BLOCK_BYTES", block)
        parts = divide([file], shard_bytes, kind="text", separator=separator.encode())
        assert len(parts) == max(1, -(-len(text) // shard_bytes))
        assert texts_of(parts, "text", separator) == whole([file], "text", separator)


def test_separators_that_overlap_are_found_from_left_to_right(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("ab\n\n\nc\n\nd")
    # From 3 on the first separator by itself is at 3, but the one at 2 has taken its first byte.
    assert [document_start(str(file), place, b"\n\n") for place in (0, 1, 2, 3, 6, 7, 9)] == [0, 4, 4, 8, 8, 9, 9]


def test_lines_rows_and_characters_are_never_cut(tmp_path: Path) -> None:
    texts = make_texts(60)
    file = str(write_jsonl(tmp_path / "a.jsonl", texts))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + "漢".join(texts).encode())
    for shard_bytes in (100, 101, 1000, 5000):
        assert texts_of(divide([file], shard_bytes, kind="jsonl", separator=b"\n"), "jsonl") == texts
        parts = divide([str(tmp_path / "b.txt")], shard_bytes, kind="text", separator="漢".encode())
        assert texts_of(parts, "text", "漢") == whole([str(tmp_path / "b.txt")], "text", "漢")


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    texts = make_texts(100)
    file = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": texts, "n": range(100)}), file, row_group_size=10)
    size = Path(file).stat().st_size
    parts = divide([file], size // 4, kind="parquet", separator=None)
    assert 3 <= len(parts) <= 5 and all(len(part.pieces) == 1 for part in parts)
    assert texts_of(parts, "parquet") == texts
    assert sum(part.size or 0 for part in parts) == pytest.approx(size, abs=len(parts))
    # A bad record is named by its row in the file, whichever part it is in.
    rows = pa.table({"text": [*texts[:95], None, *texts[96:]]})
    pq.write_table(rows, file, row_group_size=10)
    (record,) = [r for r in read_pieces([Piece(file, 9)], "parquet", "text", None, "it", 10**6) if r["problem"]]
    assert "a.parquet, row 95: column 'text' holds NoneType" in record["problem"]


def test_small_files_share_a_part_and_files_that_cannot_be_cut_are_whole(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "files", ["x" * size for size in (10, 20, 30, 90, 5)])
    files = sorted(map(str, folder.iterdir()))
    parts = divide(files, 60, kind="text", separator=None)
    assert [[piece.file[-8:-4] for piece in part.pieces] for part in parts] == [
        ["0000", "0001", "0002"],
        ["0003"],
        ["0004"],
    ]
    assert [part.size for part in parts] == [60, 90, 5]
    packed = tmp_path / "a.jsonl"
    packed.write_bytes(gzip.compress(json.dumps({"text": "x"}).encode()))
    assert divide([str(packed)], 3, kind="jsonl", separator=b"\n") == [
        Part(packed.stat().st_size, (Piece(str(packed)),))
    ]


def test_a_bad_line_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n{"text": 3}\n')
    records = list(read_pieces([Piece(str(file), 16)], "jsonl", "text", None, "it", 1000))
    (record,) = records
    assert f"it: {file} from byte 16, row 0: column 'text' holds int (3)" in record["problem"]
    assert [cut_mark(kind, "--") for kind in ("jsonl", "text", "parquet")] == [b"\n", b"--", None]


def test_row_groups_that_fill_their_shards_exactly_leave_no_empty_piece(tmp_path: Path) -> None:
    file = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["abcdefgh"] * 8}), file, row_group_size=2)
    size = Path(file).stat().st_size
    parts = divide([file], size // 4, kind="parquet", separator=None)
    assert [part.pieces for part in parts] == [
        (Piece(file, 0, 1),),
        (Piece(file, 1, 2),),
        (Piece(file, 2, 3),),
        (Piece(file, 3),),
    ]
