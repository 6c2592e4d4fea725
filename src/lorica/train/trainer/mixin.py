"""For trainers of any loss: `LoraTrainerMixin` reads adapters back; `RunTrainerMixin` is what a run adds.

transformers' own Trainer trains an adapted model, saves its adapters and reads them back: see
`lorica.model.pretrained.trainers`. `LoraTrainerMixin` does the same by inheritance, for trainers which
override those methods::

    class LoraSFTTrainer(LoraTrainerMixin, trl.SFTTrainer): ...
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor, nn

from lorica.errors import LoricaError
from lorica.model.pretrained.trainers import takes_back
from lorica.state import in_group
from lorica.train.distributed.group import check_world, wait_for_all
from lorica.train.distributed.sharded import gathered_state, is_in_parts, spread_state
from lorica.train.recipe import is_secret
from lorica.train.system import peak_memory
from lorica.train.trainer.callbacks import learned, unit
from lorica.train.trainer.checkpoints import check_moments, readable
from lorica.train.trainer.optimizer import parameter_groups
from lorica.train.trainer.sampler import LengthGroupedSampler
from lorica.tree import whole

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
        if self.state.best_global_step == self.state.global_step:
            return  # the model is as it was then
        if not takes_back(self, self.state.best_model_checkpoint):
            super()._load_best_model()


class RunTrainerMixin(LoraTrainerMixin):
    """Put it before the trainer it is mixed into, transformers' or one made of it.

    Attributes:
        loraplus_lr_ratio: learning rate of B over that of A; see `parameter_groups`. None trains both at one
            rate.
        loss_falls: whether the loss of a run that learns becomes less.
    """

    loraplus_lr_ratio: float | None = None
    loss_falls: bool = True
    _clock: tuple[float, int] | None = None
    """When the log's last entry was made, and how much was learned from by then."""
    _splits = False
    """Whether the processes of a run read the rows of each step together."""

    @property
    def _orders(self) -> bool:
        """Whether the order in which this trainer puts rows reaches the model."""
        return self.args.world_size <= 1 or self._splits

    # What is logged of the steps, and who takes them: the optimizer, in which order of rows.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the gradients of a micro-batch; see transformers' Trainer."""
        if self._clock is None:
            check_world(self.args.world_size)
            self._clock = time.perf_counter(), learned(self.model, self.args, self.state)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log; see transformers' Trainer."""
        if "loss" in logs and self._clock is not None:
            began, before = self._clock
            self._clock = now, seen = time.perf_counter(), learned(self.model, self.args, self.state)
            logs[f"{unit(self.model)}_per_second"] = round((seen - before) / max(now - began, 1e-9), 1)
            logs["peak_memory_gb"] = round(peak_memory() / 1e9, 3)
        super().log(logs, *args, **options)

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
        if not grouped or not self._orders or column not in getattr(rows, "column_names", ()):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(rows[column], self._train_batch_size * self.args.world_size, seed)

    # A model in parts: what transformers has for one that was sharded as it was loaded, and what it lacks.

    @staticmethod
    def _in_parts(model: Any) -> bool:
        return in_group() and is_in_parts(model)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self._in_parts(model):
            super()._move_model_to_device(model, device)

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm)
        return whole(found) if isinstance(found, Tensor) else found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        wanted = self.args.should_save
        with gathered_state(self.optimizer, wanted=wanted) if in_group() else contextlib.nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def close(self) -> None:
        """Give the model back as it was taken, where the trainer changed its forward; as a rule nothing."""

    # Checkpoints: which is the best, what is written, what can be read.

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this is the best evaluation so far; of two that tie, the one with the lower loss."""
        before, step = self.state.best_metric, self.state.best_global_step
        if super()._determine_best_metric(metrics, trial):
            return True
        name = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        history = [e for e in self.state.log_history if e["step"] == step and "eval_loss" in e]
        loss, best = metrics.get("eval_loss"), history[-1]["eval_loss"] if history else None
        if before is None or metrics.get(name) != before or loss is None or best is None or not loss < best:
            return False
        self.state.best_global_step = self.state.global_step
        return True

    def _save(self, *args: Any, **options: Any) -> None:
        """Write the model and the arguments, without the secrets among these."""
        hidden = {name: value for name, value in vars(self.args).items() if is_secret(name, value)}
        for name in hidden:
            setattr(self.args, name, None)
        try:
            super()._save(*args, **options)
        finally:
            for name, value in hidden.items():
                setattr(self.args, name, value)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint, "the optimizer's or the schedule's file"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and self.optimizer is not None:
                check_moments(self.optimizer)
                spread_state(self.optimizer)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        wait_for_all()  # the trainer's state, which says that a checkpoint is whole, comes after all of them

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint, "the file of random states"):
            super()._load_rng_state(checkpoint)
