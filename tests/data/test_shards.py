"""The tokens of a table are the same whatever its shards, and those of earlier versions; how they are stored."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsparse_moe.config.schema import DataConfig, SourceConfig
from qsparse_moe.data.loader import evaluation_num_bytes
from qsparse_moe.data.stored import FlatFiles
from qsparse_moe.data.token_data import TokenData, load_data
from qsparse_moe.errors import DataError
from tests.data.corpus import make_texts, write_files, write_jsonl

MakeConfig = Callable[..., DataConfig]


def make_source(kind: str, folder: Path) -> SourceConfig:
    """400 documents."""
    texts = make_texts(400)
    if kind == "jsonl":
        return SourceConfig(kind="jsonl", path=str(write_jsonl(folder / "a.jsonl", texts)))
    if kind == "separator":
        (folder / "a.txt").write_text("\n\n".join(texts), "utf-8")
        return SourceConfig(kind="text", path=str(folder / "a.txt"), separator="\n\n")
    if kind == "files":
        return SourceConfig(kind="text", path=f"{write_files(folder / 'files', texts)}/*")
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=30)
        return SourceConfig(kind="parquet", path=str(folder / "a.parquet"))
    from datasets import Dataset

    Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "saved"))
    return SourceConfig(kind="saved", path=str(folder / "saved"))


def contents(data: TokenData) -> tuple[str, list[list[int]], list[int], float]:
    rows = [row.tolist() for table in (data.train, data.validation) for row in table.tokens(range(len(table)))]
    num_bytes = [data.validation.num_bytes([index]) for index in range(len(data.validation))]
    return data.fingerprint, rows, num_bytes, data.unigram_bits_per_byte()


def shard_names(config: DataConfig) -> list[str]:
    return sorted(path.parent.name for path in Path(config.cache_dir).glob("tables/*/shard-*/shard.json"))


@pytest.mark.parametrize("kind", ["jsonl", "separator", "files", "parquet", "saved"])
def test_the_sequences_do_not_depend_on_the_shards(data_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    source = make_source(kind, tmp_path)
    whole = load_data(data_config(source))
    cut = data_config(source, shard_bytes=4000, cache_dir=str(tmp_path / "cut"))
    assert contents(load_data(cut)) == contents(whole)
    assert len(shard_names(cut)) >= 3


def test_shards_may_be_smaller_than_a_sequence_and_empty_on_one_side(data_config: MakeConfig, tmp_path: Path) -> None:
    source = SourceConfig(kind="text", path=f"{write_files(tmp_path / 'files', make_texts(40, words=2))}/*")
    whole = load_data(data_config(source, sequence_length=60))
    single = data_config(source, sequence_length=60, shard_bytes=1, cache_dir=str(tmp_path / "single"))
    assert contents(load_data(single)) == contents(whole)
    assert len(shard_names(single)) == 40


@pytest.mark.parametrize("max_bytes", [1, 6999, 7000, 7001, 7002, 7003, 10**6])
def test_a_limit_in_bytes_ends_at_the_same_character_whatever_the_shards(
    data_config: MakeConfig, tmp_path: Path, max_bytes: int
) -> None:
    texts = make_texts(200)
    path = str(write_files(tmp_path / "files", texts))
    source = SourceConfig(kind="text", path=f"{path}/*", max_bytes=max_bytes)
    counts = []
    for shard_bytes in (700, 10**6):
        config = data_config(source, shard_bytes=shard_bytes, cache_dir=str(tmp_path / str(shard_bytes)))
        if max_bytes == 1:
            with pytest.raises(DataError, match="too little text for one training sequence"):
                load_data(config)
            continue
        counts.append(contents(load_data(config)))
    assert not counts or counts[0] == counts[1]
    if max_bytes == 7001:
        # Only the shards that are needed are built.
        assert len(shard_names(data_config(source, cache_dir=str(tmp_path / "700")))) == 11


def test_the_sequences_and_fingerprints_are_those_of_earlier_versions(
    data_config: MakeConfig, jsonl_source: SourceConfig
) -> None:
    """Runs of earlier versions continue: values of the version that stored one Arrow table per source."""
    data = load_data(data_config(jsonl_source))
    assert data.parts["data.sources.0"] == "d92a90cddedb22b68e75417284112c5e"
    digest = hashlib.blake2b(digest_size=8)
    for table in (data.train, data.validation):
        digest.update(table.tokens(range(len(table))).astype(np.int64).tobytes())
    digest.update(str([data.validation.num_bytes([index]) for index in range(len(data.validation))]).encode())
    digest.update(str(data.unigram_bits_per_byte()).encode())
    assert (len(data.train), digest.hexdigest()) == (1870, "6af3ee893c0c5120")


def test_another_sequence_length_reads_the_same_files(data_config: MakeConfig, jsonl_source: SourceConfig) -> None:
    short, long = (load_data(data_config(jsonl_source, sequence_length=length)) for length in (16, 48))
    for side in ("train", "validation"):
        rows = getattr(short, side).tokens(range(3 * len(getattr(long, side))))
        joined = [*rows[0][:1], *rows[:, 1:].flatten()]
        want = [joined[begin : begin + 49] for begin in range(0, len(joined) - 1, 48)]
        assert getattr(long, side).tokens(range(len(getattr(long, side)))).tolist() == want
    assert evaluation_num_bytes(long, 5) > 0


def test_elements_of_several_files_are_read_as_one_array(tmp_path: Path) -> None:
    lengths = [0, 3, 0, 0, 1, 4, 0]
    values = np.arange(sum(lengths), dtype="<u2") + 500
    files = []
    for number, part in enumerate(np.split(values, np.cumsum(lengths)[:-1])):
        files.append(str(tmp_path / f"{number}.bin"))
        Path(files[-1]).write_bytes(part.tobytes())
    stored = FlatFiles(files, lengths, np.dtype("<u2"))
    assert len(stored) == 8
    for begin in range(8):
        for length in range(1, 9 - begin):
            assert stored.read(begin, length).tolist() == values[begin : begin + length].tolist()
    # Within one file nothing is copied.
    assert not stored.read(4, 4).flags.owndata and not stored.read(4, 4).flags.writeable


def test_a_table_of_hundreds_of_gigabytes_opens_in_milliseconds(tmp_path: Path) -> None:
    """Sparse files: nothing of them is read, and nothing is allocated, until a sequence is."""
    files = [str(tmp_path / f"{number}.bin") for number in range(50)]
    length = 10 << 30
    for file in files:
        with open(file, "wb") as stream:
            stream.truncate(2 * length)
            stream.seek(2 * (length - 2))
            stream.write(np.array([7, 8], "<u2").tobytes())
    began = time.thread_time()
    stored = FlatFiles(files, [length] * 50, np.dtype("<u2"))
    assert stored.read(length - 2, 3).tolist() == [7, 8, 0]
    assert stored.read(50 * length - 1, 1).tolist() == [8]
    # 0.3 ms here.
    assert time.thread_time() - began < 0.05


@pytest.mark.parametrize("length", [3, 5])
def test_a_file_that_has_another_size_when_it_is_first_used_is_refused(tmp_path: Path, length: int) -> None:
    file = tmp_path / "tokens"
    np.arange(length, dtype="<u2").tofile(file)
    stored = FlatFiles([str(file)], [4], np.dtype("<u2"))
    with pytest.raises(DataError, match=rf"tokens has {2 * length} bytes now, and the tokens must stay as they are"):
        stored.read(0, 2)
