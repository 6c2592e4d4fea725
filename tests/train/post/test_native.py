"""TRL's own trainers beside PEFT: the same start, rows and seed give the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import transformer
from train import tiny

import lorica
from lorica.errors import StateError
from lorica.train import teach_trl

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and TRL warn of their own future

trl: Any = pytest.importorskip("trl", reason="needs TRL: pip install 'lorica[post]'")

CONFIG = lorica.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
PAIR = {"prompt": "lovely film", "chosen": " great story", "rejected": " poor plot"}
PAIRS = [
    PAIR,
    {**PAIR, "chosen": " warm voice"},
    {**PAIR, "prompt": "dull", "rejected": " cold cast song"},
] * 4
UNPAIRED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
TEXTS = [{"text": f"{pair['prompt']}{pair['chosen']}"} for pair in PAIRS]
PROMPTS = [{"prompt": pair["prompt"]} for pair in PAIRS]

GROUP = {"num_generations": 2, "max_completion_length": 4, "disable_dropout": True, "beta": 0.1}

KINDS: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "sft": ("SFT", TEXTS, {"max_length": 16}),
    "dpo": ("DPO", PAIRS, {"max_length": 16}),
    "dpo, precomputed": ("DPO", PAIRS, {"max_length": 16, "precompute_ref_log_probs": True}),
    "ipo": ("DPO", PAIRS, {"max_length": 16, "loss_type": "ipo"}),
    "kto": ("KTO", UNPAIRED, {"max_length": 16}),
    "reward": ("Reward", PAIRS, {"max_length": 16}),
    "grpo": ("GRPO", PROMPTS, GROUP),
    "rloo": ("RLOO", PROMPTS, GROUP),
}


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def base(kind: str) -> Any:
    if kind == "reward":
        return transformer("llama-classifier", num_labels=1)
    return transformer("llama")


def config(kind: str) -> lorica.LoraConfig:
    return CONFIG.replace(task_type="SEQ_CLS") if kind == "reward" else CONFIG


def trainer(kind: str, folder: Path, model: Any, **more: Any) -> Any:
    name, rows, own = KINDS[kind]
    tokenizer: Any = tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    rewards = {"reward_funcs": lengths} if kind in ("grpo", "rloo") else {}
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(**values | own),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **rewards,
        **more,
    )


def numbers(run: Any) -> list[dict[str, float]]:
    timed = ("runtime", "_per_second", "step_time")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timed) and name != "total_flos"}
        for entry in run.state.log_history
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_logged_number_is_pefts(kind: str, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    start = base(kind)
    lorica.adapt(start, config(kind).replace(init_lora_weights=False), seed=1)
    folder = lorica.save(start, tmp_path / "start")
    theirs = trainer(
        kind, tmp_path / "theirs", peft.PeftModel.from_pretrained(base(kind), folder, is_trainable=True)
    )
    theirs.train()
    theirs.model.save_pretrained(tmp_path / "theirs")
    ours = trainer(kind, tmp_path / "ours", lorica.load(base(kind), folder, trainable=True))
    ours.train()
    lorica.save(ours.model, tmp_path / "ours")
    assert len(numbers(ours)) == len(numbers(theirs)) == 4
    for one, other in zip(numbers(ours), numbers(theirs), strict=True):
        assert one == pytest.approx(other, abs=2e-5), one.keys() ^ other.keys()
    found, expected = (load_file(tmp_path / of / "adapter_model.safetensors") for of in ("ours", "theirs"))
    moved = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    assert any(not torch.equal(found[name], moved[name]) for name in found)


def test_a_configuration_is_taken_where_pefts_is(tmp_path: Path) -> None:
    teach_trl()
    model = base("dpo")
    run = trainer("dpo", tmp_path, model, peft_config=CONFIG)
    assert run.model is model
    assert lorica.adapters(model) == {"default": CONFIG}
    run.train()
    assert run.state.log_history[0]["rewards/margins"] == 0
    lorica.detach(model)
    again = trainer("dpo", tmp_path, base("dpo"), peft_config=CONFIG)
    again.train()
    assert numbers(again) == numbers(run)


def test_pefts_configuration_is_not_put_around_an_adapter(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    model = lorica.adapt(base("dpo"), CONFIG, "mine")
    with pytest.raises(StateError, match=r"lorica's adapters 'mine' already, .* leave out peft_config"):
        trainer("dpo", tmp_path, model, peft_config=peft.LoraConfig(target_modules=["q_proj"]))
    untouched = trainer("dpo", tmp_path, base("dpo"), peft_config=peft.LoraConfig(target_modules=["q_proj"]))
    assert isinstance(untouched.model, peft.PeftModel)
