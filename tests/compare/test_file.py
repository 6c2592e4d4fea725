"""The file of a comparison: read whole, laid over one another, and refused with all that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from compare.spec import METHODS, content, spec, write
from train import tiny

from lorica.compare.check import check
from lorica.compare.file import Comparison, FewShot
from lorica.config import method_of
from lorica.errors import ConfigError, FileError
from lorica.train import Recipe

REPOSITORY = Path(__file__).parents[2]


def test_parts_are_laid_over_one_another(tmp_path: Path) -> None:
    tasks = {"mood": {"data": {"train": "rows", "labels": ["bad", "good"]}, "training": {"epochs": 4}}}
    methods = {"FT": {"baseline": {"method": "full"}, "training": {"batch_size": 2}}}
    recipe = spec(tmp_path, tasks=tasks, methods=methods).laid("mood", "FT")
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.training.load_best) == (4, 2, False)
    assert recipe.data.train == str(tmp_path / "rows")
    assert recipe.data.labels == ["bad", "good"]
    assert method_of(recipe.configuration()) == "full"


def test_paths_start_in_the_folder_of_rows(tmp_path: Path) -> None:
    def train(source: str) -> str:
        return spec(tmp_path, tasks={"a": {"data": {"train": source}}}).laid("a", "LoRA").data.train

    assert train("rows/train.jsonl") == str(tmp_path / "rows" / "train.jsonl")
    assert train("missing.csv") == str(tmp_path / "missing.csv")
    assert train("missing.tsv#train") == str(tmp_path / "missing.tsv") + "#train"
    assert train("rows#test") == str(tmp_path / "rows") + "#test"
    assert train("/elsewhere/rows.csv") == "/elsewhere/rows.csv"
    assert train("nyu-mll/glue") == "nyu-mll/glue"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": {}}, "unknown field 'method'; did you mean 'methods'"),
    ({"methods": {}}, "methods must hold at least one"),
    ({"tasks": None}, "tasks must hold at least one"),
    ({"tasks": {"a": {"dat": {}}}}, "unknown field 'tasks.a.dat'; did you mean 'data'"),
    ({"tasks": {"a": {"metric": 3}}}, "tasks.a.metric must be a name"),
    ({"tasks": {"a": {"also": "f1"}}}, "tasks.a.also must be a list of metrics' names, not 'f1'"),
    ({"tasks": {"a": "sst2"}}, "tasks.a must hold fields, not 'sst2'"),
    ({"recipe": {"output": "x"}}, "unknown field 'recipe.output'"),
    ({"methods": {"m": {}}}, "methods.m must say what trains"),
    ({"methods": {"m": {"method": {}, "baseline": {}}}}, "methods.m must say what trains"),
    ({"methods": {"m": {"method": {}, "learning_rates": []}}}, "methods.m.learning_rates must be a list"),
    ({"methods": {"m": {"method": {}, "learning_rates": [1e-3, -1]}}}, "must be positive numbers, not -1"),
    ({"methods": {"m": {"method": {}, "learning_rates": ["fast"]}}}, "must be positive numbers, not 'fast'"),
    ({"methods": {"m": {"method": {}, "learning_rates": [True]}}}, "must be positive numbers, not True"),
    ({"methods": {"m": {"method": {}, "learning_rates": [1e-3, 0.001]}}}, "learning_rates must be different"),
    (
        {"methods": {"m": {"method": {}, "learning_rates": [1], "training": {"learning_rate": 1}}}},
        "has learning_rates and a learning_rate",
    ),
    ({"methods": {"m": {"few-shot": {"shot": 1}}}}, "'methods.m.few-shot.shot'; did you mean 'shots'"),
    ({"methods": {"m": {"few-shot": {"shots": -1}}}}, "shots must be a whole number of at least 0"),
    ({"methods": {"m": {"few-shot": {"prompt": "x"}}}}, "prompt must say where the text goes"),
    ({"methods": {"m": {"baseline": None}}}, "must say what trains"),
    ({"methods": {"m": {"few-shot": {"prompt": ["{text}"]}}}}, "prompt must say where the text goes"),
    ({"seeds": []}, "seeds must be a list of at least one"),
    ({"seeds": [0, 0]}, "seeds must be different"),
    ({"seeds": ["0"]}, "seeds must be whole numbers"),
    ({"sizes": [0]}, "sizes must be whole numbers of at least 1"),
    ({"summary": "medain"}, "summary must be one of mean, median, not 'medain'; did you mean 'median'"),
    ({"split": "train"}, "split must be one of test, validation"),
    ({"keep": "no"}, "keep must be true or false"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        spec(tmp_path, **changes)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, seeds=[], summary="most", tasks={"a": {"datas": {}}})
    with pytest.raises(ConfigError) as raised:
        Comparison.load(path)
    assert str(raised.value).count("\n") == 3
    assert str(raised.value).startswith(f"{path}:\n")


def test_files_that_are_none(tmp_path: Path) -> None:
    for text, message in (("a: [", "is not YAML"), ("- a", "must hold 'tasks:'")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(FileError, match=message):
            Comparison.load(tmp_path / "c.yaml")
    with pytest.raises(FileError, match="cannot read the comparison"):
        Comparison.load(tmp_path / "none.yaml")


def test_what_does_not_fit_is_found_before_anything_runs(tmp_path: Path) -> None:
    methods: dict[str, Any] = {
        "typo": {"baseline": {"method": "bitfitt"}},
        "deep": {"baseline": {"method": "adapter-d", "dropped": 2}},
        "long": {"baseline": {"method": "pre-embed", "prefix": 64}},
        "field": {"method": {"rank": 3}},
        "prompt": {"few-shot": {}},
    }
    with pytest.raises(ConfigError) as raised:
        check(spec(tmp_path, methods={**METHODS, **methods}))
    text = str(raised.value)
    for message in (
        "typo on mood: there is no method 'bitfitt'; did you mean 'bitfit'",
        "deep on mood: dropped=2 leaves no adapter in a stack of 2 blocks",
        "long on mood: prefix=64 and infix=0 leave no room",
        "'method.rank'",
        "prompt on mood: few-shot needs a decoder",
    ):
        assert message in text
    assert "LoRA" not in text
    assert not (tmp_path / "out").exists()


def test_rows_that_do_not_do(tmp_path: Path) -> None:
    train = str(tmp_path / "rows" / "train.jsonl")
    for changes, message in (
        ({"tasks": {"a": {"data": {"train": "nowhere.csv"}}}}, "no file or folder"),
        ({"tasks": {"a": {"data": {"train": train}}}}, "a: there are no test rows to score"),
        ({"sizes": [41]}, "40 training rows are fewer than the 41 of sizes"),
        (
            {"tasks": {"a": {"data": {"train": train, "test": train, "validation_fraction": 0}}}},
            "BitFit has several learning_rates, and no validation rows",
        ),
        ({"tasks": {"a": {"data": {"train": "rows", "label": "lable"}}}}, "there is no column 'lable'"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(spec(tmp_path, **changes))


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "recipes" / "compare").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_files_that_come_with_lorica_can_be_read(path: Path) -> None:
    comparison = Comparison.load(path)
    for task in comparison.tasks:
        for method in comparison.methods:
            comparison.laid(task, method)


def test_few_shot_checks_its_fields() -> None:
    wrongs: list[dict[str, Any]] = [{"words": "yes"}, {"between": 3}, {"calibrate": 1}, {"shots": True}]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            FewShot(**wrong)


def test_yaml_without_a_point_is_a_rate(tmp_path: Path) -> None:
    given = content(tmp_path)
    text = yaml.safe_dump({**given, "methods": {"m": {"method": {}, "learning_rates": ["1e-3"]}}})
    (tmp_path / "c.yaml").write_text(text.replace("'1e-3'", "1e-3"))
    assert Comparison.load(tmp_path / "c.yaml").methods["m"].learning_rates == (1e-3,)


def test_what_trains_is_said_anew_by_a_method(tmp_path: Path) -> None:
    shared = {**content(tmp_path)["recipe"], "baseline": {"method": "bitfit"}}
    made = spec(tmp_path, recipe=shared, methods={"LoRA": {"method": {"r": 2}}})
    assert made.laid("mood", "LoRA").configuration() == Recipe().method.replace(r=2)


def test_what_decides_is_the_presets_metric_or_the_recipes(tmp_path: Path) -> None:
    given: dict[str, Any] = {"task": "sequence-classification", "data": {"train": "rows"}}
    for more, metric in (
        ({}, "accuracy"),
        ({"training": {"metric_for_best": "f1"}}, "f1"),
        ({"training": {"metric_for_best": "f1"}, "metric": "matthews"}, "matthews"),
    ):
        assert check(spec(tmp_path, tasks={"mood": {**given, **more}})) == {"mood": metric}
    names = {"good": "acceptable", "bad": "unacceptable"}
    rows = [{"sentence": row["text"], "label": names[str(row["label"])]} for row in tiny.sentences(20)]
    for split in ("train", "validation", "test"):
        tiny.write_rows(tmp_path / "cola" / f"{split}.jsonl", rows)
    cola = {"data": {"preset": "glue/cola", "train": "cola"}}
    assert check(spec(tmp_path, tasks={"cola": cola})) == {"cola": "matthews"}


def test_sizes_take_the_place_of_train_rows(tmp_path: Path) -> None:
    tasks = {"mood": {"task": "sequence-classification", "data": {"train": "rows", "train_rows": 20}}}
    check(spec(tmp_path, tasks=tasks, sizes=[30]))
