from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from study import made

import lorica
from lorica import Factors, study
from lorica.errors import AdapterError, ConfigError
from lorica.study.advice import proposed
from lorica.study.modules import spots


def layer(values: list[float], seed: int, d: int = 20) -> Factors:
    U, V = made.columns(d, len(values), seed), made.columns(d, len(values), seed + 100)
    return made.planted(U, values, V, scale=0.5)


@pytest.fixture
def adapter() -> lorica.Adapter:
    return made.adapter(
        {
            "h.0.q": layer([10, 0.1, 0.1, 0.1], 0),
            "h.0.v": layer([3, 2, 0.01, 0], 1),
            "h.1.q": layer([1, 1, 1, 1], 2),
            "h.1.v": layer([0.2, 0, 0, 0], 3, d=40),
        },
        lora_alpha=2,
    )


def test_smallest_ranks(adapter: lorica.Adapter) -> None:
    advice = study.advise(adapter)
    assert {path: found.rank for path, found in advice.layers.items()} == {
        "h.0.q": 1,
        "h.0.v": 2,
        "h.1.q": 4,
        "h.1.v": 1,
    }
    assert advice.parameters == (1 + 2 + 4) * 40 + 80
    assert advice.before == 4 * (3 * 40 + 80)
    assert advice.kept > 0.99
    assert "q of layer 0: this adapter used 1.0 of its 4 ranks; 1 keep 99% of the energy" in str(advice)
    assert "keep 99.9% of the energy" in str(study.advise(adapter, energy=0.999))
    assert json.loads(json.dumps(advice.to_dict()))["config"]["r"] == 1


def test_the_proposal_keeps_every_alpha(adapter: lorica.Adapter) -> None:
    config = study.advise(adapter).config
    for path, rank in {"h.0.q": 1, "h.0.v": 2, "h.1.q": 4, "h.1.v": 1}.items():
        assert config.rank(path) == rank
        assert config.scale(path) == pytest.approx(2 / rank)
    assert config.target_modules == ["q", "v"]
    louder = dataclasses.replace(adapter.factors["h.1.q"], scale=1.5)
    other = lorica.Adapter(adapter.config, {**adapter.factors, "h.1.q": louder})
    config = study.advise(other).config
    assert config.scale("h.1.q") == pytest.approx(1.5)
    assert config.scale("h.0.v") == pytest.approx(2 / 2)


def test_what_an_adapters_file_proposes_trains(adapter: lorica.Adapter, tmp_path: Path) -> None:
    lorica.write(adapter, tmp_path)
    read = lorica.read(tmp_path)
    assert read.lora.inference_mode
    assert not study.advise(read).config.inference_mode


@pytest.mark.parametrize(
    ("budget", "ranks"),
    [
        (40, {"h.0.q": 1}),
        (120, {"h.0.q": 1, "h.0.v": 2}),
        (160, {"h.0.q": 1, "h.0.v": 2, "h.1.q": 1}),
        (10_000, {"h.0.q": 1, "h.0.v": 2, "h.1.q": 4, "h.1.v": 1}),
    ],
)
def test_a_budget_goes_where_the_energy_is(
    adapter: lorica.Adapter, budget: int, ranks: dict[str, int]
) -> None:
    advice = study.advise(adapter, budget=budget)
    assert {path: found.rank for path, found in advice.layers.items() if found.rank} == ranks
    assert advice.parameters <= budget
    if len(ranks) < 4:
        assert advice.config.target_modules == sorted(ranks)
    assert {path: advice.config.rank(path) for path in ranks} == ranks


def test_evidence(adapter: lorica.Adapter) -> None:
    alone = study.advise(adapter)
    assert alone.thin
    assert any("one adapter, so one seed" in line for line in alone.evidence)
    assert any("1 of 4 layers use every rank they have" in line for line in alone.evidence)
    again = study.advise(adapter, others={"seed 1": adapter})
    assert not again.thin
    assert any("beside seed 1, effective ranks differ by 0%" in line for line in again.evidence)
    flat = made.adapter({path: layer([1, 1, 1, 1], 5, f.A.shape[1]) for path, f in adapter.factors.items()})
    assert study.advise(adapter, others={"other": flat}).thin
    elsewhere = made.adapter({"up": layer([1, 1], 0)})
    assert any(
        "adapts other layers" in line for line in study.advise(adapter, others={"x": elsewhere}).evidence
    )


def test_check_cuts_and_scores_again(adapter: lorica.Adapter) -> None:
    seen = []

    def score(value: lorica.Adapter) -> float:
        seen.append(value)
        return float(sum(f.r for f in value.factors.values()))

    found = study.check(adapter, score)
    assert (found.before, found.after) == (16, 8)
    assert found.energy > 0.99
    assert found.parameters == (adapter.numel, seen[1].numel)


@pytest.mark.parametrize("budget", [None, 120, 160])
def test_what_is_scored_is_what_was_advised(adapter: lorica.Adapter, budget: int | None) -> None:
    advice = study.advise(adapter, budget=budget)
    seen = []
    found = study.check(adapter, lambda value: float(not seen.append(value)), advice)
    ranks = {path: layer.rank for path, layer in advice.layers.items() if layer.rank}
    assert {path: f.r for path, f in seen[1].factors.items()} == ranks
    assert sum(f.A.numel() + f.B.numel() for f in seen[1].factors.values()) == advice.parameters
    assert found.energy == pytest.approx(advice.kept)
    for path, f in seen[1].factors.items():
        whole = made.dense(adapter.factors[path])
        lost = float((made.dense(f) - whole).norm())
        # No matrix of that rank is nearer (Eckart and Young).
        assert lost == pytest.approx(float(torch.linalg.svdvals(whole)[f.r :].norm()), abs=1e-9)
        assert seen[1].config.rank(path) == f.r
        assert seen[1].config.scale(path) == f.scale


def test_what_was_cut_is_an_adapter_that_can_be_stored(adapter: lorica.Adapter, tmp_path: Path) -> None:
    smaller = study.cut(adapter, study.advise(adapter, budget=160))
    lorica.write(smaller, tmp_path)
    again = lorica.read(tmp_path)
    assert {path: f.r for path, f in again.factors.items()} == {"h.0.q": 1, "h.0.v": 2, "h.1.q": 1}
    other = made.adapter({"h.0.q": layer([1, 1], 0)})
    with pytest.raises(AdapterError, match=r"for another adapter: only one of the two has h\.0\.v"):
        study.cut(other, study.advise(adapter))


def test_a_convolution_in_groups_has_a_rank_for_each_of_them() -> None:
    """Two groups of rank 3: what is proposed and paid for are multiples of two."""
    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(6, 5, 3, generator=draw), torch.randn(8, 3, 1, generator=draw)
    grouped = Factors(A, B * torch.tensor([4.0, 1.0, 0.5])[None, :, None], 0.5, "conv")
    value = made.adapter({"conv": grouped})
    for energy in (0.5, 0.9, 1.0):
        advice = study.advise(value, energy=energy)
        (found,) = advice.layers.values()
        assert found.rank % 2 == 0
        smaller = study.cut(value, advice).factors["conv"]
        assert smaller.r == found.rank
        assert smaller.A.numel() + smaller.B.numel() == advice.parameters
    assert advice.parameters == advice.before == A.numel() + B.numel()
    step = 2 * 15 + 8
    assert study.advise(value, budget=step).layers["conv"].rank == 2
    with pytest.raises(ConfigError, match=f"the cheapest has {step}"):
        study.advise(value, budget=step - 1)


def test_a_proposed_rank_is_of_its_own_layer_alone() -> None:
    value = made.adapter({path: layer([1, 1, 1, 1], i) for i, path in enumerate(["q", "h.q", "h.v"])})
    ranks = {"q": 3, "h.q": 2, "h.v": 2}
    config = proposed(value, ranks)
    assert {path: config.rank(path) for path in ranks} == ranks


def test_nothing_to_advise() -> None:
    zero = made.adapter({"q": Factors(made.columns(5, 2, 0).mT, 0 * made.columns(6, 2, 1), 1.0)})
    with pytest.raises(ConfigError, match="has not been trained"):
        study.advise(zero)
    with pytest.raises(AdapterError, match="the adapter's method is bitfit"):
        study.advise(lorica.Adapter(lorica.BitFitConfig(), {}))
    with pytest.raises(ConfigError, match="buys no direction; the cheapest has 40"):
        study.advise(made.adapter({"q": layer([1, 1], 0)}), budget=39)


def test_where_modules_stand() -> None:
    found = spots(
        [
            "bert.encoder.layer.3.attention.self.query",
            "bert.encoder.layer.3.attention.output.dense",
            "bert.encoder.layer.3.intermediate.dense",
            "embeddings.word",
        ]
    )
    assert [tuple(spot) for spot in found.values()] == [
        (3, "query"),
        (3, "output.dense"),
        (3, "intermediate.dense"),
        (None, "word"),
    ]
