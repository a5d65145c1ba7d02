"""One source, tokenised once into a table on the disk: built shard by shard, by any number of builders.

A table is a folder in the cache whose name is a digest of everything on which its tokens depend. Builders claim shards
that are missing (``data.claims``), write them into folders of their own, and rename those. A builder that ends early
leaves its finished shards to the next one. The manifest is written when all shards are there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from qsparse_moe.data.claims import Claim, Claims
from qsparse_moe.data.open_source import OpenSource
from qsparse_moe.data.packing_settings import Packing
from qsparse_moe.data.pieces import Part
from qsparse_moe.data.shard_writer import DIGESTS, SUMMARY, token_type, write_shard
from qsparse_moe.data.stored import (
    MANIFEST,
    SIDES,
    TABLE_FORMAT,
    VALIDATION_BYTES,
    SourceTable,
    damaged,
    find_damage,
    open_table,
    read_manifest,
    tokens_file,
    write_json_atomically,
)
from qsparse_moe.errors import DataError
from qsparse_moe.locks import flush, folder_beside

logger = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Called with the number of a shard and the bytes of its text that are done."""

TABLES = "tables"
"""Folder of tables in the cache."""

# A builder that has died is replaced after a minute, and a living one has finished a shard long before: a longer wait
# means that it hangs.
_TIMEOUT_SECONDS = 12 * 3600.0
_POLL_SECONDS = 0.1
_FIRST_NOTICE_SECONDS = 2.0
_NOTICE_SECONDS = 60.0


@dataclass(frozen=True)
class TableJob:
    """A source and what its table depends on; another process can build from it."""

    source: OpenSource
    packing: Packing
    cache_dir: Path
    shard_bytes: int
    max_bytes: int | None = None

    @cached_property
    def folder(self) -> Path:
        """The folder of the table."""
        return self.cache_dir / TABLES / _key(self)

    @cached_property
    def parts(self) -> list[Part]:
        """The parts of the source, one per shard."""
        return self.source.parts(self.shard_bytes)

    @property
    def is_complete(self) -> bool:
        """Whether the table has been built."""
        return (self.folder / MANIFEST).exists()

    def shard(self, number: int) -> Path:
        """Return the folder of a shard."""
        return self.folder / f"shard-{number:05}"

    def open(self) -> SourceTable:
        """Open the table.

        Raises:
            DataError: it is damaged, or it was built under a higher limit for bad records.
        """
        _check_bad_records(self.source, read_manifest(self.folder, self.source.setting)["bad_records"])
        return open_table(self.folder, self.packing.sequence_length, self.source.setting)


def _key(job: TableJob) -> str:
    source = job.source
    key = {
        "format": TABLE_FORMAT,
        "packing": job.packing.describe(source),
        "source": source.identity,
        "max_bytes": job.max_bytes,
        "max_document_bytes": source.limits.max_document_bytes,
        "shard_bytes": job.shard_bytes,
        "chat": None if source.chat is None else source.chat.chat.describe(),
    }
    text = json.dumps(key, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def build_table(job: TableJob, report: Report) -> int:
    """Build what is missing of a table in this process, while others may build it too, and return how many shards.

    Raises:
        DataError: the source cannot be read, the cache cannot be written, or another builder hangs.
    """
    began = time.monotonic()
    num_built = build_shards(job, report)
    # Another builder may have been faster.
    if not job.is_complete:
        with _writing(job):
            _finish(job)
    if num_built:
        _log_end(job, num_built, time.monotonic() - began)
    return num_built


def _log_end(job: TableJob, num_built: int, seconds: float) -> None:
    manifest = read_manifest(job.folder, job.source.setting)
    num_tokens = ", ".join(f"{count:,} {side}" for side, count in manifest["tokens"].items())
    of_all = (
        f" ({num_built} of {len(manifest['shards'])} shards by this process)" if len(manifest["shards"]) > 1 else ""
    )
    logger.info(
        "%s: %s bytes tokenized into %s tokens in %.1f s%s",
        job.source.setting,
        f"{manifest['text_bytes']:,}",
        num_tokens,
        seconds,
        of_all,
    )


@contextmanager
def _writing(job: TableJob) -> Iterator[None]:
    """Name the cache in an error of the disk."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {job.folder} cannot be written ({error}); it must be a folder with free space that "
            "this user may write; set data.cache_dir to one"
        ) from error


def build_shards(job: TableJob, report: Report) -> int:
    """Build shards until none is missing, and return how many; the manifest is still to be written.

    Raises:
        DataError: as ``build_table`` does.
    """
    try:
        with _writing(job):
            job.folder.mkdir(parents=True, exist_ok=True)
            return _build_missing(job, report)
    finally:
        # Nothing is left of a table without a shard.
        with suppress(OSError):
            job.folder.rmdir()


def _build_missing(job: TableJob, report: Report) -> int:
    claims, wait, num_built = Claims(job.folder), _Wait(job), 0
    missing = list(range(len(job.parts)))
    while True:
        # One listing in place of a look at every shard, of which there may be thousands.
        there = set(os.listdir(job.folder))
        missing = [number for number in missing if job.shard(number).name not in there]
        if not missing:
            break
        limit = None
        if job.max_bytes is not None:
            limit = _left(job.max_bytes, [_summary(job, number) for number in range(missing[0])])
            if limit is not None and limit <= 0:
                break
        # How much text remains is known once the shards before are there, so they are then built one by one.
        for number in missing if limit is None else missing[:1]:
            if (claim := claims.take(f"shard-{number:05}")) is not None:
                num_built += _build_shard(job, number, limit, claim, report)
                wait = _Wait(job)
                break
        else:
            wait.go_on(claims.holder(f"shard-{missing[0]:05}"))
    return num_built


def _left(max_bytes: int | None, before: Sequence[dict[str, Any]]) -> int | None:
    """Return how many bytes of text the shard behind these may have; None: any number."""
    if max_bytes is None:
        return None
    if any(summary["is_full"] for summary in before):
        return 0
    return max_bytes - sum(int(summary["text_bytes"]) for summary in before)


def _build_shard(job: TableJob, number: int, limit: int | None, claim: Claim, report: Report) -> bool:
    """Build a shard unless it is there, and return whether it was not."""
    target = job.shard(number)
    with claim:
        # It may have been finished between the last look and the claim.
        if target.exists():
            return False
        with folder_beside(target) as partial:
            write_shard(
                job.source,
                job.parts[number],
                job.packing,
                partial,
                max_bytes=limit,
                report=lambda done: report(number, done),
            )
            # Before the rename: after a power cut a file system may have the new name without the contents.
            for file in (*partial.iterdir(), partial):
                flush(file)
            try:
                partial.rename(target)
            except OSError:
                # Another builder has taken the claim over and was faster; its shard is the same.
                if not target.exists():
                    raise
        flush(job.folder)
    return True


class _Wait:
    """Waits for other builders, and logs it."""

    def __init__(self, job: TableJob) -> None:
        self._folder = job.folder
        self._began = time.monotonic()
        self._next_notice = self._began + _FIRST_NOTICE_SECONDS

    def go_on(self, holder: str) -> None:
        """Wait for a moment, or raise DataError after hours."""
        now = time.monotonic()
        if now - self._began > _TIMEOUT_SECONDS:
            raise DataError(
                f"data.cache_dir: {self._folder} is being built by {holder}, for which this process has waited "
                f"{_TIMEOUT_SECONDS / 3600:g} hours; end that process if it hangs, or set data.cache_dir to another "
                "folder"
            )
        if now >= self._next_notice:
            left = timedelta(seconds=round(_TIMEOUT_SECONDS - (now - self._began)))
            logger.info("waiting for the tokens in %s, held by %s (at most %s more)", self._folder, holder, left)
            self._next_notice = now + _NOTICE_SECONDS
        time.sleep(_POLL_SECONDS)


def _finish(job: TableJob) -> None:
    """Write the manifest of a table whose shards are all there."""
    summaries: list[dict[str, Any]] = []
    for number in range(len(job.parts)):
        if (left := _left(job.max_bytes, summaries)) is not None and left <= 0:
            break
        summaries.append(_summary(job, number))
    if not any(summary["records"] for summary in summaries):
        shutil.rmtree(job.folder, ignore_errors=True)
        raise job.source.no_records()
    bad = sum(summary["bad_records"] for summary in summaries)
    _check_bad_records(job.source, bad)
    write_json_atomically(job.folder / MANIFEST, _manifest(job, summaries) | {"bad_records": bad})
    flush(job.folder)


def _manifest(job: TableJob, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    names = [job.shard(number).name for number in range(len(summaries))]
    for name in names:
        # The digests are hashed in place of the texts, so that no text is hashed twice.
        digest.update((job.folder / name / DIGESTS).read_bytes())
    dtype = token_type(job.source, job.packing)
    files = {
        file: {
            "num_bytes": [summary["files"][file]["num_bytes"] for summary in summaries],
            "checksums": [summary["files"][file]["checksum"] for summary in summaries],
            "times": [os.stat(job.folder / name / file).st_mtime_ns for name in names],
        }
        for file in (*map(tokens_file, SIDES), VALIDATION_BYTES)
    }
    return {
        "format": TABLE_FORMAT,
        "packing": job.packing.describe(job.source),
        "dtype": dtype.str,
        "sequence_length": None if job.source.chat is None else job.packing.sequence_length,
        "digest": digest.hexdigest(),
        "text_bytes": sum(summary["text_bytes"] for summary in summaries),
        "tokens": {side: sum(files[tokens_file(side)]["num_bytes"]) // dtype.itemsize for side in SIDES},
        "byte_counts": {
            side: [sum(values) for values in zip(*(summary["byte_counts"][side] for summary in summaries), strict=True)]
            for side in SIDES
        },
        # One shard holds all conversations of a source.
        "conversations": summaries[0]["conversations"],
        "shards": names,
        "files": files,
    }


def _summary(job: TableJob, number: int) -> dict[str, Any]:
    file = job.shard(number) / SUMMARY
    try:
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(job.source.setting, f"{file} cannot be read ({error})") from error
    return summary


def _check_bad_records(source: OpenSource, skipped: int) -> None:
    limit = source.limits.max_bad_records
    if skipped > limit:
        raise DataError(
            f"{source.setting}: {skipped} bad records were skipped when its table was made, and "
            f"data.max_bad_records is {limit}; correct these records, or set data.max_bad_records={skipped} or more"
        )


def remove_damaged(job: TableJob, *, all_checksums: bool) -> list[str]:
    """Remove the damaged shards of a table, so that they are built again, and return the problem of each.

    ``all_checksums`` compares the checksum of every file, whatever its time.
    """
    problems = {}
    if job.is_complete:
        try:
            manifest = read_manifest(job.folder, job.source.setting)
            problems = dict(find_damage(job.folder, manifest, all_checksums=all_checksums))
        except DataError as error:
            problems = {MANIFEST: str(error)}
        if problems:
            # First, so that no run opens a table whose shards are being replaced.
            (job.folder / MANIFEST).unlink()
    for number in range(len(job.parts)):
        # A shard without its summary cannot be described by a new manifest.
        if job.shard(number).exists() and not (job.shard(number) / SUMMARY).exists():
            problems.setdefault(job.shard(number).name, f"{job.shard(number) / SUMMARY} is missing")
    for shard in problems:
        shutil.rmtree(job.folder / shard, ignore_errors=True)
    return list(problems.values())
