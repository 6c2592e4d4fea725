"""A model, or blocks of it, that `torch.compile` wrapped before it was adapted: as if it had not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Toy, shake, tokens
from torch import nn

import lorica
from lorica import LoraConfig
from lorica.errors import TargetError
from lorica.model import starts

pytestmark = [pytest.mark.usefixtures("unchecked_shapes"), pytest.mark.filterwarnings("ignore")]

NAMES = ["up", "down"]
FORMS: dict[str, dict[str, Any]] = {
    "list": {},
    "path": {"target_modules": ["blocks.0.up"]},
    "regex": {"target_modules": r"blocks\.\d+\.(up|down)"},
    "layers": {"layers_to_transform": [0]},
    "ranks": {"rank_pattern": {r"^blocks\.0\.up": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "biases": {"bias": "all"},
    "biases of layers": {"bias": "lora_only"},
    "head": {"modules_to_save": ["head"]},
    "rows": {"trainable_token_indices": {"embed": [3, 5]}},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["embed", "up"]},
}


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def by_block(model: Any) -> Any:
    for block in model.blocks:
        block["up"] = torch.compile(block["up"], backend="eager")
    return model


def both(model: Any) -> Any:
    return whole(by_block(model))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def base() -> Any:
    torch.manual_seed(0)
    return Toy()


def live(model: nn.Module) -> dict[str, torch.Tensor]:
    """What trains, by its name without the wrappers'."""
    return {n.replace("_orig_mod.", ""): p for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    with torch.compiler.set_stance("force_eager"):  # names are what is tested, and compiling is slow
        return model(tokens())


@pytest.mark.parametrize(
    ("compiled", "form"),
    [
        *((both, form) for form in FORMS),
        *((how, form) for how in (whole, by_block) for form in ("regex", "pissa")),
    ],
)
def test_is_adapted_saved_merged_and_detached_as_the_model_itself(
    compiled: Callable[[Any], Any], form: str, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"r": 2, "target_modules": NAMES, **FORMS[form]}
    config = LoraConfig(**fields)
    plain, model = lorica.adapt(base(), config, seed=3), compiled(base())
    before = logits(model)
    assert lorica.adapt(model, config, seed=3) is model
    ours, theirs = live(model), live(plain)
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name])
    for either in (model, plain):
        shake(either)
    want = logits(plain)
    torch.testing.assert_close(logits(model), want)
    assert not torch.allclose(want, before)

    lorica.save(model, tmp_path / "model")
    lorica.save(plain, tmp_path / "plain")
    files = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("model", "plain")]
    assert files[0] == files[1]
    torch.testing.assert_close(logits(lorica.load(base(), tmp_path / "model")), want)
    torch.testing.assert_close(logits(lorica.load(compiled(base()), tmp_path / "plain")), want)
    gathered = {name: p.detach() + 1 for name, p in model.named_parameters()}
    raised = lorica.extract(model, state_dict=gathered)
    for path, factors in lorica.model.files.extract_live(plain).factors.items():
        torch.testing.assert_close(raised.factors[path].A[: factors.r], factors.A + 1)

    lorica.merge(model)
    torch.testing.assert_close(logits(model), want)
    lorica.restore(model)
    torch.testing.assert_close(logits(model), want)
    lorica.detach(model)
    assert torch.equal(logits(model), before)
    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    untouched = base().state_dict()
    assert state.keys() == untouched.keys()
    assert all(torch.equal(state[name], untouched[name]) for name in untouched)


def test_compiled_code_calls_the_adapted_layers() -> None:
    model = both(base())
    with torch.no_grad():
        before = model(tokens())
        shake(lorica.adapt(model, LoraConfig(r=2, target_modules=NAMES)))
        after = model(tokens())
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, logits(model))


def test_an_error_leaves_it_as_it_was() -> None:
    model = whole(base())
    with pytest.raises(TargetError, match="no_such"):
        lorica.adapt(model, LoraConfig(r=2, target_modules=["no_such"]))
    assert not lorica.adapters(model)
    assert not any("lora" in type(module).__name__.lower() for module in model.modules())


@pytest.mark.parametrize("value", ["corda", "eva"])
def test_a_start_from_data_sees_it_though_the_model_was_called_before(value: str) -> None:
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=value)
    data = [tokens(4), tokens(4).flip(1)]
    found = []
    for prepare in (lambda model: model, whole):
        torch.manual_seed(0)
        model = prepare(Toy())
        model(tokens())  # compiled code knows no hook that comes later
        if value == "corda":
            starts.preprocess_corda(model, config, data)
            lorica.adapt(model, config, seed=0)
        else:
            lorica.adapt(model, config, seed=0)
            starts.initialize_lora_eva_weights(model, data, seed=0)
        found.append(lorica.extract(model))
    for path, factors in found[0].factors.items():
        torch.testing.assert_close(factors.A, found[1].factors[path].A)
