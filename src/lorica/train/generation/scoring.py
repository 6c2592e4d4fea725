"""Evaluation by what a model writes: a text for each prompt, scored against all its references."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from lorica.errors import ConfigError
from lorica.train.console import make_console
from lorica.train.files import write_lines
from lorica.train.generation.config import GenerationConfig
from lorica.train.generation.writing import check_context, settings_of, write
from lorica.train.metrics import written
from lorica.train.metrics.written import check, without_java

if TYPE_CHECKING:
    from lorica.train.recipe import Recipe
    from lorica.train.tasks.base import Task

    _Base = transformers.Trainer
else:
    _Base = object

PROMPT, GROUP, REFERENCE = "prompt_tokens", "group", "reference"
"""Columns of encoded rows that the model does not see: how many of the tokens are the prompt, which rows ask
the same, and the text that this row holds for it."""
APART = "prompt_ids"
"""A column more, where rows are cut: the prompt's tokens, where the row's own do not begin with them."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a model, and what would be right.

    Args:
        prompts: tokens of each prompt.
        references: the texts that would be right, of each.
    """

    prompts: list[list[int]]
    references: list[list[str]]


def asked(features: Dataset) -> Asked:
    """The different prompts of encoded rows, in order, with the references of all rows that share one.

    Raises:
        ConfigError: the rows are plain text, which has no prompts.
    """
    if not {PROMPT, GROUP, REFERENCE} <= set(features.column_names):
        raise ConfigError(
            "texts without prompts cannot be scored by what a model writes; leave out generation.metrics, "
            "or give prompts and completions"
        )
    prompts: dict[int, list[int]] = {}
    references: dict[int, list[str]] = {}
    columns = (features[name] for name in (GROUP, PROMPT, "input_ids", REFERENCE))
    apart = features[APART] if APART in features.column_names else [None] * len(features)
    for group, length, ids, text, own in zip(*columns, apart, strict=True):
        prompts.setdefault(group, list(ids[:length] if own is None else own))
        references.setdefault(group, []).append(text)
    return Asked(list(prompts.values()), list(references.values()))


@dataclass(frozen=True)
class Writer:
    """Writes for encoded rows, and scores what it wrote.

    Args:
        tokenizer: the model's tokenizer.
        config: how to write, and what to score by.
        console: where to show how far it has come.
        seed: of drawing.
    """

    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    console: Console
    seed: int = 0

    def check(self, model: PreTrainedModel, features: Dataset) -> None:
        """Refuse before training what could not be written or scored after it.

        Raises:
            LoricaError: a metric or a setting is unknown, or a prompt too long.
        """
        check(self.config.metrics)
        settings_of(model, self.tokenizer, self.config)
        check_context(model, asked(features).prompts, self.config)

    def note(self) -> None:
        """Say which metrics are left out on this machine, if any."""
        if left_out := without_java(self.config.metrics):
            self.console.print(
                f"there is no Java on this machine, which {', '.join(left_out)} need; they are left out"
            )

    def texts(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[str]:
        """A text for each prompt."""
        with shown(self.console, len(prompts)) as progress:
            found = write(model, self.tokenizer, prompts, self.config, seed=self.seed, progress=progress)
        return [texts[0] for texts in found]

    def score(self, model: PreTrainedModel, features: Dataset, rows: int | None = None) -> dict[str, float]:
        """Write for the first `rows` prompts, or all (None), and score."""
        wanted = asked(features)
        wanted = Asked(wanted.prompts[:rows], wanted.references[:rows])
        return written(self.texts(model, wanted.prompts), wanted.references, self.config.metrics)


def writer_of(
    recipe: Recipe,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    scored: Iterable[Dataset],
    console: Console,
) -> Writer | None:
    """What writes in a recipe's evaluations, checked on the rows that they score; None if nothing does.

    Raises:
        LoricaError: something of it cannot be done.
    """
    if not recipe.generation.metrics:
        return None
    if not task.writes:
        raise ConfigError(f"{task.name} writes no text; leave out generation.metrics")
    writer = Writer(tokenizer, recipe.generation, console, recipe.training.seed)
    for features in scored:
        writer.check(model, features)
    writer.note()
    return writer


def written_scores(
    recipe: Recipe,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    features: Dataset,
    predictions: str | Path | None,
) -> dict[str, float]:
    """Write for encoded rows, score what came of it, and keep it in a file if one is named.

    Raises:
        LoricaError: the task writes no text, or something of it cannot be done.
    """
    if predictions is None and not recipe.generation.metrics:
        return {}
    if not task.writes:
        raise ConfigError(f"{task.name} writes no text: it has no such predictions; see `lorica predict`")
    writer = Writer(tokenizer, recipe.generation, make_console(stderr=True), recipe.training.seed)
    writer.check(model, features)
    wanted = asked(features)
    texts = writer.texts(model, wanted.prompts)
    if predictions is not None:
        said = tokenizer.batch_decode(wanted.prompts, skip_special_tokens=True)
        rows = zip(said, texts, wanted.references, strict=True)
        write_lines(predictions, ({"prompt": p, "generated": t, "references": r} for p, t, r in rows))
    writer.note()
    return written(texts, wanted.references, recipe.generation.metrics)


class WritingMixin(_Base):
    """Adds to a trainer's evaluation the scores of what its model writes.

    Args:
        *args: as the trainer takes them.
        writer: writes and scores. None leaves evaluation as it is.
        **options: as the trainer takes them.
    """

    _rows: Any

    def __init__(self, *args: Any, writer: Writer | None = None, **options: Any) -> None:
        """Keep the writer."""
        self.writer = writer
        super().__init__(*args, **options)

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Evaluate; see transformers' Trainer."""
        found = super().evaluation_loop(*args, **options)
        if self.writer is not None and found.metrics is not None:
            model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            few = self.writer.config.eval_rows if self.is_in_train else None
            prefix = options.get("metric_key_prefix", "eval")
            scores = self.writer.score(model, self._rows, few)
            found.metrics.update({f"{prefix}_{name}": score for name, score in scores.items()})
        return found


@contextmanager
def shown(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` prompts are written for: a bar, or into a pipe a line every ten seconds."""
    if console.is_terminal:
        columns = TextColumn("write"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("write", total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    last = time.perf_counter()

    def line(done: int) -> None:
        nonlocal last
        if time.perf_counter() - last >= 10:
            last = time.perf_counter()
            console.print(f"write  {done}/{total} prompts")

    yield line
