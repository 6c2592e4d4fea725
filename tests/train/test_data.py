from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from lorica.errors import ConfigError, FileError
from lorica.train import DataConfig, data

ROWS = [{"text": "NA", "label": 1}, {"text": 'a "quoted", text', "label": 0}, {"text": "null", "label": 1}]


def _csv(separator: str) -> str:
    cells = [("text", "label"), ("NA", "1"), ('"a ""quoted"", text"', "0"), ("null", "1")]
    return "".join(separator.join(row) + "\n" for row in cells)


def _lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.csv": lambda path: path.write_text(_csv(",")),
    "rows.tsv": lambda path: path.write_text(_csv("\t")),
    "rows.tsv.gz": lambda path: path.write_bytes(gzip.compress(_csv("\t").encode())),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.jsonl": lambda path: path.write_text(_lines()),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(_lines().encode())),
    "rows.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_reads_every_format_alike(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert data.read(str(tmp_path / name))["train"].to_list() == ROWS


def test_reads_folders_by_the_names_of_splits(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(_lines())
    (tmp_path / "notes.md").write_text("not rows")
    splits = data.load(DataConfig(train=str(tmp_path)))
    assert [name for name, _ in splits.items()] == ["train", "validation", "test"]


def test_reads_a_folder_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "reviews.jsonl").write_text(_lines())
    assert list(data.read(str(tmp_path))) == ["train"]


@pytest.mark.parametrize("whole", [True, False])
def test_reads_what_datasets_saved(tmp_path: Path, whole: bool) -> None:
    rows = Dataset.from_list(ROWS)
    (DatasetDict({"train": rows, "test": rows}) if whole else rows).save_to_disk(tmp_path / "saved")
    assert list(data.read(str(tmp_path / "saved"))) == (["train", "test"] if whole else ["train"])


def test_named_splits_win(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(_lines())
    (tmp_path / "other.jsonl").write_text(_lines() * 2)
    splits = data.load(
        DataConfig(
            train=str(tmp_path / "train.jsonl"),
            validation=str(tmp_path / "other.jsonl"),
            test=str(tmp_path / "other.jsonl"),
        )
    )
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "validation": 6, "test": 6}


def test_validation_rows_are_drawn_by_seed(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": str(i), "label": i % 2}) + "\n" for i in range(50)))
    draw = lambda seed: data.load(DataConfig(train=str(path), validation_fraction=0.2, split_seed=seed))  # noqa: E731
    first, again, other = draw(0), draw(0), draw(1)
    assert first.validation is not None
    assert again.validation is not None
    assert other.validation is not None
    assert len(first.validation) == 10
    assert first.validation["text"] == again.validation["text"] != other.validation["text"]
    assert not set(first.train["text"]) & set(first.validation["text"])
    assert data.load(DataConfig(train=str(path), validation_fraction=0.0)).validation is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, "no file or folder .*rows.jsonl"),
        ("rows.xlsx", "x", "cannot tell the format of .*rows.xlsx"),
        ("rows.parquet", "this is no parquet file", "cannot read .*rows.parquet as parquet"),
        ("rows.jsonl", '{"text": ', "cannot read .*rows.jsonl as json"),
        ("rows.csv", "text,label\n", "rows.csv has no rows"),
        ("rows.jsonl.gz", "not zipped", "cannot read .*rows.jsonl.gz"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=message):
        data.load(DataConfig(train=str(tmp_path / name)))


def test_a_misspelt_file_meets_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(_csv(","))
    with pytest.raises(FileError, match=r"did you mean .*train\.csv"):
        data.read(str(tmp_path / "trian.csv"))
    with pytest.raises(FileError, match="there is no folder"):
        data.read(str(tmp_path / "nowhere" / "train.csv"))


def test_a_folder_without_rows_says_what_it_has(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(_csv(","))
    with pytest.raises(FileError, match=r"it has a\.csv, b\.csv"):
        data.read(str(tmp_path))


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(_lines())
    with pytest.raises(FileError, match="has no train split; it has: test"):
        data.load(DataConfig(train=str(tmp_path)))


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(FileError, match="has 1 row"):
        data.load(DataConfig(train=str(tmp_path / "train.jsonl")))


def test_an_unreachable_hub_is_said_so() -> None:
    with pytest.raises(FileError, match=r"nobody/nothing is no file or folder here.*works without the Hub"):
        data.read("nobody/nothing")


def test_a_hub_data_set_that_needs_a_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, subset: str | None) -> DatasetDict:
        if subset is None:
            raise ValueError("Config name is missing.")
        return DatasetDict({"train": Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.read("nyu-mll/glue", "sst2")["train"].to_list() == ROWS
    with pytest.raises(FileError, match="Config name is missing"):
        data.read("nyu-mll/glue")


def test_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, subset: Dataset.from_list(ROWS).to_iterable_dataset()
    )
    with pytest.raises(ConfigError, match="streamed"):
        data.read("some/stream")


def test_test_rows_come_from_their_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(_lines())
    (tmp_path / "test.jsonl").write_text(_lines() * 3)
    assert len(data.load_test(str(tmp_path))) == 9
    assert len(data.load_test(str(tmp_path / "train.jsonl"))) == 3


def test_shared_data_loads(data_dir: Path) -> None:
    splits = data.load(DataConfig(train=str(data_dir / "rotten_tomatoes")))
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 8530,
        "validation": 1066,
        "test": 1066,
    }
