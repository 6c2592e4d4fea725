from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from study import made

from lorica import Factors, study
from lorica.errors import AdapterError, ConfigError, FileError
from lorica.study.directions import top_directions

D = 120


def weight(louder: float = 1.0) -> torch.Tensor:
    """W0 with values from 10 down, whose directions 50 to 53 are known; they are scaled by `louder`."""
    U, V = made.columns(D, D, 0), made.columns(D, D, 1)
    S = torch.linspace(10, 0.1, D, dtype=torch.float64)
    S[50:54] *= louder
    return U * S @ V.mT


def update(strength: float) -> Factors:
    """ΔW in W0's directions 50 to 53."""
    U, V = made.columns(D, D, 0)[:, 50:54], made.columns(D, D, 1)[:, 50:54]
    return made.planted(U, [strength] * 4, V, scale=-2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return made.write_base(tmp_path / "base", {"h.0.q.weight": weight().float()}, model_type="made")


def test_a_planted_amplification_is_recovered(base: Path) -> None:
    found = study.amplification(made.adapter({"h.0.q": update(21.5)}), base).layers["h.0.q"]
    S = torch.linspace(10, 0.1, D, dtype=torch.float64)
    assert found.r == 4
    assert found.norm == pytest.approx(43)
    assert found.weight_norm == pytest.approx(float(S.norm()), rel=1e-5)
    assert found.in_update == pytest.approx(float(S[50:54].norm()), rel=1e-4)
    assert found.factor == pytest.approx(43 / float(S[50:54].norm()), rel=1e-4)
    assert found.in_weight == pytest.approx(float(S[:4].norm()), rel=1e-3)
    assert found.by_chance == pytest.approx(float(S.norm()) * 4 / D, rel=1e-5)
    one = study.amplification(made.adapter({"h.0.q": update(21.5)}), base, rank=1).layers["h.0.q"]
    assert one.r == 1
    assert one.in_weight == pytest.approx(10, rel=1e-3)


def test_random_directions_come_to_the_analytic_level() -> None:
    W, squares = weight(), []
    for seed in range(100):
        U, V = made.columns(D, 8, 1000 + seed), made.columns(D, 8, 2000 + seed)
        squares.append(float((U.mT @ W @ V).norm() ** 2))
    measured = math.sqrt(sum(squares) / len(squares))
    assert measured == pytest.approx(float(W.norm()) * 8 / D, rel=0.05)


@pytest.mark.parametrize(
    ("r", "printed", "by_chance", "update_norm", "projected", "factor"),
    [(4, 0.02, 0.020, 6.91, 0.32, 21.59), (64, 0.33, 0.323, 3.57, 1.90, 1.88)],
)
def test_the_papers_table(
    r: int, printed: float, by_chance: float, update_norm: float, projected: float, factor: float
) -> None:
    """Table 7: the random column follows from ‖Wq‖ = 61.95 alone, and the factors from the others."""
    level = 61.95 * r / 12288
    assert level == pytest.approx(by_chance, abs=5e-4)
    assert level == pytest.approx(printed, abs=8e-3)
    assert update_norm / projected == pytest.approx(factor, abs=5e-3)


@pytest.mark.parametrize("k", [3, 50, 90])
def test_leading_directions_of_a_weight(k: int) -> None:
    """Both by iteration and, where that would be most of them, by the whole decomposition."""
    W = weight()
    U, S, Vh = top_directions(W, k, torch.Generator().manual_seed(0))
    exact = torch.linalg.svd(W)
    assert float(S.norm()) == pytest.approx(float(exact.S[:k].norm()), rel=1e-4)
    assert float((U.mT @ exact.U[:, : k + 5]).norm() ** 2) == pytest.approx(k, rel=0.01)
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(k, dtype=Vh.dtype))


@pytest.mark.parametrize("side", ["input", "output"])
def test_overlap(side: study.WeightSide, base: Path) -> None:
    """ΔW lies in W0's directions 50 to 53: outside the strongest tenth, inside the strongest half."""
    planted = made.adapter({"h.0.q": update(1.0)})
    tenth = study.overlap(planted, base, side=side).layers["h.0.q"]
    assert tenth.phi.shape == (12, 4)
    assert tenth.phi.max() < 1e-4
    half = study.overlap(planted, base, side=side, top=0.5).layers["h.0.q"]
    assert float(half.phi[59, 3]) == pytest.approx(1, abs=1e-4)
    assert float(half.phi[49, 3]) < 1e-4
    assert float(half.random[59, 3]) == pytest.approx(0.5, abs=0.15)


def test_of_what_is_stored_transposed_or_in_parts(tmp_path: Path) -> None:
    """The same figures, however the base keeps its weights."""
    W = torch.randn(6, 4)
    f, g = made.gaussian(6, 4, 2, 1), made.gaussian(6, 4, 2, 2)
    plain = made.write_base(tmp_path / "a", {"h.0.q_proj.weight": W, "h.0.up.weight": 2 * W})
    turned = made.write_base(tmp_path / "b", {"h.0.c_attn.weight": W.mT}, model_type="gpt2")
    fused = made.write_base(tmp_path / "c", {"h.0.qkv_proj.weight": torch.cat([W, 0 * W, 0 * W])})
    expected = study.amplification(made.adapter({"h.0.q_proj": f, "h.0.up": g}), plain).layers["h.0.q_proj"]
    for name, base in (("h.0.c_attn", turned), ("h.0.q_proj", fused)):
        found = study.amplification(made.adapter({name: f}), base).layers[name]
        assert found.to_dict() == pytest.approx(expected.to_dict())


def test_norms_with_and_without_a_base(base: Path) -> None:
    f = update(3.0)
    alone = study.norms(made.adapter({"h.0.q": f})).layers["h.0.q"]
    assert (alone.update, alone.weight, alone.relative) == (pytest.approx(6), None, None)
    assert pytest.approx(float(f.A.norm())) == alone.A
    beside = study.norms(made.adapter({"h.0.q": f}), base).layers["h.0.q"]
    assert beside.weight == pytest.approx(float(weight().norm()), rel=1e-5)
    assert beside.relative == pytest.approx(6 / float(weight().norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_drift_is_what_rounding_takes(dtype: torch.dtype, base: Path) -> None:
    f = update(0.05)
    found = study.drift(made.adapter({"h.0.q": f}), base, dtype)
    W, delta = weight().float(), made.dense(f).float()
    stored = (W + delta).to(dtype)
    lost = float((stored.float() - (W + delta)).norm() / delta.norm())
    layer = found.layers["h.0.q"]
    assert layer.lost == pytest.approx(lost, rel=0.05, abs=1e-5)
    assert layer.moved == pytest.approx(float((stored != W.to(dtype)).float().mean()), abs=0.01)
    assert found.to_dict()["dtype"] == str(dtype).removeprefix("torch.")


def test_a_base_that_does_not_fit(base: Path, tmp_path: Path) -> None:
    wide = made.adapter({"h.0.q": made.gaussian(D, D + 1, 2)})
    for ask in (study.amplification, study.overlap, study.norms, study.drift):
        with pytest.raises(AdapterError, match=r"\(120, 121\), the base's \(120, 120\)"):
            ask(wide, base)
    with pytest.raises(AdapterError, match=r"h\.0\.k is not in the base; did you mean 'h\.0\.q'"):
        study.norms(made.adapter({"h.0.k": update(1)}), base)
    with pytest.raises(FileError, match="is not a folder"):
        study.norms(wide, tmp_path / "none")


def test_what_else_an_adapter_has_is_left_aside(base: Path) -> None:
    """A head and magnitudes have no place in this base, and need none."""
    f = dataclasses.replace(update(2), magnitude=torch.ones(D))
    whole = made.adapter({"h.0.q": f}, use_dora=True, modules_to_save=["head"])
    assert study.norms(dataclasses.replace(whole, extras={"head.weight": torch.ones(2, 2)}), base).layers


def test_out_of_range(unchecked_shapes: None, base: Path) -> None:
    planted = made.adapter({"h.0.q": update(1)})
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        study.amplification(planted, base, rank=0)
    with pytest.raises(ConfigError, match="top must be a share"):
        study.overlap(planted, base, top=0)
    with pytest.raises(ConfigError, match="side must be 'input' or 'output'"):
        study.overlap(planted, base, side="A")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dtype must be one that weights are stored in"):
        study.drift(planted, base, torch.int8)
    zero = made.adapter({"h.0.q": Factors(torch.randn(2, D), torch.zeros(D, 2), 1.0)})
    with pytest.raises(AdapterError, match=r"h\.0\.q: its update is zero"):
        study.amplification(zero, base)


def test_a_file_of_safetensors_is_a_base(tmp_path: Path) -> None:
    f, W = made.gaussian(12, 9, 2), torch.randn(12, 9)
    folder = made.write_base(tmp_path / "base", {"h.0.q.weight": W}, model_type="bert")
    value = made.adapter({"h.0.q": f})
    expected = study.norms(value, folder).layers["h.0.q"]
    found = study.norms(value, folder / "model.safetensors").layers["h.0.q"]
    assert found == expected or vars(found) == vars(expected)
    (folder / "config.json").unlink()
    assert study.norms(value, folder / "model.safetensors").layers["h.0.q"].weight == expected.weight
    (tmp_path / "other.bin").write_bytes(b"no tensors")
    with pytest.raises(FileError, match="is not a safetensors file"):
        study.norms(value, tmp_path / "other.bin")
