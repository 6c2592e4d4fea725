"""Real runs, on tiny things: one in a process of its own, few rows, and a comparison that is killed."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from compare.spec import METHODS, spec, write
from ranks import started
from rich.console import Console
from tiny import transformer
from train import tiny
from waiting import until

import lorica
from lorica.cli import main
from lorica.compare.check import counts
from lorica.compare.loop import Failed, in_own_process, in_this_process
from lorica.compare.results import Results, fingerprint
from lorica.compare.runs import cells
from lorica.train import train
from lorica.train.prepared import read

# Rank 2 on two blocks' six matrices and on the pooler's.
UPDATES = 2 * (4 * 2 * (32 + 32) + 2 * 2 * (32 + 64)) + 2 * (32 + 32)


def test_a_process_of_its_own(tmp_path: Path) -> None:
    first, second = (cell.trials[0] for cell in cells(spec(tmp_path), {"mood": "accuracy"}))
    row = in_own_process(second, tmp_path / "out")
    assert row["peak_memory"] > 100_000_000
    assert row["trainable"] == UPDATES + 2 * 32 + 2
    assert (row["steps"], row["rows"]["train"], set(row["scores"])) == (5, 40, {"validation", "test"})
    assert not (tmp_path / "out" / "runs" / second.key).exists()
    (tmp_path / "rows" / "train.jsonl").unlink()
    with pytest.raises(Failed, match=r"must hold train.csv|no train split"):
        in_own_process(first, tmp_path / "out")


def test_a_run_begins_with_another_adapter(tmp_path: Path) -> None:
    """A run has no checkpoint at first, so it starts, and does not go on."""
    data = tiny.write_data(tmp_path / "rows")
    given = tiny.recipe(tiny.write_model(tmp_path / "model"), data, tmp_path / "before", learning_rate=2e-2)
    before = train(given, console=Console(file=io.StringIO())).metrics["validation"]
    lora = {"method": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}, "learning_rates": [1e-9]}
    warm = {**lora, "init_from": str(tmp_path / "before"), "init_head": True}
    both = spec(tmp_path, methods={"cold": lora, "warm": warm})
    runs = [cell.trials[0] for cell in cells(both, {"mood": "accuracy"})]
    cold, begun = (in_this_process(run, tmp_path / "out")["scores"]["validation"] for run in runs)
    assert begun == pytest.approx(before, rel=1e-5)
    assert cold["loss"] != pytest.approx(begun["loss"], rel=1e-5)
    (tmp_path / "before" / "README.md").write_text("another adapter's")
    changed = [cell.trials[0].key for cell in cells(both, {"mood": "accuracy"})]
    assert changed[0] == runs[0].key
    assert changed[1] != runs[1].key


def test_few_rows_are_among_more_and_the_others_stay_whole(tmp_path: Path) -> None:
    found: dict[int, list[str]] = {}
    for cell in cells(spec(tmp_path, sizes=[10, 20, "all"]), {"mood": "accuracy"}):
        _, _, used = read(cell.trials[0].recipe)
        found[cell.size or 40] = list(used["train"].rows["text"])
        assert {split: len(own.rows) for split, own in used.items()} == {
            "train": cell.size or 40,
            "validation": 12,
            "test": 12,
        }
    assert set(found[10]) <= set(found[20]) <= set(found[40])


def test_fingerprints(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "train.csv").write_text("x")
    before = fingerprint(str(folder))
    (folder / "test.csv").write_text("x")
    assert fingerprint(str(folder)) != before
    assert fingerprint(str(folder / "train.csv")) == fingerprint(str(folder / "test.csv"))
    assert fingerprint("nyu-mll/glue#test") == "nyu-mll/glue#test"
    test, train = (fingerprint(f"{folder}#{split}") for split in ("test", "train"))
    assert test != train
    (folder / "test.csv").write_text("y")
    assert fingerprint(f"{folder}#test") != test


def outcome(path: Path) -> Any:
    """A table without what time and memory decide."""
    table = json.loads(path.read_text())
    for cost in table["costs"]:
        del cost["step_seconds"]
    return table


def test_killed_it_goes_on_and_ends_with_the_same_table(tmp_path: Path) -> None:
    file = write(tmp_path, sizes=[20, "all"])
    command = ["compare", str(file), "--in_process"]
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    results = tmp_path / "out" / "results.jsonl"
    killed = started(main, command, world=None)
    try:
        until(
            lambda: (
                killed.processes[0].exitcode is not None
                or (results.exists() and results.read_text().count("\n") >= 3)
            ),
            "the third result",
        )
    finally:
        killed.send(0, signal.SIGKILL)
        assert killed.wait()[0].code == -signal.SIGKILL
    lines = results.read_text().splitlines(keepends=True)
    assert 3 <= len(lines) < 10
    results.write_text("".join(lines)[:-20])  # the kill might as well have come while a line was written
    assert main(command) == 0
    assert outcome(tmp_path / "out" / "table.json") == outcome(tmp_path / "whole" / "table.json")
    assert Results(results).rows.keys() == Results(tmp_path / "whole" / "results.jsonl").rows.keys()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"table.md", "table.json", "results.jsonl"}


def test_counts_are_of_what_is_trained_less_the_head(tmp_path: Path) -> None:
    """The bare RoBERTa has a pooler, which its classifier has not."""
    model = transformer("roberta")
    model.save_pretrained(tmp_path / "roberta")
    methods = {"FT": {"baseline": {"method": "full"}}, "LoRA": METHODS["LoRA"]}
    tasks = {"mood": {"task": "sequence-classification", "data": {"train": "rows"}}}
    made = spec(tmp_path, recipe={"model": str(tmp_path / "roberta")}, tasks=tasks, methods=methods)
    head = sum(p.numel() for p in model.classifier.parameters())
    full, lora = counts(made)
    assert full.trainable == sum(p.numel() for p in model.parameters()) - head
    config = made.laid("mood", "LoRA").configuration().replace(task_type="SEQ_CLS")
    lorica.adapt(model, config)
    assert lora.trainable == lorica.trainable_parameters(model).trainable - head


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = write(tmp_path, methods={"LoRA [/b]": METHODS["LoRA"]}, seeds=[0])
    assert main(["compare", str(odd), "--counts"]) == 0
    assert "LoRA [/b]" in capsys.readouterr().out
    file = write(tmp_path, methods={"LoRA": METHODS["LoRA"]}, seeds=[0])
    assert main(["compare", str(file), "--counts"]) == 0
    shown = capsys.readouterr().out
    assert "reparametrisation" in shown
    assert f"{UPDATES:,}" in shown
    assert not (tmp_path / "out").exists()
    assert main(["compare", str(file), "--in_process", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert (table["summary"], table["split"], len(table["scores"])) == ("mean", "test", 1)
    assert main(["compare", str(file), "--table"]) == 0
    assert "LoRA" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "none.yaml")]) == 1
    assert "cannot read the comparison" in capsys.readouterr().err


def test_the_command_ends_with_1_where_a_run_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"training": {"learning_rate": 1e-2, "arguments": {"optim": "none"}}}
    methods = {"broken": {**METHODS["LoRA"], **training}, "LoRA": METHODS["LoRA"]}
    file = write(tmp_path, methods=methods, seeds=[0])
    assert main(["compare", str(file), "--in_process"]) == 1
    shown = capsys.readouterr().out
    assert "broken · lr 0.01 · seed 0: FAILED: transformers refuses these training arguments" in shown
    assert "[2/2] mood · LoRA" in shown
    assert "failed: mood · broken" in shown


def test_the_key_of_a_run_says_in_which_order_rows_come(tmp_path: Path) -> None:
    """Results of when rows of similar lengths shared a batch in every task are not taken for today's."""
    (first, *_) = (cell.trials[0] for cell in cells(spec(tmp_path), {"mood": "accuracy"}))

    def key(task: str, order: bool | None) -> str:
        recipe = first.recipe.replace(task=task, training={"group_by_length": order})
        return dataclasses.replace(first, recipe=recipe).key

    classes = [key("sequence-classification", order) for order in (None, True, False)]
    assert (classes[0] == classes[1], classes[0] == first.key, classes[1] == classes[2]) == (
        True,
        True,
        False,
    )
    texts = [key("causal-lm", order) for order in (None, True, False)]
    assert (texts[0] == texts[2], texts[0] == texts[1]) == (True, False)


def test_the_key_of_a_run_says_in_which_order_patterns_are_tried(tmp_path: Path) -> None:
    first = cells(spec(tmp_path), {"mood": "accuracy"})[0].trials[0]

    def key(*order: str) -> str:
        method = {"rank_pattern": {name: len(name) for name in order}}
        return dataclasses.replace(first, recipe=first.recipe.replace(method=method, baseline=None)).key

    assert key("dense", "output.dense") != key("output.dense", "dense")
    assert key("dense", "output.dense") == key("dense", "output.dense")
