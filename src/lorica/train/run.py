"""A recipe from end to end: read the rows, adapt the model, train, score, save."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from lorica.checkpoint import read, write_card
from lorica.checkpoint import write as write_adapter
from lorica.config import LoraConfig
from lorica.config.inits import FROM_DATA
from lorica.errors import ConfigError, FileError, LoricaError, listing
from lorica.model import adapt, extract, trainable_parameters
from lorica.model.pretrained.vocabulary import with_resized_tables
from lorica.plain import as_json
from lorica.reading import read_object
from lorica.train.adapt import adapt_from_rows, keep_start, warm_start
from lorica.train.console import make_console, silent
from lorica.train.data.splits import Rows
from lorica.train.distributed.group import by_first, check_alone, is_first, joined, world
from lorica.train.distributed.resuming import PER_PROCESS, check_processes, check_rows_a_step
from lorica.train.distributed.sharded import check_engine, spread_model
from lorica.train.generation.writing import writer_of
from lorica.train.prepared import Prepared, announce, prepare, with_head
from lorica.train.recipe import Recipe
from lorica.train.record import RECORD, Record, about, changed_rows, is_whole, machine, versions
from lorica.train.settings import ENGINES
from lorica.train.system import alone_in, bytes_of, sha256_of, writable_directory, write_atomically
from lorica.train.trainer.arguments import (
    LEFT_OPEN,
    chosen_defaults,
    describe_defaults,
    fitting_batch,
    with_defaults,
)
from lorica.train.trainer.checkpoints import last_checkpoint
from lorica.train.trainer.fit import fit
from lorica.train.trainer.scoring import majority

RECIPE = "recipe.yaml"

_FREE = ("output", "data.processes")
"""Fields of a recipe that change nothing of what a run comes to."""

ROWS = "rows.json"
"""Beside the checkpoints: how many rows each split of the run has, and what they are known by."""


@dataclass(frozen=True)
class Result:
    """The results of a run; ``run.json`` holds the same.

    Args:
        output: folder of the adapter.
        metrics: split (``validation``, ``test``) → scores of the model as saved.
        steps: optimizer steps.
        seconds: duration of training, in this call.
        step_seconds: median seconds per step, or None when this call made none.
        trainable: parameters that trained.
        parameters: parameters of the model in use, its base included.
        checkpoint_bytes: size of ``adapter_model.safetensors``.
        rows: split → rows.
        truncated: split → rows that were longer than `max_length`.
        skipped: split → rows that could not be used, and were left out.
        adapter_sha256: of ``adapter_model.safetensors``: the same for the same recipe on the same CPU.
        chosen: what the recipe left open of the training, as it was chosen: ``learning_rate``, ``epochs``,
            ``group_by_length``.
        majority: split → scores of calling every row the most frequent class, where rows have classes.
        warnings: signs that nothing was learned.
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
    skipped: dict[str, int]
    adapter_sha256: str
    chosen: dict[str, float] = field(default_factory=dict)
    majority: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def train(
    recipe: Recipe,
    rows: Rows | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    repeats: Record | None = None,
    changed_data: bool = False,
    changed_processes: bool = False,
    engine: str = "ddp",
    callbacks: list[TrainerCallback] | None = None,
) -> Result:
    """Train an adapter as a recipe says.

    In the processes that a launcher such as torchrun started, together: each step's rows are split over them,
    and the first one alone writes and prints. All need to reach the output folder.

    The output folder ends up with the adapter's files (PEFT's format), the tokenizer, ``recipe.yaml`` (every
    field, and the columns and labels that were found), ``run.json``, ``checkpoints/`` and TensorBoard's logs.

    Args:
        recipe: the run.
        rows: rows in memory, in place of those that `recipe.data.train` names: a `datasets.Dataset`, a
            DataFrame, a list of dictionaries or a dictionary of lists; or several by the names of their
            splits, as in a `DatasetDict`, whose validation and test rows are then taken too.
        resume: continue from the newest complete checkpoint in the output folder, or start if there is none.
        overwrite: start anew in a folder that holds a run.
        console: where to show progress. None makes one.
        repeats: a recorded run that this one repeats. Differences of versions and machine are shown, and at
            the end whether the same adapter came out.
        changed_data: repeat it even if the rows are not the recorded ones.
        changed_processes: resume in another number of processes than the run had; `batch_size` must make as
            many rows a step.
        engine: how several processes share the model; see `LaunchConfig`.
        callbacks: of transformers, for the trainer.

    Returns:
        Scores, counts and times.

    Raises:
        LoricaError: the recipe, the data or the folder cannot be used; nothing was trained then.
        Interrupted: the user pressed Ctrl-C; a checkpoint was written.
        Lost: another process of the run is gone.
    """
    hint = "resume from its last checkpoint with --resume, in as many processes"
    cpu = bool(recipe.training.arguments.get("use_cpu"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(joined(cpu=cpu, hint=f"{hint} (the run is in {recipe.output})"))
        if engine != ENGINES[0]:
            check_engine(engine)
        console = (console or make_console()) if is_first() else silent()
        output = Path(recipe.output)

        def enter() -> None:
            stack.enter_context(alone_in(output))
            _check_folder(output, resume=resume, overwrite=overwrite)

        by_first(enter)
        if recipe.init_from is not None and not _goes_on(output, resume):
            read(recipe.init_from)  # a missing one is found at once
        if repeats is not None:
            stack.enter_context(repeats.threads())
        prepared = prepare(recipe, rows, console=console)
        if repeats is not None:
            _compare_start(repeats, prepared, console, changed_data=changed_data)
        result = train_prepared(
            prepared,
            resume=resume,
            overwrite=overwrite,
            console=console,
            changed_processes=changed_processes,
            engine=engine,
            callbacks=callbacks,
        )
        if repeats is not None:
            _compare_end(repeats, prepared.recipe, result, console)
    return result


def train_prepared(
    prepared: Prepared,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console,
    changed_processes: bool = False,
    engine: str = "ddp",
    **fitting: Any,
) -> Result:
    """`train`, from rows that are encoded and a model that is loaded.

    Args:
        prepared: rows and model; the model is adapted in place.
        resume: as in `train`.
        overwrite: as in `train`.
        console: where to show progress.
        changed_processes: as in `train`.
        engine: as in `train`.
        fitting: more arguments of `fit`.
    """
    recipe, task = prepared.recipe, prepared.task
    output = Path(recipe.output)
    if task.carrier is not None:
        check_alone(task.name)

    def begin() -> Recipe | None:
        """The recipe of the run that goes on, if one does."""
        writable_directory(output)
        before = None
        if resume and _held(output):
            before = _as_before(recipe, output, changed_processes=changed_processes)
            _check_rows(prepared, output)
        elif overwrite:
            _clear(output)
        return before

    before = by_first(begin)
    held, recipe = before is not None, before or recipe
    announce(dataclasses.replace(prepared, recipe=recipe), console)

    scored = [split for split in ("validation", "test") if split in prepared.splits]
    features = {split: prepared.splits[split].features for split in scored}
    writer = None
    if recipe.generation.metrics:
        writer = writer_of(recipe, task, prepared.tokenizer, prepared.model, features.values(), console)
    method = with_head(recipe.configuration(), task)
    if isinstance(method, LoraConfig) and method.init_lora_weights in FROM_DATA:
        model = adapt_from_rows(prepared, method, output, resume=resume, console=console)
    else:
        model = adapt(prepared.model, method, seed=recipe.training.seed)
    if recipe.init_from is not None and not _goes_on(output, resume):
        warm_start(model, read(recipe.init_from), head=recipe.init_head)
    if task.keeps_start:
        keep_start(model, output, resumed=_goes_on(output, resume))
    count = trainable_parameters(model)
    console.print(str(count))
    learned = prepared.splits["train"].features
    training = with_defaults(recipe.training, len(learned) * task.copies, model, task)
    found = chosen_defaults(prepared.recipe.training, training)
    if found:
        console.print(
            describe_defaults(found, len(learned), training, copies=task.copies), markup=False, soft_wrap=True
        )
    if training.auto_batch_size and not held:
        check_alone("the search for a batch size (auto_batch_size)")
        training = fitting_batch(model, task, prepared.tokenizer, learned, training, console)
    recipe = dataclasses.replace(recipe, training=training)

    def keep() -> None:
        recipe.save(output / RECIPE)
        write_atomically(writable_directory(output / "checkpoints") / ROWS, as_json(prepared.data) + "\n")

    by_first(keep)
    if engine == "fsdp2":
        spread_model(model, console)
    done = fit(
        model,
        task,
        prepared.tokenizer,
        learned,
        prepared.features("validation"),
        recipe.training,
        output,
        resume=resume,
        console=console,
        **fitting,
        writer=writer,
    )
    metrics, doubts = {}, list(done.doubts())
    for split, own in features.items():
        metrics[split] = done.evaluated_last(own) or done.evaluate(own)
        doubts += done.all_the_same(split, len(own))
    done.trainer.close()
    beaten = {split: majority(task, model, learned, own) for split, own in features.items()}
    for doubt in doubts:
        console.print(f"warning: {doubt}", markup=False, soft_wrap=True)

    adapter = extract(model)  # where each process holds a part of the model, all of them must ask
    content = with_resized_tables(adapter, model)

    def write() -> Result:
        write_adapter(content, output)
        rows = {split: len(encoded) for split, encoded in prepared.splits.items()}
        write_card(adapter, output, about(recipe, task.inputs(recipe.data), rows, metrics))
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
            rows=rows,
            truncated={split: rows.truncated for split, rows in prepared.splits.items()},
            skipped={split: facts["skipped"] for split, facts in prepared.data.items()},
            adapter_sha256=sha256_of(weights),
            chosen=found,
            majority={split: scores for split, scores in beaten.items() if scores},
            warnings=doubts,
        )
        Record(
            recipe=recipe,
            data=prepared.data,
            versions=versions(task.libraries),
            machine=machine(),
            results=dataclasses.asdict(result),
            adapter_sha256=result.adapter_sha256,
        ).save(output)
        return result

    return by_first(write)


def _compare_start(before: Record, prepared: Prepared, console: Console, *, changed_data: bool) -> None:
    if not changed_data:
        before.check_data(prepared.data)
    for difference in before.differences():
        console.print(f"other than in the recorded run: {difference}")


def _compare_end(before: Record, recipe: Recipe, result: Result, console: Console) -> None:
    same = {"output": before.recipe.output, "data": {}}
    if before.recipe.data.messages is None:  # earlier versions did not note it
        same["data"] = {"messages": None}
    if recipe.replace(**same) != before.recipe:
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


def _check_folder(output: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite throws it away; choose one")
    if (held := _held(output)) and not resume and not overwrite:
        raise LoricaError(
            f"{output} holds a run already ({', '.join(held)}). Continue it with --resume, replace it with "
            "--overwrite, "
            "or choose another --output"
        )


def make_room(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds a run, go on with that, or remove it.

    Args:
        output: the folder.
        resume: go on with it.
        overwrite: remove it.

    Raises:
        LoricaError: it holds a run, and neither was said.
    """
    _check_folder(output, resume=resume, overwrite=overwrite)
    if overwrite:
        _clear(output)


def _held(output: Path) -> list[str]:
    """The parts of a run in a folder. A recipe alone is none: a run may fail before its first checkpoint."""
    of = ("adapter_config.json", "config.json", "checkpoints/checkpoint-*")
    found = [path for pattern in of for path in sorted(output.glob(pattern))]
    return [str(path.relative_to(output)) for path in found]


def _clear(output: Path) -> None:
    """Remove a run: any rest of it would be read beside the new run's recipe if that is stopped."""
    for old in ("checkpoints", "tensorboard"):
        shutil.rmtree(output / old, ignore_errors=True)
    for pattern in (RECIPE, RECORD, "README.md", "adapter_*", "tokenizer*"):
        for file in output.glob(pattern):
            file.unlink()


def _check_rows(prepared: Prepared, output: Path) -> None:
    """Refuse to go on with other rows than those that a run began with.

    Raises:
        ConfigError: they are others.
    """
    with contextlib.suppress(FileNotFoundError):  # earlier versions did not write it
        path = output / "checkpoints" / ROWS
        before = read_object(path)
        if not all(isinstance(facts, dict) and is_whole(facts.get("rows")) for facts in before.values()):
            raise FileError(f"{path} is damaged; start anew with --overwrite, or bring it back")
        if changed := changed_rows(before, prepared.data):
            raise ConfigError(
                f"the data of the run in {output} have changed: {', '.join(changed)}. Bring back the rows as "
                "they were, or start anew with --overwrite"
            )


def _goes_on(output: Path, resume: bool) -> bool:
    """Whether there is a checkpoint to go on from; a run that was stopped before its first starts again."""
    return resume and last_checkpoint(output / "checkpoints") is not None


def _as_before(recipe: Recipe, output: Path, *, changed_processes: bool = False) -> Recipe:
    """The recipe of a run that goes on; with another one it would be neither the old run nor the new one.

    Raises:
        ConfigError: it is another, or so is the number of processes.
    """
    checkpoint = last_checkpoint(output / "checkpoints")
    before_in = None if checkpoint is None else check_processes(checkpoint, changed=changed_processes)
    if not (output / RECIPE).is_file():
        return recipe
    saved = Recipe.load(output / RECIPE, trust_task=True)  # compared, not used
    left = [name for name in LEFT_OPEN if getattr(recipe.training, name) is None]
    recipe = recipe.replace(training={name: getattr(saved.training, name) for name in left})
    if recipe.training.auto_batch_size:
        sizes = {name: getattr(saved.training, name) for name in ("batch_size", "gradient_accumulation")}
        recipe = recipe.replace(training=sizes)
    before, now = (dict(_flat(value.to_dict())) for value in (saved, recipe))
    if before_in is not None and before_in != world():
        check_rows_a_step(saved.training, recipe.training, before_in)
        for name in PER_PROCESS:
            before[name] = now[name]
    if saved.data.messages is None:  # earlier versions did not note it
        before["data.messages"] = now["data.messages"]
    changed = [
        f"{key} was {before[key]!r}, now {now[key]!r}"
        for key in now
        if key not in _FREE and before[key] != now[key]
    ]
    if changed:
        raise ConfigError(
            f"the run in {output} was started with another recipe: {listing(changed)}. "
            f"Resume it as it was with: lorica train {shlex.quote(str(output / RECIPE))} --resume"
        )
    return recipe


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and not prefix and key != "baseline":
            yield from _flat(item, f"{key}.")
        else:
            yield prefix + key, item
