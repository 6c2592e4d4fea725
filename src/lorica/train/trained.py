"""A trained model in use: opened from its folder, scored, and asked for predictions."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from lorica.checkpoint import is_adapter
from lorica.errors import FileError
from lorica.model import load
from lorica.model.pretrained.resuming import restore_trained
from lorica.train import presets, tasks
from lorica.train.adapt import start_of
from lorica.train.console import make_console, quiet, silent
from lorica.train.data import splits as sources
from lorica.train.data.sources import holds_images, images_in
from lorica.train.data.splits import Rows
from lorica.train.data.tables import Table, as_found
from lorica.train.data.text import read_lines
from lorica.train.distributed.group import by_first, check_alone, is_first, joined, launched, on_cpu
from lorica.train.generation.writing import Writer, written_scores
from lorica.train.prepared import encode_split, notes_on, quantized_loading
from lorica.train.recipe import Recipe, check_file, check_trusted, is_code
from lorica.train.run import RECIPE
from lorica.train.settings import GenerationConfig
from lorica.train.system import writable_file
from lorica.train.tasks import LanguageTask, Task
from lorica.train.tasks.base import own_loss
from lorica.train.trainer.fit import score
from lorica.train.trainer.trainer import Trainer, arguments_of, trainer_of

ToPredict = Sequence[str] | str | Path | Table
"""Rows to predict: texts, a file's or a folder's path, or a table."""


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to use.

    Args:
        recipe: what made it.
        task: its task.
        tokenizer: its tokenizer.
        model: the model, with its adapter, frozen.
        directory: the folder that it was opened from.
    """

    recipe: Recipe
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    directory: Path | None = None


def open_run(directory: str | Path, *, trust_task: bool = False) -> Trained:
    """Load a run's folder, or a model that ``lorica merge`` made of it.

    Args:
        directory: the folder.
        trust_task: use it also where its recipe's task is code, ``file.py:Class``, which then runs here.

    Raises:
        FileError: the folder is no such folder.
        ConfigError: the task is code, and not trusted.
    """
    directory = Path(directory)
    recipe = recipe_of(directory, trust_task=trust_task)
    task = tasks.get(recipe.task).settled(recipe)
    adapted = is_adapter(directory)
    if not adapted and not (directory / "config.json").is_file():
        again = f"lorica train {shlex.quote(str(directory / RECIPE))} --resume"
        raise FileError(
            f"{directory} holds neither an adapter nor a model: its training did not end. Go on with: {again}"
        )
    with quiet():
        tokenizer = task.tokenizer(str(directory))
        if adapted:
            base = task.model(recipe.model, recipe.data, **quantized_loading(recipe, task))
            model = load(base, directory, trainable=task.keeps_start)
        else:
            model = task.model(str(directory), recipe.data)
    task.pad(model, tokenizer)
    return Trained(recipe, task, tokenizer, model.eval(), directory)


def recipe_of(directory: str | Path, *, trust_task: bool = False) -> Recipe:
    """The recipe in a folder that `train` filled.

    Args:
        directory: the folder.
        trust_task: as in `Recipe.load`.

    Raises:
        FileError: the folder is no such folder.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileError(f"there is no folder {directory}")
    if not (directory / RECIPE).is_file():
        raise FileError(
            f"{directory} has no {RECIPE}, so it was not made by `lorica train`; expected that command's "
            "--output folder"
        )
    path = directory / RECIPE
    values = check_file(path)
    # Its rewards do not run here; `evaluate`, where they do, asks for itself.
    trusted = trust_task or not is_code(values.get("task"))
    return Recipe.from_dict(values, str(path), trust_task=trusted)


def evaluate(
    directory: str | Path,
    test: str | Rows | None = None,
    *,
    generation: GenerationConfig | None = None,
    predictions: str | Path | None = None,
    trust_task: bool = False,
) -> dict[str, float]:
    """Score a trained model; in the processes that a launcher started, together.

    Args:
        directory: the folder that `train` filled.
        test: rows to score it on, in any form that `DataConfig.train` takes, or in memory. None takes the
            test rows of its recipe, as many as it names.
        generation: settings by which a language model writes text, and its scores. None takes its recipe's.
        predictions: file for its texts: JSON lines of ``prompt``, ``generated`` and ``references``.
        trust_task: as in `open_run`.

    Returns:
        The task's metrics, the loss, and ``rows``, their number.

    Raises:
        FileError: the folder or the rows are missing.
        ConfigError: the rows do not have the columns or labels that the model was trained on.
    """
    with joined():
        return _evaluate(directory, test, generation, predictions, trust_task=trust_task)


def _evaluate(
    directory: str | Path,
    test: str | Rows | None,
    generation: GenerationConfig | None,
    predictions: str | Path | None,
    *,
    trust_task: bool,
) -> dict[str, float]:
    if predictions is not None:
        by_first(lambda: writable_file(predictions))
    trained = open_run(directory, trust_task=trust_task)
    recipe = trained.recipe
    check_trusted(recipe.code(), f"the recipe in {directory}", trust_task=trust_task)
    if trained.task.carrier is not None:
        check_alone(trained.task.name)
    if test is not None:
        tagged = trained.task.tagged
        used = sources.in_preset_layout(
            sources.load_test(test, recipe.data, tagged=tagged, running=trained.task.packs), recipe.data
        )
    else:
        loaded = sources.load(recipe.data, tagged=trained.task.tagged, running=trained.task.packs)
        found = sources.without_unlabelled(loaded, recipe.data).used()
        if "test" not in found:
            raise FileError("the recipe has no test rows with labels; name some with --data.test")
        used = sources.keep_part(found["test"], "test", recipe.data)
    with quiet():
        encoded, used = encode_split(recipe, trained.task, trained.tokenizer, used)
    _tell(notes_on(trained.task, recipe.data, used))
    if used.skipped:
        _tell([f"{used.skipped:,} rows are left out, the first of them because {used.first}"])
    recipe = recipe if generation is None else recipe.replace(generation=generation)
    with quiet():
        scores = written_scores(
            recipe, trained.task, trained.tokenizer, trained.model, encoded.features, predictions
        )
    with scoring(trained, encoded.features) as trainer:
        return {**score(trainer, encoded.features), **scores, "rows": len(encoded)}


def predict(
    directory: str | Path,
    texts: ToPredict,
    *,
    generation: GenerationConfig | None = None,
    trust_task: bool = False,
) -> list[dict[str, Any]]:
    """Predict with a trained model; in the processes that a launcher started, together.

    Args:
        directory: the folder that `train` filled.
        texts: texts; or rows in memory, in any form that `train` takes; or a file or a folder of them in any
            form that `DataConfig.train` takes. A ``.txt`` file holds one text per line; a folder of images
            needs no classes.
        generation: how a language model writes. None takes its recipe's.
        trust_task: as in `open_run`.

    Returns:
        A dictionary for each row: the texts, and what the task says of them, such as ``label`` and
        ``probability``; a language model's ``generated``.

    Raises:
        FileError: the folder or the file is missing.
        ConfigError: the rows do not have the columns that the model was trained on.
    """
    with joined():
        return _predict(directory, texts, generation, trust_task=trust_task)


def _predict(
    directory: str | Path, texts: ToPredict, generation: GenerationConfig | None, *, trust_task: bool
) -> list[dict[str, Any]]:
    trained = open_run(directory, trust_task=trust_task)
    recipe, task = trained.recipe, trained.task
    rows, where, folder = _asked(trained, texts)
    rows = presets.lay_out(rows, recipe.data.preset)
    with quiet():
        if isinstance(task, LanguageTask):
            prompts = task.prompts(rows, recipe.data, trained.tokenizer, where)
            console = make_console(stderr=True) if is_first() else silent()
            writer = Writer(trained.tokenizer, generation or recipe.generation, console)
            outputs, features = writer.texts(trained.model, prompts), rows
        else:
            located, limit = task.located(rows, recipe.data, folder, where), recipe.training.max_length
            encoded = task.encode(located, recipe.data, trained.tokenizer, limit, where, labelled=False)
            features = encoded.features
            with scoring(trained) as trainer:
                outputs = trainer.predict(features).predictions  # type: ignore[arg-type]
    columns = [name for name in task.inputs(recipe.data) if name in rows.column_names]
    plain = _undecoded(rows).select_columns(columns).to_list() if columns else [{}] * len(rows)
    given = [{name: _shown(value) for name, value in row.items()} for row in plain]
    answers = task.read(outputs, features, recipe.data)
    return [{**row, **said} for row, said in zip(given, answers, strict=True)]


def _asked(trained: Trained, texts: ToPredict) -> tuple[Dataset, str, Path | None]:
    """The rows to predict, their name in messages, and the folder of the file that they came in."""
    recipe, task = trained.recipe, trained.task
    if not isinstance(texts, (str, Path)):
        if isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts):
            if not texts:
                raise FileError("there is no text to predict")
            return task.rows(texts, recipe.data), "the rows", None
        return as_found(texts).rows, "the rows", None
    path = Path(texts)
    if path.is_dir() and task.reads_files and holds_images(path):
        return task.rows([str(file) for file in images_in(path)], recipe.data), str(texts), None
    if path.suffix == ".txt" and path.is_file():
        # A line is a text, also of words whose classes are to be told.
        if not (lines := read_lines(path, recipe.data.encoding)):
            raise FileError(f"{texts} holds no rows to predict")
        return task.rows(lines, recipe.data), str(texts), path.parent
    used = sources.load_test(str(texts), recipe.data, tagged=task.tagged)
    _tell([f"{used.origin.source}: {note}" for note in used.origin.notes])
    return used.rows, used.origin.source, used.origin.folder


def _tell(notes: Sequence[str]) -> None:
    """Print notes on how rows were read, to stderr, where nobody takes them for results."""
    console = make_console(stderr=True) if is_first() else silent()
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def _undecoded(rows: Dataset) -> Dataset:
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def _shown(value: Any) -> Any:
    """A value as JSON has it: of an image, its path."""
    return value.get("path") if isinstance(value, dict) and set(value) == {"bytes", "path"} else value


class scoring:
    """A trainer that only scores and predicts, and leaves no folder behind.

    Args:
        trained: the model.
        rows: encoded rows that the task's own trainer scores. None predicts from rows without labels.
    """

    def __init__(self, trained: Trained, rows: Dataset | None = None) -> None:
        self._trained, self._rows = trained, rows
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Trainer:
        trained = self._trained
        values: dict[str, Any] = {
            "output_dir": self._folder.name,
            "per_device_eval_batch_size": trained.recipe.training.eval_batch_size,
            "report_to": "none",
            "use_cpu": on_cpu() and launched() > 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "prediction_loss_only": self._rows is not None and not trained.task.reads_outputs,
        }
        if self._rows is not None and trained.task.carrier is not None:
            return self._carried(trained.task, self._rows, values)
        args = TrainingArguments(**values)
        trainer = Trainer(
            model=trained.model,
            args=args,
            processing_class=trained.tokenizer,
            data_collator=trained.task.collator(trained.tokenizer),
            score=trained.task.metrics,
            loss=own_loss(trained.task),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def _carried(self, task: Task, rows: Dataset, values: dict[str, Any]) -> Any:
        """The trainer of the library that carries the task; a reference is how the run began."""
        trained, training = self._trained, self._trained.recipe.training
        began = None if trained.directory is None else start_of(trained.directory)
        if task.keeps_start and (began is None or not restore_trained(trained.model, began)):
            raise FileError(f"{began} is gone, which holds how the run began: scores are measured against it")
        values |= {
            "per_device_train_batch_size": training.batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation,
            "seed": training.seed,
            "bf16": training.bf16,
        }
        with quiet():
            trainer = trainer_of(task, training.seed)(
                model=trained.model,
                args=arguments_of(task, values, rows.column_names, training.max_length),
                train_dataset=rows,
                eval_dataset=rows,
                processing_class=trained.tokenizer,
            )
        trainer.remove_callback(transformers.PrinterCallback)
        if task.keeps_start:
            assert trained.directory is not None
            restore_trained(trained.model, trained.directory)
        return trainer

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()
