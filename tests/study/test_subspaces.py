from __future__ import annotations

import math

import pytest
import torch
from study import made

from lorica import Adapter, Factors, LoraConfig, study
from lorica.errors import AdapterError, ConfigError


def from_directions(U: torch.Tensor, V: torch.Tensor) -> Factors:
    """A and B whose own singular vectors are the given ones, the first the strongest."""
    strength = torch.arange(V.shape[1], 0, -1, dtype=torch.float64)
    return Factors(strength[:, None] * V.mT, U * strength, 1.0)


def test_planted_directions() -> None:
    """Where the directions are shared φ is 1, and elsewhere at the level of chance."""
    d = 400
    shared, own, other = made.columns(d, 9, 0).split([1, 4, 4], dim=1)
    one = from_directions(made.columns(500, 5, 1), torch.cat([shared, own], 1))
    two = from_directions(made.columns(500, 5, 2), torch.cat([shared, other], 1))
    found = study.compare(one, two)
    assert found.at(1, 1) == pytest.approx(1)
    assert found.at(5, 5) == pytest.approx(1 / 5)
    assert found.d == d
    random = study.compare(one, two, side="B")
    assert random.at(5, 5) == pytest.approx(random.by_chance(5, 5), abs=0.02)
    assert random.by_chance(5, 5) == 5 / 500


@pytest.mark.parametrize("side", ["A", "B", "input", "output"])
def test_by_the_definition(side: study.Side) -> None:
    f, g = made.gaussian(20, 30, 3, 1), made.gaussian(20, 30, 5, 2, scale=-2)
    bases = []
    for h in (f, g):
        matrix = {"A": h.A.double(), "B": h.B.double()}.get(side, made.dense(h))
        svd = torch.linalg.svd(matrix)
        bases.append((svd.Vh.mT if side in ("A", "input") else svd.U)[:, : h.r])
    found = study.compare(f, g, side=side)
    assert found.phi.shape == (3, 5)
    for i in range(1, 4):
        for j in range(1, 6):
            cosines = torch.linalg.svdvals(bases[0][:, :i].mT @ bases[1][:, :j])
            shared, p = float(cosines.square().sum()), min(i, j)
            assert found.at(i, j) == pytest.approx(shared / p, abs=1e-9)
            distance = study.projection_distance(found.at(i, j), i, j)
            assert distance == pytest.approx(math.sqrt(p - shared), abs=1e-6)


def test_the_papers_printed_relation_does_not_hold() -> None:
    U, V = made.columns(60, 4, 0), made.columns(60, 4, 1)
    found = float(study.phi(U, V)[3, 3])
    d = math.sqrt(4 - float((U.mT @ V).norm() ** 2))
    assert found == pytest.approx(1 - d**2 / 4)
    assert abs(found - (1 - d**2) / 4) > 0.5


def test_itself_and_the_orthogonal() -> None:
    f = made.gaussian(20, 30, 4)
    found = study.compare(f, f).phi
    assert torch.allclose(found.diagonal(), torch.ones(4, dtype=found.dtype))
    Q = made.columns(30, 8, 0)
    assert study.phi(Q[:, :4], Q[:, 4:]).max() < 1e-12


def test_the_random_level() -> None:
    """Drawn and analytic, at the sizes of a comparison of rank 8 with rank 64."""
    drawn = torch.stack([study.random_phi(768, 8, 64, seed=seed)[7, 63] for seed in range(4)])
    assert study.expected_phi(768, 8, 64) == pytest.approx(0.0833, abs=1e-4)
    assert float(drawn.mean()) == pytest.approx(0.0833, rel=0.1)
    assert study.expected_phi(12288, 8, 64) == pytest.approx(0.0052, abs=1e-4)
    assert torch.equal(study.random_phi(40, 3, 5), study.random_phi(40, 3, 5))


def test_two_adapters_compare_what_both_have() -> None:
    one = made.adapter(
        {f"h.0.{name}": made.gaussian(d, 5, 2) for name, d in (("q", 6), ("v", 6), ("up", 9))},
        base_model_name_or_path="mine",
    )
    others = {"q": made.gaussian(6, 5, 4), "up": made.gaussian(9, 7, 2), "k": made.gaussian(6, 5, 2)}
    two = made.adapter({f"h.0.{n}": f for n, f in others.items()}, base_model_name_or_path="yours")
    report = study.similarity(one, two)
    assert list(report.layers) == ["h.0.q"]
    assert report.layers["h.0.q"].phi.shape == (2, 4)
    notes = "\n".join(report.notes)
    for part in (
        "bases differ (mine and yours)",
        "only the first adapts h.0.v",
        "only the second adapts h.0.k",
    ):
        assert part in notes
    assert "h.0.up and h.0.up cannot be compared by input: the directions of one have 5 dimensions" in notes
    assert list(study.similarity(one, two, side="B").layers) == ["h.0.q", "h.0.up"]
    with pytest.raises(AdapterError, match="have 5 dimensions, those of the other 7"):
        study.similarity(one, two, paths=["h.0.up"])
    with pytest.raises(AdapterError, match=r"h\.0\.k: one has no update for it"):
        study.similarity(one, two, paths=["h.0.k"])


def test_nothing_in_common() -> None:
    one, two = (made.adapter({name: made.gaussian(6, 5, 2)}) for name in ("q", "v"))
    with pytest.raises(AdapterError, match="no layer that can be compared") as caught:
        study.similarity(one, two)
    assert "only the first adapts q" in str(caught.value)


def test_layers_of_one_adapter() -> None:
    same, other, narrow = made.gaussian(6, 50, 3, 1), made.gaussian(6, 50, 4, 2), made.gaussian(6, 8, 3)
    report = study.correlation(made.adapter({"h.0.q": same, "h.0.v": same, "h.1.q": other, "up": narrow}))
    assert report.rank == 3
    assert report.phi[0, 1] == pytest.approx(1)
    assert report.phi[0, 2] == pytest.approx(study.compare(same, other).at(3, 3))
    assert report.phi[2, 0] == report.phi[0, 2]
    assert report.phi[0, 3].isnan()
    assert torch.allclose(report.phi.diagonal(), torch.ones(4, dtype=report.phi.dtype))


def test_what_has_no_directions() -> None:
    f = Factors(torch.randn(3, 5), torch.zeros(4, 3), 1.0)
    assert study.directions(f, "A").shape == (5, 3)  # A starts at random
    sides: list[study.Side] = ["B", "input", "output"]
    for side in sides:
        with pytest.raises(AdapterError, match=r"the update: .* is zero and so has no directions"):
            study.directions(f, side)
    grouped = Factors(torch.randn(6, 5, 3, 3), torch.randn(8, 3, 1, 1), 1.0, "conv")
    with pytest.raises(AdapterError, match="a convolution in 2 groups"):
        study.directions(grouped, "A")


def test_adapters_without_updates() -> None:
    none = Adapter(LoraConfig(), {})
    with pytest.raises(AdapterError, match="neither has a low-rank update"):
        study.similarity(none, none)


def test_no_such_side(unchecked_shapes: None) -> None:
    with pytest.raises(ConfigError, match="side must be one of A, B, input, output, not 'left'"):
        study.directions(made.gaussian(6, 5, 2), "left")  # type: ignore[arg-type]


def test_directions_of_no_importance_are_left_out() -> None:
    f = made.planted(made.columns(20, 3, 0), [3, 1, 0], made.columns(30, 3, 1))
    assert study.directions(f, "input").shape == (30, 2)


def test_out_of_range() -> None:
    found = study.compare(made.gaussian(6, 5, 2), made.gaussian(6, 5, 3))
    with pytest.raises(ConfigError, match="they have 2 and 3 directions"):
        found.at(3, 3)
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        study.correlation(made.adapter({"a": made.gaussian(6, 5, 2)}), rank=0)
    with pytest.raises(AdapterError, match="the adapter has no factors"):
        study.correlation(Adapter(LoraConfig(r=2, target_modules=["q"]), {}))
