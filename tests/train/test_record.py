from __future__ import annotations

import datetime
import decimal
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from train import tiny

import lorica
from lorica.cli import main
from lorica.errors import ConfigError, FileError
from lorica.train import Recipe, Record, prepare, train
from lorica.train.data.rows import fingerprint


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_run_comes_out_again_from_its_record(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(make_recipe(max_steps=6)).output
    record = Record.load(first)
    assert record.adapter_sha256 == sha256(first)
    torch.manual_seed(7)  # whatever went on before must not matter
    assert main(["train", "--from", str(first / "run.json"), "--output", str(tmp_path / "again")]) == 0
    assert sha256(tmp_path / "again") == sha256(first)
    assert f"came out again, byte for byte (sha256 {sha256(first)})" in capsys.readouterr().out
    again = Record.load(tmp_path / "again" / "run.json")
    assert again.results["metrics"] == record.results["metrics"]
    assert (again.data, again.versions) == (record.data, record.versions)


def test_options_override_the_recorded_recipe(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(make_recipe(max_steps=2)).output
    capsys.readouterr()
    argv = ["train", "--from", str(first), "--training.seed", "1", "--output", str(tmp_path / "other")]
    assert main(argv) == 0
    assert "adapter came out" not in capsys.readouterr().out
    assert Record.load(tmp_path / "other").recipe.training.seed == 1
    assert sha256(tmp_path / "other") != sha256(first)


def test_the_first_folder_is_not_written_over(make_recipe: Callable[..., Recipe]) -> None:
    first = train(make_recipe(max_steps=2)).output
    assert main(["train", "--from", str(first)]) == 1


def test_changed_rows_are_refused_unless_told(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_data(tmp_path / "data")
    first = train(make_recipe(max_steps=2).replace(data={"train": str(data)})).output
    tiny.write_rows(data / "train.jsonl", tiny.sentences(42, seed=5))
    argv = ["train", "--from", str(first), "--output", str(tmp_path / "again")]
    assert main(argv) == 1
    assert "the train rows (40 then, 42 now). Bring back" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert main([*argv, "--changed_data"]) == 0
    assert "another adapter came out than the recorded one" in capsys.readouterr().out


def test_other_versions_are_named(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(make_recipe(max_steps=1)).output
    values = json.loads((first / "run.json").read_text())
    values["versions"]["torch"] = "1.0"
    values["machine"]["threads"] = torch.get_num_threads() + 1
    (first / "run.json").write_text(json.dumps(values))
    assert main(["train", "--from", str(first), "--output", str(tmp_path / "again")]) == 0
    out = capsys.readouterr().out
    assert f"other than in the recorded run: torch 1.0 then, {torch.__version__} now" in out
    assert "threads" not in out, "the recorded number is used"
    assert torch.get_num_threads() + 1 == values["machine"]["threads"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the run"),
        ("{", "cannot be read as JSON"),
        ("[]", "should hold a JSON object"),
        ("{}", "it has no recipe"),
    ],
)
def test_files_that_are_no_record(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(FileError, match=message):
        Record.load(tmp_path)


def test_a_recipe_of_another_version(make_recipe: Callable[..., Recipe]) -> None:
    first = train(make_recipe(max_steps=1)).output
    values = json.loads((first / "run.json").read_text())
    values["recipe"]["training"]["lerning_rate"] = 1
    (first / "run.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"run.json: unknown field 'training.lerning_rate'"):
        Record.load(first)


def test_changed_data_belongs_to_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--changed_data"]) == 2
    assert "belongs to --from" in capsys.readouterr().err


def test_rows_are_known_by_their_content(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": str(i), "label": i} for i in range(2500)])
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_parquet(tmp_path / "rows.parquet", batch_size=7)
    files = [
        Dataset.from_json(str(tmp_path / "rows.jsonl")),
        Dataset.from_parquet(str(tmp_path / "rows.parquet")),
    ]
    prints = {json.dumps(fingerprint(each)) for each in (rows, *files) if isinstance(each, Dataset)}
    assert len(prints) == 1
    assert fingerprint(rows)["rows"] == 2500
    moved = rows.select([1, 0, *range(2, 2500)])
    assert fingerprint(moved) != fingerprint(rows)


def test_any_column_counts() -> None:
    values = {
        "price": [decimal.Decimal("1.20")],
        "span": [datetime.timedelta(seconds=1)],
        "day": [datetime.datetime(2026, 1, 2)],
    }
    first = fingerprint(Dataset.from_dict(values))
    assert first == fingerprint(Dataset.from_dict(values))
    for name, other in {"price": decimal.Decimal("1.30"), "span": datetime.timedelta(seconds=2)}.items():
        assert fingerprint(Dataset.from_dict({**values, name: [other]})) != first


def test_images_are_known_by_their_bytes(tmp_path: Path) -> None:
    def found(name: str, shade: int, inside: bool) -> Any:
        path = tmp_path / name
        Pictures.new("RGB", (4, 4), (shade, 0, 0)).save(path)
        image = {"bytes": path.read_bytes(), "path": None} if inside else {"bytes": None, "path": str(path)}
        return fingerprint(
            Dataset.from_list([{"image": image, "x": 1}], Features({"image": Image(), "x": Value("int64")}))
        )

    assert found("a.png", 9, inside=False) == found("b.png", 9, inside=True)
    assert found("a.png", 10, inside=False) != found("b.png", 9, inside=True)


def test_an_adapter_starts_alike_whatever_else_is_adapted(make_recipe: Callable[..., Recipe]) -> None:
    def start(seed: int, *targets: str) -> Any:
        prepared = prepare(make_recipe(seed=seed))
        method = prepared.recipe.method.replace(target_modules=list(targets))
        return lorica.extract(lorica.adapt(prepared.model, method, seed=seed)).factors

    alone, together, other = start(0, "query"), start(0, "query", "value", "dense"), start(1, "query")
    assert set(alone) < set(together)
    for path, factors in alone.items():
        assert torch.equal(factors.A, together[path].A)
        assert not torch.equal(factors.A, other[path].A)
