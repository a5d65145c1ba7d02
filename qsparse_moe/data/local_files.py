"""The records of local files: text, JSON lines and Parquet, with the problem of each that cannot be used.

A record is ``{"text": ..., "problem": ...}``: one of the two is empty. A record with a problem keeps its position in
the stream, so that skipping it does not move any other record, and a resumed stream counts as the first one did. An
error that makes a whole file unreadable is raised.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO, NamedTuple, cast

from qsparse_moe.data.conversations import messages_json
from qsparse_moe.data.pieces import Piece, is_compressed, open_piece
from qsparse_moe.errors import DataError

logger = logging.getLogger(__name__)

Record = dict[str, str]

_BYTE_ORDER_MARK = codecs.BOM_UTF8
# Bytes read at once where a file is cut into documents: large enough that decoding, not reading, takes the time.
_BLOCK_BYTES = 1 << 20
# Python converts integers of up to 4300 digits.
_LONGEST_NUMBER = 4300


def read_files(
    files: list[str],
    kind: str,
    column: str,
    separator: str | None,
    setting: str,
    max_bytes: int,
    is_chat: bool = False,
) -> Iterator[Record]:
    """Yield the records of all files; a file without any is skipped, and the log names it.

    With ``is_chat`` the text of a record is a conversation's messages as JSON, and ``place`` names the record.

    Raises:
        DataError: a file cannot be opened, is cut off or is not of its kind.
    """
    yield from read_pieces([Piece(file) for file in files], kind, column, separator, setting, max_bytes, is_chat)


def read_pieces(
    pieces: Sequence[Piece],
    kind: str,
    column: str,
    separator: str | None,
    setting: str,
    max_bytes: int,
    is_chat: bool = False,
) -> Iterator[Record]:
    """Yield the records of pieces of files, as ``read_files`` does."""
    for piece in pieces:
        place = f"{setting}: {piece.file}"
        if piece.begin and kind != "parquet":
            place += f" from byte {piece.begin}"
        found = False
        value = _messages if is_chat else _text
        for record in _records(piece, kind, column, separator, place, max_bytes, value):
            found = True
            yield {"place": place} | record if is_chat else record
        if not found and piece.is_whole:
            logger.warning("%s is empty and is skipped", place)


def cut_mark(kind: str, separator: str | None) -> bytes | None:
    """Return what ends a document in the files of a source; None if a file is one document, or has row groups."""
    if kind == "jsonl":
        return b"\n"
    return separator.encode("utf-8") if kind == "text" and separator else None


def too_long(place: str, max_bytes: int) -> str:
    """Return the problem of a document that is longer than ``data.max_document_bytes``."""
    return (
        f"{place} has more than data.max_document_bytes ({max_bytes}) bytes, and a document must fit, because it is "
        "held in memory whole; cut it into documents (for kind text: name their separator), or raise the setting"
    )


def text_problem(text: object, column: str, place: str) -> str:
    """Return the problem of a row's value as text; an empty string if there is none."""
    if not isinstance(text, str):
        return not_text(type(text).__name__, str(text), column, place)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return f"{place}: column {column!r} holds half of a surrogate pair, and text must be Unicode; remove such rows"
    return ""


def not_text(kind: str, shown: str, column: str, place: str) -> str:
    """Return the problem of a row whose value is not text."""
    return (
        f"{place}: column {column!r} holds {kind} ({shown[:40]}), and every row must hold text; "
        "remove such rows, or name another column"
    )


def missing_column(columns: list[str], column: str, place: str) -> str:
    """Return the problem of rows that do not have the column."""
    return (
        f"{place} has no column {column!r}; its columns are {', '.join(sorted(columns)) or 'none'}. The setting column "
        "must name the one that holds the text"
    )


def short(error: BaseException) -> str:
    """Return the first line of an error, with its type."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


def _records(
    piece: Piece, kind: str, column: str, separator: str | None, place: str, max_bytes: int, value: ReadValue
) -> Iterator[Record]:
    try:
        if kind == "parquet":
            yield from _parquet_rows(piece, column, place, value)
            return
        stream, offset = _opened(piece, cut_mark(kind, separator))
        with stream:
            if kind == "jsonl":
                yield from _json_lines(stream, column, place, max_bytes, value)
            elif separator:
                yield from _separated(stream, separator, place, max_bytes, offset)
            else:
                yield from _whole(stream, place, max_bytes)
    # Errors of our own name the place and the way out already.
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise DataError(
            f"{place} cannot be read as {kind}: {short(error)}; every file must be complete and readable. "
            "Repair it, leave it out of path, or set the kind that it is"
        ) from error


def _opened(piece: Piece, separator: bytes | None) -> tuple[IO[bytes], int]:
    """Open a piece for reading, decompressed if it is gzip, after the byte-order mark that the file may begin with.

    Also return the place of its first document in the file, 0 for a whole file.
    """
    if not piece.is_whole:
        assert separator is not None, "only files whose documents end with a separator are cut"
        return open_piece(piece, separator, _BYTE_ORDER_MARK)
    file = piece.file
    stream = cast(IO[bytes], gzip.GzipFile(file) if is_compressed(file) else io.BufferedReader(io.FileIO(file)))
    try:
        if stream.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
            stream.seek(0)
    except BaseException:
        stream.close()
        raise
    return stream, 0


def _whole(stream: IO[bytes], place: str, max_bytes: int) -> Iterator[Record]:
    # One byte more than is allowed shows that the file is too long without reading the rest of it.
    content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        yield _bad(too_long(place, max_bytes))
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        yield _bad(_not_utf8(place, error.object[error.start], error.start))
        return
    if text:
        yield _good(text)


def _separated(stream: IO[bytes], separator: str, place: str, max_bytes: int, offset: int) -> Iterator[Record]:
    """Yield the documents between separators, block by block; ``offset`` is the stream's place in its file.

    A long file takes no more memory than its longest document.
    """
    # An incremental decoder, because a block may end inside a character.
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, skips = "", False
    while True:
        block = stream.read(_BLOCK_BYTES)
        begin = offset - len(decoder.getstate()[0])
        try:
            rest += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            yield _bad(_not_utf8(place, error.object[error.start], begin + error.start))
            return
        offset += len(block)
        *documents, rest = rest.split(separator)
        for text in documents if block else (*documents, rest):
            if skips:  # the end of a document that was too long
                skips = False
            elif _is_longer(text, max_bytes):
                yield _bad(too_long(f"{place}: a document that ends before byte {offset}", max_bytes))
            else:
                yield _good(text)
        if not block:
            return
        if _is_longer(rest, max_bytes):
            if not skips:
                yield _bad(too_long(f"{place}: a document that ends after byte {offset}", max_bytes))
            # A separator may begin in the last characters.
            skips, rest = True, rest[len(rest) - len(separator) + 1 :]


def _is_longer(text: str, max_bytes: int) -> bool:
    # A character of UTF-8 has 1 to 4 bytes, so that the number of characters decides for most texts without encoding.
    return len(text) > max_bytes or (4 * len(text) > max_bytes and len(text.encode("utf-8")) > max_bytes)


def _json_lines(stream: IO[bytes], column: str, place: str, max_bytes: int, value: ReadValue) -> Iterator[Record]:
    row = -1
    # readline with a limit: iterating over the stream would hold a line of any length in memory.
    for line in iter(lambda: stream.readline(max_bytes + 1), b""):
        is_cut = len(line) > max_bytes and not line.endswith(b"\n")
        if is_cut:
            _pass_line(stream)
        elif not line.strip():
            continue
        row += 1
        at = f"{place}, row {row}"
        yield _bad(too_long(f"{at},", max_bytes)) if is_cut else _json_record(line, column, at, value)


def _pass_line(stream: IO[bytes]) -> None:
    while (piece := stream.readline(_BLOCK_BYTES)) and not piece.endswith(b"\n"):
        continue


def _json_record(line: bytes, column: str, place: str, value: ReadValue) -> Record:
    try:
        # Digits stay text: Python refuses to convert integers of more than 4300 digits, and other columns may do so.
        values = json.loads(line, parse_int=partial(_Number, "int"), parse_float=partial(_Number, "float"))
    except (ValueError, RecursionError) as error:
        return _bad(
            f"{place} cannot be read as jsonl: {short(error)}; every line must be one JSON object in UTF-8. "
            "Correct the line, or set the kind that the file is"
        )
    if not isinstance(values, dict):
        return _bad(
            f"{place} cannot be read as jsonl: it is not a JSON object; every line must be one, such as "
            f'{{"{column}": "..."}}. Correct the line, or set the kind that the file is'
        )
    if column not in values:
        return _bad(missing_column(list(values), column, place))
    return value(values[column], column, place)


class _Number(NamedTuple):
    """A JSON number that is left unconverted."""

    kind: str
    digits: str


def _parquet_rows(piece: Piece, column: str, place: str, value: ReadValue) -> Iterator[Record]:
    import pyarrow.parquet

    # Opened by us: a path given to pyarrow may be taken for a URL.
    with open(piece.file, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
        names = table.schema_arrow.names
        if column not in names:
            # A file without rows is skipped like other empty files, whatever its columns are.
            if table.metadata.num_rows:
                raise DataError(missing_column(names, column, f"{place}, row 0"))
            return
        row = sum(table.metadata.row_group(group).num_rows for group in range(piece.begin))
        groups = range(piece.begin, table.num_row_groups if piece.end is None else piece.end)
        # Small batches: a batch is held in memory whole, and a document may have many megabytes.
        for batch in table.iter_batches(batch_size=256, columns=[column], row_groups=list(groups)):
            for found in batch.column(0).to_pylist():
                yield value(found, column, f"{place}, row {row}")
                row += 1


def _not_utf8(place: str, byte: int, offset: int) -> str:
    return (
        f"{place} is not UTF-8 (byte 0x{byte:02x} at offset {offset}), and text must be; convert it (iconv -t utf-8) "
        "or leave it out of path"
    )


ReadValue = Callable[[object, str, str], Record]
"""Returns the record of a value of a column, at a place that messages name."""


def _text(value: object, column: str, place: str) -> Record:
    if isinstance(value, _Number):
        return _bad(not_text(value.kind, value.digits, column, place))
    problem = text_problem(value, column, place)
    return _bad(problem) if problem else _good(cast(str, value))


def _messages(value: object, column: str, place: str) -> Record:
    text, problem = messages_json(_converted(value), column, place)
    return {"text": text, "problem": problem, "place": place}


def _converted(value: object) -> object:
    """Return a JSON value with its numbers, such as the arguments of a tool; those that Python refuses stay text."""
    if isinstance(value, _Number):
        convert = int if value.kind == "int" else float
        return convert(value.digits) if len(value.digits) < _LONGEST_NUMBER else value.digits
    if isinstance(value, dict):
        return {key: _converted(item) for key, item in value.items()}
    return [_converted(item) for item in value] if isinstance(value, list) else value


def _good(text: str) -> Record:
    return {"text": text, "problem": ""}


def _bad(problem: str) -> Record:
    return {"text": "", "problem": problem}
