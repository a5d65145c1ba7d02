"""A shard that is missing or was changed between prepare and train: refused by name, and built again by prepare."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qsparse_moe.config.schema import DataConfig, SourceConfig
from qsparse_moe.data.token_data import PreparedSource, TokenData, load_data, prepare_data
from qsparse_moe.errors import DataError

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def config(data_config: MakeConfig, jsonl_source: SourceConfig) -> DataConfig:
    """A prepared source of several shards."""
    config = data_config(jsonl_source, shard_bytes=10_000)
    load_data(config)
    return config


def folder_of(config: DataConfig) -> Path:
    (folder,) = Path(config.cache_dir).glob("tables/*")
    return folder


def prepare(config: DataConfig, *, verify: bool = False) -> tuple[TokenData, PreparedSource]:
    data, (source,) = prepare_data(config, processes=1, verify=verify, progress=lambda *_: None)
    return data, source


def rows_of(data: TokenData) -> list[list[int]]:
    rows: list[list[int]] = data.train.tokens(range(len(data.train))).tolist()
    return rows


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "shorter":
        file.write_bytes(content[:-2])
    else:
        content[3] ^= 1
        file.write_bytes(content)


PROBLEMS = {
    "missing": "train.bin is missing",
    "shorter": r"train.bin has (\d+) bytes, and it was written with (\d+)",
    "changed": "train.bin was changed: its checksum is another",
}


@pytest.mark.parametrize("how", PROBLEMS)
def test_a_damaged_shard_is_named_and_prepare_builds_it_again(config: DataConfig, how: str) -> None:
    before = rows_of(load_data(config))
    folder = folder_of(config)
    others = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*/*.bin") if "00002" not in str(path)}
    damage(folder / "shard-00002" / "train.bin", how)
    message = (
        rf"data\.cache_dir: the tokens of data\.sources\.0 \(jsonl\) are damaged: .*{folder.name}/shard-00002/"
        rf"{PROBLEMS[how]}; the files must be as they were written\. `qsparse-moe prepare` with this config"
    )
    with pytest.raises(DataError, match=message):
        load_data(config)
    data, source = prepare(config)
    assert rows_of(data) == before and source.num_built == 1 and len(source.repaired) == 1
    assert "shard-00002/train.bin" in source.repaired[0]
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert rows_of(load_data(config)) == before


def test_a_change_that_keeps_the_time_of_a_file_is_found_with_verify(config: DataConfig) -> None:
    file = folder_of(config) / "shard-00001" / "validation.bin"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    damage(file, "changed")
    os.utime(file, ns=times)
    # Neither train nor prepare reads files that look as they did.
    load_data(config)
    assert prepare(config)[1].num_built == 0
    _, source = prepare(config, verify=True)
    assert source.num_built == 1 and "shard-00001/validation.bin was changed" in source.repaired[0]
    assert not prepare(config, verify=True)[1].repaired


def test_copied_files_are_compared_once(config: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    before, folder = rows_of(load_data(config)), folder_of(config)
    shutil.move(folder, folder.with_name("old"))
    shutil.copytree(folder.with_name("old"), folder, copy_function=shutil.copyfile)
    for expected in (1, 0):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert rows_of(load_data(config)) == before
        assert (
            sum("files were copied or changed; their checksums are compared" in m for m in caplog.messages) == expected
        )


def test_a_manifest_that_cannot_be_read_is_refused_and_made_again_from_the_shards(config: DataConfig) -> None:
    before, manifest = load_data(config).fingerprint, folder_of(config) / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(DataError, match=r"manifest\.json has the format 99, and this version reads 1; .*prepare"):
        load_data(config)
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read \(JSONDecodeError: .*`qsparse-moe prepare`"):
        load_data(config)
    data, source = prepare(config)
    assert data.fingerprint == before and source.num_built == 0 and len(source.repaired) == 1


def test_a_shard_without_its_summary_is_built_again(config: DataConfig) -> None:
    before, folder = load_data(config).fingerprint, folder_of(config)
    (folder / "manifest.json").unlink()
    (folder / "shard-00001" / "shard.json").unlink()
    with pytest.raises(DataError, match=r"shard-00001/shard\.json cannot be read .*`qsparse-moe prepare`"):
        load_data(config)
    data, source = prepare(config)
    assert data.fingerprint == before and source.num_built == 1


def test_a_shard_that_vanishes_while_a_run_reads_it_is_named(config: DataConfig) -> None:
    data, folder = load_data(config), folder_of(config)
    damage(folder / "shard-00001" / "train.bin", "shorter")
    with pytest.raises(DataError, match=r"shard-00001/train\.bin has \d+ bytes now, .*prepare`, and resume the run"):
        data.train.tokens([len(data.train) // 4])
    shutil.rmtree(folder / "shard-00000")
    message = r"shard-00000/train\.bin cannot be read any more \(.*No such file.*prepare`, and resume the run"
    with pytest.raises(DataError, match=message):
        data.train.tokens([0])
