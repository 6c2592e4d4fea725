"""The trainers that carry post-training, and their arguments: TRL's, as a recipe's ``post`` says."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from lorica.errors import ConfigError, LoricaError, nearest, require
from lorica.train.settings import PostConfig
from lorica.train.tasks.post.answers import PostTask
from lorica.train.tasks.post.grouped import Grouped
from lorica.train.tasks.post.preference import Preference

_OWNED = {
    "loss_type": "loss",
    "beta": "beta",
    "label_smoothing": "label_smoothing",
    "num_generations": "generations",
    "max_completion_length": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "reward_weights": "reward_weights",
}
"""Fields of TRL's that say the same as one of PostConfig."""

_TAKEN = ("model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks")
"""Arguments of lorica's trainer that TRL's take too."""


def trainer_of(task: PostTask, seed: int = 0) -> Callable[..., Any]:
    """A function of the arguments of lorica's `Trainer` that makes a task's trainer.

    Args:
        task: what is learned, settled.
        seed: of the order of judged answers, which their trainer reads in one order.

    Raises:
        MissingExtra: TRL is not installed.
    """
    require("trl", extra="post")

    def make(*, model: PreTrainedModel, train_dataset: Any, processing_class: Any, **options: Any) -> Any:
        from lorica.train.post.trainers import KINDS, Answering

        kind = _kind(task, train_dataset.column_names)
        given = {name: value for name, value in options.items() if name in _TAKEN}
        if kind == "judged":
            train_dataset = train_dataset.shuffle(seed=seed)
        if isinstance(task, Grouped):
            from lorica.train.post.rewards import rewards_of

            given["reward_funcs"] = rewards_of(task.post, model, processing_class)
        with refusals(task):
            trainer = KINDS[kind][0](
                model=model, train_dataset=train_dataset, processing_class=processing_class, **given
            )
        if isinstance(trainer, Answering):
            assert isinstance(task, Grouped)
            trainer.separator, trainer.limit = task.separator, task.limit(processing_class)
        trainer.loraplus_lr_ratio = options.get("loraplus_lr_ratio")
        return trainer

    return make


def arguments_of(
    task: PostTask, values: dict[str, Any], columns: list[str], max_length: int
) -> TrainingArguments:
    """The arguments of TRL's trainer, of what `lorica.train.trainer.trainer.arguments_of` takes.

    Raises:
        MissingExtra: TRL is not installed.
        ConfigError: ``post`` says what TRL refuses.
    """
    require("trl", extra="post")
    from lorica.train.post.trainers import KINDS

    kind = _kind(task, columns)
    config = KINDS[kind][1]
    known = {item.name for item in dataclasses.fields(config)}
    for name in task.post.arguments:
        if name in _OWNED and getattr(task.post, _OWNED[name]) is not None and name != "loss_type":
            raise ConfigError(f"set post.{_OWNED[name]} instead of post.arguments.{name}")
        if name not in known:
            raise ConfigError(f"TRL's {config.__name__} has no {name!r}{nearest(name, known)}")
    # TRL would turn both on unless they are given.
    values = {**values, "gradient_checkpointing": values.get("activation_checkpointing", False)}
    own = {**_shared(task, kind, max_length), **_particular(task.post, kind, values)}
    own = {name: value for name, value in own.items() if value is not None and name in known}
    with refusals(task):
        return config(**{**values, **own, **task.post.arguments})


def _kind(task: PostTask, columns: list[str]) -> str:
    if not isinstance(task, Preference):
        return task.name
    if task.post.loss in ("cpo", "simpo", "orpo"):
        return str(task.post.loss)
    return "judged" if "completion_ids" in columns else "paired"


def _shared(task: PostTask, kind: str, max_length: int) -> dict[str, Any]:
    post = task.post
    return {"max_length": max_length, "beta": post.beta, "label_smoothing": post.label_smoothing or None}


def _particular(post: PostConfig, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    if kind in ("paired", "judged"):
        default = "kto" if kind == "judged" else "sigmoid"
        # KTO pairs each prompt with the answer of the row before it.
        order = {"train_sampling_strategy": "sequential"} if kind == "judged" else {}
        return {"loss_type": post.loss or default, **order}
    if kind in ("cpo", "orpo"):
        return {"remove_unused_columns": False}
    if kind == "simpo":
        return {"loss_type": "simpo", "cpo_alpha": 0.0, "remove_unused_columns": False}
    if kind not in ("grpo", "rloo"):
        return {}
    size = values["per_device_eval_batch_size"]
    return {
        "loss_type": post.loss,
        "num_generations": post.generations,
        "per_device_eval_batch_size": max(size - size % post.generations, post.generations),
        "max_completion_length": post.max_new_tokens,
        "temperature": post.temperature,
        "top_p": post.top_p,
        "reward_weights": post.reward_weights,
        # Its rows are no tokens yet, and come in an order of groups.
        "train_sampling_strategy": "random",
        "include_num_input_tokens_seen": "no",
        "disable_dropout": True,
    }


@contextlib.contextmanager
def refusals(task: PostTask) -> Iterator[None]:
    """Say what TRL refuses in the errors of this library, and leave out what it is told of its future.

    Raises:
        ConfigError: it refused.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
            yield
    except LoricaError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"TRL refuses this run of the task {task.name}: {error}") from error
