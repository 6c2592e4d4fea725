"""How a trainer evaluates: by length, rows beside their outputs, and losses averaged over target tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

if TYPE_CHECKING:
    from datasets import Dataset


if TYPE_CHECKING:
    from datasets import Dataset

    _Base = transformers.Trainer
else:
    _Base = object


class EvaluationMixin(_Base):
    """Gives metrics the rows they score, and the loss of token labels as a mean over all targets.

    Rows are read longest first where a column says how long they are, which saves padding; outputs stand
    beside their rows all the same.
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
        self._order: list[int] | None = None
        self._targets: list[Tensor] = []
        if score is not None:
            options["compute_metrics"] = lambda outcome: _scored(
                score, self._beside_rows(outcome), self._rows
            )
        super().__init__(*args, **options)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> dict[str, float]:
        """Evaluate on rows; see transformers' Trainer."""
        self._look_at(self.eval_dataset if eval_dataset is None else eval_dataset)
        return super().evaluate(eval_dataset, *args, **options)

    def predict(self, test_dataset: Any, *args: Any, **options: Any) -> Any:
        """Predict for rows; see transformers' Trainer."""
        self._look_at(test_dataset)
        return super().predict(test_dataset, *args, **options)

    def _look_at(self, rows: Any) -> None:
        """Keep the rows, and the order in which they are read if that is not their own."""
        self._rows, self._order = rows, None
        column = self.args.length_column_name
        if self.args.world_size <= 1 and column in getattr(rows, "column_names", ()):
            lengths = rows[column][:]
            self._order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        # transformers' own order by length is drawn at random, so outputs could not be put beside their rows.
        if self.args.world_size > 1:
            return None
        own = torch.utils.data.SequentialSampler(eval_dataset)
        return own if self._order is None else cast(torch.utils.data.Sampler, self._order)

    def _beside_rows(self, outcome: EvalPrediction) -> EvalPrediction:
        """Outputs and labels in the rows' own order."""
        parts = (outcome.predictions, outcome.label_ids, outcome.inputs, outcome.losses)
        return EvalPrediction(*(back_in_order(part, self._order) for part in parts))

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
        return found._replace(
            predictions=back_in_order(found.predictions, self._order),
            label_ids=back_in_order(found.label_ids, self._order),
        )


def _scored(
    score: Callable[[EvalPrediction, Dataset], dict[str, float]], outcome: EvalPrediction, rows: Dataset
) -> dict[str, float]:
    """The metrics; none is a number where the model has diverged, whatever class its NaNs would stand for."""
    given = outcome.predictions
    parts = given if isinstance(given, tuple) else (given,)
    if not any(_diverged(part) for part in parts):
        return score(outcome, rows)
    numbers: Any = tuple(np.nan_to_num(p) if _diverged(p) else p for p in parts)
    outcome.predictions = numbers if isinstance(given, tuple) else numbers[0]
    return dict.fromkeys(score(outcome, rows), math.nan)


def _diverged(part: Any) -> bool:
    # Models write -inf for what is out of the question.
    return isinstance(part, np.ndarray) and part.dtype.kind == "f" and not (part < np.inf).all()


def back_in_order(read: Any, order: Sequence[int] | None) -> Any:
    """Put what was read in another order back in its own.

    Args:
        read: arrays (rows, ...), also in tuples and dictionaries; None stays None.
        order: places of the rows in the order in which they were read; None is their own.
    """
    if read is None or order is None:
        return read
    if isinstance(read, Mapping):
        return {name: back_in_order(value, order) for name, value in read.items()}
    if isinstance(read, (list, tuple)):
        return tuple(back_in_order(value, order) for value in read)
    return read[np.argsort(order)]


def _are_tokens(labels: Any) -> bool:
    return isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
