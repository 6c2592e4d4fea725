"""LoRA-FA against its formula."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import Toy, shake, tokens

import lorica
from lorica.errors import ConfigError
from lorica.peft import LoraConfig, create_lorafa_optimizer, create_loraplus_optimizer, get_peft_model


def test_lorafa_keeps_a_and_corrects_the_gradient_of_b() -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["up"], modules_to_save=["head"])
    model = get_peft_model(Toy(), config)
    shake(model)
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=1e-2, weight_decay=0.1)
    model(tokens()).square().sum().backward()
    layers = lorica.extract(model, "default").factors
    grads = {n.split(".lora_")[0]: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    before = {path: (f.A.clone(), f.B.clone()) for path, f in layers.items()}
    head = model.get_submodule("base_model.model.head.modules_to_save.default")
    old_head = head.weight.detach().clone()  # type: ignore[operator]
    optimizer.step()
    for path, (A, B) in before.items():
        gradient = grads[f"base_model.model.{path}"]
        assert gradient is not None
        g = gradient.double() @ torch.linalg.inv(A.double() @ A.double().T) / 1.5**2
        # The first step of Adam: the means are the gradient's own.
        expected = (B.double() - 1e-2 * g / (g.abs() + 1e-6 / 0.001**0.5)) * (1 - 1e-3)
        assert torch.equal(layers[path].A, A)
        torch.testing.assert_close(layers[path].B.double(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(head.weight.detach(), old_head)  # type: ignore[operator,arg-type]
    again = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    own = [layer.A.data_ptr() for layer in layers.values()]
    assert [A.data_ptr() for A in again.param_groups[0]["downs"]] == own


def test_what_does_not_agree_with_the_adapter_is_refused() -> None:
    model = get_peft_model(Toy(), LoraConfig(r=2, lora_alpha=3, target_modules=["up"]))
    with pytest.raises(
        ConfigError, match=r"default: r=4 was passed to create_lorafa_optimizer, the adapter has 2"
    ):
        create_lorafa_optimizer(model, r=4, lora_alpha=3, lr=1e-2)
    model.set_requires_grad("default", False)
    with pytest.raises(ConfigError, match="no B of the model trains"):
        create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=1e-2)
    with pytest.raises(ConfigError, match="no parameter of the model trains"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=2)
