"""How a trainer evaluates: rows beside outputs, and losses averaged over target tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

if TYPE_CHECKING:
    from datasets import Dataset

    _Base = transformers.Trainer
else:
    _Base = object


class EvaluationMixin(_Base):
    """Gives metrics the rows they score, and the loss of token labels as a mean over all targets.

    transformers averages the loss over rows, each with the mean of its batch, so it moves with the batch
    size wherever rows have unlike numbers of targets.
    Where only the loss is computed, its exponential is reported beside it as ``perplexity``.

    Args:
        *args: as the trainer takes them.
        score: function of the outputs and the encoded rows, with all their columns, that returns metrics.
        **options: as the trainer takes them.
    """

    def __init__(
        self,
        *args: Any,
        score: Callable[[EvalPrediction, Dataset], dict[str, float]] | None = None,
        **options: Any,
    ) -> None:
        """Keep the function."""
        self._rows: Any = None
        self._targets: list[Tensor] = []
        if score is not None:
            options["compute_metrics"] = lambda outcome: score(outcome, self._rows)
        super().__init__(*args, **options)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> dict[str, float]:
        """Evaluate on rows; see transformers' Trainer."""
        self._rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().evaluate(eval_dataset, *args, **options)

    def predict(self, test_dataset: Any, *args: Any, **options: Any) -> Any:
        """Predict for rows; see transformers' Trainer."""
        self._rows = test_dataset
        return super().predict(test_dataset, *args, **options)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        # In the order of the rows: transformers shuffles them by length, and metrics that look at both rows
        # and outputs would pair the wrong ones.
        if self.args.world_size <= 1:
            return torch.utils.data.SequentialSampler(eval_dataset)
        return None

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **options: Any
    ) -> Any:
        """A step of evaluation, whose targets are counted."""
        found = super().prediction_step(model, inputs, prediction_loss_only, *args, **options)
        labels = inputs.get("labels")
        if found[0] is not None and _are_tokens(labels):
            # A model that predicts the next token has no target in a row's first place.
            shifted = labels[:, 1:] if self._loss_shifts_labels else labels
            count = shifted.ne(-100).sum().to(found[0].device, torch.float64)
            total = found[0].double() * count if count else count
            self._targets.append(torch.stack([total, count]))
        return found

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Evaluate; see transformers' Trainer."""
        self._targets = []
        found = super().evaluation_loop(*args, **options)
        if self._targets and found.metrics is not None:
            gathered = self.accelerator.gather(torch.stack(self._targets).sum(0, keepdim=True).float())
            assert isinstance(gathered, Tensor)
            # On one process nothing is gathered, and no digit lost.
            sums = torch.stack(self._targets).sum(0) if len(gathered) == 1 else gathered.double().sum(0)
            loss = float(sums[0] / sums[1]) if sums[1] else math.nan
            name = next((key for key in found.metrics if key.endswith("_loss")), None)
            if name is not None:
                found.metrics[name] = loss
                if self.args.prediction_loss_only:
                    # Past 700 the exponential has no float.
                    found.metrics[name.removesuffix("loss") + "perplexity"] = math.exp(min(loss, 700.0))
        self._targets = []
        return found


def _are_tokens(labels: Any) -> bool:
    return isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
