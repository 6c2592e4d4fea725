"""Prompts in, texts out, in batches of similar lengths; and what the texts score in evaluation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.errors import ConfigError, LoricaError, nearest
from lorica.model import mixed
from lorica.train.console import make_console, silent
from lorica.train.distributed.group import by_first, gathered, is_first, rank, world
from lorica.train.distributed.sharded import gathered_parts
from lorica.train.metrics import written
from lorica.train.metrics.written import check, without_java
from lorica.train.settings import GenerationConfig
from lorica.train.system import write_lines
from lorica.train.tasks.base import positions_of
from lorica.train.tasks.language import GROUP, PROMPT_IDS, PROMPT_LENGTH, REFERENCE

if TYPE_CHECKING:
    from lorica.train.recipe import Recipe
    from lorica.train.tasks.base import Task


_OWN = ("num_return_sequences", "max_length", "use_cache")

_SAMPLING = ("temperature", "top_k", "top_p")

_SEARCHING = ("length_penalty",)


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    adapters: Sequence[str | None] | None = None,
    sequences: int = 1,
    seed: int = 0,
    streamer: Any = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[str]]:
    """Write on from prompts.

    Args:
        model: a decoder, or an encoder and decoder. In evaluation meanwhile.
        tokenizer: its tokenizer.
        prompts: tokens of each prompt.
        config: how to write.
        adapters: name of the adapter that answers each prompt, or None for the base; without it, those that
            are active.
        sequences: texts for each prompt; more than one needs beams or sampling.
        seed: seed of the drawing, which leaves torch's own random numbers as they were.
        streamer: takes the tokens of a single prompt as they come; see transformers' TextStreamer.
        progress: called with the number of prompts done.

    Returns:
        For each prompt its texts, the prompt left out.

    Raises:
        LoricaError: the model writes no text, or a prompt and its answer pass the model's context.
    """
    settings = settings_of(model, tokenizer, config, sequences)
    check_context(model, prompts, config)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts: list[list[str]] = [[] for _ in prompts]
    both = bool(model.config.is_encoder_decoder)
    # Several processes write a batch each in turn, in the same batches as one would.
    shared = streamer is None and world() > 1
    turns = list(enumerate(range(0, len(order), config.batch_size)))
    with _evaluating(model), _drawing(config.do_sample, seed), gathered_parts(model) as in_parts:
        if shared and in_parts:  # each pass needs all processes: who has no batch left writes the last again
            turns += [(turn, turns[-1][1]) for turn in range(len(turns), -(-len(turns) // world()) * world())]
        for turn, start in turns:
            if shared and turn % world() != rank():
                continue
            if shared and config.do_sample:
                torch.manual_seed(seed + turn)
            places = order[start : start + config.batch_size]
            batch = pad([prompts[i] for i in places], _padding(tokenizer), left=not both)
            batch = {name: value.to(model.device) for name, value in batch.items()}
            chosen = None if adapters is None else mixed(model, [adapters[i] for i in places])
            with chosen or contextlib.nullcontext():
                found: Any = model.generate(**batch, generation_config=settings, streamer=streamer)  # type: ignore[operator]
            if not both:
                found = found[:, batch["input_ids"].shape[1] :]
            said = tokenizer.batch_decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, text in enumerate(said):
                texts[places[row // sequences]].append(text.strip())
            progress(start + len(places))
    if shared:
        texts = [next((part for part in each if part), []) for each in zip(*gathered(texts), strict=True)]
    return texts


def settings_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    sequences: int = 1,
) -> transformers.GenerationConfig:
    """The settings of transformers' `generate`: texts end with the model's end tokens or the tokenizer's.

    Raises:
        ConfigError: the model writes no text, or the settings contradict each other.
    """
    if not model.can_generate():
        raise ConfigError(
            f"{type(model).__name__} does not write text; take a model with a language-modelling head "
            "(AutoModelForCausalLM or AutoModelForSeq2SeqLM loads one)"
        )
    if sequences < 1 or (sequences > 1 and not config.do_sample and config.num_beams < sequences):
        raise ConfigError(
            f"{sequences} different texts a prompt need do_sample, or at least as many beams; num_beams is "
            f"{config.num_beams}"
        )
    known = transformers.GenerationConfig().to_dict()
    for name in config.arguments:
        if name in _OWN or hasattr(config, name):
            raise ConfigError(f"generation.arguments must not hold {name!r}, which has a place of its own")
        if name not in known:
            raise ConfigError(f"transformers' GenerationConfig has no {name!r}{nearest(name, known)}")
    # transformers remarks on settings that have no effect.
    idle = {*(() if config.do_sample else _SAMPLING), *(_SEARCHING if config.num_beams == 1 else ())}
    names = ("max_new_tokens", "num_beams", "no_repeat_ngram_size", "repetition_penalty", "do_sample")
    chosen = {name: getattr(config, name) for name in (*names, *_SAMPLING, *_SEARCHING) if name not in idle}
    own: Any = model.generation_config
    tokens = {name: value for name, value in own.to_dict().items() if name.endswith("_token_id")}
    ends = tokens.get("eos_token_id")
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    # The training rows end with the tokenizer's token, which may be none of the model's.
    ends += [end for end in [tokenizer.eos_token_id] if end is not None and end not in ends]
    tokens["eos_token_id"] = ends or None
    if tokens.get("pad_token_id") is None:
        tokens["pad_token_id"] = ends[0] if ends else None
    return transformers.GenerationConfig(
        **{**tokens, **chosen, "num_return_sequences": sequences, **config.arguments}
    )


def check_context(model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> None:
    """Refuse prompts that leave no room for an answer.

    Raises:
        LoricaError: naming the first, its tokens and the model's.
    """
    places = positions_of(model.config)
    empty = next((row for row, ids in enumerate(prompts) if not len(ids)), None)
    if empty is not None:
        raise LoricaError(f"prompt {empty + 1} gives no tokens, so there is nothing to write on from")
    if places is None:
        return
    new = 0 if model.config.is_encoder_decoder else config.max_new_tokens
    for row, ids in enumerate(prompts):
        if len(ids) + new > places:
            more = f" and {new:,} more are to be written" if new else ""
            raise LoricaError(
                f"prompt {row + 1} has {len(ids):,} tokens{more}; the model takes {places:,}. Shorten the "
                "prompt, or lower max_new_tokens"
            )


def pad(rows: Sequence[Sequence[int]], token: int, *, left: bool) -> dict[str, Tensor]:
    """Tokens (rows, longest) and their mask; a decoder's prompts end where its text begins, so left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), token)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(longest - len(tokens), None) if left else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    # The mask hides it: any token will do where there is none of its own.
    token: Any = tokenizer.pad_token_id
    return 0 if token is None else token


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _drawing(sampled: bool, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(enabled=sampled):
        if sampled:
            torch.manual_seed(seed)
        yield


if TYPE_CHECKING:
    from lorica.train.recipe import Recipe
    from lorica.train.tasks.base import Task

    _Base = transformers.Trainer
else:
    _Base = object


@dataclass(frozen=True)
class Prompts:
    """The prompts of an evaluation, and their right answers.

    Args:
        prompts: tokens of each prompt.
        references: the texts that would be right, of each.
    """

    prompts: list[list[int]]
    references: list[list[str]]


def prompts_in(features: Dataset) -> Prompts:
    """The different prompts of encoded rows, in order, with the references of all rows that share one.

    Raises:
        ConfigError: the rows are plain text, which has no prompts.
    """
    if not {PROMPT_LENGTH, GROUP, REFERENCE} <= set(features.column_names):
        raise ConfigError(
            "texts without prompts cannot be scored by what a model writes; leave out generation.metrics, "
            "or give prompts and completions"
        )
    prompts: dict[int, list[int]] = {}
    references: dict[int, list[str]] = {}
    columns = (features[name] for name in (GROUP, PROMPT_LENGTH, "input_ids", REFERENCE))
    apart = features[PROMPT_IDS] if PROMPT_IDS in features.column_names else [None] * len(features)
    for group, length, ids, text, own in zip(*columns, apart, strict=True):
        prompts.setdefault(group, list(ids[:length] if own is None else own))
        references.setdefault(group, []).append(text)
    return Prompts(list(prompts.values()), list(references.values()))


@dataclass(frozen=True)
class Writer:
    """Writes for encoded rows, and scores the texts.

    Args:
        tokenizer: the model's tokenizer.
        config: how to write, and what to score by.
        console: where to show progress.
        seed: of drawing.
    """

    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    console: Console
    seed: int = 0

    def check(self, model: PreTrainedModel, features: Dataset) -> None:
        """Refuse before training a configuration that could not write or score after it.

        Raises:
            LoricaError: a metric or a setting is unknown, or a prompt too long.
        """
        check(self.config.metrics)
        settings_of(model, self.tokenizer, self.config)
        check_context(model, prompts_in(features).prompts, self.config)

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
        wanted = prompts_in(features)
        wanted = Prompts(wanted.prompts[:rows], wanted.references[:rows])
        return written(self.texts(model, wanted.prompts), wanted.references, self.config.metrics)


def writer_of(
    recipe: Recipe,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    scored: Iterable[Dataset],
    console: Console,
) -> Writer | None:
    """The writer of a recipe's evaluations, checked on the rows that they score; None if nothing is written.

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
    """Write for encoded rows, score the texts, and keep them in a file if one is named.

    Raises:
        LoricaError: the task writes no text, or something of it cannot be done.
    """
    if predictions is None and not recipe.generation.metrics:
        return {}
    if not task.writes:
        raise ConfigError(f"{task.name} writes no text: it has no such predictions; see `lorica predict`")
    console = make_console(stderr=True) if is_first() else silent()
    writer = Writer(tokenizer, recipe.generation, console, recipe.training.seed)
    writer.check(model, features)
    wanted = prompts_in(features)
    texts = writer.texts(model, wanted.prompts)
    if predictions is not None:
        said = tokenizer.batch_decode(wanted.prompts, skip_special_tokens=True)
        rows = zip(said, texts, wanted.references, strict=True)
        lines = [{"prompt": p, "generated": t, "references": r} for p, t, r in rows]
        by_first(lambda: write_lines(predictions, lines))
    writer.note()
    return written(texts, wanted.references, recipe.generation.metrics)


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
