"""LoRA-FA: A stays frozen at its start, and B's gradient is corrected for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lorica.errors import ConfigError
from lorica.layers import lora_layers
from lorica.state import adapted

_RIDGE = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW whose gradient of B is ``(1/s²)·G·(A·Aᵀ)⁻¹``.

    Of all gradients of B this one moves ``s·B·A`` closest to where full fine-tuning would.

    Args:
        params: groups of parameters. In a group with "downs" and "scales", each parameter is a B, with its A
            (r, d_in) and scale at the same index there; other groups are trained by plain AdamW.
        lr: learning rate.
        betas: decay of the running means of gradient and squared gradient.
        eps: added to the root of the latter.
        weight_decay: decay of weights, times `lr`.
        correct_bias: whether to correct the means for their start at zero.

    Raises:
        ConfigError: a value is out of range.

    Source: LoRA-FA (Zhang et al., 2023).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"lr={lr} and eps={eps} must be at least 0 and betas={betas} in [0, 1)")
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "correct_bias": correct_bias, "downs": None, "scales": None})

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, without A and the scales, which belong to the model."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group.update(downs=None, scales=None)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state; A and the scales stay the model's."""
        own = [(group["downs"], group["scales"]) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, (downs, scales) in zip(self.param_groups, own, strict=True):
            group.update(downs=downs, scales=scales)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss anew.

        Returns:
            The closure's loss; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["downs"] is not None:
                    gradient = corrected(gradient, group["downs"][i], group["scales"][i])
                self._update(parameter, gradient, group)
        return loss

    def _update(self, parameter: Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def corrected(gradient: Tensor, A: Tensor, scale: float) -> Tensor:
    """The gradient of B (d_out, r) by which ``s·B·A`` moves closest to the gradient of the weight."""
    r = A.shape[0]
    A = A.flatten(1).float()
    gram = A @ A.T + _RIDGE * torch.eye(r, device=A.device)
    update = gradient.flatten(1).float() @ torch.linalg.pinv(gram, hermitian=True) / scale**2
    return update.view_as(gradient).to(gradient.dtype)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freeze every A and train the rest by LoRA-FA.

    Args:
        model: adapted model; adapted embeddings are left out, for B's gradient there has no correction by A.
        r: rank; must equal the configuration's. Each layer's own scale is used.
        lora_alpha: α; must equal the configuration's.
        lr: learning rate.
        weight_decay: of AdamW.
        use_rslora: if given, must equal the configuration's.

    Returns:
        The optimizer.

    Raises:
        ConfigError: r, α or `use_rslora` differ from the active adapters', or nothing is left to train.
        StateError: the model carries no adapter.
    """
    root, state = adapted(model)
    for name in state.active:
        config = state.configs[name]
        given = {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora}
        wrong = [
            f"{key}={value} was passed to create_lorafa_optimizer, the adapter has {getattr(config, key)}"
            for key, value in given.items()
            if value is not None and getattr(config, key) != value
        ]
        if wrong:
            raise ConfigError(f"{name}: {'; '.join(wrong)}")
    ups, downs, scales = [], [], []
    for layer in lora_layers(root).values():
        for name in state.active:
            if name in layer.scaling and layer.kind != "embedding":
                A, B = layer.factor_parameters(name)
                A.requires_grad_(False)
                if B.requires_grad:
                    ups.append(B)
                    downs.append(A)
                    scales.append(layer.scaling[name])
    corrected_ones = {id(B) for B in ups}
    rest = [p for p in root.parameters() if p.requires_grad and id(p) not in corrected_ones]
    if not ups:
        raise ConfigError("no B of the model trains; LoRA-FA has nothing to do")
    groups = [{"params": ups, "downs": downs, "scales": scales}, *([{"params": rest}] if rest else [])]
    return LoraFAOptimizer(groups, lr=lr, weight_decay=weight_decay)
