from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
from lorica.train.trainer.deferred import DeferredLogits, deferred_logits

CHUNK = 4


class Watched:
    """A head deferred in small chunks, with a record of what made it compute."""

    def __init__(self, head: nn.Module) -> None:
        self.whole: list[str] = []
        self.context = deferred_logits(head, chunk=CHUNK, on_whole=self.whole.append)


def causal(name: str, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    small = {**tiny._SMALL, **tiny._TEXT, **tiny._LENGTH, **settings}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**small)
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


def rows() -> dict[str, Tensor]:
    ids = torch.randint(3, tiny.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :5] = labels[1, 7:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**{**rows(), **inputs}).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: Any, tolerance: float = 1e-5, **inputs: Any) -> list[str]:
    loss, expected = step(model, **inputs)
    watched = Watched(model.get_output_embeddings())
    with watched.context:
        own, found = step(model, **inputs)
    torch.testing.assert_close(own, loss, rtol=1e-6, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance)
    return watched.whole


SCALED = {
    "Llama": {},
    "Gemma2": {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 2.0},
    "Cohere": {"num_key_value_heads": 2, "logit_scale": 3.0},
    "Granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
    "RecurrentGemma": {
        "num_hidden_layers": 3,
        "lru_width": 16,
        "attention_window_size": 8,
        "logits_soft_cap": 2.0,
    },
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("tied", [False, True])
def test_architectures(name: str, tied: bool) -> None:
    model = causal(name, **SCALED[name], tie_word_embeddings=tied)
    assert assert_same_step(model) == []


def test_softcap_matters() -> None:
    hot = causal("Gemma2", **SCALED["Gemma2"])
    nn.init.normal_(hot.lm_head.weight, std=3.0)
    assert assert_same_step(hot, 1e-4) == []


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-masked", "t5"])
def test_other_losses(name: str) -> None:
    model = tiny.transformer(name)
    inputs: dict[str, Any] = {"attention_mask": None} if name == "t5" else {}
    assert assert_same_step(model, **inputs) == []


def test_bias_in_the_head() -> None:
    model = causal("Llama")
    model.lm_head = nn.Linear(16, tiny.VOCABULARY)
    assert assert_same_step(model) == []


def test_count_of_the_window() -> None:
    assert assert_same_step(causal("Llama"), num_items_in_batch=torch.tensor(50)) == []


def test_auxiliary_loss_of_experts() -> None:
    settings = {"num_local_experts": 2, "num_key_value_heads": 2, "output_router_logits": True}
    assert assert_same_step(causal("Mixtral", **settings)) == []


CONFIGS = {
    "trunk": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapted(config: dict[str, Any]) -> None:
    model = causal("Llama")
    tiny.adapted(model, lorica.LoraConfig(r=2, **config))
    assert assert_same_step(model) == []
    gradients = step(model)[1]
    assert any("lm_head" in name for name in gradients) == (config != CONFIGS["trunk"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_trained_whole_beside_a_base_in_half_precision(dtype: torch.dtype) -> None:
    model = causal("Llama").to(dtype)
    fields: dict[str, Any] = CONFIGS["head trained whole"]
    tiny.adapted(model, lorica.LoraConfig(r=2, **fields))
    loss, gradients = step(model)
    with deferred_logits(model.lm_head, chunk=CHUNK):
        found, chunked = step(model)
    torch.testing.assert_close(found, loss, rtol=1e-2, atol=1e-2)
    name = next(name for name in gradients if "lm_head" in name)
    assert chunked[name].dtype == torch.float32
    difference = (chunked[name] - gradients[name]).norm() / gradients[name].norm()
    assert difference < 3e-2


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_head_that_shares_its_update_with_the_embedding(field: str) -> None:
    model = causal("Llama", tie_word_embeddings=True)
    settings: dict[str, Any] = {"target_modules": ["q_proj"]} | {field: ["lm_head"]}
    tiny.adapted(model, lorica.LoraConfig(r=2, ensure_weight_tying=True, **settings))
    assert assert_same_step(model) == []
    assert any("embed_tokens" in name for name in step(model)[1])


def test_adapter_of_the_head_acts() -> None:
    model = causal("Llama")
    plain = step(model)[0]
    tiny.adapted(model, lorica.LoraConfig(r=2, target_modules=["lm_head"]))
    with deferred_logits(model.lm_head, chunk=CHUNK):
        assert not torch.isclose(step(model)[0], plain)


def test_dropout_before_the_heads_adapter() -> None:
    model = causal("Llama")
    tiny.adapted(model, lorica.LoraConfig(r=2, lora_dropout=0.5, target_modules=["lm_head"]))
    watched = Watched(model.lm_head)
    with watched.context:
        losses = {step(model)[0].item() for _ in range(3)}
    assert len(losses) == 3
    assert watched.whole == []


def test_rows_with_adapters_of_their_own() -> None:
    model = causal("Llama")
    for name in ("a", "b"):
        tiny.adapted(model, lorica.LoraConfig(r=2, target_modules=["lm_head"]), name)
    with lorica.mixed(model, ["a", None, "b"]):
        plain = model(**rows())
        with deferred_logits(model.lm_head, chunk=CHUNK):
            out = model(**rows())
    assert not isinstance(out.logits, DeferredLogits)
    torch.testing.assert_close(out.loss, plain.loss)


def test_autocast_trains_the_head() -> None:
    model = causal("Llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert assert_same_step(model, 1e-2) == []


def test_logits_of_all_tokens_never_exist() -> None:
    model, sizes = causal("Llama"), []
    model.lm_head.forward = lambda x: sizes.append(x[..., 0].numel()) or F.linear(x, model.lm_head.weight)
    before = model.lm_head.forward
    with deferred_logits(model.lm_head, chunk=CHUNK):
        loss, _ = step(model)
    assert loss.isfinite()
    assert max(sizes) == CHUNK
    # Three rows of eight predictions, less those whose label is ignored.
    assert sum(sizes) == 24 - 6
    assert model.lm_head.forward is before


def test_undone_on_exit() -> None:
    model = causal("Llama")
    with deferred_logits(model.lm_head):
        assert isinstance(model(**rows()).logits, DeferredLogits)
    with pytest.raises(IndexError), deferred_logits(model.lm_head):
        model(**{**rows(), "labels": rows()["labels"] + tiny.VOCABULARY + 200})
    assert "forward" not in vars(model.lm_head)
    assert not isinstance(model(**rows()).logits, DeferredLogits)


def deferred(
    head: nn.Module | None = None, hidden: Tensor | None = None
) -> tuple[DeferredLogits, Tensor, list[str]]:
    """Deferred logits (2, 3, 5), the same computed, and the record."""
    head = nn.Linear(4, 5) if head is None else head
    hidden = torch.randn(2, 3, 4) if hidden is None else hidden
    plain = head(hidden)
    watched = Watched(head)
    with watched.context:
        logits = head(hidden)
    assert isinstance(logits, DeferredLogits)
    return logits, plain, watched.whole


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float64),
    "scale": lambda x: 2 * (x / 3) * torch.tensor(0.5),
    "softcap": lambda x: torch.tanh(x / 2) * 2,
    "shift": lambda x: x[..., :-1, :].contiguous(),
    "rows": lambda x: x[1:],
    "ellipsis last": lambda x: x[:, 1:, ...],
    "flat": lambda x: x.view(-1, 5),
    "flat, by size": lambda x: x.reshape(6, -1),
    "shape as one": lambda x: x.view((3, 2, 5)),
    "twice": lambda x: (x[:, :-1] / 2).float().view(-1, x.size(-1)),
}
COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "part of the vocabulary": lambda x: x[..., :3],
    "one row": lambda x: x[0],
    "mask": lambda x: x[torch.tensor([True, False])],
    "more than one number": lambda x: x * torch.arange(5),
    "a parameter": lambda x: x * nn.Parameter(torch.tensor(2.0)),
    "other shape": lambda x: x.view(-1, 15),
    "added to": lambda x: torch.ones(5) + x,
    "joined": lambda x: torch.cat([x, x]),
    "detached": lambda x: x.detach(),
    "no reduction": lambda x: F.cross_entropy(
        x.view(-1, 5), torch.zeros(6, dtype=torch.long), reduction="none"
    ),
    "weights": lambda x: F.cross_entropy(
        x.view(-1, 5), torch.zeros(6, dtype=torch.long), weight=torch.ones(5)
    ),
    "probabilities": lambda x: F.cross_entropy(x.view(-1, 5), torch.full((6, 5), 0.2)),
}


@pytest.mark.parametrize("operation", KEPT.values(), ids=KEPT)
def test_remembered(operation: Callable[[Tensor], Tensor]) -> None:
    logits, plain, whole = deferred()
    found, expected = operation(logits), operation(plain)
    assert isinstance(found, DeferredLogits)
    assert whole == []
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert (found.ndim, len(found), found.numel()) == (expected.ndim, len(expected), expected.numel())
    torch.testing.assert_close(found + torch.zeros(1), expected)
    assert whole == ["add"]


@pytest.mark.parametrize("operation", COMPUTED.values(), ids=COMPUTED)
def test_computed_when_needed(operation: Callable[[Tensor], Tensor]) -> None:
    logits, plain, whole = deferred()
    found = operation(logits)
    assert type(found) is Tensor
    assert len(set(whole)) == 1
    torch.testing.assert_close(found, operation(plain))


def test_computed_logits_are_differentiable() -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    logits, plain, _ = deferred(hidden=hidden)
    torch.testing.assert_close(
        torch.autograd.grad(logits.exp().sum(), hidden), torch.autograd.grad(plain.exp().sum(), hidden)
    )


def test_repr_computes() -> None:
    logits, plain, _ = deferred()
    assert repr(logits) == repr(plain)


def test_error_is_the_plain_one() -> None:
    logits, _, _ = deferred()
    with pytest.raises(RuntimeError, match="shape"):
        logits.view(-1, 7)
