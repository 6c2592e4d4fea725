"""Scores of answers: functions of the user's own, and reward models that a run trained.

    function         path/to/file.py:function(prompts, completions, **columns) ──▶ a number for each
    folder of a run  its adapter on *this* base: the frozen weights are the policy's own, in memory once

A function is what TRL's trainers take, so those written for them serve here, and the other way round.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.checkpoint import is_adapter
from lorica.errors import ConfigError, FileError, LoricaError, nearest
from lorica.model import detach, load
from lorica.state import find_adapted
from lorica.train.data.forms import as_one_kind
from lorica.train.recipe import Recipe, import_from, is_code, split_entry
from lorica.train.settings import PostConfig
from lorica.train.tasks.post.reward import Reward

Score = Callable[..., list[float | None]]


def rewards_of(post: PostConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Score]:
    """The rewards that a recipe names, as TRL's trainers take them.

    Args:
        post: the recipe's part.
        model: the policy, adapted; the base of reward adapters.
        tokenizer: the policy's.

    Raises:
        FileError: there is no such file, function or folder.
        ConfigError: it is no function, or its adapter is of another base.
    """
    return [
        function_of(entry) if is_code(entry) else AdapterReward(entry, model, tokenizer)
        for entry in post.rewards
    ]


def function_of(entry: str) -> Score:
    """The function that an entry names; its answers are checked.

    Raises:
        FileError: there is no such file, or it raised when imported.
        ConfigError: it holds no such function.
    """
    place, name = split_entry(entry)
    module = import_from(place, "the reward")
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not name:
        raise ConfigError(
            f"name the function of {place} that is the reward: {place}:{known[0] if known else 'f'}"
        )
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{place} has no function {name!r}{nearest(name, known)}")

    @functools.wraps(function)
    def score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        try:
            found = list(cast(Any, function)(prompts=prompts, completions=completions, **columns))
        except Exception as error:
            raise LoricaError(f"the reward {entry} failed: {type(error).__name__}: {error}") from error
        wrong = [value for value in found if value is not None and not _is_number(value)]
        if len(found) != len(completions) or wrong:
            got = f"{wrong[0]!r:.60}" if wrong else f"{len(found)} numbers"
            raise LoricaError(
                f"the reward {entry} must return a number for each of {len(completions)} completions, or "
                f"None where it has no say; it returned {got}"
            )
        return [value if value is None else float(value) for value in found]

    score.__name__ = name
    return score


def _is_number(value: Any) -> bool:
    try:
        return float(value) == float(value)
    except (TypeError, ValueError):
        return False


class AdapterReward:
    """A reward model that a run of the task reward trained, on the base of the policy.

    Args:
        folder: of the run.
        model: the policy; its frozen weights serve both.
        tokenizer: the policy's.

    Raises:
        FileError: the folder holds no adapter.
        ConfigError: it is of another task or base.
    """

    def __init__(self, folder: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put the adapter on a model that shares the policy's weights."""
        path = Path(folder)
        if not is_adapter(path):
            raise FileError(
                f"the reward {folder!r} is neither a function, path/to/file.py:function, nor the folder of a "
                "run of the task reward"
            )
        recipe = Recipe.load(path / "recipe.yaml", trust_task=True)  # read; none of its code runs
        if recipe.task != Reward.name:
            raise ConfigError(f"the reward {folder} is of the task {recipe.task}, where reward is due")
        name = model.name_or_path
        if name and recipe.model != name:
            raise ConfigError(
                f"the reward {folder} was trained on {recipe.model!r}, and this run's model is {name!r}: an "
                "adapter scores on its own base alone. Train a reward on this model"
            )
        self.__name__ = path.name
        self._recipe, self._tokenizer = recipe, tokenizer
        self.model = load(with_scores(model), path).eval()
        self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.model.config.pad_token_id = tokenizer.pad_token_id

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """The number of each answer."""
        data, limit = self._recipe.data, self._recipe.training.max_length
        limit = min(limit, self._tokenizer.model_max_length)
        rows = [
            Reward.layout(
                self._tokenizer,
                *as_one_kind(_plain(prompt), _plain(answer), data),
                None,
                data.separator,
                limit,
            )[0]
            for prompt, answer in zip(prompts, completions, strict=True)
        ]
        size = self._recipe.training.eval_batch_size
        found: list[float | None] = []
        for start in range(0, len(rows), size):
            batch = self._tokenizer.pad(
                {"input_ids": rows[start : start + size]}, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            with torch.no_grad():
                found += self.model(**batch).logits[:, 0].float().tolist()
        return found


def _plain(said: Any) -> Any:
    """A text, or messages without what a table put under keys that they lack."""
    if isinstance(said, str):
        return said
    return [{key: value for key, value in message.items() if value is not None} for message in said]


def with_scores(model: PreTrainedModel) -> PreTrainedModel:
    """A model that gives one number to a text, made of another's body; every weight of that is shared.

    Args:
        model: any model of transformers, adapted or not; it stays as it is.

    Raises:
        ConfigError: its architecture has none that scores texts.
    """
    mapping = transformers.AutoModelForSequenceClassification._model_mapping
    if type(model.config) not in mapping:
        raise ConfigError(f"{type(model.config).__name__} has no model that scores texts")
    made: Any = mapping[type(model.config)]
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        scoring: Any = (made[0] if isinstance(made, (list, tuple)) else made)(config)
    body = _sharing(model)
    setattr(scoring, scoring.base_model_prefix, body.base_model)
    device = model.device
    for module in scoring.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:  # the head, which an adapter brings
                empty = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    scoring.name_or_path = model.name_or_path
    return scoring


def _sharing(model: PreTrainedModel) -> Any:
    """The plain model below an adapted one, as modules of its own around the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    trains = [(tensor, tensor.requires_grad) for tensor in model.parameters()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    if find_adapted(twin) is not None:
        detach(twin)
    for tensor, flag in trains:
        tensor.requires_grad_(flag)
    return twin
