"""From a recipe to all that training needs: rows found and encoded, model and tokenizer loaded, and told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.config import AdapterConfig
from lorica.errors import ConfigError, listing, require
from lorica.find import HEADS
from lorica.train import presets, tasks
from lorica.train.console import quiet, waiting
from lorica.train.data import splits as sources
from lorica.train.data.labels import UNKNOWN
from lorica.train.data.mapped import SAMPLE, LazyRows
from lorica.train.data.rows import RowError, UsableRows, act_on_rows, fingerprint, fingerprint_on_disk
from lorica.train.distributed.group import world
from lorica.train.distributed.rows import Encoding, encoded_once
from lorica.train.recipe import Recipe
from lorica.train.settings import DataConfig, TrainingConfig
from lorica.train.tasks import Encoded, Task
from lorica.train.tasks.packing import check_packing, pack
from lorica.train.tasks.parts import PART, HowEncoded, encode_in_parts
from lorica.train.tasks.stored import cached, key_of
from lorica.train.trainer.arguments import check_device
from lorica.train.trainer.sampler import Padding, padding


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs, before anything is adapted or trained.

    Args:
        recipe: the recipe, with the columns and labels that were found.
        task: the task.
        tokenizer: the model's tokenizer.
        model: the pretrained model with a new head, every parameter trainable.
        splits: encoded rows by split: ``train``, and ``validation`` and ``test`` where there are any.
        data: split → ``rows`` and ``sha256`` of the rows as they came (see `fingerprint`); ``skipped``, how
            many more could not be used, and ``first_skipped``, the fault of the first of these.
        unlabelled: source of test rows that are left out because they have no labels, or None.
        notes: notes for the user on how the rows were read; whole lines.
    """

    recipe: Recipe
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    splits: dict[str, Encoded]
    data: dict[str, dict[str, Any]]
    unlabelled: str | None = None
    notes: Sequence[str] = ()

    def features(self, split: str) -> Dataset | None:
        """Encoded rows of a split, or None."""
        return self.splits[split].features if split in self.splits else None


def prepare(recipe: Recipe, rows: sources.Rows | None = None, *, console: Console | None = None) -> Prepared:
    """Read the rows, find what the recipe left open, load the model, and encode the rows.

    torch's random numbers are seeded first, so the new head is the same each time, whatever is trained later.

    Args:
        recipe: the run.
        rows: rows in memory, in place of those that `recipe.data.train` names.
        console: shows progress. None is silent.

    Raises:
        LoricaError: something is missing or does not fit. Nothing has been written.
    """
    read = encode(recipe, rows, console=console)
    with waiting(console, f"loading {recipe.model}"):
        model = load_model(read.recipe, read)
    return Prepared(model=model, **read._asdict())


def encode(recipe: Recipe, rows: sources.Rows | None = None, *, console: Console | None = None) -> Encoding:
    """Read and encode the rows; `prepare` without the model. Of a machine's processes one does it for all."""
    if world() > 1 and not recipe.data.streaming:  # what stays on disk is mapped by each
        return encoded_once(lambda: _encode(recipe, rows, console))
    return _encode(recipe, rows, console)


def _encode(recipe: Recipe, rows: sources.Rows | None, console: Console | None) -> Encoding:
    source = recipe.data.preset or recipe.data.train
    with waiting(console, "looking at the rows" if rows is not None else f"reading {source}"):
        recipe, task, used, unlabelled = _read(recipe, rows)
    task.ready()
    encoded, data = {}, {}
    notes: list[str] = []
    taken: dict[int, dict[str, Any]] = {}
    with quiet():
        tokenizer = task.tokenizer(recipe.model)
        for name, own in used.items():
            with waiting(console, f"encoding {len(own.rows):,} {name} rows"):
                if recipe.data.streaming and name == "train":
                    encoded[name], told = encode_lazily(recipe, task, tokenizer, own)
                    notes.append(told)
                else:
                    encoded[name], own = encode_split(recipe, task, tokenizer, own, taken)
                known = fingerprint_on_disk if recipe.data.streaming else fingerprint
                data[name] = {**(taken.get(id(own.rows)) or known(own.rows)), "skipped": own.skipped}
            if own.first is not None:
                data[name]["first_skipped"] = own.first
            notes += notes_on(task, recipe.data, own, training=name == "train")
    if recipe.training.packing:
        encoded["train"] = pack(encoded["train"], recipe.training.packed_length or recipe.training.max_length)
    return Encoding(recipe, task, tokenizer, encoded, data, unlabelled, list(dict.fromkeys(notes)))


def notes_on(task: Task, data: DataConfig, used: UsableRows, *, training: bool = False) -> list[str]:
    """Notes for the user on how some rows were read; whole lines.

    Args:
        task: the task that reads them.
        data: their columns, resolved.
        used: the rows.
        training: tell which of their columns are not read, too.
    """
    read = {*task.columns(data), *(data.labels or [])}
    idle = (
        [name for name in used.rows.column_names if name not in read]
        if training and not task.reads_all
        else []
    )
    told = [*used.origin.notes, *task.notes(used.rows, data)]
    told += [f"columns that are not read: {listing(idle)}"] if idle else []
    return [f"{used.origin.source}: {note}" for note in told]


def load_model(recipe: Recipe, read: Encoding) -> PreTrainedModel:
    """The model for rows that `encode` read, its new head drawn from the recipe's seed."""
    task = read.task
    with quiet():
        transformers.set_seed(recipe.training.seed)
        model = task.model(recipe.model, recipe.data, **quantized_loading(recipe, task))
    task.pad(model, read.tokenizer)
    if recipe.training.packing:
        check_packing(model, min(recipe.training.batch_size, 2))
    task.begin(model, read.splits["train"].features)
    return model


def encode_split(
    recipe: Recipe,
    task: Task,
    tokenizer: Any,
    used: UsableRows,
    taken: dict[int, dict[str, Any]] | None = None,
) -> tuple[Encoded, UsableRows]:
    """Encode the rows of a split, or take them from the cache where the recipe says so.

    Args:
        recipe: the run, with columns and labels resolved.
        task: the task that reads the rows.
        tokenizer: the model's.
        used: the rows.
        taken: where to leave the fingerprints that were taken on the way, by the rows' `id`.

    Raises:
        RowError: a row cannot be used, and the recipe does not say to leave it out.
    """
    data, limit, where = recipe.data, recipe.training.max_length, used.origin.source

    def encode(rows: Dataset) -> Encoded:
        rows = task.located(rows, data, used.origin.folder, where)
        if data.processes == 1 and len(rows) <= PART:
            return task.encode(rows, data, tokenizer, limit, where)
        return encode_in_parts(HowEncoded(task, data, tokenizer, limit, where), rows)

    def act(rows: Dataset) -> Encoded:
        if not data.cache:
            return encode(rows)
        found = fingerprint(rows)
        if taken is not None:
            taken[id(rows)] = found
        return cached(key_of(task, tokenizer, data, limit, found), lambda: encode(rows))

    try:
        return act_on_rows(used, act, skip=data.skip_bad)
    except RowError as error:
        if used.origin.places is None or data.validation is not None or UNKNOWN not in error.problem:
            raise
        hint = "; if it was set aside from them as a validation row, name all classes with --data.labels"
        raise RowError(error.rows, error.where, error.problem + hint, used.origin) from error


def encode_lazily(recipe: Recipe, task: Task, tokenizer: Any, used: UsableRows) -> tuple[Encoded, str]:
    """Rows of a split that are encoded when it is their turn; the first now, to see what they are like.

    Returns:
        The rows, and a note on the first of them.

    Raises:
        RowError: one of the first rows cannot be used, and the recipe does not say to leave it out.
    """
    first = used.select(range(min(SAMPLE, len(used.rows))))
    sample, _ = encode_split(recipe, task, tokenizer, first)
    limit = recipe.training.max_length
    told = (
        f"{used.origin.source}: {len(used.rows):,} rows stay on disk, and are encoded when it is their turn; "
        f"of the first {len(sample):,}, {sample.truncated:,} are cut to {limit:,} tokens"
    )
    rows = LazyRows(
        used,
        lambda part: task.encode(part, recipe.data, tokenizer, limit, used.origin.source).features,
        [name for name in sample.features.column_names if name != "length"],  # which is not known of all
        skip=recipe.data.skip_bad,
    )
    return Encoded(rows, 0, sample.longest, len(used.rows), sample.lengths), told  # type: ignore[arg-type]


def read(recipe: Recipe, rows: sources.Rows | None = None) -> tuple[Recipe, Task, dict[str, UsableRows]]:
    """Read the rows and find what the recipe left open; as `encode` does, without a tokenizer.

    Columns and labels are looked for in all training rows, of which those that are asked for are then kept.

    Returns:
        The recipe with what was found, its task, and the rows of each split.
    """
    return _read(recipe, rows)[:3]


def _read(
    recipe: Recipe, rows: sources.Rows | None
) -> tuple[Recipe, Task, dict[str, UsableRows], str | None]:
    if recipe.data.preset is not None:
        recipe = presets.apply(recipe, own_rows=rows is not None)
    if rows is not None:
        recipe = recipe.replace(data={"train": sources.IN_PYTHON})
    task = tasks.get(recipe.task).settled(recipe)
    check_device(recipe.training)
    if recipe.data.template is not None and not task.writes:
        raise ConfigError(f"data.template lays out rows of language models; {task.name} reads columns")
    if recipe.data.messages and not (task.packs or task.carrier is not None):
        raise ConfigError(f"{task.name} reads no conversations; leave out data.messages")
    if recipe.data.messages and recipe.data.template is not None:
        raise ConfigError(
            "data.template lays rows out in place of the chat template; leave out data.messages"
        )
    if recipe.data.streaming:
        recipe = _streamed(recipe, task)
    if recipe.training.packing and not task.packs:
        raise ConfigError(f"training.packing is for causal language models; {task.name} has no packed rows")
    splits = sources.load(recipe.data, rows, tagged=task.tagged, running=task.packs)
    train = splits.used()["train"]

    def resolve(rows: Dataset) -> Any:
        return task.resolve(dataclasses.replace(splits, train=rows), recipe.data)

    try:
        data, train = act_on_rows(train, resolve, skip=recipe.data.skip_bad)
    except ConfigError as error:
        raise ConfigError(f"{train.origin.source}: {error}") from error
    kept = sources.without_unlabelled(splits, data)
    left_out = splits.used()["test"].origin.source if kept.test is not splits.test else None
    used = {**kept.used(), "train": train}
    recipe = dataclasses.replace(recipe, data=data)
    return (
        recipe,
        task,
        {split: sources.keep_part(each, split, data) for split, each in used.items()},
        left_out,
    )


def _streamed(recipe: Recipe, task: Task) -> Recipe:
    """The recipe of rows that stay on disk: batches are drawn at random, for no row's length is known.

    Raises:
        ConfigError: it asks for a feature that needs all rows at once.
    """
    if not task.writes or task.carrier is not None:
        raise ConfigError(f"data.streaming is for language tasks; {task.name} needs all rows first")
    wants = {
        "training.packing": recipe.training.packing,
        "training.auto_batch_size": recipe.training.auto_batch_size,
        "data.running": recipe.data.running,
    }
    if asked := [name for name, value in wants.items() if value]:
        raise ConfigError(f"{listing(asked)} needs all rows at once; leave it out, or data.streaming")
    return recipe.replace(training={"group_by_length": False})


def announce(prepared: Prepared, console: Console) -> None:
    """Print it."""
    for line in lines(prepared):
        # A row's own text may be in it: brackets are no markup then, and its end is worth having.
        console.print(line, markup=False, soft_wrap=True)


def lines(prepared: Prepared) -> Iterator[str]:
    """The lines that are printed."""
    data, training = prepared.recipe.data, prepared.recipe.training
    columns = " + ".join(prepared.task.inputs(data))
    rows = ", ".join(f"{len(rows):,} {split}" for split, rows in prepared.splits.items())
    classes = f" ({listing(data.labels, limit=6)})" if data.labels else ""
    target = f" → {data.label}{classes}" if data.label else f" →{classes}" if classes else ""
    yield f"{prepared.recipe.model}: {columns}{target}; {rows} rows"
    if prepared.unlabelled is not None:
        yield f"{prepared.unlabelled} has no labels, and is not scored"
    yield from prepared.notes
    yield from prepared.task.remarks(data)
    for split, facts in prepared.data.items():
        if facts["skipped"]:
            yield (
                f"{facts['skipped']:,} {split} rows are left out, the first of them because "
                f"{facts['first_skipped']}"
            )
    train = prepared.splits["train"]
    if train.lengths:
        yield lengths(train)
    if data.streaming:
        return
    if training.packing:
        yield packing(train, training, by_length=prepared.task.by_length(training))
    elif len(train) != len(train.features):
        longest = max(train.features["length"])
        yield f"{len(train):,} training rows are read as {len(train.features):,} of up to {longest:,} tokens"
    limit = min(training.max_length, getattr(prepared.tokenizer, "model_max_length", training.max_length))
    for split, encoded in prepared.splits.items():
        if encoded.truncated:
            yield (
                f"{encoded.truncated:,} of {len(encoded):,} {split} rows "
                f"({encoded.truncated / len(encoded):.1%}) are cut to {limit} tokens; "
                f"the longest has {encoded.longest:,}"
            )
    saved = (
        None if training.packing else padding(train.features["length"], training.batch_size, training.seed)
    )
    if saved is not None and prepared.task.by_length(training):
        yield (
            f"batches of similar lengths: {saved.grouped:.0%} of what the model reads is padding, in a "
            f"random order {saved.random:.0%}"
        )
    elif saved is not None:
        yield (
            f"batches of rows drawn at random: {saved.random:.0%} of what the model reads is padding, by "
            f"similar lengths {saved.grouped:.0%}"
        )


def packing(encoded: Encoded, training: TrainingConfig, *, by_length: bool) -> str:
    """Number of sequences that the training rows are packed into, and the share of padding."""
    sizes = list(encoded.features["length"])
    saved = padding(sizes, training.batch_size, training.seed) or Padding(0.0, 0.0)
    return (
        f"{len(encoded):,} training rows are packed into {len(sizes):,} sequences of up to {max(sizes):,} "
        f"tokens, {len(encoded) / len(sizes):.1f} rows a sequence; "
        f"{saved.grouped if by_length else saved.random:.1%} of what the model reads is padding"
    )


def lengths(encoded: Encoded) -> str:
    """Lengths of the rows, in tokens, before any is cut."""
    low, middle, high, most = np.percentile(encoded.lengths or [0], [0, 50, 95, 100])
    return (
        f"tokens a training row: {low:,.0f} at least, {middle:,.0f} in the median, 95 % have up to "
        f"{high:,.0f}, {most:,.0f} at most"
    )


def quantized_loading(recipe: Recipe, task: Task) -> dict[str, Any]:
    """The arguments of `from_pretrained` that load the base as the recipe's `quantization` says.

    Scales are packed too (double quantization), and products are taken in the dtype the recipe trains in.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    if recipe.quantization is None:
        return {}
    require("bitsandbytes", extra="quantized")
    training = recipe.training
    # The head is new and trains whole. None leaves it to transformers, which spares output embeddings.
    skip = list(HEADS.get(task.task_type or "", ())) or None
    if recipe.quantization == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16
            if training.bf16
            else torch.float16
            if training.fp16
            else torch.float32,
            llm_int8_skip_modules=skip,
        )
    return {"quantization_config": config}


def with_head(config: AdapterConfig, task: Task) -> AdapterConfig:
    """A configuration that trains the task's new head too."""
    config = config if config.task_type else config.replace(task_type=task.task_type)
    if task.modules_to_save and config.modules_to_save is None:
        config = config.replace(modules_to_save=list(task.modules_to_save))
    return config
