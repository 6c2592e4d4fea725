"""transformers' Trainer and TRL's, unchanged, with wrapped models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from dropin import training
from tiny import transformer
from train import tiny

import lorica
from lorica.errors import AdapterError, ConfigError, StateError
from lorica.peft import LoraConfig, PeftModelForCausalLM, get_peft_model

# transformers and TRL warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_transformers_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    training.check_resumes(training.trainer, tmp_path)


def test_transformers_trainer_ends_with_the_best(tmp_path: Path) -> None:
    training.check_ends_with_the_best(training.trainer, tmp_path)


def test_both_hold_where_peft_is_not_installed(tmp_path: Path) -> None:
    program = Path(__file__).with_name("without_peft.py")
    hide = "import runpy, sys; sys.modules['peft'] = None; "
    hide += "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", hide, program, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def sft(folder: Path, model: Any = None, peft_config: Any = None, **more: Any) -> Any:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install 'lorica[peers]'")
    values = training.options(folder, **more) | {"max_length": 8, "bf16": False}
    return trl.SFTTrainer(
        model=training.model() if model is None else model,
        args=trl.SFTConfig(**values),
        train_dataset=training.rows(),
        eval_dataset=training.rows(8),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def test_trls_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    training.check_resumes(sft, tmp_path)


def test_trls_trainer_ends_with_the_best(tmp_path: Path) -> None:
    training.check_ends_with_the_best(sft, tmp_path)


def test_trls_trainer_adapts_by_a_configuration(tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    _ = trl.SFTTrainer  # imported before the configuration is made, as scripts do
    base = transformer("llama")
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = sft(tmp_path, base, peft_config=config)
    assert type(run.model) is PeftModelForCausalLM
    assert run.model.get_base_model() is base
    run.train()
    trained = training.weights(tmp_path / "checkpoint-8")
    assert all(tensor.abs().sum() > 0 for tensor in trained.values())
    assert not (tmp_path / "checkpoint-8" / "model.safetensors").exists()
    lorica.detach(base)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name])


def test_dpo_adapts_by_a_configuration_and_compares_with_the_base(tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    kind, tokenizer = trl.DPOTrainer, tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    values = training.options(tmp_path, max_steps=1) | {"max_length": 12, "bf16": False}
    pair = {"prompt": "lovely film", "chosen": " great story", "rejected": " poor plot"}
    run = kind(
        model=transformer("llama"),
        args=trl.DPOConfig(**values),
        train_dataset=Dataset.from_list([pair] * 8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    assert list(run.model.peft_config) == ["default"]
    run.train()
    assert run.state.log_history[0]["rewards/margins"] == 0  # the adapter starts at the base


def test_transformers_models_take_adapters_by_their_own_methods(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = transformer("llama").eval()
    x = torch.arange(3, 11)[None]
    base = model(x).logits.detach()
    model.add_adapter(config)
    one = model(x).logits.detach()
    assert not torch.allclose(one, base)
    assert model.active_adapters() == ["default"]
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(config)
    model.add_adapter(config, "two")
    two = model(x).logits.detach()
    assert not torch.allclose(two, one)
    model.disable_adapters()
    torch.testing.assert_close(model(x).logits, base, rtol=0, atol=0)
    model.enable_adapters()
    torch.testing.assert_close(model(x).logits, two, rtol=0, atol=0)
    model.set_adapter("default")
    torch.testing.assert_close(model(x).logits, one, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    model.delete_adapter("two")
    assert model.get_adapter_state_dict().keys() == model.get_adapter_state_dict("default").keys() != set()
    with pytest.raises(AdapterError, match="no adapter is named 'two'"):
        model.delete_adapter(["default", "two"])
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    torch.testing.assert_close(model(x).logits, one, rtol=0, atol=0)


def test_pefts_own_configuration_does_not_reach_a_model_that_is_adapted_here() -> None:
    peft: Any = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model: Any = transformer("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"must be a LoraConfig of lorica\.peft"):
        model.add_adapter(config, "theirs")
    theirs: Any = transformer("llama")
    theirs.add_adapter(config)
    assert type(theirs.model.layers[0].self_attn.q_proj).__module__.startswith("peft.")


def test_an_adapted_head_that_trl_would_read_past_is_refused(tmp_path: Path) -> None:
    model = training.model(target_modules=["q_proj", "lm_head"])
    with pytest.raises(StateError, match=r"lm_head.*leave 'lm_head' out of target_modules"):
        sft(tmp_path, model).train()


def test_a_head_trained_whole_is_what_trl_reads(tmp_path: Path) -> None:
    model = training.model(modules_to_save=["lm_head"])
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    frozen, trained = head._parameters["weight"].clone(), head.modules_to_save["default"].weight.clone()
    sft(tmp_path, model, max_steps=1).train()
    assert torch.equal(head._parameters["weight"], frozen)
    assert not torch.equal(head.modules_to_save["default"].weight, trained)
    lorica.mixed(model, ["default"])
    with pytest.raises(StateError, match=r"lm_head carries an adapter"):
        model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]]), fused_lm_head=True)


def test_so_is_that_of_a_model_without_a_wrapper(tmp_path: Path) -> None:
    base = transformer("llama")
    model = lorica.adapt(base, lorica.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(StateError, match=r"lm_head.*leave 'lm_head' out of target_modules"):
        sft(tmp_path, model).train()
    lorica.detach(model)
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs


def test_transformers_trainer_trains_an_adapted_head(tmp_path: Path) -> None:
    run = training.trainer(tmp_path, max_steps=1)
    run.model = run.model_wrapped = model = training.model(target_modules=["lm_head"])
    run.train()
    head: Any = model.get_submodule("base_model.model.lm_head")
    assert head.lora_B.default.weight.abs().sum() > 0


def test_recomputed_activations_give_the_same_gradients() -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        base = transformer("llama").train()
        if recompute:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model(input_ids=torch.arange(3, 11)[None], labels=torch.arange(3, 11)[None]).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 0
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other)
