"""A run killed at any moment and resumed ends with the same file as one that was never interrupted."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import started
from safetensors.torch import load_file
from train import tiny
from train.killed import kills_and_resumes

from lorica.cli import main
from lorica.errors import ConfigError, FileError, LoricaError
from lorica.plain import as_json
from lorica.train import Recipe, RowError, evaluate, predict, train
from lorica.train.trainer.callbacks import CheckpointCallback
from lorica.train.trainer.fit import Interrupted


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model, data = tiny.write_model(folder / "model"), tiny.write_data(folder / "data")
    recipe = tiny.recipe(model, data, folder / "out", epochs=15, load_best=False, learning_rate=3e-3)
    return train(recipe.replace(method={"r": 8, "lora_alpha": 16, "lora_dropout": 0.0})).output


def test_the_folder_holds_everything(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenizer.json",
        "recipe.yaml",
        "run.json",
        "checkpoints",
    }
    assert not any(name.startswith(".") for name in names)
    record = json.loads((run / "run.json").read_text())
    results = record["results"]
    assert set(results["metrics"]) == {"validation", "test"}
    assert results["rows"] == {"train": 40, "validation": 12, "test": 12}
    assert results["trainable"] == sum(
        t.numel() for t in load_file(run / "adapter_model.safetensors").values()
    )
    assert results["checkpoint_bytes"] == (run / "adapter_model.safetensors").stat().st_size
    assert set(record["versions"]) >= {"python", "lorica", "torch", "transformers", "datasets"}
    assert record["seeds"] == {"training": 0, "split": 0}


def test_a_run_that_learns_is_not_warned_of(run: Path) -> None:
    assert json.loads((run / "run.json").read_text())["results"]["warnings"] == []


def test_the_card_states_task_data_and_scores(run: Path) -> None:
    card = (run / "README.md").read_text()
    scores = json.loads((run / "run.json").read_text())["results"]["metrics"]
    for line in (
        "| task | sequence-classification |",
        "| data | data |",
        "| learned | text → label |",
        "| classes | bad, good |",
        "| rows | 40 train, 12 validation, 12 test |",
        "| rows a step | 4 |",
        "| seed | 0 |",
    ):
        assert line in card.splitlines()
    assert f"| test | {scores['test']['loss']:.4f} | {scores['test']['accuracy']:.2%} |" in card
    assert "PeftModel.from_pretrained" in card


def test_the_recipe_holds_what_was_found(run: Path) -> None:
    recipe = Recipe.load(run / "recipe.yaml")
    assert (recipe.data.text, recipe.data.label, recipe.data.labels) == ("text", "label", ["bad", "good"])


def test_the_adapter_learned_and_scores_the_same_when_loaded(run: Path) -> None:
    scores = evaluate(run)
    results = json.loads((run / "run.json").read_text())["results"]["metrics"]["test"]
    assert scores.pop("rows") == 12
    assert scores == pytest.approx(results, abs=1e-6)
    assert scores["accuracy"] >= 0.9


def test_evaluate_takes_as_many_test_rows_as_the_recipe_names(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(max_steps=1).replace(data={"test_rows": 5})
    result = train(recipe)
    scores = evaluate(result.output)
    assert scores.pop("rows") == result.rows["test"] == 5
    assert scores == pytest.approx(result.metrics["test"], abs=1e-6)


def test_evaluate_on_other_rows(run: Path, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sentences(20, seed=9))
    assert evaluate(run, str(rows))["rows"] == 20
    wrong = tiny.write_rows(tmp_path / "wrong.jsonl", [{"text": "great film", "label": "superb"}])
    with pytest.raises(RowError, match=r"row 1 of .*wrong\.jsonl has the label 'superb'"):
        evaluate(run, str(wrong))


def test_predict_texts_and_files(run: Path, tmp_path: Path) -> None:
    texts = ["lovely great film", "awful grim plot"]
    said = predict(run, texts)
    assert [row["label"] for row in said] == ["good", "bad"]
    assert [row["text"] for row in said] == texts
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in said)
    (tmp_path / "lines.txt").write_text("\n".join(texts) + "\n\n")
    assert predict(run, tmp_path / "lines.txt") == said
    tiny.write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    assert predict(run, tmp_path / "rows.jsonl") == said


def test_predict_refuses(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for texts, message in (
        ([], "no text"),
        (tmp_path / "empty.txt", "no rows"),
        (tmp_path / "none.txt", "no file or folder"),
    ):
        with pytest.raises(FileError, match=message):
            predict(run, texts)


def test_folders_that_no_training_made(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no folder"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(FileError, match=r"has no recipe.yaml"):
        evaluate(tmp_path)


def test_an_unfinished_run_says_so(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    output = train(recipe).output
    (output / "adapter_config.json").unlink()
    with pytest.raises(FileError, match=r"its training did not end\. Go on with: lorica train "):
        evaluate(output)


def test_a_second_run_must_say_what_it_wants(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(max_steps=2)
    train(recipe)
    with pytest.raises(LoricaError, match=r"holds a run already .*--resume.*--overwrite.*--output"):
        train(recipe)
    with pytest.raises(ConfigError, match="choose one"):
        train(recipe, resume=True, overwrite=True)
    with pytest.raises(ConfigError, match=r"another recipe: training.learning_rate was 0.01, now 0.5"):
        train(recipe.replace(training={"learning_rate": 0.5}), resume=True)
    assert train(recipe, resume=True).steps == 2
    assert train(recipe.replace(training={"learning_rate": 0.5}), overwrite=True).steps == 2


def stopped_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the next run hear a Ctrl-C in a step."""
    before = CheckpointCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == step:
            self.interrupt()
        before(self, args, state, control, **more)

    monkeypatch.setattr(CheckpointCallback, "on_step_end", on_step_end)


def test_what_is_overwritten_is_not_read_beside_the_new_recipe(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(max_steps=4)
    output = train(recipe).output
    stopped_after(monkeypatch, 1)
    turned = recipe.replace(data={"labels": ["good", "bad"]})
    with pytest.raises(Interrupted):
        train(turned, overwrite=True)
    with pytest.raises(FileError, match=r"its training did not end\. Go on with: lorica train "):
        predict(output, ["great film"])
    assert sorted(path.name for path in output.iterdir()) == ["checkpoints", "recipe.yaml"]
    monkeypatch.undo()
    assert train(turned, resume=True).steps == 4
    assert predict(output, ["great film"])


def test_a_run_goes_on_with_the_rows_it_began_with(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.write_data(tmp_path / "rows")
    recipe = make_recipe(max_steps=4).replace(data={"train": str(data)})
    stopped_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        train(recipe)
    monkeypatch.undo()
    before = (data / "train.jsonl").read_text()
    tiny.write_rows(data / "train.jsonl", tiny.sentences(40, seed=5))
    with pytest.raises(ConfigError, match=r"have changed: the train rows \(40 then, 40 now\).*--overwrite"):
        train(recipe, resume=True)
    (data / "train.jsonl").write_text(before)
    assert train(recipe, resume=True).steps == 4


def test_a_run_that_failed_at_once_leaves_nothing_to_continue(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(max_steps=1, arguments={"optim": "nosuch"})
    with pytest.raises(ConfigError, match="nosuch"):
        train(recipe)
    assert (Path(recipe.output) / "recipe.yaml").is_file()
    recipe = make_recipe(max_steps=1)
    assert train(recipe).steps == 1


def test_a_run_does_not_go_on_by_another_method(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(max_steps=1)
    train(recipe)
    with pytest.raises(ConfigError, match="another recipe: baseline was None, now"):
        train(recipe.replace(baseline={"method": "bitfit"}), resume=True)


def test_the_same_seed_gives_the_same_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def made(name: str, seed: int) -> bytes:
        recipe = make_recipe(max_steps=3, seed=seed).replace(output=str(tmp_path / name))
        return (train(recipe).output / "adapter_model.safetensors").read_bytes()

    assert made("a", 0) == made("b", 0)
    assert made("c", 1) != made("d", 0)


def test_a_folder_that_cannot_be_written(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write to"):
        train(make_recipe().replace(output=str(tmp_path / "file" / "run")))
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(FileError, match="cannot write to"):
            train(make_recipe().replace(output=str(tmp_path / "locked" / "run")))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "x"}] * 4, "needs at least two classes"),
        ([{"text": None, "label": "x"}, {"text": "a", "label": "y"}], "where a text is due"),
        ([{"words": "a", "mark": "x"}, {"words": "a", "mark": "y"}], "cannot tell which column"),
        ([{"text": "a", "label": None}, {"text": "a", "label": "y"}], "has no label"),
    ],
)
def test_bad_rows_are_refused_before_anything_is_written(
    make_recipe: Callable[..., Recipe], tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    recipe = make_recipe().replace(data={"train": str(path), "validation_fraction": 0.0})
    with pytest.raises(LoricaError, match=message):
        train(recipe)
    assert not Path(recipe.output).exists()


def test_a_label_that_only_the_test_rows_have(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "test.jsonl", [{"text": "a", "label": "new"}])
    recipe = make_recipe().replace(data={"test": str(path)})
    with pytest.raises(RowError, match=r"row 1 of .*test\.jsonl has the label 'new'"):
        train(recipe)
    assert not Path(recipe.output).exists()


def test_cut_rows_are_reported(
    make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(make_recipe(max_steps=1, max_length=5))
    assert result.truncated["train"] > 0
    assert (
        f"{result.truncated['train']} of 40 train rows ({result.truncated['train'] / 40:.1%}) are cut to 5 "
        "tokens; the longest has 12" in capsys.readouterr().out
    )


def test_a_recipe_survives_as_it_was_written(run: Path) -> None:
    assert yaml.safe_load((run / "recipe.yaml").read_text())["method"]["target_modules"] == "all-linear"


def test_what_has_no_form_in_json() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        as_json({"x": object()})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes, and this system cannot fork")
def test_a_killed_run_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    ended = started(kills_and_resumes, str(tmp_path), world=None).wait(600)[0]
    assert ended.code == 0, ended.output
    assert len(ended.value) == 10
    assert ended.value == {name: [-signal.SIGKILL, 0, True] for name in ended.value}, ended.output


def test_a_run_that_did_not_end_is_told_how_to_go_on(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    begun = tmp_path / "a run"
    begun.mkdir()
    make_recipe(max_steps=2).replace(output=str(begun)).save(begun / "recipe.yaml")
    with pytest.raises(FileError, match=r"its training did not end") as told:
        predict(begun, ["film"])
    again = shlex.split(str(told.value).partition("Go on with: ")[2])
    assert again[0] == "lorica"
    assert main(again[1:]) == 0
    assert predict(begun, ["film"])
