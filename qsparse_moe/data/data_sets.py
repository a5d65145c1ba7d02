"""Data sets that ``datasets`` opens as a whole: from the hub, from a folder with its layout, or saved by it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from qsparse_moe.config.schema import SourceConfig
from qsparse_moe.data.hub_wait import log_slow_wait
from qsparse_moe.data.local_files import missing_column, short
from qsparse_moe.data.open_source import Limits, OpenSource, sizes_and_times
from qsparse_moe.errors import DataError

# A saved data set has this many shards for any number of ranks, so that its order is always the same.
_NUM_PARTS = 64


def is_saved(folder: str) -> bool:
    """Return whether ``datasets``' ``save_to_disk`` wrote the folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def open_hub(source: SourceConfig, setting: str, limits: Limits) -> OpenSource:
    """Open a data set of the hub, or a local folder laid out as one.

    Raises:
        DataError: there is none of that name, subset and split, it cannot be reached, or it has no such column.
    """
    # Imported here: the library takes about a second, which commands that read no data should not pay.
    import datasets

    # In a log file, every update of a progress bar would be a line of its own.
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = source.path
    assert isinstance(path, str), "config.rules lets no hub source pass without a name"
    if _looks_like_a_folder(path) and not os.path.isdir(os.path.expanduser(path)):
        raise DataError(
            f"{setting}: path {path!r} looks like a folder, and there is none (looked in {os.getcwd()!r}), so the hub "
            "is not contacted; correct the path, or write a data set of the hub as owner/name"
        )
    try:
        # One builder for both, so that the stream is of the revision that the identity names.
        with log_slow_wait(f"the hub's answer about {path} ({setting})"):
            builder = datasets.load_dataset_builder(path, source.subset)
            dataset = builder.as_streaming_dataset(split=source.split)
    except Exception as error:  # missing data set, subset or split, no network, no permission: many types
        raise DataError(
            f"{setting}: {path!r} (subset {source.subset}, split {source.split}) cannot be opened: "
            f"{short(error)}; it must be a data set of the hub that this machine reaches, with that subset and split. "
            "Correct the name, log in with `hf auth login`, or use a local copy (kind jsonl or parquet)"
        ) from error
    columns = dataset.column_names
    if columns is not None:
        _require_column(columns, source.record_column, f"{setting}: {path!r}")
        # The other columns may hold images or audio, whose decoding would cost more than reading the text.
        dataset = dataset.select_columns([source.record_column])
    identity = source.model_dump(include={"kind", "path", "subset", "split", "column"})
    # The hub's commit; of a data set in a local folder a digest of its files' times.
    identity["revision"] = [str(builder.hash), str(builder.config_id)]
    files = tuple(str(file) for file in (builder.config.data_files or {}).get(str(source.split), ()))
    # Only local files can be hashed for the fingerprint; files on the hub are identified by the commit above.
    local = files if all(map(os.path.isfile, files)) else ()
    return OpenSource(setting, dataset, source.record_column, identity, None, local, limits)


def open_saved(source: SourceConfig, setting: str, limits: Limits) -> OpenSource:
    """Open a folder that ``save_to_disk`` wrote.

    Raises:
        DataError: it is no such folder, or it has no such split or column.
    """
    import datasets

    assert isinstance(source.path, str), "config.rules lets no saved source pass without a folder"
    folder = os.path.abspath(os.path.expanduser(source.path))
    if not is_saved(folder):
        raise DataError(
            f"{setting}: path {source.path!r} is not a folder that save_to_disk wrote (looked for state.json and "
            f"dataset_dict.json in {folder}); correct the path, or set the kind that the files are"
        )
    try:
        found: Any = datasets.load_from_disk(folder)
    except Exception as error:  # the library's and pyarrow's, of many types
        raise DataError(
            f"{setting}: {folder} cannot be read as a saved data set: {short(error)}; its files must be complete. "
            "Save it again"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            raise DataError(
                f"{setting}: {folder} has no split {source.split!r}; its splits are {', '.join(found)}. The setting "
                "split must name one"
            )
        found = found[source.split]
    _require_column(found.column_names, source.record_column, f"{setting}: {source.path!r}")
    files = tuple(str(Path(file["filename"])) for file in found.cache_files)
    # datasets refuses more shards than there are rows.
    stream = found.select_columns([source.record_column]).to_iterable_dataset(
        num_shards=max(1, min(_NUM_PARTS, len(found)))
    )
    identity = source.model_dump(include={"kind", "split", "column"}) | {"files": sizes_and_times(files)}
    return OpenSource(setting, stream, source.record_column, identity, None, files, limits)


def _looks_like_a_folder(path: str) -> bool:
    # The name of a data set on the hub has at most one slash.
    return path.startswith((".", "~", os.sep)) or path.count("/") > 1


def _require_column(columns: list[str], column: str, place: str) -> None:
    if column not in columns:
        raise DataError(missing_column(columns, column, place))
