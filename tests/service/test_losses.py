"""Each loss against ten lines of plain arithmetic in float64: values, log-probabilities and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from service.causal_models import CONTEXT, VOCABULARY, gpt2, llama
from torch import Tensor, nn

import lorica
from lorica.service import Client, Datum
from lorica.service.errors import UserError


def plain(name: str, logp: Tensor, d: dict[str, Tensor], low: float, high: float, beta: float) -> Tensor:
    """The loss as it is written down."""
    w = d.get("weights", torch.ones_like(logp))
    if name == "cross_entropy":
        return -(logp * w).sum()
    ratio, A = torch.exp(logp - d["logprobs"]), d["advantages"]
    if name == "importance_sampling":
        return -(ratio * A).sum()
    if name == "ppo":
        return -torch.min(ratio * A, ratio.clamp(low, high) * A).sum()
    if name == "cispo":
        return -(ratio.clamp(low, high).detach() * logp * A).sum()
    return -(logp * A - 0.5 * beta * (logp - d["logprobs"]) ** 2).sum()


def sequences(name: str, k: int | None) -> list[dict[str, Tensor]]:
    """Of several lengths, some tokens without weight, ratios on both sides of the clip."""
    random = torch.Generator().manual_seed(3)
    found = []
    for n in (1, 5, 17):
        shape = (n,) if k is None else (n, k)
        d = {
            "tokens": torch.randint(0, VOCABULARY, (n,), generator=random),
            "target_tokens": torch.randint(0, VOCABULARY, shape, generator=random),
        }
        if name == "cross_entropy":
            d["weights"] = torch.randn(shape, generator=random) * (torch.rand(shape, generator=random) > 0.3)
        else:
            d["logprobs"] = -4.5 + torch.randn(shape, generator=random) * 0.4
            d["advantages"] = torch.randn(shape, generator=random).round()
        found.append(d)
    return found


def reference(
    model: nn.Module, adapter: lorica.Adapter, data: list, loss: Callable
) -> tuple[Tensor, list, dict]:
    """The loss of a plainly adapted model, and A's and B's gradients by path."""
    lorica.attach(model, adapter, trainable=True)
    total, logps = torch.zeros((), dtype=torch.float64), []
    for d in data:
        logits = model(input_ids=d["tokens"][None]).logits[0]
        target = d["target_tokens"].reshape(len(d["tokens"]), -1)
        logp = logits.log_softmax(-1).gather(1, target).reshape(d["target_tokens"].shape)
        logps.append(logp.detach())
        total = total + loss(logp, {name: t.double() for name, t in d.items()})
    total.backward()
    live = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return total, logps, live


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
def test_equal_to_plain_arithmetic(name: str, k: int | None) -> None:
    build = gpt2 if name == "ppo" else llama
    config = {"ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1}, "dro": {"beta": 0.3}}.get(
        name, {}
    )
    data = sequences(name, k)
    with Client(build().double()) as client:
        run = client.create(4, seed=1)
        # Where B is zero A's gradient would be: move first.
        run.forward_backward([Datum.of(**d) for d in sequences("cross_entropy", None)], "cross_entropy")
        run.optim_step(learning_rate=0.02)
        adapter = run.adapter().result()
        out = run.forward_backward([Datum.of(**d) for d in data], name, config).result()
        gradient = run.gradient().result()
    bounds = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "beta": 0.05, **config}
    total, logps, live = reference(
        build().double(),
        adapter,
        data,
        lambda logp, d: plain(
            name, logp, d, bounds["clip_low_threshold"], bounds["clip_high_threshold"], bounds["beta"]
        ),
    )
    assert out.loss == pytest.approx(float(total.detach()), rel=1e-6)
    for got, want in zip(out.logprobs, logps, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert len(gradient) * 2 == len(live)
    for path, (dA, dB) in gradient.items():
        want = live[f"{path}.lora_A.default.weight"].float()
        torch.testing.assert_close(dA, want, rtol=1e-5, atol=1e-6)
        want = live[f"{path}.lora_B.default.weight"].float()
        torch.testing.assert_close(dB, want, rtol=1e-5, atol=1e-6)
        assert dA.abs().max() > 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_targets_are_the_dense_ones() -> None:
    target = torch.tensor([[4, 0], [7, 9], [0, 0]])
    weights = torch.tensor([[0.5, 0.0], [0.25, 0.75], [0.0, 0.0]])
    with Client(llama()) as client:
        run = client.create(2, seed=0)
        dense = run.forward([Datum.of([1, 2, 3], target_tokens=target, weights=weights)], "cross_entropy")
        sparse = {"target_tokens": target.to_sparse_csr(), "weights": weights.to_sparse_csr()}
        thin = run.forward([Datum.of([1, 2, 3], **sparse)], "cross_entropy")
        assert thin.result().loss == dense.result().loss != 0


@pytest.mark.parametrize(
    ("change", "loss", "config", "says"),
    [
        ({"tokens": []}, "cross_entropy", {}, "0 tokens"),
        ({"tokens": [1] * (CONTEXT + 1)}, "cross_entropy", {}, f"1 to {CONTEXT}"),
        ({"tokens": [1, VOCABULARY, 2]}, "cross_entropy", {}, f"token {VOCABULARY}"),
        ({"target_tokens": [1, -1, 2]}, "cross_entropy", {}, "token -1"),
        ({"target_tokens": [1, 2]}, "cross_entropy", {}, r"\(3,\)"),
        ({"weights": [1.0, float("nan"), 0.0]}, "cross_entropy", {}, "weights holds NaN"),
        ({"weights": [1.0]}, "cross_entropy", {}, "shape of target_tokens"),
        ({"rewards": [1.0, 1.0, 1.0]}, "cross_entropy", {}, "rewards"),
        ({}, "ppo", {}, "needs loss_fn_inputs"),
        ({}, "gspo", {}, "'gspo' is not carried"),
        ({}, "cross_entropy", {"beta": 1.0}, "no settings"),
    ],
)
def test_wrong_data_is_named(change: dict, loss: str, config: dict, says: str) -> None:
    given = {"tokens": [1, 2, 3], "target_tokens": [2, 3, 4], **change}
    with Client(llama()) as client:
        run = client.create(2, seed=0)
        with pytest.raises(UserError, match=says):
            run.forward_backward([Datum.of(**given)], loss, config)
