"""A recipe from end to end: train it, score what came of it, and use it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

import lorica
from lorica.checkpoint import is_adapter
from lorica.errors import ConfigError, FileError, LoricaError, listing
from lorica.model import adapt, load, save, trainable_parameters
from lorica.train import data as sources
from lorica.train import tasks
from lorica.train.arguments import check_device
from lorica.train.checkpoints import last_checkpoint
from lorica.train.console import make_console
from lorica.train.quiet import quiet
from lorica.train.files import bytes_of, writable_directory, write_atomically
from lorica.train.fitting import fit, score
from lorica.train.recipe import Recipe
from lorica.train.tasks import Encoded, Task
from lorica.train.trainer import Trainer

RECIPE = "recipe.yaml"
RESULTS = "results.json"


@dataclass(frozen=True)
class Prepared:
    """All that training needs, before anything is adapted or trained.

    Args:
        recipe: the recipe, with the columns and labels that were found.
        task: what is learned.
        tokenizer: the model's tokenizer.
        model: the pretrained model with a new head, every parameter trainable.
        splits: encoded rows by split: ``train``, and ``validation`` and ``test`` where there are any.
    """

    recipe: Recipe
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    splits: dict[str, Encoded]

    def features(self, split: str) -> Dataset | None:
        """Encoded rows of a split, or None."""
        return self.splits[split].features if split in self.splits else None


@dataclass(frozen=True)
class Result:
    """What a run came to; ``results.json`` holds the same.

    Args:
        output: folder of the adapter.
        metrics: split (``validation``, ``test``) → scores of the model as saved.
        steps: optimizer steps.
        seconds: duration of training, in this call.
        step_seconds: median seconds a step, or None when this call made none.
        trainable: parameters that trained.
        parameters: parameters of the model in use, its base included.
        checkpoint_bytes: size of ``adapter_model.safetensors``.
        rows: split → rows.
        truncated: split → rows that were longer than `max_length`.
    """

    output: Path
    metrics: dict[str, dict[str, float]]
    steps: int
    seconds: float
    step_seconds: float | None
    trainable: int
    parameters: int
    checkpoint_bytes: int
    rows: dict[str, int]
    truncated: dict[str, int]


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Result:
    """Train an adapter as a recipe says.

    The output folder ends up with the adapter's files (PEFT's format), the tokenizer, ``recipe.yaml`` (every field, and the columns and
    labels that were found), ``results.json``, ``checkpoints/`` and TensorBoard's logs.

    Args:
        recipe: the run.
        resume: go on from the newest complete checkpoint in the output folder, or start if there is none.
        overwrite: start anew in a folder that holds a run.
        console: where to show progress. None makes one.

    Returns:
        Scores, counts and times.

    Raises:
        LoricaError: the recipe, the data or the folder cannot be used; nothing was trained then.
        Interrupted: the user pressed Ctrl-C; a checkpoint was written.
    """
    console = console or make_console()
    _check_folder(Path(recipe.output), resume=resume, overwrite=overwrite)
    prepared = prepare(recipe)
    recipe, task = prepared.recipe, prepared.task
    output = writable_directory(recipe.output)
    if resume:
        _check_same(recipe, output)
    elif overwrite:
        for old in ("checkpoints", "tensorboard"):
            shutil.rmtree(output / old, ignore_errors=True)
    _report(prepared, console)

    method = recipe.method if recipe.method.task_type else recipe.method.replace(task_type=task.task_type)
    model = adapt(prepared.model, method, seed=recipe.training.seed)
    count = trainable_parameters(model)
    console.print(str(count))
    recipe.save(output / RECIPE)
    done = fit(
        model,
        task,
        prepared.tokenizer,
        prepared.splits["train"].features,
        prepared.features("validation"),
        recipe.training,
        output,
        resume=resume,
        console=console,
    )
    scored = [split for split in ("validation", "test") if split in prepared.splits]
    metrics = {split: done.evaluate(prepared.splits[split].features) for split in scored}
    save(model, output)
    prepared.tokenizer.save_pretrained(output)
    result = Result(
        output=output,
        metrics=metrics,
        steps=done.steps,
        seconds=done.seconds,
        step_seconds=done.step_seconds,
        trainable=count.trainable,
        parameters=count.deployed,
        checkpoint_bytes=bytes_of(output / "adapter_model.safetensors"),
        rows={split: len(rows) for split, rows in prepared.splits.items()},
        truncated={split: rows.truncated for split, rows in prepared.splits.items()},
    )
    write_atomically(
        output / RESULTS, as_json({**dataclasses.asdict(result), "recipe": recipe, "versions": versions()})
    )
    return result


def prepare(recipe: Recipe) -> Prepared:
    """Read the rows, find what the recipe left open, load the model, and encode the rows.

    torch's random numbers are seeded first, so the new head is the same each time, whatever is trained later.

    Raises:
        LoricaError: something is missing or does not fit. Nothing has been written.
    """
    task = tasks.get(recipe.task)
    check_device(recipe.training)
    splits = sources.load(recipe.data)
    recipe = dataclasses.replace(recipe, data=task.resolve(splits, recipe.data))
    with quiet():
        tokenizer = task.tokenizer(recipe.model)
        encoded = {
            name: task.encode(rows, recipe.data, tokenizer, recipe.training.max_length, f"the {name} rows")
            for name, rows in splits.items()
        }
        transformers.set_seed(recipe.training.seed)
        model = task.model(recipe.model, recipe.data)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Prepared(recipe, task, tokenizer, model, encoded)


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to use.

    Args:
        recipe: what made it.
        task: what it does.
        tokenizer: its tokenizer.
        model: the model, with its adapter, frozen.
    """

    recipe: Recipe
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel


def open_run(directory: str | Path) -> Trained:
    """Load what `train` left in a folder, or what ``lorica merge`` made of it.

    Raises:
        FileError: the folder is no such folder.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileError(f"there is no folder {directory}")
    if not (directory / RECIPE).is_file():
        raise FileError(
            f"{directory} has no {RECIPE}, so it was not made by `lorica train`; expected that command's --output folder"
        )
    recipe = Recipe.load(directory / RECIPE)
    task = tasks.get(recipe.task)
    with quiet():
        tokenizer = task.tokenizer(str(directory))
        if is_adapter(directory):
            model = load(task.model(recipe.model, recipe.data), directory)
        elif (directory / "config.json").is_file():
            model = task.model(str(directory), recipe.data)
        else:
            hint = (
                "; training did not finish: resume it with --resume"
                if last_checkpoint(directory / "checkpoints")
                else ""
            )
            raise FileError(f"{directory} holds neither an adapter nor a model{hint}")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Trained(recipe, task, tokenizer, model.eval())


def evaluate(directory: str | Path, test: str | None = None) -> dict[str, float]:
    """Score a trained model.

    Args:
        directory: the folder that `train` filled.
        test: rows to score it on, in any form that `DataConfig.train` takes. None takes the test rows of its recipe.

    Returns:
        The task's metrics, the loss, and ``rows``, how many there were.

    Raises:
        FileError: the folder or the rows are missing.
        ConfigError: the rows do not have the columns or labels that the model was trained on.
    """
    trained = open_run(directory)
    recipe = trained.recipe
    if test is not None:
        rows = sources.load_test(test, recipe.data.subset)
    else:
        found = sources.load(recipe.data).test
        if found is None:
            raise FileError("the recipe has no test rows; name some with --data.test")
        rows = found
    with quiet():
        encoded = trained.task.encode(
            rows, recipe.data, trained.tokenizer, recipe.training.max_length, "the test rows"
        )
    with _trainer(trained) as trainer:
        return {**score(trainer, encoded.features), "rows": len(encoded)}


def predict(directory: str | Path, texts: Sequence[str] | str | Path) -> list[dict[str, Any]]:
    """Predict with a trained model.

    Args:
        directory: the folder that `train` filled.
        texts: texts, or a file of rows in any form that `DataConfig.train` takes; a ``.txt`` file holds one text a line.

    Returns:
        A dictionary for each row: the texts, and what the task says of them, such as ``label`` and ``probability``.

    Raises:
        FileError: the folder or the file is missing.
        ConfigError: the rows do not have the columns that the model was trained on.
    """
    trained = open_run(directory)
    recipe, task = trained.recipe, trained.task
    if isinstance(texts, (str, Path)):
        path = Path(texts)
        if path.suffix == ".txt":
            rows = task.rows(_lines(path), recipe.data)
        else:
            rows = next(iter(sources.read(str(path)).values()))
    else:
        rows = task.rows(texts, recipe.data)
    if not len(rows):
        raise FileError(
            f"{texts} holds no rows to predict"
            if isinstance(texts, (str, Path))
            else "there is no text to predict"
        )
    with quiet():
        encoded = task.encode(
            rows, recipe.data, trained.tokenizer, recipe.training.max_length, "the rows", labelled=False
        )
        with _trainer(trained) as trainer:
            outputs = trainer.predict(encoded.features).predictions  # type: ignore[arg-type]
    columns = [name for name in (recipe.data.text, recipe.data.text_pair) if name is not None]
    given = [
        dict(zip(columns, row, strict=True)) for row in zip(*(rows[name] for name in columns), strict=True)
    ]
    return [{**row, **said} for row, said in zip(given, task.read(outputs, recipe.data), strict=True)]


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {
        "lorica": lorica.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def as_json(value: Any) -> str:
    """Results as JSON, recipes and paths included."""

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"{type(item).__name__} has no form in JSON")

    return json.dumps(value, indent=2, ensure_ascii=False, default=plain) + "\n"


class _trainer:  # noqa: N801  (a context manager, read as a statement)
    """A trainer that only scores and predicts, and leaves no folder behind."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Trainer:
        args = TrainingArguments(
            output_dir=self._folder.name,
            per_device_eval_batch_size=self._trained.recipe.training.eval_batch_size,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trained = self._trained
        trainer = Trainer(
            model=trained.model,
            args=args,
            processing_class=trained.tokenizer,
            data_collator=trained.task.collator(trained.tokenizer),
            compute_metrics=trained.task.metrics,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {error}") from error


def _check_folder(output: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite throws it away; choose one")
    held = [name for name in (RECIPE, "checkpoints", "adapter_config.json") if (output / name).exists()]
    if held and not resume and not overwrite:
        raise LoricaError(
            f"{output} holds a run already ({', '.join(held)}). Continue it with --resume, replace it with --overwrite, "
            "or choose another --output"
        )


def _check_same(recipe: Recipe, output: Path) -> None:
    """A run resumed with another recipe would be neither the old run nor the new one."""
    if not (output / RECIPE).is_file():
        return
    before, now = (dict(_flat(dataclasses.asdict(value))) for value in (Recipe.load(output / RECIPE), recipe))
    changed = [
        f"{key} was {before[key]!r}, now {now[key]!r}"
        for key in now
        if key != "output" and before[key] != now[key]
    ]
    if changed:
        raise ConfigError(
            f"the run in {output} was started with another recipe: {listing(changed)}. "
            f"Resume it as it was with: lorica train {output / RECIPE} --resume"
        )


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and not prefix:
            yield from _flat(item, f"{key}.")
        else:
            yield prefix + key, item


def _report(prepared: Prepared, console: Console) -> None:
    data = prepared.recipe.data
    columns = " + ".join(name for name in (data.text, data.text_pair) if name)
    rows = ", ".join(f"{len(rows):,} {split}" for split, rows in prepared.splits.items())
    classes = f" ({listing(data.labels, limit=6)})" if data.labels else ""
    console.print(f"{prepared.recipe.model}: {columns} → {data.label}{classes}; {rows} rows")
    for split, encoded in prepared.splits.items():
        if encoded.truncated:
            console.print(
                f"{encoded.truncated:,} of {len(encoded):,} {split} rows are cut to {prepared.recipe.training.max_length} tokens; "
                f"the longest has {encoded.longest:,}"
            )
