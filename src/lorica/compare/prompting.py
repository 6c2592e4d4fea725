"""Few-shot prompting: scores of a decoder without training, with examples before each row."""

from __future__ import annotations

import dataclasses
import inspect
import io
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_utils import EvalPrediction

from lorica.compare.file import FewShot
from lorica.errors import ConfigError, FileError
from lorica.train import tasks
from lorica.train.console import Console, quiet
from lorica.train.data.columns import check_texts
from lorica.train.embedded import resolve_model
from lorica.train.generation.writing import writer_of
from lorica.train.prepared import read
from lorica.train.recipe import Recipe
from lorica.train.settings import DataConfig
from lorica.train.tasks import CausalLanguageModelling, SequenceClassification
from lorica.train.tasks.base import positions_of
from lorica.train.tasks.prompts import prompts_of
from lorica.train.trainer.fit import score
from lorica.train.trainer.trainer import Trainer

_ONE, _TWO = "{text}\nAnswer:", "{text}\n{text_pair}\nAnswer:"
_EMPTY = "N/A"  # the row without content of Zhao et al.


def prompt(recipe: Recipe, settings: FewShot) -> dict[str, Any]:
    """Score a decoder on a recipe's rows without training it.

    Args:
        recipe: task, model, data; `training.seed` draws the examples, and `training.eval_batch_size` is the
            number of texts per batch.
        settings: of the prompts.

    Returns:
        The fields of a run's line: the scores, and zeros for the costs of training.

    Raises:
        ConfigError: prompting is not possible for the task, or a class has fewer rows than `shots`.
    """
    recipe, task, used = read(recipe)
    data, splits = recipe.data, {name: own.rows for name, own in used.items()}
    with quiet():
        tokenizer = task.tokenizer(recipe.model)
        base = resolve_model(recipe.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False).eval()
        task.pad(model, tokenizer)
        scored = {name: rows for name, rows in splits.items() if name != "train"}
        if isinstance(task, SequenceClassification):
            reader = _Classifier(model, tokenizer, data, settings, recipe, splits["train"])
            scores = {name: reader.score(task, rows, f"the {name} rows") for name, rows in scored.items()}
        elif isinstance(task, CausalLanguageModelling) and data.text and data.label:
            before = _examples_before(data, settings, splits["train"], recipe.training.seed)
            scores = {
                name: _complete(task, model, tokenizer, rows, data, before, recipe)
                for name, rows in scored.items()
            }
        else:
            raise ConfigError(f"few-shot is for classification and completions, not for this {task.name}")
    return {
        "scores": scores,
        "trainable": 0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint_bytes": 0,
        "steps": 0,
        "step_seconds": None,
        "seconds": 0.0,
        "rows": {name: len(rows) for name, rows in splits.items()},
    }


class _Classifier:
    """Chooses the label that the model finds likeliest after the examples and the row."""

    def __init__(
        self, model: Any, tokenizer: Any, data: DataConfig, settings: FewShot, recipe: Recipe, train: Dataset
    ) -> None:
        self.model, self.tokenizer, self.data, self.settings = model, tokenizer, data, settings
        self.batch = recipe.training.eval_batch_size
        self.words = settings.words or list(data.labels or [])
        if len(self.words) != len(data.labels or []):
            raise ConfigError(f"few-shot.words has {len(self.words)} words for the labels {data.labels}")
        self.template = settings.prompt or (_TWO if data.text_pair else _ONE)
        if data.text_pair and "{text_pair}" not in self.template:
            raise ConfigError("few-shot.prompt must say where the second text goes, as {text_pair}")
        self.examples = self._draw(train, recipe.training.seed)
        self.limit = _room(model, tokenizer)
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.start = [] if start is None else [start]
        self.endings = [self._ids(f" {word}") for word in self.words]
        self.bias = self._likelihoods([self._prompt(_EMPTY, _EMPTY)])[0] if settings.calibrate else 0.0

    def score(self, task: SequenceClassification, rows: Dataset, where: str) -> dict[str, float]:
        """The task's metrics of some rows."""
        check_texts(rows, task.inputs(self.data), where)
        columns = [list(rows[name]) for name in task.inputs(self.data)]
        prompts = [self._prompt(*texts) for texts in zip(*columns, strict=True)]
        found = self._likelihoods(prompts) - self.bias
        labels = np.array(task.targets(rows, self.data, where))
        outcome = EvalPrediction(predictions=found, label_ids=labels)
        return {name: float(value) for name, value in task.metrics(outcome, rows).items()}

    def _draw(self, train: Dataset, seed: int) -> list[tuple[str, int]]:
        """Examples of each class, with their labels, mixed."""
        of: dict[int, list[int]] = defaultdict(list)
        for row, label in enumerate(
            tasks.SequenceClassification().targets(train, self.data, "the training rows")
        ):
            of[label].append(row)
        random_ = random.Random(seed)
        chosen: list[tuple[int, int]] = []
        for label, word in enumerate(self.words):
            if len(of[label]) < self.settings.shots:
                raise ConfigError(
                    f"there are {len(of[label])} training rows of {word!r}, fewer than "
                    f"shots={self.settings.shots}"
                )
            chosen += [(row, label) for row in random_.sample(of[label], self.settings.shots)]
        random_.shuffle(chosen)
        names = [name for name in (self.data.text, self.data.text_pair) if name is not None]
        return [(self._fill(*(train[row][name] for name in names)), label) for row, label in chosen]

    def _fill(self, text: str, text_pair: str = "") -> str:
        texts = {"{text}": text, "{text_pair}": text_pair}
        return re.sub(r"\{text(_pair)?\}", lambda found: texts[found[0]], self.template)

    def _prompt(self, text: str, text_pair: str = "") -> list[int]:
        """The examples and the row; the first examples are left out if not all fit."""
        own = self._ids(self._fill(text, text_pair))
        room = self.limit - len(self.start) - len(own) - max(map(len, self.endings))
        if room < 0:
            raise FileError(
                f"a row of {len(own)} tokens has no room in the model's {self.limit}: {text[:60]!r}"
            )
        before: list[int] = []
        for filled, label in reversed(self.examples):
            example = self._ids(f"{filled} {self.words[label]}{self.settings.between}")
            if len(before) + len(example) > room:
                break
            before = example + before
        return [*self.start, *before, *own]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @torch.no_grad()
    def _likelihoods(self, prompts: Sequence[list[int]]) -> np.ndarray:
        """Log-likelihood of each label behind each prompt (prompts, labels)."""
        pairs = [(p, label) for p in range(len(prompts)) for label in range(len(self.endings))]
        pairs.sort(key=lambda pair: len(prompts[pair[0]]))
        result = np.zeros((len(prompts), len(self.endings)))
        for i in range(0, len(pairs), self.batch):
            part = pairs[i : i + self.batch]
            texts = [prompts[p] + self.endings[label] for p, label in part]
            found = self._read(texts, [len(self.endings[label]) for _, label in part])
            for (p, label), value in zip(part, found.tolist(), strict=True):
                result[p, label] = value
        return result

    def _read(self, texts: list[list[int]], ends: list[int]) -> Tensor:
        """Log-likelihood of the last tokens of each text; `ends` gives their numbers."""
        longest, kept = max(map(len, texts)), max(ends) + 1
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):  # padded on the left, so that all end in one column
            ids[row, longest - len(text) :] = torch.tensor(text)
            mask[row, longest - len(text) :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        more: dict[str, Any] = {}
        takes = inspect.signature(self.model.forward).parameters
        if "position_ids" in takes:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in takes:
            more["logits_to_keep"] = kept
        logits = self.model(input_ids=ids, attention_mask=mask, **more).logits[:, -kept:-1].float()
        likelihood = logits.log_softmax(-1).gather(-1, ids[:, -kept + 1 :, None]).squeeze(-1).cpu()
        back = torch.arange(kept - 1, 0, -1)  # place of a column, from the end
        return torch.where(back <= torch.tensor(ends)[:, None], likelihood, 0.0).sum(-1)


def _room(model: Any, tokenizer: Any) -> int:
    """Tokens that the model reads at once."""
    return min(filter(None, (positions_of(model.config), tokenizer.model_max_length)))


def _examples_before(data: DataConfig, settings: FewShot, train: Dataset, seed: int) -> str:
    if settings.shots > len(train):
        raise ConfigError(f"there are {len(train)} training rows, fewer than shots={settings.shots}")
    rows = train.select(random.Random(seed).sample(range(len(train)), settings.shots))
    prompts = prompts_of(rows, data, "the training rows", filled=True)
    examples = [
        f"{prompt}{data.separator}{answer}{settings.between}"
        for prompt, answer in zip(prompts, rows[str(data.label)], strict=True)
    ]
    return "".join(examples)


def _complete(
    task: CausalLanguageModelling,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    data: DataConfig,
    before: str,
    recipe: Recipe,
) -> dict[str, float]:
    """The task's own scores, with examples before each prompt."""
    assert data.text is not None
    texts = [before + text for text in prompts_of(rows, data, "the rows", filled=True)]
    rows = rows.remove_columns(data.text).add_column(data.text, texts)  # type: ignore[arg-type,call-arg]
    data = dataclasses.replace(data, system=None, text_pair=None)  # they are in the prompt
    encoded = task.encode(rows, data, tokenizer, _room(model, tokenizer), "the rows")
    silent = Console(file=io.StringIO())
    writer = writer_of(recipe, task, tokenizer, model, [encoded.features], silent)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=recipe.training.eval_batch_size,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            prediction_loss_only=not task.reads_outputs,
        )
        trainer = Trainer(
            model=model,
            args=args,
            processing_class=tokenizer,
            data_collator=task.collator(tokenizer),
            score=task.metrics,
            writer=writer,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return score(trainer, encoded.features)
