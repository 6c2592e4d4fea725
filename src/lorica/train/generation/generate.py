"""`generate`: texts for prompts, by a trained model, an adapter on its base, or any model that writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, TextStreamer

from lorica.checkpoint import is_adapter
from lorica.checkpoint.peft import read_settings
from lorica.errors import ConfigError, FileError
from lorica.model import adapters as adapters_on
from lorica.model import load, merge, restore
from lorica.train import tasks
from lorica.train.console import make_console, quiet
from lorica.train.data.forms.known import CHATS
from lorica.train.embedded import resolve_model
from lorica.train.generation.writing import settings_of, shown, write
from lorica.train.recipe import Recipe
from lorica.train.run import RECIPE
from lorica.train.settings import DataConfig, GenerationConfig
from lorica.train.tasks import LanguageTask
from lorica.train.tasks.base import loading
from lorica.train.tasks.language import reads_chats
from lorica.train.trained import Trained, open_run


def generate(
    source: str | Path | Trained,
    prompts: Sequence[str],
    generation: GenerationConfig | None = None,
    *,
    adapters: Sequence[str | Path] = (),
    merged: bool = False,
    chat: bool | None = None,
    sequences: int = 1,
    seed: int = 0,
    stream: Callable[[str], object] | None = None,
    trust_task: bool = False,
) -> list[dict[str, Any]]:
    """Write texts.

    Args:
        source: what `train` or ``lorica merge`` left; an adapter's folder, whose configuration names its
            base; or any model, by folder or Hub name.
        prompts: as a user would type them. They are laid out as the recipe's rows were: followed by its
            separator, or as a user's message in its chat template.
        generation: how to write. None takes the recipe's, or the defaults.
        adapters: more adapters for the same base, by folder or Hub name. Each answers every prompt beside the
            source's own (or the base, where it has none), all in the same batches.
        merged: fold the adapter into the weights meanwhile, which is faster and rounds once.
        chat: lay a prompt out as a user's message. None does so where the recipe learned conversations.
        sequences: texts per prompt; more than one needs beams or sampling.
        seed: seed of sampling.
        stream: called with the text of a single prompt as it comes.
        trust_task: as in `lorica.train.open_run`, for a source that is a folder.

    Returns:
        A dictionary for each text: ``prompt``, ``generated``, and ``adapter`` where there are several.

    Raises:
        LoricaError: the model writes no text, a prompt is too long for it, or the adapters do not fit.
    """
    if not len(prompts):
        raise ConfigError("there is no prompt to write on from")
    trained = source if isinstance(source, Trained) else opened(source, trust_task=trust_task)
    task, model, tokenizer = trained.task, trained.model, trained.tokenizer
    if not isinstance(task, LanguageTask):
        raise ConfigError(f"{task.name} writes no text; `lorica predict` gives its answers")
    config = generation or trained.recipe.generation
    settings_of(model, tokenizer, config, sequences)
    names = _beside(model, adapters)
    if merged and adapters:
        raise ConfigError("one adapter can be merged, not several; leave out merged, or the other adapters")
    if stream is not None and (len(prompts) > 1 or len(names) > 1 or sequences > 1 or config.num_beams > 1):
        raise ConfigError(
            "a text can be shown as it comes for one prompt, without beams, adapters or sequences"
        )
    data = trained.recipe.data
    if chat is not None and chat != reads_chats(data):
        data = DataConfig(text=CHATS[0] if chat else "text")
    ids = task.prompts(task.rows(prompts, data), data, tokenizer, "the prompts")
    folded = _merged(model) if merged else contextlib.nullcontext()
    with quiet(), folded, shown(make_console(stderr=True), len(ids) * len(names)) as progress:
        found = write(
            model,
            tokenizer,
            [each for each in ids for _ in names],
            config,
            adapters=[name for _ in ids for name in names] if len(names) > 1 else None,
            sequences=sequences,
            seed=seed,
            streamer=None if stream is None else _Streamer(tokenizer, stream),
            progress=progress,
        )
    asked = [(prompt, name) for prompt in prompts for name in names]
    return [
        {"prompt": prompt, **({"adapter": name} if len(names) > 1 else {}), "generated": text}
        for (prompt, name), texts in zip(asked, found, strict=True)
        for text in texts
    ]


def opened(source: str | Path, *, trust_task: bool = False) -> Trained:
    """Load a model that writes; see `generate`.

    Raises:
        FileError: there is no such model or adapter.
    """
    folder = Path(source)
    if (folder / RECIPE).is_file():
        return open_run(folder, trust_task=trust_task)
    name, adapter = str(source), is_adapter(folder)
    if adapter:
        base = read_settings(folder).get("base_model_name_or_path")
        if not base:
            raise FileError(
                f"the adapter {folder} does not say which base it is for; give the base, and the adapter "
                "beside it"
            )
        name = str(base)
    with quiet(), loading(f"a model from {name!r}"):
        config = transformers.AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False)
    task = tasks.get("seq2seq-lm" if config.is_encoder_decoder else "causal-lm")
    recipe = Recipe(task=task.name, model=name, data=DataConfig(text="text"))
    with quiet():
        tokenizer, model = task.tokenizer(name), task.model(name, recipe.data)
        if adapter:
            load(model, folder)
    task.pad(model, tokenizer)
    return Trained(recipe, task, tokenizer, model.eval())


def _beside(model: PreTrainedModel, others: Sequence[str | Path]) -> list[str | None]:
    """Load more adapters; the names of all that answer, or None for the active ones."""
    there = list(adapters_on(model)) if others else []
    names: list[str | None] = [next(iter(there), None)]
    for other in others:
        plain = Path(other).name.replace(".", "-") or "adapter"
        taken = {*there, *names}
        name = next(n for n in (plain, *(f"{plain}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        with quiet():
            load(model, other, name=name)
        names.append(name)
    return names


@contextlib.contextmanager
def _merged(model: PreTrainedModel) -> Iterator[None]:
    merge(model)
    try:
        yield
    finally:
        restore(model)


class _Streamer(TextStreamer):
    """Hands a text on as whole words of it come."""

    def __init__(self, tokenizer: Any, hand_on: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._hand_on = hand_on

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a part."""
        self._hand_on(text)
