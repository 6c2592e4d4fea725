"""transformers' Trainer for adapted models.

transformers' own Trainer trains an adapted model, saves its adapters and reads them back:
`lorica.model.trainers` sees to that. `LoraTrainerMixin` does the same by inheritance, for trainers which
override those methods::

    class LoraSFTTrainer(LoraTrainerMixin, trl.SFTTrainer): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor, nn

from lorica.errors import LoricaError
from lorica.model.trainers import takes_back
from lorica.train.generation.writing import WritingMixin
from lorica.train.trainer.evaluation import EvaluationMixin
from lorica.train.trainer.measuring import MeasuringMixin
from lorica.train.trainer.optimizer import parameter_groups
from lorica.train.trainer.resuming import ResumingMixin
from lorica.train.trainer.sampler import LengthGroupedSampler
from lorica.train.trainer.token_loss import TokenLossMixin

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object

_HOOKS = ("_load_from_checkpoint", "_load_best_model")


class LoraTrainerMixin(_Base):
    """Lets a trainer resume from adapter-only checkpoints, and end with the best of them.

    Put it before the trainer it is mixed into. A model without adapters, FSDP and DeepSpeed take the
    trainer's own ways.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a trainer in which the two methods would never be called.

        Raises:
            LoricaError: the installed transformers names them otherwise.
        """
        super().__init_subclass__(**options)
        place = cls.__mro__.index(LoraTrainerMixin)
        before, after = cls.__mro__[:place], cls.__mro__[place + 1 : -1]
        hidden = [base.__name__ for base in before if not issubclass(base, LoraTrainerMixin)]
        if hidden:
            raise LoricaError(
                f"{cls.__name__} cannot load adapters: {hidden[0]} comes before LoraTrainerMixin; "
                f"write class {cls.__name__}(LoraTrainerMixin, {hidden[0]})"
            )
        missing = [hook for hook in _HOOKS if not any(hook in vars(base) for base in after)]
        if after and missing:
            raise LoricaError(
                f"{cls.__name__} cannot load adapters: {after[0].__name__} of transformers "
                f"{transformers.__version__} has no {' and no '.join(missing)}; "
                "this version of transformers is not supported yet"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not takes_back(self, resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not takes_back(self, self.state.best_model_checkpoint):
            super()._load_best_model()


class Trainer(
    LoraTrainerMixin,
    ResumingMixin,
    MeasuringMixin,
    WritingMixin,
    EvaluationMixin,
    TokenLossMixin,
    transformers.Trainer,
):
    """transformers' Trainer, with adapter checkpoints, LoRA+ and an order of rows that a resume keeps.

    The loss of a language model is averaged over the target tokens of all the batches of a step, or of all
    rows in evaluation, and computed without the matrix of logits.

    Args:
        *args: as transformers' Trainer takes them.
        loraplus_lr_ratio: learning rate of B over that of A; see `parameter_groups`. None trains both at one
            rate.
        loss: function of the model's outputs and its inputs that returns a batch's mean loss, or None for
            the model's own; such as a task's.
        **options: as transformers' Trainer takes them, `chunked_loss` (see `TokenLossMixin`), `score`
            (see `EvaluationMixin`) and `writer` (see `WritingMixin`).
    """

    def __init__(
        self,
        *args: Any,
        loraplus_lr_ratio: float | None = None,
        loss: Callable[[Any, Mapping[str, Any]], Tensor | None] | None = None,
        **options: Any,
    ) -> None:
        """Keep the two, and leave the rest to transformers."""
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.loss = loss
        super().__init__(*args, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch; see transformers' Trainer."""
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = found
        own = self.loss(outputs, inputs)
        if own is not None:
            labels = inputs.get("labels")
            if labels is None or num_items_in_batch is None:
                loss = own
            else:
                loss = own * self._share(labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this is the best evaluation so far; of two that tie, the one with the lower loss."""
        before, step = self.state.best_metric, self.state.best_global_step
        if super()._determine_best_metric(metrics, trial):
            return True
        name = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        loss, best = metrics.get("eval_loss"), self._loss_at(step)
        if before is None or metrics.get(name) != before or loss is None or best is None or not loss < best:
            return False
        self.state.best_global_step = self.state.global_step
        return True

    def _loss_at(self, step: int | None) -> float | None:
        """Loss of the evaluation at a step."""
        found = [e["eval_loss"] for e in self.state.log_history if e["step"] == step and "eval_loss" in e]
        return found[-1] if found else None

    def get_optimizer_cls_and_kwargs(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any, model: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """The optimizer's class and arguments, with LoRA+'s parameter groups where they are asked for."""
        optimizer, options = super().get_optimizer_cls_and_kwargs(args, model)
        if self.loraplus_lr_ratio is not None:
            options["params"] = parameter_groups(
                cast(nn.Module, self.model if model is None else model),
                lr=args.learning_rate,
                weight_decay=args.weight_decay,
                loraplus_lr_ratio=self.loraplus_lr_ratio,
            )
        return optimizer, options

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        # Not `train_dataset`: the column of lengths, which no model's forward names, is gone from it by now.
        rows: Any = self.train_dataset
        column = self.args.length_column_name
        grouped = self.args.train_sampling_strategy == "group_by_length"
        if not grouped or self.args.world_size > 1 or column not in getattr(rows, "column_names", ()):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(rows[column], self._train_batch_size, seed)
