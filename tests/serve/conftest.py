"""An encoder and a decoder with their adapters, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with ``model`` and ``adapters``, and each adapter's model alone."""
    import encoders

    folder = tmp_path_factory.mktemp("encoder")
    return folder, encoders.write_encoder(folder)


@pytest.fixture(scope="module")
def model() -> Any:
    """A decoder."""
    from serving import decoder

    return decoder()


@pytest.fixture(scope="module")
def folders(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The decoder's adapters, one of each kind."""
    from serving import KINDS, write_adapter

    root = tmp_path_factory.mktemp("adapters")
    return {k: write_adapter(model, root / k, config, i) for i, (k, config) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def alone(model: Any) -> Any:
    """The answers of each adapter alone on the decoder."""
    from serving import Alone

    return Alone(model)
