"""An encoder and its adapters, made once."""

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
