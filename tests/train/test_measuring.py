from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from lorica.train.trainer.measuring import learned, unit


@pytest.mark.parametrize(
    ("name", "counted", "amount"),
    [("input_ids", "tokens", 700), ("pixel_values", "samples", 60), ("input_features", "samples", 60)],
)
def test_what_is_counted(name: str, counted: str, amount: int) -> None:
    # 3 steps of 5 rows, 2 batches and 2 processes.
    args: Any = SimpleNamespace(train_batch_size=5, gradient_accumulation_steps=2, world_size=2)
    state = TrainerState(global_step=3, num_input_tokens_seen=700)
    model = SimpleNamespace(main_input_name=name)
    assert unit(model) == counted
    assert learned(model, args, state) == amount


def test_a_model_that_does_not_say_reads_tokens() -> None:
    assert unit(object()) == "tokens"
