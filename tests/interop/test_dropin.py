"""One script, run with `peft` and with `lorica.peft`: the same results, the same keys, the same text."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dropin_scripts import CLASSIFIER, SCRIPTS, Script, build
from tiny import transformer
from torch import Tensor

import lorica.peft

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")

# PEFT warns of its own future, and of what the scripts below do on purpose.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_same_with_either(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, texts = [], []
    for p in (peft, lorica.peft):
        folder = tmp_path / p.__name__
        folder.mkdir()
        torch.manual_seed(0)
        results.append(script(p, folder))
        texts.append(capsys.readouterr().out)
    theirs, ours = results
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        same(ours[key], expected, key)
    assert texts[0] == texts[1]


def same(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, Tensor):
        assert ours.shape == theirs.shape, where
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6, msg=lambda text: f"{where}: {text}")
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            same(ours[key], theirs[key], f"{where}, {key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), f"{where}: {ours}, {theirs}"
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            same(one, other, f"{where}[{i}]")
    else:
        assert ours == theirs, where


def test_isinstance_says_yes_to_pefts_classes() -> None:
    model = build(lorica.peft, "bert-classifier", **CLASSIFIER)
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    assert not isinstance(model, peft.PeftModelForCausalLM)
    assert type(model) is lorica.peft.PeftModelForSequenceClassification
    assert type(model).__name__ == model.__class__.__name__


def test_a_configuration_of_pefts_own_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(lorica.LoricaError, match=r"lorica\.peft"):
            lorica.peft.get_peft_model(transformer("bert"), peft.LoraConfig())
