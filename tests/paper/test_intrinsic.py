"""Few directions are enough: training in a random subspace, and the spectrum of what full training changes.

On scikit-learn's handwritten digits, so small enough to run here and real enough to mean something.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lorica import Factors
from lorica.study.spectra import of_layer

WIDTHS = (64, 96, 96, 10)

Rows = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> tuple[Rows, Rows]:
    """Rows to learn from, and others to be scored on."""
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, score = order[:1200], order[1200:]
    return (x[learn], y[learn]), (x[score], y[score])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for i, o in itertools.pairwise(WIDTHS) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def descend(forward: Callable[[Tensor], Tensor], parameters: list[Tensor], rows: Rows, rate: float) -> None:
    adam = torch.optim.Adam(parameters, lr=rate)
    for _ in range(150):
        adam.zero_grad()
        F.cross_entropy(forward(rows[0]), rows[1]).backward()
        adam.step()


def in_subspace(dimensions: int, learn: Rows, score: Rows) -> float:
    """Accuracy where only θ₀ + P·z can be reached, P random and z of so many numbers (Li et al., 2018)."""
    model = network()
    start = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in start.values()]
    P = torch.randn(sum(sizes), dimensions, generator=torch.Generator().manual_seed(1))
    P /= P.norm(dim=0)
    z = torch.zeros(dimensions, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        moved = (P @ z).split(sizes)
        weights = {name: p + m.view_as(p) for (name, p), m in zip(start.items(), moved, strict=True)}
        return functional_call(model, weights, x)

    descend(forward, [z], learn, 0.1)
    with torch.no_grad():
        return accuracy(forward(score[0]), score[1])


def test_the_intrinsic_dimension_is_a_small_share_of_the_parameters(digits: tuple[Rows, Rows]) -> None:
    """d₉₀: how many random directions give nine tenths of the accuracy that all parameters give."""
    learn, score = digits
    model = network()
    descend(model, list(model.parameters()), learn, 3e-3)
    whole = accuracy(model(score[0]), score[1])
    assert whole > 0.95
    reached = {d: in_subspace(d, learn, score) for d in (4, 32, 256)}
    count = sum(p.numel() for p in model.parameters())
    assert reached[4] < reached[32] < reached[256]
    assert reached[32] < 0.9 * whole <= reached[256]
    assert 256 / count < 0.02


def test_what_full_training_changes_has_a_low_effective_rank(digits: tuple[Rows, Rows]) -> None:
    """From a network that knows eight of the digits to one that knows ten: W − W0 of full training."""
    learn, score = digits
    known = learn[1] < 8
    model = network()
    descend(model, list(model.parameters()), (learn[0][known], learn[1][known]), 3e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    descend(model, list(model.parameters()), learn, 1e-3)
    assert accuracy(model(score[0]), score[1]) > 0.93
    hidden = model.get_parameter("2.weight").detach() - before["2.weight"]
    whole = Factors(torch.eye(hidden.shape[1]), hidden, 1.0)
    found = of_layer(whole)
    assert found.energy[7] > 0.9
    assert found.effective_rank < 10
    chance = of_layer(Factors(torch.eye(96), torch.randn(96, 96), 1.0))
    assert chance.effective_rank > 40
