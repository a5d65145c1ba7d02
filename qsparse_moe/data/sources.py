"""Open every kind of source as a stream of texts, through Hugging Face ``datasets``.

A local source is a stream with one shard per file, so that streams split over ranks, shuffle and resume by file. Files
are opened one at a time: an error names its file, and files whose other columns differ can be read together.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
import sysconfig
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qsparse_moe.config.schema import SourceConfig
from qsparse_moe.data.chat import Chat, ChatCounts, ChatSource
from qsparse_moe.data.data_sets import is_saved, open_hub, open_saved
from qsparse_moe.data.local_files import cut_mark, read_files, read_pieces
from qsparse_moe.data.open_source import LIMITS, Limits, OpenSource, sizes_and_times
from qsparse_moe.data.pieces import is_compressed
from qsparse_moe.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

# Tests, tables of constants and packages that distributions of Python split off or leave out: without them the text is
# plain source code, and nearly the same on every machine with the same Python.
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "__phello__", "test", "tests", "encodings", "pydoc_data"}
    | {"idlelib", "lib2to3", "turtledemo", "tkinter", "distutils", "ensurepip", "venv"}
)
# Written when Python is built or by a distribution: they hold this machine's paths and flags.
_STDLIB_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize")


def open_source(source: SourceConfig, index: int, limits: Limits = LIMITS, *, chat: Chat | None = None) -> OpenSource:
    """Find the files or the hub data set of ``data.sources[index]`` without reading a document.

    ``chat`` reads the records of a source of format chat.

    Raises:
        DataError: nothing is there, or all files are empty.
    """
    opened = _opened(source, f"data.sources.{index} ({source.kind})", limits)
    if source.format == "text":
        return opened
    assert chat is not None, "load_data opens the chat settings for every source of format chat"
    return replace(opened, identity=opened.identity | {"format": "chat"}, chat=ChatSource(chat, ChatCounts()))


def _opened(source: SourceConfig, setting: str, limits: Limits) -> OpenSource:
    if source.kind == "hub":
        return open_hub(source, setting, limits)
    if source.kind == "saved":
        return open_saved(source, setting, limits)
    files = _stdlib_files(setting) if source.kind == "stdlib" else _local_files(source, setting)
    return _open_files(source, setting, files, limits)


def _open_files(source: SourceConfig, setting: str, files: list[str], limits: Limits) -> OpenSource:
    # datasets creates one shard per entry of the only list among these.
    arguments: dict[str, Any] = {
        "files": files,
        "kind": source.kind,
        "column": source.record_column,
        "separator": source.separator,
        "setting": setting,
        "max_bytes": limits.max_document_bytes,
        "is_chat": source.format == "chat",
    }
    whole_files = source.kind in ("stdlib", "text")
    return OpenSource(
        setting=setting,
        dataset=_generated(arguments, setting),
        column="text",
        identity={
            "kind": source.kind,
            "column": source.record_column,
            "separator": source.separator,
            "files": sizes_and_times(files),
        },
        num_bytes=sum(map(os.path.getsize, files)) if whole_files and not any(map(is_compressed, files)) else None,
        files=tuple(files),
        limits=limits,
        read_pieces=partial(read_pieces, **{name: value for name, value in arguments.items() if name != "files"}),
        cut_mark=cut_mark(source.kind, source.separator),
    )


def _generated(arguments: dict[str, Any], setting: str) -> IterableDataset:
    from datasets import Features, IterableDataset, Value, config

    try:
        # The offsets of Arrow's plain strings have 32 bits, which limits the texts of a batch to 2 GB together.
        features = Features({"text": Value("large_string"), "problem": Value("string")})
        if arguments["is_chat"]:
            features["place"] = Value("string")
        return IterableDataset.from_generator(read_files, features=features, gen_kwargs=arguments)
    except OSError as error:
        # from_generator reads no data here, but it creates a lock file in the cache folder.
        raise DataError(
            f"{setting}: the cache folder of the library datasets ({config.HF_DATASETS_CACHE}) cannot be written "
            f"({error}), and it must be; set the environment variable HF_HOME to a folder that can"
        ) from error


def _stdlib_files(setting: str) -> list[str]:
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, folders, names in os.walk(root):
        # Assigned in place, so that os.walk does not descend into the others.
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
    """Return every file that the paths and globs match, once, in the order of their paths."""
    patterns = (source.path,) if isinstance(source.path, str) else source.path
    assert patterns, f"config.rules lets no {source.kind} source pass without a path"
    # Sorted, because glob returns the order of the file system, which differs between machines.
    files = sorted({os.path.abspath(file) for pattern in patterns for file in _matches(pattern, setting)})
    empty = [file for file in files if not os.path.getsize(file)]
    if len(empty) == len(files):
        raise DataError(
            f"{setting}: {empty[0]} is empty{', and so are all others' if empty[1:] else ''}, and a file must hold "
            "text; name files that do in path"
        )
    if empty:
        logger.warning(
            "%s: %d of %d files are empty and skipped; the first: %s", setting, len(empty), len(files), empty[0]
        )
    return [file for file in files if file not in set(empty)]


def _matches(pattern: str, setting: str) -> list[str]:
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded) and is_saved(expanded):
        raise DataError(
            f"{setting}: path {pattern!r} is a data set that save_to_disk wrote, and a path must be a file or a glob "
            "of files; set kind to saved"
        )
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
            "that matches one; correct the path, or make it absolute"
        )
    return files
