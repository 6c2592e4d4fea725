"""Arguments of another kind than is due: each is refused by name, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorica

X = torch.ones(2, 4)
NO_NAME = [3, 0.5, True, b"a", Path("a"), object(), ["a"], [], {"a": 1}, {"a"}, "\ud800", "a" * 5000]
NO_NAMES = [3, 0.5, True, b"a", Path("a"), object(), [None], [["a"]], ["a", 3], X, torch.tensor([0, 1])]
NO_PATH = [None, 3, 0.5, True, b"a", object(), ["a"], [], {"a": 1}, {"a"}, X, "\ud800", "a" * 5000]

Act = Callable[[Any, Any], Any]

CASES: dict[str, tuple[list[Any], Act]] = {
    "active": (NO_NAMES, lorica.active),
    "mixed": ([each for each in NO_NAMES if each != [None]], lorica.mixed),
    "merge": (NO_NAMES, lorica.merge),
    "delta_weight": (NO_NAMES, lambda model, given: lorica.delta_weight(model, "0", given)),
    "detach": (NO_NAME, lorica.detach),
    "switch": ([None, *NO_NAME], lorica.switch),
    "extract": (NO_NAME, lorica.extract),
    "save": (NO_NAME, lambda model, given: lorica.save(model, "saved", given)),
    "load_weights": (NO_NAME, lambda model, given: lorica.load_weights(model, "adapter", given)),
    "load": ([None, *NO_NAME[:-1]], lambda model, given: lorica.load(model, "adapter", given)),
    "a layer's path": ([None, *NO_NAME], lorica.delta_weight),
    "save to": (NO_PATH, lambda model, given: lorica.save(model, given, "a")),
    "load from": (NO_PATH, lambda model, given: lorica.load(model, given, "c")),
    "load_weights from": (NO_PATH, lambda model, given: lorica.load_weights(model, given, "a")),
    "read from": (NO_PATH, lambda _, given: lorica.read(given)),
    "is_adapter": (NO_PATH, lambda _, given: lorica.is_adapter(given)),
    "trainable": (
        [None, "yes", 1, X],
        lambda model, given: lorica.load(model, "adapter", "c", trainable=given),
    ),
    "seed": (
        ["1", 0.5, X, object()],
        lambda model, given: lorica.adapt(model, lorica.LoraConfig(target_modules=["0"]), "c", seed=given),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 4))
    for name in "ab":
        lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["0"]), name=name)
    lorica.save(model, "adapter", "a")
    before, keys = model(X), set(model.state_dict())
    values, act = CASES[case]
    for value in values:
        with pytest.raises(lorica.LoricaError):
            act(model, value)
        assert torch.equal(model(X), before), value
        assert set(model.state_dict()) == keys, value
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
