"""`Recipe`: a whole run as a value. A YAML file holds one; the command line's flags are its fields."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from lorica.config import AdapterConfig, LoraConfig, as_config, read_config
from lorica.errors import ConfigError, FileError
from lorica.train.fields import check_fields
from lorica.train.files import write_atomically
from lorica.train.generation.config import GenerationConfig
from lorica.train.secrets import without_secrets
from lorica.train.trust import check_trusted
from lorica.train.yaml_file import read_yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

QUANTIZATIONS = ("nf4", "fp4", "int8")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the rows come from, and which of their columns matter.

    Args:
        preset: name of a data set that lorica knows, such as "glue/rte": its task, place, columns, labels and
            metric take the place of what is left at its default here.
        train: training rows: a csv, tsv, json, jsonl, txt, conll (each also .gz, .zst, .bz2, .xz or .zip),
            xlsx, parquet or arrow file; a folder of such files named after their splits, of images or texts
            in folders named after their classes, of images listed in metadata.csv, or one that datasets
            saved; a data set's name on the Hugging Face Hub; or "docstrings", the data set made from
            Python's own docstrings. ``#NAME`` after it takes its split, or a workbook's sheet, of that name.
        validation: validation rows, in any of these forms. None takes the split of that name from `train`, or
            a part of its rows.
        test: test rows, in any of these forms. None takes the split of that name from `train`, if it has one.
        subset: configuration of a Hub data set that has several, such as "sst2" of "nyu-mll/glue".
        encoding: encoding of text files, such as "cp1251". None takes that of their byte-order mark, else
            UTF-8, else cp1252, which is then said.
        columns: names of the columns of csv, tsv and xlsx files that do not begin with them. None takes their
            first line.
        text: column of the input: the text, the prompt, the messages, the list of words, an image or its
            path. None looks for the usual names.
        text_pair: column of the second text, where a row is a pair; of the second part of a prompt, such as
            Alpaca's ``input``. None looks for the usual names when `text` is None too.
        system: column of what comes before a prompt or a conversation, as its system message. None looks for
            the usual names.
        label: column of what is to be learned: the class, the number, the completion, the text to write, the
            list of classes. None looks for the usual names.
        references: column of lists of texts, each of which would be right: where rows have it, it takes the
            place of a language task's `label`.
        separator: what stands between a prompt and its completion. May hold special tokens of the model.
        stride: tokens that neighbouring windows of a long text share, in question answering. None takes a
            quarter of a window.
        unanswerable: whether a question may have no answer in its text. None looks at the training rows.
        labels: names of the classes in the order of their ids. None takes those found in the training rows,
            sorted.
        validation_fraction: share of the training rows set aside, in (0, 1), when there is no validation
            split; 0 sets none aside.
        split_seed: seed of that draw, and of the parts that `fraction` and the numbers of rows keep.
        fraction: share of the training rows to learn from, in (0, 1]. None takes all.
        train_rows: number of training rows to learn from. None takes all.
        validation_rows: number of validation rows to score. None takes all.
        test_rows: number of test rows to score. None takes all.
        skip_bad: leave out rows that cannot be used, and count them, in place of refusing them all.
    """

    preset: str | None = None
    train: str = "docstrings"
    validation: str | None = None
    test: str | None = None
    subset: str | None = None
    encoding: str | None = None
    columns: list[str] | None = None
    text: str | None = None
    text_pair: str | None = None
    system: str | None = None
    label: str | None = None
    references: str = "references"
    separator: str = "\n"
    stride: int | None = None
    unanswerable: bool | None = None
    labels: list[str] | None = None
    validation_fraction: float = 0.1
    split_seed: int = 0
    fraction: float | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        _as_texts(self, "train", "validation", "test")
        _expect(self, "validation_fraction", 0 <= self.validation_fraction < 1, "a share in [0, 1)")
        _expect(self, "stride", self.stride is None or self.stride >= 0, "None, or 0 or more")
        _expect(self, "fraction", self.fraction is None or 0 < self.fraction <= 1, "a share in (0, 1]")
        for name in ("train_rows", "validation_rows", "test_rows"):
            rows = getattr(self, name)
            _expect(self, name, rows is None or rows > 0, "None or more than 0")
        alone = self.fraction is None or self.train_rows is None
        _expect(self, "train_rows", alone, "None where fraction is given")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train. AdamW, with a checkpoint at each evaluation.

    Args:
        learning_rate: peak learning rate. None chooses it by the method and the model's width (see
            `lorica.train.defaults`): LoRA likes about ten times that of full fine-tuning.
        epochs: passes over the training rows. None takes 3, or as many as few rows need to be learned.
        max_steps: optimizer steps to take, whatever `epochs` says. None lets `epochs` decide.
        batch_size: rows a step on each device.
        auto_batch_size: halve `batch_size` while a step on the longest rows does not fit into memory, and
            gather as many more batches a step: the rows a step stay the same.
        eval_batch_size: rows a batch in evaluation, on each device.
        gradient_accumulation: batches whose gradients are added up for one step.
        weight_decay: AdamW's decay of weight matrices, a step and unit of learning rate; biases and norms
            have none.
        warmup_ratio: share of the steps, in [0, 1), over which the learning rate climbs to its peak.
        lr_scheduler: course of the learning rate after that: "linear", "cosine", "constant",
            "constant_with_warmup", "polynomial" or "inverse_sqrt".
        max_grad_norm: norm to which larger gradients are scaled down; 0 leaves them.
        max_length: tokens kept of each row; how many rows are cut is reported.
        seed: seed of the new head, the adapter, the order of rows and dropout.
        start_batches: batches of training rows that a start from data looks at before training, where
            `init_lora_weights` is "eva", "corda" or "lora_ga".
        eval_steps: steps between evaluations. None evaluates once an epoch.
        save_steps: steps between checkpoints, besides the one at each evaluation. None writes no others.
        save_total_limit: checkpoints to keep: the newest, and always the best.
        early_stopping_patience: evaluations without a better result after which training stops. None never
            stops early.
        metric_for_best: metric that decides which checkpoint is the best, "loss" included. None takes the
            task's own.
        load_best: end with the best checkpoint instead of the last.
        loraplus_lr_ratio: learning rate of B over that of A (LoRA+; Hayou et al., 2024, advise 2 to 16). None
            or 1 trains both at one rate.
        chunked_loss: compute a language model's loss a few tokens at a time, without the matrix of all
            logits: the same loss and gradients in a fraction of the memory.
        group_by_length: put rows of similar lengths into one batch, which saves padding.
        bf16: bfloat16 autocast. Needs a device that has it.
        fp16: float16 autocast with loss scaling. Needs a GPU.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more
            time.
        logging_steps: steps between log entries.
        report_to: trackers that receive them: "tensorboard", "wandb", "mlflow", ... An empty list is none.
        arguments: any other fields of transformers.TrainingArguments, passed on as they are.
    """

    learning_rate: float | None = None
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 16
    auto_batch_size: bool = False
    eval_batch_size: int = 64
    gradient_accumulation: int = 1
    weight_decay: float = 0.0
    warmup_ratio: float = 0.06
    lr_scheduler: str = "linear"
    max_grad_norm: float = 1.0
    max_length: int = 128
    seed: int = 0
    start_batches: int = 16
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 2
    early_stopping_patience: int | None = None
    metric_for_best: str | None = None
    load_best: bool = True
    loraplus_lr_ratio: float | None = None
    chunked_loss: bool = True
    group_by_length: bool = True
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values."""
        for name in (
            "batch_size",
            "start_batches",
            "eval_batch_size",
            "gradient_accumulation",
            "max_length",
            "logging_steps",
        ):
            _expect(self, name, getattr(self, name) > 0, "more than 0")
        for name in (
            "learning_rate",
            "epochs",
            "max_steps",
            "eval_steps",
            "save_steps",
            "early_stopping_patience",
            "loraplus_lr_ratio",
        ):
            value = getattr(self, name)
            _expect(self, name, value is None or value > 0, "None or more than 0")
        for name in ("weight_decay", "max_grad_norm"):
            _expect(self, name, getattr(self, name) >= 0, "0 or more")
        _expect(self, "save_total_limit", self.save_total_limit >= 1, "at least 1")
        _expect(self, "warmup_ratio", 0 <= self.warmup_ratio < 1, "a share in [0, 1)")
        _expect(self, "lr_scheduler", self.lr_scheduler in SCHEDULERS, f"one of {SCHEDULERS}")
        ends = self.lr_scheduler == "polynomial" and "lr_scheduler_kwargs" not in self.arguments
        _expect(
            self,
            "learning_rate",
            not ends or self.learning_rate is None or self.learning_rate > 1e-7,
            "more than 1e-7, where the polynomial schedule ends",
        )
        _expect(self, "fp16", not (self.fp16 and self.bf16), "False where bf16 is True")


def _default_method() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run: what to learn, on which model, from which rows, by which method.

    Args:
        task: what is learned: "sequence-classification", "multi-label-classification", "regression",
            "causal-lm", "seq2seq-lm", "token-classification", "question-answering", "image-classification",
            one registered by the user, or one in a file of theirs, as "path/to/file.py:Class".
        model: the pretrained model: a folder or a name on the Hugging Face Hub. The default is installed with
            lorica[demo] and needs no download.
        quantization: load the model packed by bitsandbytes: "nf4" or "fp4" (QLoRA's four bits a weight) or
            "int8". None loads it as it is. Needs lorica[quantized].
        data: where the rows come from.
        method: what trains.
        baseline: what trains instead of that: another of the paper's methods by its name and fields, such as
            ``{method: bitfit}``, or several to combine (LoRA is ``{method: lora, r: 8}`` there). None trains
            `method`.
        training: how it trains.
        init_from: folder or Hub name of an adapter whose weights training begins with, of the same method and
            targets. None begins as the method says.
        init_head: take that adapter's head too, where it has the same classes. Else the head starts anew.
        generation: how a language task writes text, and what that is scored by.
        output: folder for the adapter, the tokenizer, this recipe, run.json, checkpoints and
            TensorBoard's logs.
    """

    task: str = "sequence-classification"
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    quantization: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    method: LoraConfig = field(default_factory=_default_method)
    baseline: dict[str, Any] | list[dict[str, Any]] | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    init_from: str | None = None
    init_head: bool = False
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    output: str = "runs/train"

    def __post_init__(self) -> None:
        """Check the values."""
        _as_texts(self, "model", "init_from", "output")
        self.configuration()
        _expect(
            self,
            "quantization",
            self.quantization in (None, *QUANTIZATIONS),
            f"None or one of {QUANTIZATIONS}",
        )
        _expect(
            self, "init_head", self.init_from is not None or not self.init_head, "False without init_from"
        )

    def configuration(self) -> AdapterConfig:
        """What to train: `baseline`, or else `method`.

        Raises:
            ConfigError: the baseline names no method, or a value that it cannot use.
        """
        if self.baseline is None:
            return self.method
        given = [self.baseline] if isinstance(self.baseline, Mapping) else self.baseline
        if not given or not all("method" in each for each in given):
            raise ConfigError(
                f"baseline must name a method, such as {{method: bitfit}}, not {self.baseline!r}"
            )
        return as_config([read_config(each) for each in given])

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; ``replace(training={"seed": 1})`` reaches into a part."""
        for name, change in changes.items():
            if isinstance(change, Mapping) and dataclasses.is_dataclass(getattr(self, name)):
                changes[name] = dataclasses.replace(getattr(self, name), **change)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain value, as files hold them: tokens and passwords are left out."""
        return without_secrets(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """The recipe as YAML, every field written out but tokens and passwords."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def save(self, path: str | Path) -> Path:
        """Write the recipe as a YAML file, and return its path."""
        path = Path(path)
        write_atomically(path, self.to_yaml())
        return path

    @classmethod
    def load(cls, path: str | Path, *, trust_task: bool = False) -> Recipe:
        """Read a recipe from a YAML file; fields it leaves out keep their defaults.

        Args:
            path: of the file.
            trust_task: take it also where its task is code, ``file.py:Class``, which runs when it is used.

        Raises:
            FileError: there is no such file, or it is not YAML.
            ConfigError: it has a field that does not exist, or a value of the wrong type; or its task is code
                that is not trusted.
        """
        return cls.from_dict(check_file(path), str(path), trust_task=trust_task)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], where: str = "the recipe", *, trust_task: bool = False
    ) -> Recipe:
        """Make a recipe of plain values, as JSON and YAML hold them.

        Args:
            values: fields by name, those of a part in a mapping of their own.
            where: what to call them in an error.
            trust_task: as in `load`.

        Raises:
            ConfigError: there is a field that does not exist, or a value of the wrong type; or the task is
                code that is not trusted.
        """
        check_fields(values, cls(), where)
        check_trusted(values.get("task"), where, trust_task=trust_task)
        import jsonargparse

        parser = _parser()
        try:
            parsed = parser.parse_object(dict(values))
        except (jsonargparse.ArgumentError, OverflowError) as error:  # texts become numbers on the way
            raise ConfigError(f"{where}: {error}") from error
        return from_parsed(parser, parsed)


@functools.cache  # making one takes longer than all else that reading a recipe does
def _parser() -> ArgumentParser:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_recipe(parser)
    return parser


def add_recipe(parser: ArgumentParser) -> None:
    """Give a command-line parser a recipe's fields as options, and ``--config`` for a recipe file."""
    parser.add_argument(
        "--config", action="config", help="recipe to start from, a YAML file; options override it"
    )
    parser.add_class_arguments(Recipe)


def from_parsed(parser: ArgumentParser, parsed: Any) -> Recipe:
    """The recipe that parsed arguments stand for."""
    values = parser.instantiate(parsed)
    return Recipe(**{item.name: values[item.name] for item in dataclasses.fields(Recipe)})


def check_file(path: str | Path) -> Mapping[str, Any]:
    """Refuse a recipe file that is missing, is not YAML, or holds a field that does not exist.

    Returns:
        What it holds.

    Raises:
        FileError: there is no such file, or it is not YAML.
        ConfigError: naming every unknown field, with the nearest known one.
    """
    path = Path(path)
    content = read_yaml(path, "the recipe")
    if not isinstance(content, Mapping):
        raise FileError(
            f"the recipe {path} must hold fields such as 'task:' and 'model:', not {type(content).__name__}"
        )
    check_fields(content, Recipe(), str(path))
    return content


def _as_texts(config: Any, *names: str) -> None:
    """Take a path as its text, which YAML and JSON have a form for."""
    for name in names:
        if isinstance(value := getattr(config, name), Path):
            object.__setattr__(config, name, str(value))


def _expect(config: Any, name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {expected}, not {getattr(config, name)!r}")
