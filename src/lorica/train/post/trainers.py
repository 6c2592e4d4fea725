"""TRL's trainers as a run has them: rows that are encoded already, scores over whole sets, exact resumes.

    preference   pairs    ──▶ DPOTrainer          reward   ──▶ RewardTrainer
                 judged   ──▶ KTOTrainer          grpo     ──▶ GRPOTrainer
                 no reference ──▶ CPO, ORPO       rloo     ──▶ RLOOTrainer

The loss and the step are TRL's. The reference is the adapter's own start: see `lorica.model.pretrained`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from lorica.train.tasks.post.answers import question_tokens
from lorica.train.trainer.mixin import RunTrainerMixin

# They are among TRL's experiments, and say so whenever they are imported.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

trl: Any = importlib.import_module("trl")
cpo: Any = importlib.import_module("trl.experimental.cpo")
orpo: Any = importlib.import_module("trl.experimental.orpo")

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object

NAMES = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "accuracy": "accuracy",
    "margin": "margin",
    "mean_reward": "reward",
    "reward": "reward",
    "kl": "kl",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "cut",
}
"""TRL's names of what an evaluation measures → a run's. What is not here is logged in training alone."""

_BUFFER = "answers.pt"
"""In a checkpoint between two rounds of answers: those that are still to be learned from."""


class PostTrainer(RunTrainerMixin, _Base):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A run's evaluation, checkpoints and log for TRL's trainers; the first base, before the trainer."""

    writer = None
    _read: list[int]
    """Rows of each batch of an evaluation."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
        return dataset  # it is encoded, and nothing of it is to be left out unsaid

    def train(self, *args: Any, **options: Any) -> Any:
        """Train; see transformers' Trainer."""
        with _quietly():
            return super().train(*args, **options)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write none: the run writes its own."""

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Read all rows; each figure is the mean over them, and not over batches."""
        self._read = []
        stored = self._stored()
        stored.clear()
        with _quietly():
            found = super().evaluation_loop(*args, **options)
        if found.metrics is not None:
            prefix = options.get("metric_key_prefix", "eval")
            found.metrics.update({f"{prefix}_{name}": value for name, value in self._means(stored).items()})
        stored.clear()
        return found

    def _stored(self) -> dict[str, list[float]]:
        """TRL's figures of each batch of an evaluation."""
        return self._metrics["eval"]  # pyright: ignore[reportAttributeAccessIssue]

    def _means(self, stored: dict[str, list[float]]) -> dict[str, float]:
        means = {}
        for theirs, values in stored.items():
            theirs = theirs.removeprefix("eval_")
            name = NAMES.get(theirs) or _of_reward(theirs)
            if name is None:
                continue
            # Batches without a wanted answer, say, have no figure of one.
            counts = self._read if len(values) == len(self._read) else [1] * len(values)
            known = [(float(v), n) for v, n in zip(values, counts, strict=True) if not math.isnan(v)]
            rows = sum(count for _, count in known)
            means[name] = sum(value * count for value, count in known) / rows if rows else math.nan
        return means

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        """Evaluate a batch, and count its rows."""
        first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
        self._read.append(len(first))
        return super().prediction_step(model, inputs, *args, **options)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy == "group_by_length":
            return torch.utils.data.SequentialSampler(eval_dataset)
        return super()._get_eval_sampler(eval_dataset)

    def close(self) -> None:
        """Give the model its own forward back, in whose place the trainer put its own."""
        bare: Any = self.accelerator.unwrap_model(self.model)
        vars(bare).pop("forward", None)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what transformers tells TRL of its future."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
        yield


def _of_reward(name: str) -> str | None:
    """The name of one reward's mean among several: ``rewards/NAME/mean``."""
    first, _, rest = name.partition("/")
    return f"reward_{rest.removesuffix('/mean')}" if first == "rewards" and rest.endswith("/mean") else None


class Paired(PostTrainer, trl.DPOTrainer):
    """Pairs of answers, against a reference."""


class Judged(PostTrainer, trl.KTOTrainer):
    """Answers that were judged alone, against a reference."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not self.calculate_KL:
            return dataset

        def beside(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            """Each prompt with the answer before its own in the batch, from which KTO estimates the KL."""
            answers = rows["completion_ids"]
            return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

        return dataset.map(beside, batched=True, batch_size=args.per_device_train_batch_size)

    def predict(self, test_dataset: Any, *args: Any, **options: Any) -> Any:
        """Score encoded rows; see transformers' Trainer."""
        rows = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")
        return super().predict(rows, *args, **options)


def _collated(feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
    """The columns that trainers without a reference collate, of a row that is encoded."""
    prompt = feature["prompt_ids"]
    made = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        answer = feature[f"{side}_ids"]
        made[f"{side}_input_ids"] = prompt + answer
        made[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
        made[f"{side}_labels"] = [-100] * len(prompt) + answer
    return made


class Free(PostTrainer):
    """Pairs of answers without a reference, as TRL's experiments have them."""

    tokenize_row = staticmethod(_collated)

    def predict(self, test_dataset: Any, *args: Any, **options: Any) -> Any:
        """Score encoded rows; see transformers' Trainer."""
        return super().predict(test_dataset.map(self.tokenize_row), *args, **options)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any
    ) -> torch.Tensor:
        """Add the gradients of a micro-batch, and count its tokens."""
        loss = super().training_step(model, inputs, *args, **options)
        read = inputs["chosen_attention_mask"].sum() + inputs["rejected_attention_mask"].sum()
        gathered: Any = self.accelerator.gather(read.to(self.accelerator.device))
        self.state.num_input_tokens_seen += int(gathered.sum())
        return loss

    def _stored(self) -> dict[str, list[float]]:
        return self._stored_metrics["eval"]  # pyright: ignore[reportAttributeAccessIssue]


class Contrastive(Free, cpo.CPOTrainer):
    """SimPO and CPO."""


class OddsRatio(Free, orpo.ORPOTrainer):
    """ORPO."""


class Rewarding(PostTrainer, trl.RewardTrainer):
    """A number for each answer, the larger for the better of two."""


class Answering(PostTrainer):
    """Prompts whose answers the model writes in training.

    Attributes:
        separator: what stands between a prompt in text and its answer.
        limit: tokens of a prompt at most; a longer one loses its start.
    """

    separator: str
    limit: int
    loss_falls = False

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        tokenizer: Any = self.processing_class
        ids = [question_tokens(tokenizer, prompt, None, self.separator)[-self.limit :] for prompt in prompts]
        return ids, None, {}

    # A checkpoint may fall between two rounds of answers; those that are left belong to it.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._left() and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self._buffered_inputs, folder / _BUFFER)
        super()._save_checkpoint(model, trial)  # which ends with what says that the checkpoint is whole

    def _left(self) -> bool:
        """Whether answers of the present round are still to be learned from."""
        every = self.args.steps_per_generation * self.num_iterations  # pyright: ignore
        return self._step % every != 0

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = transformers.TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            self._step = state.global_step * self.args.gradient_accumulation_steps
            if self._left():
                place = self.accelerator.device
                self._buffered_inputs = torch.load(Path(checkpoint) / _BUFFER, map_location=place)


class GroupRelative(Answering, trl.GRPOTrainer):
    """Each answer against the others to its prompt, over their spread."""


class LeaveOneOut(Answering, trl.RLOOTrainer):
    """Each answer against the mean of the others to its prompt."""


KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "paired": (Paired, trl.DPOConfig),
    "judged": (Judged, trl.KTOConfig),
    "cpo": (Contrastive, cpo.CPOConfig),
    "simpo": (Contrastive, cpo.CPOConfig),
    "orpo": (OddsRatio, orpo.ORPOConfig),
    "reward": (Rewarding, trl.RewardConfig),
    "grpo": (GroupRelative, trl.GRPOConfig),
    "rloo": (LeaveOneOut, trl.RLOOConfig),
}
"""Kind of training → its trainer, and TRL's configuration of it."""
