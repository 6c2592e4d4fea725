"""A task: it makes features of rows, names the head that they need, scores and reads the result."""

from __future__ import annotations

import contextlib
import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import transformers
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from lorica.checkpoint.embedded import resolve_model
from lorica.errors import ConfigError, FileError, LoricaError
from lorica.train.data.rows import RowError
from lorica.train.data.splits import Splits
from lorica.train.settings import DataConfig, TrainingConfig

if TYPE_CHECKING:
    from lorica.train.recipe import Recipe

NEW_PARAMETERS = "lorica_new"
"""Attribute of a loaded model: names of the parameters that its files did not hold, which are random."""


@dataclass(frozen=True)
class Encoded:
    """Rows as a model takes them.

    Args:
        features: columns that the model's forward names; ``length``, the tokens of each row; and whatever
            else the task's metrics and readings need, which the model does not see.
        truncated: rows that were cut to the longest length allowed.
        longest: tokens of the longest row before any was cut.
        rows: rows that were encoded. None says that each gave one row of features.
        lengths: tokens of each row before any was cut. None where rows have no lengths.
    """

    features: Dataset
    truncated: int
    longest: int
    rows: int | None = None
    lengths: Sequence[int] | None = None

    def __len__(self) -> int:
        """Number of rows that were encoded."""
        return len(self.features) if self.rows is None else self.rows


class Task(ABC):
    """One kind of learning. A subclass says all that is particular to it; nothing else in lorica.train does.

    Attributes:
        name: its name in recipes.
        task_type: its name in PEFT's configuration, or None.
        auto_class: transformers' class that loads a model with this task's head.
        best_metric: metric that decides which checkpoint is the best: a key of `metrics`, of which higher is
            better, or "loss".
        label_columns: columns of the features that hold the targets.
        modules_to_save: new modules that train whole, where PEFT has no `task_type` that says so.
        reads_outputs: whether `metrics` looks at the model's outputs. A language model's, which are as many
            numbers a token as there are words, are better not kept: its evaluation is loss and perplexity.
        reads_files: whether what a row is read from may be the path of a file, such as an image's.
        writes: whether its answer is a text that the model writes; see `LanguageTask`.
        packs: whether it predicts the next token: training rows can then be packed, and texts may run on.
        reads_all: whether every column of a row is read, whatever its name.
        keeps_start: whether its loss compares the adapter with how it started.
        sequences: sequences of a batch that the model reads for each of its rows.
        tagged: whether a ``.txt`` file of rows holds words and their classes, and not texts.
        groups_lengths: whether rows of similar lengths share a batch where a recipe leaves that open. That
            is for a loss that is a mean over rows: each counts as before. In a mean over tokens, those of
            short rows count for more so, and a few steps learn the length of the latest batches.
        carrier: module of the trainers that carry it in place of lorica's own, in one process; it is imported
            when the task trains, and has `trainer_of` and `arguments_of`, as `lorica.train.post.making` has
            them. None: lorica's own.
        libraries: packages whose versions decide its numbers, beyond those of every run.
    """

    name: ClassVar[str]
    task_type: ClassVar[str | None]
    auto_class: ClassVar[str]
    best_metric: ClassVar[str]
    label_columns: ClassVar[tuple[str, ...]] = ("labels",)
    reads_outputs: ClassVar[bool] = True
    modules_to_save: ClassVar[tuple[str, ...]] = ()
    reads_files: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    reads_all: ClassVar[bool] = False
    keeps_start: ClassVar[bool] = False
    sequences: ClassVar[int] = 1
    tagged: ClassVar[bool] = False
    groups_lengths: ClassVar[bool] = True
    carrier: ClassVar[str | None] = None
    libraries: ClassVar[tuple[str, ...]] = ()

    @property
    def copies(self) -> int:
        """Rows of a batch that each training row makes."""
        return 1

    def settled(self, recipe: Recipe) -> Self:
        """The task with what a recipe says of it beyond columns and rows; as a rule itself.

        Raises:
            ConfigError: it says what the task cannot do.
        """
        return self

    def by_length(self, training: TrainingConfig) -> bool:
        """Whether rows of similar lengths share a batch: as the training says, or else as suits the loss."""
        return self.groups_lengths if training.group_by_length is None else training.group_by_length

    def ready(self) -> None:
        """Check that there is all that training needs beyond rows and a model.

        Raises:
            ConfigError: something is missing.
        """
        return

    @abstractmethod
    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Fill in columns and labels that the user left out by looking at the rows; check those given."""

    @abstractmethod
    def encode(
        self,
        rows: Dataset,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        where: str,
        *,
        labelled: bool = True,
    ) -> Encoded:
        """Turn rows into features.

        Args:
            rows: the rows, as they came.
            data: their columns and labels, resolved.
            tokenizer: the model's tokenizer.
            max_length: tokens kept of each row.
            where: name of these rows in errors, such as "the test rows".
            labelled: whether they have labels; rows to predict have none.
        """

    def encodes_apart(self, rows: Dataset, data: DataConfig) -> bool:
        """Whether the encoding of a row depends on no other row, so that many are encoded a part at a time.

        Args:
            rows: the rows, as they came.
            data: their columns and labels, resolved.
        """
        return False

    def groups(self, rows: Dataset, data: DataConfig, where: str) -> Sequence[int] | None:
        """The number that each row bears in its features, if they hold one; None where that is its place."""
        return None

    def located(self, rows: Dataset, data: DataConfig, folder: Path | None, where: str) -> Dataset:
        """The rows with the paths in them as they are from here, where a task reads files.

        Args:
            rows: the rows, as they came.
            data: their columns, resolved.
            folder: that of the file they came in; None where they came in none.
            where: name of these rows in errors.

        Raises:
            RowError: there is no such file.
        """
        return rows

    @abstractmethod
    def head(self, data: DataConfig) -> dict[str, Any]:
        """Fields of the model's configuration that make the head fit, such as ``num_labels``."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """A function that makes a batch of features: pads and stacks them."""

    def loss(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """The mean loss of a batch, where it is another than the model's own.

        Args:
            outputs: the model's outputs.
            inputs: the batch, labels included.
        """
        return None

    def remarks(self, data: DataConfig) -> Sequence[str]:
        """Lines for the user about a run before it starts, beyond its columns and rows."""
        return ()

    def columns(self, data: DataConfig) -> list[str]:
        """Columns that are read of a row to learn from."""
        named = [data.label, *((data.labels or []) if data.label is None else [])]
        return [*self.inputs(data), *(name for name in named if name is not None), data.references]

    def notes(self, rows: Dataset, data: DataConfig) -> list[str]:
        """Lines for the user about some rows, beyond the columns that are not read.

        Args:
            rows: the rows of a split, as they came.
            data: their columns and labels, resolved.
        """
        return []

    @abstractmethod
    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """Score the model's outputs over a whole set, of which `features` are the encoded rows."""

    @abstractmethod
    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """Read the model's outputs for some rows, one dictionary per row as it came."""

    @abstractmethod
    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """Make rows to predict of plain texts."""

    def inputs(self, data: DataConfig) -> list[str]:
        """Columns that a prediction reads, and repeats beside its answer."""
        return [name for name in (data.text, data.text_pair) if name is not None]

    def tokenizer(self, name: str) -> Any:
        """Load a model's tokenizer, or another processor that turns its inputs into numbers.

        Its `model_max_length` is lowered to the model's context.

        Raises:
            FileError: it does not exist.
            ConfigError: it has no token to pad with.
        """
        with loading(f"a tokenizer from {name!r}", _hint(name)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                resolve_model(name), trust_remote_code=False
            )
        if tokenizer.pad_token is None:
            # A decoder's tokenizer often has none; any token will do, since the mask hides it.
            if tokenizer.eos_token is None:
                raise ConfigError(
                    f"the tokenizer of {name!r} has neither a padding nor an end-of-text token, so rows of "
                    "different lengths cannot share a batch; set its pad_token and save it"
                )
            tokenizer.pad_token = tokenizer.eos_token
        with contextlib.suppress(Exception):  # an adapter's folder has no model's configuration
            config = transformers.AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False)
            most = positions_of(config)
            tokenizer.model_max_length = min(tokenizer.model_max_length, most or tokenizer.model_max_length)
        return tokenizer

    def pad(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """Tell the model which token pads; a classifier reads the last one before it."""
        token = getattr(tokenizer, "pad_token_id", None)
        for config in (model.config, model.config.get_text_config()) if token is not None else ():
            config.pad_token_id = token

    def model(self, name: str, data: DataConfig, **options: Any) -> PreTrainedModel:
        """Load a pretrained model with this task's head, new unless the model has one of that shape.

        Args:
            name: folder or Hub name.
            data: columns and labels, resolved.
            options: more arguments of `from_pretrained`.
        """
        with loading(f"a model for {self.name} from {name!r}", _hint(name)):
            model, report = getattr(transformers, self.auto_class).from_pretrained(
                resolve_model(name),
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                output_loading_info=True,
                **self.head(data),
                **options,
            )
        # The path on this machine would tell the adapter's other users nothing.
        model.config._name_or_path = model.name_or_path = name
        other_shapes = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
        setattr(model, NEW_PARAMETERS, {*report["missing_keys"], *other_shapes})
        return model

    def begin(self, model: PreTrainedModel, features: Dataset) -> None:
        """Set the values of a new head that the training rows tell before it learns; as a rule none.

        Args:
            model: as `model` returned it; its attribute `NEW_PARAMETERS` names the parameters that its files
                did not hold.
            features: the training rows, encoded.
        """
        return


def own_loss(task: Task) -> Callable[[Any, Mapping[str, Any]], Tensor | None] | None:
    """A task's loss, or None where the model's is its own, and the outputs need not be kept for it."""
    return None if type(task).loss is Task.loss else task.loss


def padded_right(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, for batches that are padded on the right, whichever side its own is.

    Places of tokens are counted from the left. The tokenizer itself, which is saved with the adapter, keeps
    its side.
    """
    result = copy.copy(tokenizer)
    result.padding_side = "right"
    return result


def needs_tokens(rows: Sequence[Sequence[int]], where: str) -> None:
    """Refuse rows of which nothing is left.

    Raises:
        RowError: rows have no tokens.
    """
    empty = [row for row, ids in enumerate(rows) if not len(ids)]
    if empty:
        raise RowError(empty, where, "has no text: it gives no tokens")


def _hint(name: str) -> str:
    if os.path.isdir(name):  # noqa: PTH112 - takes any text, one too long to be a path too
        return ""
    return (
        ". A folder works without the Hub, with config.json, model.safetensors and the "
        "tokenizer's files in it, as save_pretrained writes them: --model FOLDER"
    )


@contextlib.contextmanager
def loading(what: str, hint: str = "") -> Iterator[None]:
    """Name the thing that was being loaded where that fails: damaged files fail in any way.

    Args:
        what: such as "a tokenizer from 'models/x'".
        hint: more to say, at the end.

    Raises:
        FileError: it failed.
    """
    try:
        yield
    except LoricaError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise FileError(f"cannot load {what}: {reason}{hint}") from error


# These number positions from behind the padding token's id on, and leave those before it unused.
_COUNT_FROM_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke"),
    *("markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}


def positions_of(config: Any) -> int | None:
    """The most tokens that a model takes, by its configuration, or None where that names no limit."""
    config = config.get_text_config()
    count = getattr(config, "max_position_embeddings", None)
    if not isinstance(count, int) or count <= 0:
        return None
    if config.model_type in _COUNT_FROM_PADDING and isinstance(config.pad_token_id, int):
        return count - config.pad_token_id - 1
    return count
