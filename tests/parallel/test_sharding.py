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
    first, second = on_ranks(work.together_and_alone, names, str(folder))
    assert first == second
    return first


@pytest.mark.parametrize("name", work.CASES)
def test_two_ranks_train_as_one_process(name: str, outcomes: Any) -> None:
    found = outcomes[name]
    assert not isinstance(found, str), found
    assert found.moved > 0
    alone, parts, copies = found.norms
    for way, together in enumerate((parts, copies)):
        summed = name in work.SUMMED_OTHERWISE[way]
        assert found.apart[way] <= (1e-6 if summed else 0.0)
        assert found.same_file[way] or summed
        assert together == pytest.approx(alone, rel=1e-5)
    if name in work.FIXED:
        assert "choose which acts before sharding" in found.base_apart
    else:
        assert found.base_apart == pytest.approx(0.0, abs=1e-6)
