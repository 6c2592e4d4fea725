"""That the suite itself really runs with shapes checked: everything else relies on it."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from lorica.functional import lora_linear


def _linear(**changed: torch.Tensor) -> torch.Tensor:
    parts = {"x": torch.ones(2, 3, 8), "A": torch.ones(4, 8), "B": torch.ones(5, 4), **changed}
    return lora_linear(parts["x"], torch.ones(5, 8), None, parts["A"], parts["B"], 1)


def test_fitting_shapes_pass() -> None:
    assert _linear().shape == (2, 3, 5)


@pytest.mark.parametrize(
    "changed", [{"A": torch.ones(4, 7)}, {"B": torch.ones(5, 3)}, {"x": torch.ones(2, 3, 7)}]
)
def test_a_shape_that_does_not_fit_is_named(changed: dict[str, torch.Tensor]) -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="lora_linear"):
        _linear(**changed)


@pytest.mark.usefixtures("unchecked_shapes")
def test_checks_can_be_left_out_for_a_compiler() -> None:
    compiled = torch.compile(_linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(), _linear())
