"""Arguments of another kind than is due, to the algebra and the study of adapters: refused by name.

Where annotations state shapes, the tests' own checker stops them first; those functions are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from algebra.made import made

import lorica
from lorica import algebra, study

ADAPTER = made(4)
NO_ADAPTER = [None, 1, "runs/one", Path("runs/one"), [], {"x": 1}, torch.nn.Linear(2, 2)]
NO_COUNT = [0, -1, 1.5, "1", [1], object(), float("nan"), float("inf"), 1j, True, torch.tensor(2.0)]
NO_SHARE = [0, -0.5, 1.5, "1", [1], object(), float("nan"), float("inf"), 1j, True]
NO_FACTOR = [None, True, "1", [1], float("nan"), float("inf"), 10**400, 1j, object()]
NO_WEIGHTS = [
    [],
    [1],
    [1, "a"],
    [float("nan"), 1],
    [1e308, 1e308],
    "ab",
    1,
    [None, 1],
    [10**400, 1],
    object(),
]

CASES: dict[str, tuple[list[Any], Callable[[Any], Any]]] = {
    "add": (NO_ADAPTER, lambda given: algebra.add(ADAPTER, given)),
    "subtract": (NO_ADAPTER, lambda given: algebra.subtract(ADAPTER, given)),
    "scale": (NO_ADAPTER, lambda given: algebra.scale(given, 2.0)),
    "compress": (NO_ADAPTER, lambda given: algebra.compress(given, rank=2)),
    "combine": ([*NO_ADAPTER, [ADAPTER, None]], algebra.combine),
    "error": (NO_ADAPTER, lambda given: algebra.error(ADAPTER, given)),
    "spectrum": (NO_ADAPTER, study.spectrum),
    "advise": (NO_ADAPTER, study.advise),
    "others": (NO_ADAPTER[1:4], lambda given: study.advise(ADAPTER, others=given)),
    "interference": ([*NO_ADAPTER, {"a": ADAPTER, "b": 1}], study.interference),
    "norms": (NO_ADAPTER, study.norms),
    "gather": (NO_ADAPTER, study.gather),
    "cut": (NO_ADAPTER, lambda given: study.cut(ADAPTER, given)),
    "weights": (NO_WEIGHTS, lambda given: algebra.combine([ADAPTER, ADAPTER], given)),
    "factor": (NO_FACTOR, lambda given: algebra.scale(ADAPTER, given)),
    "keep": ([2, -1, *NO_COUNT[2:]], lambda given: algebra.add(ADAPTER, ADAPTER, keep=given)),
    "rank": (NO_COUNT, lambda given: algebra.compress(ADAPTER, rank=given)),
    "energy": (NO_SHARE, lambda given: algebra.compress(ADAPTER, energy=given)),
    "svd_rank": (NO_COUNT, lambda given: algebra.combine([ADAPTER], method="svd", svd_rank=given)),
    "density": (NO_SHARE, lambda given: algebra.combine([ADAPTER], method="ties", density=given)),
    "seed": (
        ["1", 0.5, object()],
        lambda given: algebra.combine([ADAPTER], method="dare_linear", density=0.5, seed=given),
    ),
    "method": ([None, 1, ["svd"], "nope"], lambda given: algebra.combine([ADAPTER], method=given)),
    "energy of advice": (NO_SHARE, lambda given: study.advise(ADAPTER, energy=given)),
    "budget": (NO_COUNT, lambda given: study.advise(ADAPTER, budget=given)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name(case: str) -> None:
    values, act = CASES[case]
    for value in values:
        with pytest.raises(lorica.LoricaError):
            act(value)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd", "ties", "magnitude_prune_svd"])
def test_a_density_of_one_is_the_same_as_a_whole_number(method: str) -> None:
    drawn: dict[str, Any] = {"seed": 0} if method.startswith("dare") else {}
    one, other = (algebra.combine([ADAPTER], method=method, density=each, **drawn) for each in (1, 1.0))
    for path, factors in one.factors.items():
        assert torch.equal(factors.A, other.factors[path].A)
        assert torch.equal(factors.B, other.factors[path].B)
