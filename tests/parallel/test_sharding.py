"""Two ranks with half the rows each against one process with all of them, for all that an adapter holds."""

from __future__ import annotations

from typing import Any

import pytest
from parallel import work
from ranks import on_ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("transformers")
    names = list(work.CASES)
    folder = tmp_path_factory.mktemp("sharded")
    first, second = on_ranks(work.sharded_and_not, names, str(folder), timeout=300)
    assert first == second
    return first


@pytest.mark.parametrize("name", work.CASES)
def test_sharded_training_is_that_of_one_process(name: str, outcomes: Any) -> None:
    found = outcomes[name]
    assert not isinstance(found, str), found
    assert found.moved > 0
    assert found.apart <= (1e-6 if name in work.SUMMED_OTHERWISE else 0.0)
    assert found.same_file or name in work.SUMMED_OTHERWISE
    assert found.norms[0] == pytest.approx(found.norms[1], rel=1e-5)
    if name in work.FIXED:
        assert "choose which acts before sharding" in found.base_apart
    else:
        assert found.base_apart == pytest.approx(0.0, abs=1e-6)
