"""`Comparison`: tasks, methods and seeds, from a YAML file.

recipe      fields of all runs        ┐
tasks       fields of each task       ├─ combined, they are a recipe: one run
methods     fields of each method     ┘
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lorica.errors import ConfigError, FileError, lines, nearest
from lorica.reading import read_yaml
from lorica.train import presets
from lorica.train.recipe import Recipe

SUMMARIES = ("mean", "median")
SPLITS = ("test", "validation")
_RECIPE = tuple(item.name for item in dataclasses.fields(Recipe) if item.name != "output")
_ROWS = (".gz", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_WHOLE = ("baseline", "labels", "report_to")  # replaced as a whole, not merged field by field


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """Prompting instead of training: examples before each row, and the label that the model finds likeliest.

    In a language-modelling task, `shots` examples come before each prompt, and the scores are the task's own.

    Args:
        shots: number of examples per class (in a language-modelling task, of all examples), drawn from the
            training rows.
        prompt: template of a row before its label, with ``{text}`` and, for pairs, ``{text_pair}``.
        words: a word per label, in the labels' order. None takes the labels' names.
        between: text between two examples.
        calibrate: divide a label's probability by its probability after an empty row. Without this, words
            that are frequent in any text win.

    Source: Brown et al., 2020; Hu et al., 2021, table 8; Zhao et al., 2021 (calibration).
    """

    shots: int = 2
    prompt: str | None = None
    words: list[str] | None = None
    between: str = "\n\n"
    calibrate: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if isinstance(self.shots, bool) or not isinstance(self.shots, int) or self.shots < 0:
            raise ConfigError(f"shots must be a whole number of at least 0, not {self.shots!r}")
        if self.prompt is not None and "{text}" not in (self.prompt if isinstance(self.prompt, str) else ""):
            raise ConfigError(f"prompt must say where the text goes, as {{text}}, not {self.prompt!r}")
        if self.words is not None and not (
            isinstance(self.words, list) and all(isinstance(word, str) and word for word in self.words)
        ):
            raise ConfigError(f"words must be a list of words, one for each label, not {self.words!r}")
        if not isinstance(self.between, str):
            raise ConfigError(f"between must be a text, not {self.between!r}")
        if not isinstance(self.calibrate, bool):
            raise ConfigError(f"calibrate must be true or false, not {self.calibrate!r}")


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A task of the comparison.

    Args:
        recipe: fields of its recipe: ``task``, ``model``, ``data``, ``training``.
        metric: metric that decides. None takes the task's own.
        also: other metrics to show; they decide nothing.
    """

    recipe: dict[str, Any]
    metric: str | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """A method of the comparison.

    Args:
        recipe: fields of its recipe: ``method`` or ``baseline``, ``training``.
        learning_rates: rates to try; the best on the validation rows is taken. Empty takes the recipe's.
        few_shot: settings of prompting instead of training.
        series: name of a series; a line in the plot joins its methods, such as LoRA at several ranks.
    """

    recipe: dict[str, Any]
    learning_rates: tuple[float, ...] = ()
    few_shot: FewShot | None = None
    series: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods × tasks × seeds.

    Args:
        tasks: name → task.
        methods: name → method.
        recipe: fields of a recipe that all runs share.
        seeds: of head, adapter, rows' order and dropout. The runs with the first seed choose the learning
            rate.
        sizes: numbers of training rows (`DataConfig.train_rows`); None takes the task's own.
        summary: ``"mean"`` or ``"median"``, over the seeds.
        split: the rows whose score is shown: ``"test"``; or ``"validation"`` as in the paper, whose test
            rows are not public: then the same rows choose the learning rate.
        data: folder that relative paths of rows start from. None is the current one.
        output: folder for results.jsonl, the table and the plot.
        keep: whether to keep each run's adapter, in ``runs/`` there.
        trust_task: allow tasks that are code, ``file.py:Class``. Only the caller can set it, not the file.
    """

    tasks: dict[str, TaskEntry]
    methods: dict[str, MethodEntry]
    recipe: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int | None, ...] = (None,)
    summary: str = "mean"
    split: str = "test"
    data: str | None = None
    output: str = "runs/compare"
    keep: bool = False
    trust_task: bool = False

    @classmethod
    def load(cls, path: str | Path, *, trust_task: bool = False, **changes: Any) -> Comparison:
        """Read a comparison from a YAML file.

        Args:
            path: of the file.
            trust_task: allow tasks that are code, ``file.py:Class``, which then runs here.
            changes: fields to set instead of the file's.

        Raises:
            FileError: there is no such file, or it is not YAML.
            ConfigError: lists all problems, one per line.
        """
        content = read_yaml(Path(path), "the comparison")
        if not isinstance(content, Mapping):
            raise FileError(f"the comparison {path} must hold 'tasks:' and 'methods:'")
        return cls.from_dict({**content, **changes}, str(path), trust_task=trust_task)

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], where: str = "the comparison", *, trust_task: bool = False
    ) -> Comparison:
        """Read a comparison from the content of its YAML file; see `load`."""
        problems: list[str] = []
        values = dict(_values(content, problems))
        if problems:
            raise ConfigError(f"{where}:\n{lines(problems)}")
        return cls(**values, trust_task=trust_task)

    def laid(self, task: str, method: str) -> Recipe:
        """The recipe of a method on a task.

        Raises:
            ConfigError: the three parts together are not a valid recipe.
        """
        if (task, method) not in self._laid:
            self._laid[task, method] = self._lay(task, method)
        return self._laid[task, method]

    @cached_property
    def _laid(self) -> dict[tuple[str, str], Recipe]:
        return {}

    def _lay(self, task: str, method: str) -> Recipe:
        parts = (self.recipe, self.tasks[task].recipe, self.methods[method].recipe)
        content: dict[str, Any] = {}
        for part in parts:
            for name, other in (("method", "baseline"), ("baseline", "method")):
                if name in part:  # what trains is said anew
                    content.pop(other, None)
            content = _over(content, part)
        recipe = presets.apply(Recipe.from_dict(content, f"{method} on {task}", trust_task=self.trust_task))
        paths = {
            name: found
            for name in ("train", "validation", "test")
            if (found := _under(self.data, getattr(recipe.data, name))) is not None
        }
        return recipe.replace(data=paths)


def _values(content: Mapping[str, Any], problems: list[str]) -> Iterator[tuple[str, Any]]:
    known = [item.name for item in dataclasses.fields(Comparison) if item.name != "trust_task"]
    problems += [
        f"unknown field {name!r}{nearest(str(name), known)}" for name in content if name not in known
    ]
    recipe = content.get("recipe", {})
    if _fields(recipe, "recipe", _RECIPE, problems):
        yield "recipe", dict(recipe)
    for name, entry in (("tasks", _task), ("methods", _method)):
        given = content.get(name)
        if not isinstance(given, Mapping) or not given:
            problems.append(f"{name} must hold at least one, by name, not {given!r}")
            continue
        yield name, {str(key): entry(value, f"{name}.{key}", problems) for key, value in given.items()}
    for name in ("seeds", "sizes"):
        if name in content:
            given = content[name]
            if not isinstance(given, list) or not given:
                problems.append(f"{name} must be a list of at least one, not {given!r}")
                continue
            values = [None if value in ("all", None) and name == "sizes" else value for value in given]
            least = 1 if name == "sizes" else 0
            if wrong := [v for v in values if not (v is None and name == "sizes") and not _whole(v, least)]:
                problems.append(f"{name} must be whole numbers of at least {least}, not {wrong[0]!r}")
            elif len(set(values)) < len(values):
                problems.append(f"{name} must be different, not {given!r}")
            else:
                yield name, tuple(values)
    for name, choices in (("summary", SUMMARIES), ("split", SPLITS)):
        if name in content:
            if content[name] in choices:
                yield name, content[name]
            else:
                hint = nearest(str(content[name]), choices)
                problems.append(f"{name} must be one of {', '.join(choices)}, not {content[name]!r}{hint}")
    for name in ("data", "output"):
        if content.get(name) is not None:
            yield name, str(content[name])
    if "keep" in content:
        if not isinstance(content["keep"], bool):
            problems.append(f"keep must be true or false, not {content['keep']!r}")
        yield "keep", content["keep"]


def _task(given: Any, where: str, problems: list[str]) -> TaskEntry:
    if not _fields(given, where, (*_RECIPE, "metric", "also"), problems):
        return TaskEntry(recipe={})
    metric = given.get("metric")
    if metric is not None and not isinstance(metric, str):
        problems.append(f"{where}.metric must be a name, not {metric!r}")
    also = given.get("also") or []
    if not (isinstance(also, list) and all(isinstance(name, str) for name in also)):
        problems.append(f"{where}.also must be a list of metrics' names, not {also!r}")
        also = []
    fields = {n: value for n, value in given.items() if n not in ("metric", "also")}
    return TaskEntry(recipe=fields, metric=metric, also=tuple(also))


def _method(given: Any, where: str, problems: list[str]) -> MethodEntry:
    own = ("learning_rates", "few-shot", "series")
    if not _fields(given, where, (*_RECIPE, *own), problems):
        return MethodEntry(recipe={})
    recipe = {name: value for name, value in given.items() if name not in own}
    if sum(given.get(name) is not None for name in ("method", "baseline", "few-shot")) != 1:
        problems.append(
            f"{where} must say what trains, by one of baseline (such as {{method: bitfit}}), method (LoRA) "
            "or few-shot"
        )
    few_shot = None
    if given.get("few-shot") is not None:
        known = tuple(item.name for item in dataclasses.fields(FewShot))
        if _fields(given["few-shot"], f"{where}.few-shot", known, problems):
            try:
                few_shot = FewShot(**given["few-shot"])
            except ConfigError as error:
                problems.append(f"{where}.few-shot: {error}")
    rates = given.get("learning_rates", [])
    if not isinstance(rates, list) or ("learning_rates" in given and not rates):
        problems.append(f"{where}.learning_rates must be a list of at least one, not {rates!r}")
        rates = []
    found = []
    for rate in rates:
        try:
            found.append(float(rate))  # YAML's 1e-3, without a point, is a text
        except (TypeError, ValueError):
            found.append(math.nan)
        named = isinstance(rate, (int, float, str)) and not isinstance(rate, bool)
        if not (named and 0 < found[-1] < math.inf):
            problems.append(f"{where}.learning_rates must be positive numbers, not {rate!r}")
    if len(set(found)) < len(found):
        problems.append(f"{where}.learning_rates must be different, not {rates!r}")
    training = given.get("training")
    if found and (few_shot or (isinstance(training, Mapping) and "learning_rate" in training)):
        problems.append(f"{where} has learning_rates and " + ("few-shot" if few_shot else "a learning_rate"))
    series = given.get("series")
    series = None if series is None else str(series)
    return MethodEntry(recipe=recipe, learning_rates=tuple(found), few_shot=few_shot, series=series)


def _fields(given: Any, where: str, known: tuple[str, ...], problems: list[str]) -> bool:
    if not isinstance(given, Mapping):
        problems.append(f"{where} must hold fields, not {given!r}")
        return False
    unknown = [name for name in given if name not in known]
    problems += [f"unknown field '{where}.{name}'{nearest(str(name), known)}" for name in unknown]
    return not unknown


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _over(under: Any, over: Any) -> Any:
    """One part of a recipe over another: its fields replace the other's, and the rest stay."""
    result = dict(under)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = _over(result[name], value) if both and name not in _WHOLE else value
    return result


def _under(folder: str | None, source: str | None) -> str | None:
    """A source of rows, in the folder of rows if it is a relative path that is found there."""
    if folder is None or source is None or Path(source).is_absolute():
        return None
    place, mark, split = source.partition("#")
    found = Path(folder).expanduser() / place
    return f"{found}{mark}{split}" if found.exists() or found.suffix in _ROWS else None
