"""EVA on a model: the inputs' own directions, ranks where they vary, and a configuration that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Toy, outputs, shake, transformer
from torch import Tensor, nn

import lorica
from lorica import EvaConfig, LoraConfig
from lorica.errors import AdapterError, ConfigError, TargetError
from lorica.layers import lora_layers
from lorica.model import starts
from lorica.model.files import extract_live


def toy() -> Toy:
    """With inputs that vary more along some directions than along others."""
    torch.manual_seed(4)
    model = Toy(dim=16).eval()
    model.embed.weight.data *= 0.6 ** torch.arange(16)
    return model


def batches(count: int = 3, rows: int = 8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(0, 40, (rows, 9), generator=draw) for _ in range(count)]


def config(**settings: Any) -> LoraConfig:
    fields: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["up", "down"],
        "init_lora_weights": "eva",
    }
    return LoraConfig(**fields | settings)


def stacked(model: nn.Module, path: str, data: list[Any]) -> Tensor:
    """All that a layer is given."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda m, args: seen.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for inputs in data:
            model(**inputs) if isinstance(inputs, dict) else model(inputs)
    handle.remove()
    return torch.cat(seen).double()


def test_the_rows_of_A_are_right_singular_vectors_of_the_stacked_inputs() -> None:
    model = lorica.adapt(toy(), config(eva_config={"rho": 1.0}))
    starts.initialize_lora_eva_weights(model, batches())
    for path in ("blocks.0.up", "blocks.0.down", "blocks.1.up"):
        x = stacked(toy(), path, batches())
        Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:3]
        A = extract_live(model).factors[path].A.double()
        torch.testing.assert_close(A @ A.T, torch.eye(3).double(), rtol=0, atol=1e-5)
        assert (torch.linalg.svdvals(A @ Vh.T) > 0.95).all()


def test_the_model_computes_what_it_did() -> None:
    model = lorica.adapt(toy(), config())
    starts.initialize_lora_eva_weights(model, batches())
    assert torch.equal(outputs(model), outputs(toy()))
    assert not model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_ranks_go_where_inputs_vary_and_the_budget_stays() -> None:
    found = starts.get_eva_state_dict(toy(), batches(), config(eva_config={"rho": 2.0}))
    ranks = {path: len(A) for path, A in found.items()}
    assert sum(ranks.values()) == 4 * 3
    assert max(ranks.values()) <= 6
    shares = {}
    for path in ranks:
        x = stacked(toy(), path, batches())
        S = torch.linalg.svdvals(x - x.mean(0)).square()
        shares[path] = (S / S.sum())[:6]
    best = torch.cat(list(shares.values())).sort(descending=True).values[: 4 * 3]
    expected = {path: int((share >= best[-1]).sum()) for path, share in shares.items()}
    assert sum(abs(expected[path] - rank) for path, rank in ranks.items()) <= 2


@pytest.mark.parametrize("adjust", [True, False])
def test_the_configuration_says_what_came_of_it(adjust: bool, tmp_path: Path) -> None:
    model = lorica.adapt(toy(), config(eva_config={"adjust_scaling_factors": adjust}))
    found = starts.get_eva_state_dict(model, batches())
    found["blocks.0.up"] = found["blocks.0.up"][:1]
    starts.initialize_lora_eva_weights(model, eva_state_dict=found)
    settled = lorica.extract(model).lora
    scales = set()
    for path, layer in lora_layers(model).items():
        assert settled.rank(path) == len(layer.factor_parameters("default")[0])
        assert settled.scale(path) == pytest.approx(layer.scaling["default"])
        scales.add(round(layer.scaling["default"], 6))
    assert settled.rank_pattern
    assert (scales == {2.0}) == adjust
    shake(model)
    lorica.save(model, tmp_path)
    torch.testing.assert_close(outputs(lorica.load(toy(), tmp_path)), outputs(model), rtol=1e-6, atol=1e-6)


def test_a_rank_is_of_its_own_layer_alone(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        torch.manual_seed(0)
        parts = {"up": nn.Linear(6, 6), "block": nn.ModuleDict({"up": nn.Linear(6, 6)})}
        return nn.ModuleDict(parts)

    model = lorica.adapt(nested(), config(r=2, target_modules=["up"]))
    found = {"up": torch.randn(4, 6), "block.up": torch.randn(2, 6)}
    starts.initialize_lora_eva_weights(model, eva_state_dict=found)
    settled = lorica.extract(model).lora
    assert [settled.rank(path) for path in found] == [4, 2]
    lorica.save(model, tmp_path)
    loaded = lorica.extract(lorica.load(nested(), tmp_path))
    assert {path: f.r for path, f in loaded.factors.items()} == {"up": 4, "block.up": 2}
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(nested(), tmp_path)
    shapes = {n: p.shape[0] for n, p in theirs.named_parameters() if "lora_A" in n}
    assert sorted(shapes.values()) == [2, 4]


def test_a_layer_left_without_rank_is_itself_again() -> None:
    model = lorica.adapt(toy(), config())
    found = starts.get_eva_state_dict(model, batches())
    found["blocks.1.down"] = found["blocks.1.down"][:0]
    starts.initialize_lora_eva_weights(model, eva_state_dict=found)
    assert type(model.blocks[1].down) is nn.Linear  # type: ignore[union-attr]
    assert "blocks.1.down" not in lora_layers(model)
    settled = lorica.extract(model).lora
    again = lorica.attach(toy(), lorica.extract(model))
    assert lora_layers(again).keys() == lora_layers(model).keys()
    assert "down" not in (settled.target_modules or ())


def test_dora_keeps_its_magnitudes() -> None:
    model = lorica.adapt(toy(), config(use_dora=True))
    starts.initialize_lora_eva_weights(model, batches())
    torch.testing.assert_close(outputs(model), outputs(toy()))
    assert all(f.magnitude is not None for f in extract_live(model).factors.values())


def test_whitening_divides_by_the_root_of_the_singular_value() -> None:
    plain, white = (
        starts.get_eva_state_dict(toy(), batches(1), config(eva_config={"whiten": whiten, "rho": 1.0}))
        for whiten in (False, True)
    )
    x = stacked(toy(), "blocks.0.up", batches(1))
    # One batch, shown twice until nothing turned any more.
    S = torch.linalg.svdvals(torch.cat([x, x]) - x.mean(0))[:3].float()
    expected = plain["blocks.0.up"] / S[:, None].sqrt()
    torch.testing.assert_close(white["blocks.0.up"], expected, rtol=0.02, atol=1e-3)


def test_layers_with_the_same_inputs_are_looked_at_once_and_masked_tokens_are_not() -> None:
    model = transformer("llama")
    draw = torch.Generator().manual_seed(2)
    data = []
    for _ in range(2):
        tokens = torch.randint(3, 40, (8, 9), generator=draw)
        mask = torch.ones_like(tokens)
        mask[:, 6:] = 0
        data.append({"input_ids": tokens, "attention_mask": mask})
    chosen = LoraConfig(
        r=2, target_modules=["q_proj", "k_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    found = starts.get_eva_state_dict(model, data, chosen)
    assert torch.equal(found["model.layers.0.self_attn.q_proj"], found["model.layers.0.self_attn.k_proj"])
    path = "model.layers.0.self_attn.q_proj"
    x = stacked(model, path, data).view(-1, 9, 16)[:, :6].flatten(0, 1)
    Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2]
    assert (torch.linalg.svdvals(found[path].double() @ Vh.T) > 0.97).all()


def test_labels_leave_out_tokens_as_asked() -> None:
    model = transformer("llama")
    tokens = torch.randint(3, 40, (16, 9))
    labels = tokens.clone()
    labels[:, :6] = -100
    data = [{"input_ids": tokens, "labels": labels}]
    results = []
    for use in (True, False):
        settings = EvaConfig(rho=1.0, use_label_mask=use)
        chosen = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=settings)
        results.append(starts.get_eva_state_dict(model, data, chosen)["model.layers.1.self_attn.q_proj"])
    assert not torch.allclose(*results, atol=1e-2)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    starts.get_eva_state_dict(toy(), batches(), config(), progress=lambda *n: told.append(n))
    assert told[0][0] == 0
    assert told[-1] == (4, 4)


class TestRefused:
    def test_another_start(self) -> None:
        model = lorica.adapt(toy(), config().replace(init_lora_weights=True))
        with pytest.raises(ConfigError, match="adapt the model with 'eva' first"):
            starts.initialize_lora_eva_weights(model, batches())

    def test_nothing_to_start_from(self) -> None:
        model = lorica.adapt(toy(), config())
        with pytest.raises(ConfigError, match="give a dataloader"):
            starts.initialize_lora_eva_weights(model)
        with pytest.raises(AdapterError, match="the data loader is empty"):
            starts.initialize_lora_eva_weights(model, [])

    def test_batches_too_small(self) -> None:
        model = lorica.adapt(toy(), config())
        before = {path: f.A.clone() for path, f in extract_live(model).factors.items()}
        with pytest.raises(AdapterError, match="never had 6 tokens in one batch"):
            starts.initialize_lora_eva_weights(model, [torch.zeros(1, 5, dtype=torch.long)])
        assert all(torch.equal(before[path], f.A) for path, f in extract_live(model).factors.items())

    def test_a_state_dict_of_another_model(self) -> None:
        model = lorica.adapt(toy(), config())
        found = starts.get_eva_state_dict(model, batches())
        with pytest.raises(AdapterError, match=r"missing blocks\.0\.up"):
            starts.initialize_lora_eva_weights(
                model, eva_state_dict={path: A for path, A in found.items() if path != "blocks.0.up"}
            )
        with pytest.raises(AdapterError, match=r"A must be \(rank, 16\)"):
            starts.initialize_lora_eva_weights(
                model, eva_state_dict={**found, "blocks.0.up": torch.zeros(2, 5)}
            )
        with pytest.raises(AdapterError, match="every rank"):
            starts.initialize_lora_eva_weights(
                model, eva_state_dict={path: A[:0] for path, A in found.items()}
            )

    def test_an_attention_that_is_never_called(self) -> None:
        attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        with pytest.raises(TargetError, match="read without being called"):
            lorica.adapt(attention, config(target_modules=["attention"]))


@pytest.mark.parametrize("dora", [False, True])
def test_by_adapt_in_one_step(dora: bool) -> None:
    data = batches()
    one = lorica.adapt(toy(), config(use_dora=dora), data=data, seed=0)
    two = lorica.adapt(toy(), config(use_dora=dora), seed=0)
    starts.initialize_lora_eva_weights(two, data)
    ours, theirs = one.state_dict(), two.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert lorica.adapters(one)["default"] == lorica.adapters(two)["default"]
