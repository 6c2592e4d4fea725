"""What a command prints after ``next:`` runs as it is printed, whatever the run was."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from train import tiny

import lorica
from lorica.cli import main
from lorica.cli.shared import hints
from lorica.train import Recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows with and without a test split, pairs, and a run; in a folder whose name needs quotes."""
    folder = tmp_path_factory.mktemp("hints") / "my runs"
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data")
    tiny.write_rows(folder / "alone.jsonl", tiny.sentences(40))
    pairs = [{"premise": r["text"], "hypothesis": r["text"], "label": r["label"]} for r in tiny.sentences(40)]
    tiny.write_rows(folder / "pairs.jsonl", pairs)
    assert main(["train", *flags(folder, "data"), "-o", str(folder / "run")]) == 0
    return folder


def flags(place: Path, rows: str, *more: str) -> list[str]:
    given = ["-m", str(place / "model"), "-d", str(place / rows), "--method.r", "4", "--lr", "1e-2"]
    return [*given, "-b", "4", "--max-steps", "4", "--training.report_to", "[]", *more]


def commands(printed: str) -> list[list[str]]:
    """The commands that were printed, as a shell splits them."""
    lines = [line.removeprefix("next: ") for line in printed.splitlines() if line.startswith("next: ")]
    return [shlex.split(line) for line in lines]


def follow(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a command, then each that it proposes; the names of these."""
    capsys.readouterr()
    assert main(argv) == 0
    found = commands(capsys.readouterr().out)
    for program, *words in found:
        assert program == "lorica"
        assert main(words) == 0, words
    return [words[1] for words in found]


def test_after_training(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", *flags(place, "data"), "-o", str(tmp_path / "a run")]
    assert follow(argv, capsys) == ["evaluate", "predict", "merge"]
    argv = ["train", *flags(place, "alone.jsonl"), "-o", str(tmp_path / "no test rows")]
    assert follow(argv, capsys) == ["predict", "merge"]
    argv = ["train", *flags(place, "pairs.jsonl"), "-o", str(tmp_path / "pairs")]
    assert follow(argv, capsys) == ["predict", "merge"]


@pytest.mark.parametrize(
    ("method", "proposed"),
    [
        ("{method: bitfit}", ["evaluate", "predict", "merge"]),
        ("{method: full}", ["evaluate", "predict", "merge"]),
        ("{method: adapter-p, bottleneck: 4}", ["evaluate", "predict"]),
    ],
)
def test_after_training_by_other_methods(
    method: str, proposed: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", *flags(place, "data"), "--baseline", method, "-o", str(tmp_path / "run")]
    assert follow(argv, capsys) == proposed


def test_after_merging(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, more in (("merged", []), ("streamed", ["--stream"])):
        argv = ["merge", str(place / "model"), str(place / "run"), "--output", str(tmp_path / name), *more]
        assert follow(argv, capsys) == ["evaluate", "predict"]


def test_what_is_made_of_adapters_can_be_scored(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(place / "run")
    assert main(["train", *flags(place, "data"), "--seed", "1", "-o", str(tmp_path / "other")]) == 0
    other = str(tmp_path / "other")
    made = {
        "small": ["compress", run, "--output", str(tmp_path / "small"), "--rank", "2"],
        "both": ["combine", run, other, "--output", str(tmp_path / "both"), "--keep", other],
        "cut": ["study", run, "--output", str(tmp_path / "report"), "--cut", str(tmp_path / "cut")],
    }
    for name, argv in made.items():
        assert follow(argv, capsys) == ["evaluate", "predict"], name
        assert Recipe.load(tmp_path / name / "recipe.yaml").output == str(tmp_path / name)
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert not {"run.json", "checkpoints"} & names  # which are of another adapter
    assert lorica.read(tmp_path / "both").extras.keys() == lorica.read(other).extras.keys()


def test_adapters_of_different_tasks_have_no_recipe_in_common(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = place / "run", tmp_path / "other"
    adapter = lorica.read(run)
    lorica.write(lorica.Adapter(adapter.config.replace(modules_to_save=None), adapter.factors), other)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["labels"] = ["one", "two", "three"]
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert follow(["combine", str(run), str(other), "--output", str(tmp_path / "both")], capsys) == ["info"]
    assert not (tmp_path / "both" / "recipe.yaml").exists()


def test_after_a_search(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny.recipe(place / "model", place / "data", tmp_path / "x", epochs=1)
    recipe.save(tmp_path / "recipe.yaml")
    (tmp_path / "space.yaml").write_text("method.r: {choice: [1, 2]}\n")
    argv = ["tune", "recipe.yaml", "--space", "space.yaml", "--trials", "2", "--output", "search"]
    assert follow(argv, capsys) == ["evaluate", "predict", "train"]
    argv = ["tune", "recipe.yaml", "--ramp", "--rank.limit", "2", "--output", "ramp"]
    assert follow(argv, capsys) == ["train"]


def test_how_to_go_on_names_the_folder_as_a_shell_reads_it(tmp_path: Path) -> None:
    assert shlex.split(hints.command("train", tmp_path / "my run", "--resume"))[2] == str(tmp_path / "my run")
    (tmp_path / "x").mkdir()
    assert hints.unused(str(tmp_path / "x")) == tmp_path / "x-2"
    (tmp_path / "run.json").write_text(json.dumps({"results": None}))
    assert not hints.has_test_rows(tmp_path)
