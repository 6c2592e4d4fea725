"""PiSSA, OLoRA, CorDA and LoRA-GA by their definitions, against naive decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorica import inits
from lorica.config import LoraGAConfig
from lorica.errors import AdapterError


def matrix(rows: int = 24, columns: int = 17, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall off, so that its leading part is well defined."""
    draw = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, columns, generator=draw, dtype=torch.float64)).Q
    return U @ torch.diag(0.6 ** torch.arange(columns, dtype=torch.float64)) @ V


def truncated(weight: Tensor, r: int) -> Tensor:
    """The closest matrix of rank r."""
    U, S, Vh = torch.linalg.svd(weight)
    return U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]


class TestLeading:
    def test_exactly(self) -> None:
        U, S, Vh = inits.leading(matrix(), 5)
        torch.testing.assert_close(U @ torch.diag(S) @ Vh, truncated(matrix(), 5))

    @pytest.mark.parametrize("shape", [(24, 17), (17, 24), (40, 40)])
    def test_randomized_comes_close_and_repeats(self, shape: tuple[int, int]) -> None:
        weight = matrix(40, 40)[: shape[0], : shape[1]]
        first, again = (inits.leading(weight, 4, niter=32, random=inits.generator(1, "a")) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        product = first.U @ torch.diag(first.S) @ first.Vh
        torch.testing.assert_close(product, truncated(weight, 4), rtol=0, atol=1e-6)

    def test_more_iterations_come_closer(self) -> None:
        weight = torch.randn(60, 50, dtype=torch.float64)
        lost = [
            float((U @ torch.diag(S) @ Vh - weight).norm())
            for U, S, Vh in (
                inits.leading(weight, 6, niter=n, random=inits.generator(0, "")) for n in (0, 2, 16)
            )
        ]
        best = float((truncated(weight, 6) - weight).norm())
        assert lost[0] > lost[1] > lost[2] >= best - 1e-9
        assert lost[2] < 1.001 * best


@pytest.mark.parametrize("niter", [None, 16])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_pissa_is_the_principal_part(niter: int | None, scale: float) -> None:
    A, B = inits.pissa(matrix(), 4, scale, niter=niter, random=inits.generator(0, "a"))
    torch.testing.assert_close(scale * B @ A, truncated(matrix(), 4), rtol=0, atol=1e-6)
    # Both halves carry the root of the singular values.
    torch.testing.assert_close(A @ A.T, B.T @ B)


def test_olora_is_the_first_part_of_qr() -> None:
    A, B = inits.olora(matrix(), 4)
    torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=torch.float64))
    # What Q's first columns span is what W0's first columns span, and R is W0 seen from there.
    torch.testing.assert_close(B @ A, B @ B.T @ matrix())
    torch.testing.assert_close((B @ A)[:, :4], matrix()[:, :4])


class TestCorda:
    @pytest.mark.parametrize("method", ["ipm", "kpm"])
    def test_the_terms_are_those_of_the_oriented_decomposition(self, method: str) -> None:
        x = torch.randn(300, 17, dtype=torch.float64) @ matrix(17, 17, seed=2)
        C = x.T @ x / len(x)
        oriented = inits.orient(matrix(), C, 5, method)  # type: ignore[arg-type]
        A, B = oriented.factors(2.0)
        damped = C + 0.01 * C.diagonal().mean() * torch.eye(17, dtype=torch.float64)
        while torch.dist(damped @ damped.inverse(), torch.eye(17, dtype=torch.float64)) >= 0.05:
            damped += 0.01 * C.diagonal().mean() * torch.eye(17, dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(matrix() @ damped, full_matrices=False)
        part = slice(None, 5) if method == "ipm" else slice(-5, None)
        expected = U[:, part] @ torch.diag(S[part]) @ Vh[part] @ damped.inverse()
        torch.testing.assert_close(2 * B @ A, expected)

    def test_all_terms_together_are_the_weight(self) -> None:
        x = torch.randn(300, 17, dtype=torch.float64)
        A, B = inits.orient(matrix(), x.T @ x, 17).factors(1.0)
        torch.testing.assert_close(B @ A, matrix())

    def test_ipm_loses_less_on_those_inputs_than_pissa_and_kpm_more(self) -> None:
        x = torch.randn(300, 17, dtype=torch.float64) @ matrix(17, 17, seed=2)
        weight = torch.randn(24, 17, dtype=torch.float64)

        def lost(A: Tensor, B: Tensor) -> float:
            return float((x @ (weight - B @ A).T).norm())

        C = x.T @ x / len(x)
        ipm = lost(*inits.orient(weight, C, 4, "ipm").factors(1.0))
        assert (
            ipm < lost(*inits.pissa(weight, 4, 1.0)) < lost(*inits.orient(weight, C, 4, "kpm").factors(1.0))
        )

    def test_a_covariance_that_has_no_inverse_is_damped(self) -> None:
        x = torch.randn(3, 17)
        A, B = inits.orient(matrix().float(), x.T @ x, 4).factors(1.0)
        assert torch.isfinite(B @ A).all()

    def test_covariances_are_averaged_over_batches(self) -> None:
        batches = [torch.randn(2, 5, 7), torch.randn(9, 7)]
        total = inits.Covariance()
        for x in batches:
            total.add(x)
        rows = [(x.flatten(0, -2) / x.max().abs()) for x in batches]
        torch.testing.assert_close(total.mean(), sum(x.T @ x for x in rows) / 2)

    @pytest.mark.parametrize(
        "bad", [torch.zeros(3, 4), torch.full((3, 4), torch.nan), torch.full((3, 4), torch.inf)]
    )
    def test_inputs_that_say_nothing_are_refused(self, bad: Tensor) -> None:
        with pytest.raises(AdapterError, match="no finite covariance"):
            inits.Covariance().add(bad)

    def test_a_sum_that_overflows_is_refused(self) -> None:
        total = inits.Covariance(torch.float16)
        with pytest.raises(AdapterError, match=r"outgrew torch\.float16 at batch 4"):  # noqa: PT012
            for _ in range(9):
                total.add(torch.ones(20000, 4))

    def test_a_covariance_that_is_none_is_refused(self) -> None:
        with pytest.raises(AdapterError, match="has no inverse"):
            inits.orient(matrix().float(), torch.full((17, 17), torch.inf), 4)

    def test_no_inputs_are_refused(self) -> None:
        with pytest.raises(AdapterError, match="never called"):
            inits.Covariance().mean()


class TestLoraGA:
    r = 3

    def start(
        self, direction: str = "ArB2r", scale: str = "unit", lora_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        config = LoraGAConfig(direction=direction, scale=scale)  # type: ignore[arg-type]
        triples = inits.lead(matrix(), self.r, inits.generator(0, "a"))
        return inits.lora_ga(triples, self.r, lora_scale, matrix(seed=5), config, inits.generator(0, "a"))

    @pytest.mark.parametrize(
        ("direction", "for_A", "for_B"),
        [("ArB2r", [0, 1, 2], [3, 4, 5]), ("A2rBr", [3, 4, 5], [0, 1, 2]), ("ArBr", [1, 3, 5], [0, 2, 4])],
    )
    def test_each_direction_takes_its_vectors(
        self, direction: str, for_A: list[int], for_B: list[int]
    ) -> None:
        A, B = self.start(direction)
        U, S, Vh = torch.linalg.svd(matrix(), full_matrices=False)
        torch.testing.assert_close(A.T @ A, Vh[for_A].T @ Vh[for_A], rtol=0, atol=1e-6)
        expected = U[:, for_B] @ torch.diag(S[for_B] ** 2) @ U[:, for_B].T
        torch.testing.assert_close(B @ B.T, expected, rtol=0, atol=1e-6)

    def test_random_takes_pairs(self) -> None:
        A, B = self.start("random")
        # B·A is then a sum of the gradient's own terms.
        U, S, Vh = torch.linalg.svd(matrix(), full_matrices=False)
        terms = (U.T @ (B @ A) @ Vh.T).diagonal() / S
        assert sorted(terms[:6].round(decimals=4).tolist()) == [0, 0, 0, 1, 1, 1]

    def test_scales(self) -> None:
        A, B = self.start()
        stable, weight, gd = (
            self.start(scale=s, lora_scale=4.0) for s in ("stable", "weight_svd", "gd_scale")
        )
        torch.testing.assert_close(stable[1], B * 24**0.25 / 4)
        norm = torch.linalg.matrix_norm(matrix(seed=5), 2)
        torch.testing.assert_close(weight[1][:, 0].norm(), norm, rtol=1e-4, atol=0)
        torch.testing.assert_close(gd[0], A / 4)
        torch.testing.assert_close(gd[1], B / 4)

    def test_the_first_step_follows_the_gradient(self) -> None:
        """What one step of plain descent on A and B changes lies along the gradient's leading part."""
        G = matrix()
        A, B = self.start("ArB2r")
        change = -(B @ (B.T @ G)) - (G @ A.T) @ A
        random = torch.randn(self.r, 17, dtype=torch.float64) / 17**0.5
        drawn = -(G @ random.T) @ random

        def alignment(step: Tensor) -> float:
            return float(-(step * G).sum() / (step.norm() * G.norm()))

        assert alignment(change) > 0.95
        assert alignment(change) > alignment(drawn) + 0.1
        # In the span of the leading r right vectors it is the whole gradient.
        Vh = torch.linalg.svd(G).Vh[: self.r]
        assert float(((change + G) @ Vh.T).norm() / (G @ Vh.T).norm()) < 0.1
