"""The same where PEFT is not installed; test_trainers.py runs it in a process that cannot import it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dropin import training
from transformers import PreTrainedModel, trainer_utils

from lorica.peft import LoraConfig, PeftModelForCausalLM

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model = training.model()
    assert type(model) is PeftModelForCausalLM
    assert isinstance(model, PreTrainedModel)
    assert trainer_utils._is_peft_model(model)
    assert not trainer_utils._is_peft_model(model.get_base_model())
    base: Any = model.get_base_model()
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "other")
    assert model.active_adapters == ["other"]
    training.check_resumes(training.trainer, folder / "resume")
    training.check_ends_with_the_best(training.trainer, folder / "best")
