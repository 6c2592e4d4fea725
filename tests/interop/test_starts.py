"""Every start has the same effect in PEFT as here, from the same base and the same data."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, outputs, shake, transformer
from torch import Tensor, nn

import lorica
from lorica import inits
from lorica.config import exactly
from lorica.layers import lora_layers
from lorica.model import starts

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]


def settings(value: str, **more: Any) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": value} | more


def data(count: int = 4, rows: int = 1) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    tokens = [torch.randint(3, 40, (rows, 9), generator=draw) for _ in range(count)]
    return [{"input_ids": t, "labels": t} for t in tokens]


def ours(value: str, **more: Any) -> Any:
    model, config = transformer("llama"), lorica.LoraConfig(**settings(value, **more))
    if value == "corda":
        starts.preprocess_corda(model, config, data(30))
    elif value == "lora_ga":
        starts.preprocess_loraga(model, config, data())
    lorica.adapt(model, config, seed=0)
    if value == "eva":
        starts.initialize_lora_eva_weights(model, data(rows=32))
    return model


def theirs(value: str, **more: Any) -> Any:
    model, config = transformer("llama"), peft.LoraConfig(**settings(value, **more))
    torch.manual_seed(0)
    if value == "corda":
        pytest.importorskip("attr", reason="PEFT's CorDA needs attrs")
        config.corda_config = importlib.import_module("peft.tuners.lora.config").CordaConfig()
        corda = importlib.import_module("peft.tuners.lora.corda")
        corda.preprocess_corda(model, config, lambda: [model(**inputs) for inputs in data(30)])
    elif value == "lora_ga":
        config.lora_ga_config = (
            config.lora_ga_config or importlib.import_module("peft.tuners.lora.config").LoraGAConfig()
        )
        loraga = importlib.import_module("peft.tuners.lora.loraga")
        loraga.preprocess_loraga(
            model, config, lambda: [model(**inputs).loss.backward() for inputs in data()]
        )
    model = peft.get_peft_model(model, config)
    if value == "eva":
        peft.initialize_lora_eva_weights(model, data(rows=32), show_progress_bar=False)
    return model.eval()


def pairs(mine: nn.Module, other: Any) -> list[tuple[Any, Any]]:
    """The adapted layers of both, path by path."""
    return [(layer, other.base_model.model.get_submodule(path)) for path, layer in lora_layers(mine).items()]


def close(one: Tensor, other: Tensor, tolerance: float) -> None:
    assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize(("value", "tolerance"), [("pissa", 1e-4), ("olora", 1e-4), ("corda", 1e-4)])
def test_the_same_is_taken_out_of_the_base(value: str, tolerance: float) -> None:
    mine, other = ours(value), theirs(value)
    for layer, peer in pairs(mine, other):
        A, B = layer.factor_parameters("default")
        close(B @ A, peer.lora_B.default.weight @ peer.lora_A.default.weight, tolerance)
        close(layer.base_weight, peer.base_layer.weight, tolerance)
        assert layer.scaling["default"] == pytest.approx(peer.scaling["default"])


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit", "weight_svd"])
def test_lora_ga_starts_from_the_same_vectors_up_to_their_signs(direction: str, scale: str) -> None:
    chosen = {"direction": direction, "scale": scale}
    mine = ours("lora_ga", lora_ga_config=lorica.LoraGAConfig(**chosen))  # type: ignore[arg-type]
    config = importlib.import_module("peft.tuners.lora.config")
    other = theirs("lora_ga", lora_ga_config=config.LoraGAConfig(**chosen))
    for layer, peer in pairs(mine, other):
        A, B = layer.factor_parameters("default")
        peer_A, peer_B = peer.lora_A.default.weight, peer.lora_B.default.weight
        # PEFT estimates W0's norm from as few directions as the rank.
        tolerance = 0.1 if scale == "weight_svd" else 2e-3
        for column in range(2):
            close(A[column].outer(A[column]), peer_A[column].outer(peer_A[column]), tolerance)
            close(B[:, column].outer(B[:, column]), peer_B[:, column].outer(peer_B[:, column]), tolerance)


def test_eva_shares_out_the_same_ranks_for_nearly_the_same_directions() -> None:
    mine, other = ours("eva"), theirs("eva")
    config, peer_config = lorica.extract(mine).lora, other.peft_config["default"]
    # PEFT's keys are bare paths, which it reads as patterns.
    ranks, alphas = (
        {exactly(path): value for path, value in pattern.items()}
        for pattern in (peer_config.rank_pattern, peer_config.alpha_pattern)
    )
    assert config.rank_pattern == ranks
    assert config.alpha_pattern == pytest.approx(alphas)
    for layer, peer in pairs(mine, other):
        A, _ = layer.factor_parameters("default")
        assert (torch.linalg.svdvals(A @ peer.lora_A.default.weight.T) > 0.9).all()


def test_loftq_is_the_same_where_pefts_own_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """At α = r: PEFT forgets the scale. And it knows no CPU, so its source is told of one."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    utils = importlib.import_module("peft.utils.loftq_utils")
    source = inspect.getsource(utils.loftq_init).replace('else "cuda"', 'else "cpu"')
    namespace = dict(vars(utils))
    exec(source, namespace)
    # Neither side is a multiple of what bitsandbytes packs for a CPU.
    weight = torch.randn(33, 50)
    for rounds in (1, 3):
        base, A, B = namespace["loftq_init"](weight, 4, 5, rounds)
        config = lorica.LoftQConfig(loftq_bits=4, loftq_iter=rounds)
        my_A, my_B, my_base = inits.loftq(weight, 5, 1.0, config)
        close(my_base, base, 1e-2 if rounds > 1 else 0)
        close(my_B @ my_A, B @ A, 1e-1 if rounds > 1 else 1e-4)


@pytest.mark.parametrize(
    "value", ["pissa", "olora", "pissa_niter_16", "corda", "lora_ga", "eva", "orthogonal"]
)
def test_files_from_here_mean_the_same_on_pefts_untouched_base(value: str, tmp_path: Path) -> None:
    mine = ours(value)
    shake(mine)
    lorica.save(mine, tmp_path)
    other = peft.PeftModel.from_pretrained(transformer("llama"), tmp_path).eval()
    torch.testing.assert_close(outputs(other, "llama"), outputs(mine, "llama"), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("value", ["pissa", "olora"])
def test_each_reads_the_others_form_without_the_start(value: str, tmp_path: Path) -> None:
    mine, other = ours(value), theirs(value)
    for model in (mine, other):
        shake(model)
    lorica.save(mine, tmp_path / "mine", as_trained=True)
    other.save_pretrained(tmp_path / "other")
    read = peft.PeftModel.from_pretrained(transformer("llama"), tmp_path / "mine").eval()
    torch.testing.assert_close(outputs(read, "llama"), outputs(mine, "llama"), rtol=1e-4, atol=1e-5)
    loaded = lorica.load(transformer("llama"), tmp_path / "other")
    torch.testing.assert_close(outputs(loaded, "llama"), outputs(other, "llama"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", ["pissa", "olora", "corda", "lora_ga"])
def test_what_peft_converts_loads_here(value: str, tmp_path: Path) -> None:
    other = theirs(value)
    start = tmp_path / "start"
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(start)
    shake(other)
    expected = outputs(other, "llama")
    other.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=str(start))
    loaded = lorica.load(transformer("llama"), tmp_path / "trained")
    torch.testing.assert_close(outputs(loaded, "llama"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", ["pissa", "olora", "corda"])
def test_training_takes_the_same_course(value: str) -> None:
    inputs = {**batch("llama"), "labels": batch("llama")["input_ids"]}
    losses: list[list[float]] = []
    for model in (ours(value), theirs(value)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        steps = []
        for _ in range(3):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
