"""How A and B start: the distributions of the paper, from draws that no other module can disturb."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import Toy
from torch import Tensor

import lorica
from lorica import LoraConfig, inits


def draw(init_lora_weights: bool | str, *, r: int = 64, embedding: bool = False) -> tuple[Tensor, Tensor]:
    return inits.start(((r, 400), (300, r)), init_lora_weights, inits.generator(0, "a"), embedding=embedding)


def assert_uniform(factor: Tensor, bound: float) -> None:
    # Of 19,200 draws or more the extremes come this close to the bound, the deviation to that of a uniform.
    assert factor.abs().max() <= bound
    assert factor.min() < -0.99 * bound
    assert factor.max() > 0.99 * bound
    assert abs(factor.std().item() * math.sqrt(3) / bound - 1) < 0.02


def assert_normal(factor: Tensor, deviation: float) -> None:
    assert abs(factor.std().item() / deviation - 1) < 0.02
    assert abs(factor.mean().item()) < 0.03 * deviation
    within = (factor.abs() < deviation).double().mean().item()
    assert abs(within - 0.6827) < 0.02


class TestDistributions:
    def test_the_papers_start_is_kaiming_uniform_and_zero(self) -> None:
        A, B = draw(True)
        assert_uniform(A, 1 / math.sqrt(400))
        assert not B.any()

    def test_kaiming_with_a_root_5_is_torchs_own_bound(self) -> None:
        A, _ = draw(True)
        torch.nn.init.kaiming_uniform_(reference := torch.empty(64, 400), a=math.sqrt(5))
        assert abs(A.std().item() / reference.std().item() - 1) < 0.02

    @pytest.mark.parametrize("r", [16, 64])
    def test_gaussian_has_deviation_1_over_r(self, r: int) -> None:
        A, B = draw("gaussian", r=r)
        assert_normal(A, 1 / r)
        assert not B.any()

    def test_false_makes_both_random(self) -> None:
        A, B = draw(False)
        assert_uniform(A, 1 / math.sqrt(400))
        assert_uniform(B, 1 / math.sqrt(64))

    @pytest.mark.parametrize("start", [True, "gaussian"])
    def test_an_embedding_starts_the_other_way_round(self, start: bool | str) -> None:
        A, B = draw(start, embedding=True)
        assert not A.any()
        assert_normal(B, 1.0)

    def test_an_embedding_with_both_random(self) -> None:
        A, B = draw(False, embedding=True)
        assert_normal(A, 1.0)
        assert_normal(B, 1.0)

    def test_the_fan_in_of_a_convolution_counts_its_kernel(self) -> None:
        A, _ = inits.start(((64, 20, 3, 5), (8, 64, 1, 1)), True, inits.generator(0, "a"))
        assert_uniform(A, 1 / math.sqrt(20 * 3 * 5))


class TestOrthogonal:
    def test_the_update_is_zero_though_neither_factor_is(self) -> None:
        A, B = draw("orthogonal", r=8)
        assert float((B @ A).abs().max()) < 1e-6
        assert float(A.abs().mean()) > 0.01
        assert float(B.abs().mean()) > 0.01

    def test_it_fills_half_the_rank_on_each_side(self) -> None:
        A, B = draw("orthogonal", r=8)
        assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 4
        # Rows of an orthonormal basis, mixed by a tenth of normal numbers.
        assert abs(float(A.square().sum()) / (4 * 400 / 100) - 1) < 0.1


class TestGenerator:
    def test_seed_and_path_fix_the_draws(self) -> None:
        first, again = (torch.rand(4, generator=inits.generator(3, "a.b")) for _ in range(2))
        assert torch.equal(first, again)

    @pytest.mark.parametrize(
        ("seed", "path"), [(4, "a.b"), (3, "a.c"), (31, "a.b"), (-3, "a.b"), (2**70, "a.b")]
    )
    def test_another_seed_or_path_gives_others(self, seed: int, path: str) -> None:
        first = torch.rand(4, generator=inits.generator(3, "a.b"))
        assert not torch.equal(first, torch.rand(4, generator=inits.generator(seed, path)))

    def test_the_values_are_the_same_on_every_machine_and_day(self) -> None:
        # Python salts its own hash() anew in each process; the path must not go through it.
        assert (
            inits.generator(0, "encoder.layer.0").initial_seed() == 2744774744471576688
        )  # BLAKE2b of the two

    def test_the_global_generator_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        draw(False)
        assert torch.equal(before, torch.get_rng_state())

    def test_a_seed_comes_from_the_global_generator(self) -> None:
        torch.manual_seed(1)
        first, second = inits.draw_seed(), inits.draw_seed()
        torch.manual_seed(1)
        assert first == inits.draw_seed()
        assert first != second


def starts(model: torch.nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Each module's A of an adapter."""
    return {path: factors.A for path, factors in lorica.extract(model, name).factors.items()}


class TestTheSameSeedGivesTheSameAdapter:
    """The start of a module depends on the seed and its own path, on nothing else."""

    @pytest.fixture
    def alone(self) -> dict[str, Tensor]:
        return starts(lorica.adapt(Toy(), LoraConfig(r=2, target_modules=["up"]), seed=5))

    @pytest.mark.parametrize(
        "targets", [["down", "up"], ["up", "down", "embed"], "all-linear", r".*(up|head)"]
    )
    def test_whatever_else_is_adapted(self, alone: dict[str, Tensor], targets: list[str] | str) -> None:
        found = starts(lorica.adapt(Toy(), LoraConfig(r=2, target_modules=targets), seed=5))
        assert len(found) > len(alone)
        assert all(torch.equal(A, found[path]) for path, A in alone.items())

    def test_whatever_was_adapted_before(self, alone: dict[str, Tensor]) -> None:
        model = lorica.adapt(Toy(), LoraConfig(r=4, target_modules=["down"]), "first")
        lorica.adapt(model, LoraConfig(r=2, target_modules=["up"]), "second", seed=5)
        assert all(torch.equal(A, alone[path]) for path, A in starts(model, "second").items())

    def test_whatever_the_base_holds(self, alone: dict[str, Tensor]) -> None:
        torch.manual_seed(99)
        found = starts(lorica.adapt(Toy(blocks=3), LoraConfig(r=2, target_modules=["up"]), seed=5))
        assert all(torch.equal(A, found[path]) for path, A in alone.items())

    def test_the_modules_differ_from_each_other(self, alone: dict[str, Tensor]) -> None:
        assert not torch.equal(alone["blocks.0.up"], alone["blocks.1.up"])

    def test_torchs_seed_fixes_it_too(self) -> None:
        def one() -> dict[str, Tensor]:
            model = Toy()
            torch.manual_seed(7)
            return starts(lorica.adapt(model, LoraConfig(r=2, target_modules=["up"])))

        first, again = one(), one()
        assert all(torch.equal(A, again[path]) for path, A in first.items())

    def test_adapting_draws_once_however_much_is_adapted(self) -> None:
        states = []
        for targets in (["up"], ["up", "down", "head"]):
            model = Toy()
            torch.manual_seed(7)
            lorica.adapt(model, LoraConfig(r=2, target_modules=targets))
            states.append(torch.get_rng_state())
        assert torch.equal(*states)

    def test_a_seed_leaves_the_global_generator_alone(self) -> None:
        model = Toy()
        before = torch.get_rng_state()
        lorica.adapt(model, LoraConfig(r=2, target_modules=["up"]), seed=5)
        assert torch.equal(before, torch.get_rng_state())
