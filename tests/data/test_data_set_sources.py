"""Data sets of the Hugging Face hub, and those that save_to_disk wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsparse_moe.config.schema import SourceConfig
from qsparse_moe.data import sources
from qsparse_moe.data.sources import open_source
from qsparse_moe.errors import DataError
from tests.data.corpus import make_texts
from tests.data.read_source import read


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """A data set as it lies on the hub: a folder of files that ``datasets`` recognises."""
    folder = tmp_path / "data_set"
    folder.mkdir()
    for part in range(2):
        texts = make_texts(5, seed=part)
        pq.write_table(pa.table({"body": texts, "n": range(5)}), folder / f"train-{part}.parquet")
    pq.write_table(pa.table({"body": ["held out"], "n": [0]}), folder / "test-0.parquet")
    return folder


def test_a_hub_data_set_is_streamed_by_split(data_folder: Path) -> None:
    assert read(kind="hub", path=str(data_folder), column="body") == make_texts(5) + make_texts(5, seed=1)
    assert read(kind="hub", path=str(data_folder), column="body", split="test") == ["held out"]


def test_the_identity_of_a_hub_data_set_follows_its_revision(data_folder: Path) -> None:
    config = SourceConfig(kind="hub", path=str(data_folder), column="body")
    before = open_source(config, 0).identity
    assert open_source(config, 0).identity == before
    os.utime(data_folder / "train-1.parquet", ns=(0, 1))
    assert open_source(config, 0).identity != before


def test_a_hub_name_is_passed_on_with_its_subset(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    real, requested = datasets.load_dataset_builder, []

    def load(name: str, subset: str | None) -> Any:
        requested.append((name, subset))
        return real(str(data_folder))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    assert len(read(kind="hub", path="owner/name", subset="small", column="body")) == 10
    assert requested == [("owner/name", "small")]


def test_a_hub_data_set_that_cannot_be_opened_is_refused(data_folder: Path) -> None:
    with pytest.raises(DataError, match=r"\(hub\): 'owner/none' \(subset None, split train\) cannot be opened: .*copy"):
        read(kind="hub", path="owner/none")
    with pytest.raises(DataError, match=r"split nowhere\) cannot be opened: .*nowhere.*Correct the name"):
        read(kind="hub", path=str(data_folder), split="nowhere")
    with pytest.raises(DataError, match=r"\(hub\): '.*' has no column 'text'; its columns are body, n\..*column"):
        read(kind="hub", path=str(data_folder))


def test_a_hub_stream_that_breaks_is_a_data_error() -> None:
    from datasets import IterableDataset

    def broken() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("the line went dead")

    source = sources.OpenSource("data.sources.0 (hub)", IterableDataset.from_generator(broken), "text", {}, None)
    with pytest.raises(DataError, match=r"sources\.0 \(hub\) could not be read.*ConnectionError: the line.*Try again"):
        list(source.texts())


def test_a_saved_data_set_is_read_by_its_own_kind(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    texts = make_texts(70)
    train = Dataset.from_dict({"body": texts, "n": list(range(70))})
    train.save_to_disk(tmp_path / "plain")
    DatasetDict(train=train, test=train.select([3])).save_to_disk(tmp_path / "splits")
    assert read(kind="saved", path=str(tmp_path / "plain"), column="body") == texts
    assert read(kind="saved", path=str(tmp_path / "splits"), column="body", split="test") == [texts[3]]
    with pytest.raises(DataError, match=r"\(saved\): .*splits has no split 'dev'; its splits are train, test\."):
        read(kind="saved", path=str(tmp_path / "splits"), column="body", split="dev")
    with pytest.raises(DataError, match=r"\(saved\): .* has no column 'text'; its columns are body, n\."):
        read(kind="saved", path=str(tmp_path / "plain"))
    with pytest.raises(
        DataError, match=r"\(saved\): path '.*' is not a folder that save_to_disk wrote .*correct the path"
    ):
        read(kind="saved", path=str(tmp_path))
    with pytest.raises(
        DataError, match=r"\(text\): path '.*plain' is a data set that save_to_disk wrote.* kind to saved"
    ):
        read(kind="text", path=str(tmp_path / "plain"))
    (tmp_path / "plain" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"plain cannot be read as a saved data set: .*Save it again"):
        read(kind="saved", path=str(tmp_path / "plain"), column="body")


def test_a_missing_folder_is_not_requested_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_: pytest.fail("requested"))
    for path in (str(tmp_path / "no"), "./no", "a/b/c"):
        with pytest.raises(DataError, match=r"\(hub\): path '.*' looks like a folder, and there is none .*owner/name"):
            read(kind="hub", path=path)
