"""Documents from every kind of source, as one stream of texts each, through Hugging Face ``datasets``.

A local source is a stream with one shard a file, so that streams split over ranks, shuffle and resume by file. Files
are opened one at a time: an error names its file, and files whose other columns differ can be read together.
"""

from __future__ import annotations

import glob
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_moe.config.schema import SourceConfig
from qsparse_moe.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

# Tests, tables of constants and packages that distributions of Python split off or leave out: without them the text is
# plain source code, and nearly the same on every machine with the same Python.
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "__phello__", "test", "tests", "encodings", "pydoc_data"}
    | {"idlelib", "lib2to3", "turtledemo", "tkinter", "distutils", "ensurepip", "venv"}
)
# Written when Python is built or by a distribution: they hold this machine's paths and flags.
_STDLIB_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize")

_READERS = {"jsonl": "json", "parquet": "parquet"}


@dataclass(frozen=True)
class OpenSource:
    """A source that was found, not yet read."""

    setting: str
    """Where it stands in the config, and its kind."""
    dataset: IterableDataset
    """Its stream; one shard a file."""
    column: str
    """The column of the stream that holds the text."""
    identity: dict[str, Any]
    """What tells cheaply whether the source is still the same: files with sizes and times, or a hub revision."""
    num_bytes: int | None
    """Bytes of text in all; None where only reading can tell."""

    def texts(self, dataset: IterableDataset | None = None) -> Iterator[str]:
        """The documents in order, without empty ones; ``dataset`` may be a part of the stream.

        Raises:
            DataError: a file, a row or the hub cannot be read as text.
        """
        try:
            for row, example in enumerate(self.dataset if dataset is None else dataset):
                text = _text_of(example, self.column, f"{self.setting}, row {row} of the stream")
                if text:
                    yield text
        except DataError:
            raise
        except Exception as error:  # the hub's readers raise whatever their formats and the network do
            raise DataError(
                f"{self.setting} could not be read to the end: {_short(error)}; every row must be readable text. Try "
                "again if the network failed, else choose other data or a local copy (kind jsonl or parquet)"
            ) from error


def open_source(source: SourceConfig, index: int) -> OpenSource:
    """Find the files or the hub data set of ``data.sources[index]``; reads no document.

    Raises:
        DataError: nothing is there, or a file is empty.
    """
    setting = f"data.sources.{index} ({source.kind})"
    if source.kind == "hub":
        return _open_hub(source, setting)
    files = _stdlib_files(setting) if source.kind == "stdlib" else _local_files(source, setting)
    return _open_files(source, setting, files)


def _open_files(source: SourceConfig, setting: str, files: list[str]) -> OpenSource:
    stats = [os.stat(file) for file in files]
    whole_files = source.kind in ("stdlib", "text")
    num_bytes = sum(stat.st_size for stat in stats) if whole_files else None
    # datasets makes one shard an entry of the only list among these.
    arguments = {
        "files": files,
        "kind": source.kind,
        "column": source.column,
        "separator": source.separator,
        "setting": setting,
    }
    return OpenSource(
        setting=setting,
        dataset=_generated(arguments, setting),
        column="text",
        identity={
            "kind": source.kind,
            "column": source.column,
            "separator": source.separator,
            "files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)],
        },
        num_bytes=num_bytes,
    )


def _generated(arguments: dict[str, Any], setting: str) -> IterableDataset:
    from datasets import Features, IterableDataset, Value, config

    try:
        features = Features({"text": Value("string")})
        return IterableDataset.from_generator(_read_files, features=features, gen_kwargs=arguments)
    except OSError as error:
        # It reads nothing yet, but leaves a lock file.
        raise DataError(
            f"{setting}: the cache folder of the library datasets ({config.HF_DATASETS_CACHE}) cannot be written "
            f"({error}), and it must be; set the environment variable HF_HOME to a folder that can"
        ) from error


def _stdlib_files(setting: str) -> list[str]:
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _is_plain_library(name)]
        files += [os.path.join(folder, name) for name in names if name.endswith(".py") and _is_plain_library(name)]
    files = sorted(file for file in files if os.path.getsize(file))
    if not files:
        raise DataError(
            f"{setting}: {root} holds no .py file, so this Python ({sys.version.split()[0]}) has no readable standard "
            "library; use another Python, or a source of kind text"
        )
    return files


def _is_plain_library(name: str) -> bool:
    return name not in _STDLIB_SKIPPED and not name.startswith(_STDLIB_SKIPPED_PREFIXES)


def _local_files(source: SourceConfig, setting: str) -> list[str]:
    """Every file that the paths and globs match, once, in order of their paths."""
    patterns = (source.path,) if isinstance(source.path, str) else source.path
    assert patterns, f"config.rules lets no {source.kind} source pass without a path"
    files = {os.path.abspath(file) for pattern in patterns for file in _matches(pattern, setting)}
    for file in sorted(files):
        if not os.path.getsize(file):
            raise _empty_file(file, setting)
    return sorted(files)


def _matches(pattern: str, setting: str) -> list[str]:
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        raise DataError(
            f"{setting}: path {pattern!r} is a folder, and a path must be a file or a glob of files; "
            f"write {os.path.join(pattern, '*')!r} for the files in it"
        )
    if os.path.isfile(expanded):  # before globbing: a file name may hold [ or *
        return [expanded]
    files = [file for file in glob.glob(expanded, recursive=True) if os.path.isfile(file)]
    if not files:
        raise DataError(
            f"{setting}: path {pattern!r} matches no file (looked in {os.getcwd()!r}); it must be a file or a glob "
            "that matches one; mend the path, or give it from the root"
        )
    return files


def _empty_file(file: str, setting: str) -> DataError:
    return DataError(
        f"{setting}: {file} is empty, and every file must hold text; remove it, or name only the others in path"
    )


def _read_files(
    files: list[str], kind: str, column: str, separator: str | None, setting: str
) -> Iterator[dict[str, str]]:
    """The generator behind a local source; module-level because ``datasets`` hashes it by name."""
    for file in files:
        texts: Iterable[str]
        if kind in _READERS:
            texts = _read_records(file, kind, column, setting)
        else:
            text = _read_text(file, setting)
            texts = text.split(separator) if separator else (text,)
        for text in texts:
            yield {"text": text}


def _read_text(file: str, setting: str) -> str:
    try:
        return Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{setting}: {file} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}), and "
            f"text must be; convert it (iconv -t utf-8) or leave it out of path"
        ) from error
    except OSError as error:
        raise _unreadable(file, "text", error, setting) from error


def _read_records(file: str, kind: str, column: str, setting: str) -> Iterator[str]:
    place = f"{setting}: {file}"
    row = -1
    # datasets leaves a lock file for every file that it opens; they go with this folder.
    with tempfile.TemporaryDirectory(prefix="qsparse_moe-") as scratch:
        try:
            for row, example in enumerate(_open_records(file, kind, column, scratch)):
                yield _text_of(example, column, f"{place}, row {row}")
        except DataError:
            raise
        except Exception as error:  # the readers raise many types, from pyarrow's to StopIteration
            if _holds_no_rows(file, kind):
                raise _empty_file(file, setting) from error
            raise _unreadable(file, kind, error, setting) from error
    if row < 0:
        raise _empty_file(file, setting)


def _open_records(file: str, kind: str, column: str, scratch: str) -> IterableDataset:
    from datasets import load_dataset

    options: dict[str, Any] = {"split": "train", "streaming": True, "cache_dir": scratch}
    dataset = load_dataset(_READERS[kind], data_files=glob.escape(file), **options)
    if kind == "parquet" and column in (dataset.column_names or ()):
        # The other columns need not be read at all.
        dataset = load_dataset(_READERS[kind], data_files=glob.escape(file), columns=[column], **options)
    return dataset


def _text_of(example: dict[str, Any], column: str, place: str) -> str:
    _require_column(example, column, place)
    text = example[column]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: column {column!r} holds {type(text).__name__} ({str(text)[:40]}), and every row must hold text; "
            "remove such rows, or name another column"
        )
    return text


def _require_column(columns: Iterable[str], column: str, place: str) -> None:
    if column not in (names := sorted(columns)):
        raise DataError(
            f"{place} has no column {column!r}; its columns are {', '.join(names) or 'none'}. The setting column must "
            "name the one that holds the text"
        )


def _holds_no_rows(file: str, kind: str) -> bool:
    import pyarrow
    import pyarrow.parquet

    try:
        return kind == "parquet" and pyarrow.parquet.read_metadata(file).num_rows == 0
    except (pyarrow.ArrowInvalid, OSError):
        return False


def _unreadable(file: str, kind: str, error: Exception, setting: str) -> DataError:
    return DataError(
        f"{setting}: {file} cannot be read as {kind}: {_short(error)}; every file must be whole, readable and UTF-8. "
        "Mend it, leave it out of path, or set the kind that it is"
    )


def _open_hub(source: SourceConfig, setting: str) -> OpenSource:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        # One builder for both, so that the stream is of the revision that the identity names.
        builder = datasets.load_dataset_builder(source.path, source.subset)
        dataset = builder.as_streaming_dataset(split=source.split)
    except Exception as error:  # missing data set, subset or split, no network, no permission: many types
        raise DataError(
            f"{setting}: {source.path!r} (subset {source.subset}, split {source.split}) cannot be opened: "
            f"{_short(error)}; it must be a data set of the hub that this machine reaches, with that subset and split. "
            "Mend the name, log in with `hf auth login`, or use a local copy (kind jsonl or parquet)"
        ) from error
    columns = dataset.column_names
    if columns is not None:
        _require_column(columns, source.column, f"{setting}: {source.path!r}")
        dataset = dataset.select_columns([source.column])
    identity = source.model_dump(include={"kind", "path", "subset", "split", "column"})
    # The hub's commit; of a data set in a local folder a digest of its files' times.
    identity["revision"] = [str(builder.hash), str(builder.config_id)]
    return OpenSource(setting, dataset, source.column, identity, None)


def _short(error: Exception) -> str:
    """The first line of an error, with its type."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
