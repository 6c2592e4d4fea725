"""A recipe from end to end: read the rows, adapt the model, train, score, save."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.config import LoraConfig
from lorica.errors import ConfigError, LoricaError, listing
from lorica.model import adapt, save, trainable_parameters
from lorica.train import data as sources
from lorica.train import tasks
from lorica.train.arguments import check_device
from lorica.train.console import make_console
from lorica.train.files import bytes_of, sha256_of, writable_directory
from lorica.train.fitting import fit
from lorica.train.quantization import quantized_loading
from lorica.train.quiet import quiet
from lorica.train.recipe import Recipe
from lorica.train.record import RECORD, Record, fingerprint, machine, versions
from lorica.train.tasks import Encoded, Task

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Prepared:
    """All that training needs, before anything is adapted or trained.

    Args:
        recipe: the recipe, with the columns and labels that were found.
        task: what is learned.
        tokenizer: the model's tokenizer.
        model: the pretrained model with a new head, every parameter trainable.
        splits: encoded rows by split: ``train``, and ``validation`` and ``test`` where there are any.
        data: split → number and SHA-256 of the rows as they came; see `fingerprint`.
    """

    recipe: Recipe
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    splits: dict[str, Encoded]
    data: dict[str, dict[str, Any]]

    def features(self, split: str) -> Dataset | None:
        """Encoded rows of a split, or None."""
        return self.splits[split].features if split in self.splits else None


@dataclass(frozen=True)
class Result:
    """What a run came to; ``run.json`` holds the same.

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
        adapter_sha256: of ``adapter_model.safetensors``: the same for the same recipe on the same CPU.
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
    adapter_sha256: str


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    repeats: Record | None = None,
    changed_data: bool = False,
) -> Result:
    """Train an adapter as a recipe says.

    The output folder ends up with the adapter's files (PEFT's format), the tokenizer, ``recipe.yaml`` (every
    field, and the columns and labels that were found), ``run.json``, ``checkpoints/`` and TensorBoard's logs.

    Args:
        recipe: the run.
        resume: go on from the newest complete checkpoint in the output folder, or start if there is none.
        overwrite: start anew in a folder that holds a run.
        console: where to show progress. None makes one.
        repeats: a recorded run that this one repeats. What is other here than there is shown, and at the end
            whether the same adapter came out.
        changed_data: repeat it even if the rows are not the recorded ones.

    Returns:
        Scores, counts and times.

    Raises:
        LoricaError: the recipe, the data or the folder cannot be used; nothing was trained then.
        Interrupted: the user pressed Ctrl-C; a checkpoint was written.
    """
    console = console or make_console()
    _check_folder(Path(recipe.output), resume=resume, overwrite=overwrite)
    check_start(recipe)
    with contextlib.nullcontext() if repeats is None else repeats.threads():
        prepared = prepare(recipe)
        if repeats is not None:
            _compare_start(repeats, prepared, console, changed_data=changed_data)
        result = train_prepared(prepared, resume=resume, overwrite=overwrite, console=console)
    if repeats is not None:
        _compare_end(repeats, prepared.recipe, result, console)
    return result


def train_prepared(
    prepared: Prepared, *, resume: bool = False, overwrite: bool = False, console: Console, **fitting: Any
) -> Result:
    """`train`, from rows that are encoded and a model that is loaded.

    Args:
        prepared: rows and model; the model is adapted in place.
        resume: as in `train`.
        overwrite: as in `train`.
        console: where to show progress.
        fitting: more arguments of `fit`.
    """
    recipe, task = prepared.recipe, prepared.task
    output = writable_directory(recipe.output)
    if resume:
        _check_same(recipe, output)
    elif overwrite:
        for old in ("checkpoints", "tensorboard"):
            shutil.rmtree(output / old, ignore_errors=True)
        (output / RECORD).unlink(missing_ok=True)
    _report(prepared, console)

    method = recipe.configuration()
    method = method if method.task_type else method.replace(task_type=task.task_type)
    if task.modules_to_save and method.modules_to_save is None:
        method = method.replace(modules_to_save=list(task.modules_to_save))
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
        **fitting,
    )
    scored = [split for split in ("validation", "test") if split in prepared.splits]
    metrics = {split: done.evaluate(prepared.splits[split].features) for split in scored}
    save(model, output)
    prepared.tokenizer.save_pretrained(output)
    weights = output / "adapter_model.safetensors"
    result = Result(
        output=output,
        metrics=metrics,
        steps=done.steps,
        seconds=done.seconds,
        step_seconds=done.step_seconds,
        trainable=count.trainable,
        parameters=count.deployed,
        checkpoint_bytes=bytes_of(weights),
        rows={split: len(rows) for split, rows in prepared.splits.items()},
        truncated={split: rows.truncated for split, rows in prepared.splits.items()},
        adapter_sha256=sha256_of(weights),
    )
    Record(
        recipe=recipe,
        data=prepared.data,
        versions=versions(),
        machine=machine(),
        results=dataclasses.asdict(result),
        adapter_sha256=result.adapter_sha256,
    ).save(output)
    return result


def prepare(recipe: Recipe) -> Prepared:
    """Read the rows, find what the recipe left open, load the model, and encode the rows.

    torch's random numbers are seeded first, so the new head is the same each time, whatever is trained later.

    Raises:
        LoricaError: something is missing or does not fit. Nothing has been written.
    """
    read = encode(recipe)
    model = load_model(read.recipe, read.task, read.tokenizer)
    return Prepared(read.recipe, read.task, read.tokenizer, model, read.splits, read.data)


class Encoding(NamedTuple):
    """What `Prepared` holds, but for the model."""

    recipe: Recipe
    task: Task
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Encoded]
    data: dict[str, dict[str, Any]]


def encode(recipe: Recipe) -> Encoding:
    """Read and encode the rows; `prepare` without the model."""
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
    data = {name: fingerprint(rows) for name, rows in splits.items()}
    return Encoding(recipe, task, tokenizer, encoded, data)


def load_model(recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of a recipe that `encode` completed, its new head drawn from the recipe's seed."""
    with quiet():
        transformers.set_seed(recipe.training.seed)
        model = task.model(recipe.model, recipe.data, **quantized_loading(recipe, task))
    task.pad(model, tokenizer)
    return model


def _compare_start(before: Record, prepared: Prepared, console: Console, *, changed_data: bool) -> None:
    if not changed_data:
        before.check_data(prepared.data)
    for difference in before.differences():
        console.print(f"other than in the recorded run: {difference}")


def _compare_end(before: Record, recipe: Recipe, result: Result, console: Console) -> None:
    if recipe.replace(output=before.recipe.output) != before.recipe:
        return  # another run, made from the record of one
    if result.adapter_sha256 == before.adapter_sha256:
        console.print(f"the recorded adapter came out again, byte for byte (sha256 {result.adapter_sha256})")
        return
    reasons = before.differences()
    if before.machine["device"] != "cpu":
        reasons.append("on a GPU, sums are not taken in the same order each time")
    console.print(
        f"another adapter came out than the recorded one (sha256 {result.adapter_sha256}, recorded "
        f"{before.adapter_sha256}){'; other here: ' + listing(reasons) if reasons else ''}"
    )


def check_start(recipe: Recipe) -> None:
    """Refuse a start that looks at data before training, which a recipe has no step for.

    Raises:
        ConfigError: it does.
    """
    method = recipe.configuration()
    if isinstance(method, LoraConfig) and method.init_lora_weights in ("eva", "corda", "lora_ga"):
        raise ConfigError(
            f"init_lora_weights={method.init_lora_weights!r} looks at data before training, which a recipe "
            "does not do; prepare the model in Python (see the guide to starts) and train it with "
            'lorica.train.fit, or choose "pissa", "olora" or True'
        )


def _check_folder(output: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite throws it away; choose one")
    held = [name for name in (RECIPE, "checkpoints", "adapter_config.json") if (output / name).exists()]
    if held and not resume and not overwrite:
        raise LoricaError(
            f"{output} holds a run already ({', '.join(held)}). Continue it with --resume, replace it with "
            "--overwrite, "
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
    columns = " + ".join(prepared.task.inputs(data))
    rows = ", ".join(f"{len(rows):,} {split}" for split, rows in prepared.splits.items())
    classes = f" ({listing(data.labels, limit=6)})" if data.labels else ""
    target = f" → {data.label}{classes}" if data.label else f" →{classes}" if classes else ""
    console.print(f"{prepared.recipe.model}: {columns}{target}; {rows} rows")
    for split, encoded in prepared.splits.items():
        if encoded.truncated:
            console.print(
                f"{encoded.truncated:,} of {len(encoded):,} {split} rows are cut to "
                f"{prepared.recipe.training.max_length} tokens; "
                f"the longest has {encoded.longest:,}"
            )
