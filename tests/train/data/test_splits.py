from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from lorica.errors import ConfigError, FileError
from lorica.train import DataConfig, Recipe
from lorica.train.data import splits as data
from lorica.train.prepared import encode

ROWS = [{"text": "NA", "label": 1}, {"text": 'a "quoted", text', "label": 0}, {"text": "null", "label": 1}]


def _csv(separator: str) -> str:
    cells = [("text", "label"), ("NA", "1"), ('"a ""quoted"", text"', "0"), ("null", "1")]
    return "".join(separator.join(row) + "\n" for row in cells)


def _lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


def _arrow(path: Path, make: Any) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.csv": lambda path: path.write_text(_csv(",")),
    "rows.tsv": lambda path: path.write_text(_csv("\t")),
    "rows.tsv.gz": lambda path: path.write_bytes(gzip.compress(_csv("\t").encode())),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.jsonl": lambda path: path.write_text(_lines()),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(_lines().encode())),
    "rows.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    "file.arrow": lambda path: _arrow(path, pa.ipc.new_file),
    "stream.arrow": lambda path: _arrow(path, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", WRITERS)
def test_reads_every_format_alike(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    typed = not name.startswith(("rows.csv", "rows.tsv"))  # cells are texts
    expected = ROWS if typed else [{**row, "label": str(row["label"])} for row in ROWS]
    assert data.read(str(tmp_path / name))["train"].to_list() == expected


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
        ("rows.xls", "x", "cannot tell the format of .*rows.xls by its name; save it as .xlsx or .csv"),
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


def test_rows_too_few_for_the_share_set_aside() -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction is 0.9, of 2 rows .* none to learn from"):
        data.load(DataConfig(validation_fraction=0.9), Dataset.from_list(ROWS[:2]))


def test_an_unreachable_hub_is_said_so() -> None:
    with pytest.raises(
        FileError,
        match=r"nobody/nothing is no file or folder here.*works without the Hub.*--data\.train PATH",
    ):
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
    assert len(data.load_test(str(tmp_path)).rows) == 9
    assert len(data.load_test(str(tmp_path / "train.jsonl")).rows) == 3


def test_shared_data_loads(data_dir: Path) -> None:
    splits = data.load(DataConfig(train=str(data_dir / "rotten_tomatoes")))
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 8530,
        "validation": 1066,
        "test": 1066,
    }


def numbered(path: Path, count: int = 50) -> Path:
    path.write_text("".join(json.dumps({"text": str(i), "label": i % 2}) + "\n" for i in range(count)))
    return path


def part(path: Path, **options: Any) -> list[str]:
    config = DataConfig(train=str(path), validation_fraction=0.0, **options)
    return list(data.keep_part(data.load(config).used()["train"], "train", config).rows["text"])


def test_a_part_of_the_rows_is_drawn_by_seed(tmp_path: Path) -> None:
    path = numbered(tmp_path / "rows.jsonl")
    tenth, fifth, twenty = part(path, fraction=0.1), part(path, fraction=0.2), part(path, train_rows=20)
    assert (len(tenth), len(fifth), len(twenty)) == (5, 10, 20)
    assert set(tenth) < set(fifth) < set(twenty)
    assert part(path, fraction=0.1) == tenth != part(path, fraction=0.1, split_seed=1)
    assert part(path, fraction=1.0) == [str(i) for i in range(50)]
    assert len(part(path, fraction=1e-9)) == 1
    with pytest.raises(ConfigError, match=r"data.train_rows is 51, of 50 training rows in .*rows\.jsonl"):
        part(path, train_rows=51)


def test_parts_of_the_rows_to_score_are_drawn_too(tmp_path: Path) -> None:
    files = {split: str(numbered(tmp_path / f"{split}.jsonl")) for split in ("train", "validation", "test")}
    all_rows = DataConfig(train=files["train"], validation=files["validation"], test=files["test"])
    config = dataclasses.replace(all_rows, validation_rows=5, test_rows=10)
    found = {
        split: list(data.keep_part(used, split, config).rows["text"])
        for split, used in data.load(config).used().items()
    }
    assert {split: len(rows) for split, rows in found.items()} == {"train": 50, "validation": 5, "test": 10}
    assert set(found["validation"]) < set(found["test"])
    with pytest.raises(ConfigError, match=r"data.test_rows is 51, of 50 test rows in .*test\.jsonl"):
        data.keep_part(data.load(config).used()["test"], "test", dataclasses.replace(all_rows, test_rows=51))


@pytest.mark.parametrize(
    "values",
    [
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"train_rows": 0},
        {"validation_rows": 0},
        {"test_rows": -1},
        {"train_rows": 3, "fraction": 0.5},
    ],
)
def test_parts_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        DataConfig(**values)


def test_rows_keep_their_numbers(tmp_path: Path) -> None:
    config = DataConfig(train=str(numbered(tmp_path / "rows.jsonl")), validation_fraction=0.2, train_rows=7)
    used = data.load(config).used()
    used["train"] = data.keep_part(used["train"], "train", config)
    for each in used.values():
        for row, text in enumerate(each.rows["text"]):
            assert each.origin.number(row) == int(text) + 1
        assert each.origin.source == str(tmp_path / "rows.jsonl")


def test_rows_in_memory() -> None:
    rows = Dataset.from_list(ROWS * 4)
    alone = data.load(DataConfig(), rows)
    assert (len(alone.train), len(alone.validation or [])) == (10, 2)
    splits = data.load(DataConfig(), DatasetDict({"train": rows, "dev": rows, "test": rows}))
    assert [name for name, _ in splits.items()] == ["train", "validation", "test"]
    assert splits.used()["test"].origin.source == "the test rows"
    for wrong in ([1], "text", {"train": rows, "test": [1]}, {}, []):
        with pytest.raises(ConfigError, match=r"rows in Python must be a datasets\.Dataset"):
            data.load(DataConfig(), wrong)  # type: ignore[arg-type]
    with pytest.raises(FileError, match="were given in Python; give them again"):
        data.load(DataConfig(train=data.IN_PYTHON))


def test_a_split_by_its_name(tmp_path: Path) -> None:
    numbered(tmp_path / "train.jsonl", 9)
    numbered(tmp_path / "validation_mismatched.jsonl", 4)
    splits = data.load(
        DataConfig(train=str(tmp_path), validation=f"{tmp_path}#validation_mismatched", validation_fraction=0)
    )
    assert len(splits.validation or []) == 4
    assert len(data.load_test(f"{tmp_path}#train").rows) == 9
    with pytest.raises(FileError, match="has no exam split; it has: train"):
        data.load_test(f"{tmp_path}#exam")
    numbered(tmp_path / "c#.jsonl", 3)
    assert len(data.load_test(str(tmp_path / "c#.jsonl")).rows) == 3


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)


def test_a_folder_of_images_by_class(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "1.png")
    found = data.read(str(tmp_path))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 2, "test": 2}
    assert found["train"].features["label"].names == ["cat", "dog"]
    assert list(found["train"]["label"]) == [0, 1]


def test_a_folder_of_images_with_metadata(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,mood\na.png,glad\nb.png,sad\n")
    assert data.read(str(tmp_path))["train"]["mood"] == ["glad", "sad"]
    assert data.read(str(tmp_path))["train"][1]["image"].size == (4, 4)
    (tmp_path / "metadata.csv").write_text("name,mood\na.png,glad\nc.png,sad\n")
    with pytest.raises(FileError, match=r"metadata.csv has no column 'file_name'"):
        data.read(str(tmp_path))
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(FileError, match="have no labels: put them into a folder for each class"):
        data.read(str(tmp_path))


@pytest.mark.parametrize(
    ("test", "kept"),
    [
        ({"label": [0, 1]}, True),
        ({"label": [-1, -1]}, False),
        ({"label": ["-1", "-1"]}, False),  # as a csv file has them
        ({"label": [None, None]}, False),
        ({"id": [7, 8]}, False),
        ({"label": [None, None], "references": [["a"], ["b"]]}, True),
    ],
)
def test_test_rows_without_labels_are_left_out(test: dict[str, Any], kept: bool) -> None:
    rows = Dataset.from_dict({"text": ["a"] * 8, "label": [0, 1] * 4})
    found = data.load(DataConfig(), {"train": rows, "test": Dataset.from_dict({"text": ["a", "b"], **test})})
    assert (data.without_unlabelled(found, DataConfig(label="label")).test is not None) == kept
    assert data.without_unlabelled(found, DataConfig(label="label", test="mine.csv")).test is not None
    columns = DataConfig(labels=["label", "other"])  # a column for each class
    assert (data.without_unlabelled(found, columns).test is not None) == ("id" not in test)


def test_a_folder_whose_test_rows_lack_the_column_of_labels(tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": "x" if i % 2 else "y"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.csv").write_text("id,text\n1,a\n")
    found = encode(Recipe(data=DataConfig(train=str(tmp_path))))
    assert set(found.splits) == {"train", "validation"}
    assert found.unlabelled == str(tmp_path / "test.csv")
