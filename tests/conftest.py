"""What every test runs under: shapes checked at run time, one thread, no network, the same random numbers."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorica.train import Recipe

# Set before anything imports torch or transformers, which read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What a test reads from the console must not depend on the developer's own.
os.environ["COLUMNS"] = "120"
for variable in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE"):
    os.environ.pop(variable, None)

import coverage
import fork_server
import hypothesis
import jaxtyping
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

gc.disable()  # until all is imported: a sixth of that time went into walking what was imported before


class _Tracing:
    """Measures coverage where it is asked for, and leaves the rest untraced, which is a third quicker.

    Args:
        measured: what pytest-cov has started; None without it.
    """

    def __init__(self, measured: coverage.Coverage | None) -> None:
        self.measured, self.on = measured, True
        self.turn(False)

    def turn(self, on: bool) -> None:
        """On or off."""
        if self.measured is not None and on != self.on:
            (self.measured.start if on else self.measured.stop)()
        self.on = on


_tracing = _Tracing(coverage.Coverage.current())


def _modules_with_shapes() -> list[str]:
    """The modules of lorica whose annotations state array shapes: they import them from `lorica._shapes`.

    The others are left as they are, so that a wrong argument there meets lorica's own error, not a checker's.
    """
    source = REPOSITORY / "src"
    files = [
        path for path in (source / "lorica").rglob("*.py") if "from lorica._shapes import" in path.read_text()
    ]
    return [
        re.sub(r"\.__init__$", "", ".".join(path.relative_to(source).with_suffix("").parts)) for path in files
    ]


# Must come before the first import of lorica: the modules are rewritten as they are imported.
jaxtyping.install_import_hook(_modules_with_shapes(), "shape_check.check")

import torch

torch.set_num_threads(1)


# The same examples every time: a failure that comes and goes teaches nobody. LORICA_EXPLORE=1 draws new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("explore" if os.environ.get("LORICA_EXPLORE") else "same")


# A process that is killed leaves what it wrote to the system; waiting for the disk proves nothing here.
os.fsync = lambda fd: None

_TIE: list[Any] = []
"""transformers' own `tie_weights`, as it was first seen."""

COVERED = ("algebra", "checkpoint", "inits", "interop", "layers", "methods", "model", "pieces")
"""Folders whose tests count for the coverage of the core, besides the files beside them."""

NOT_COVERED = ("examples", "journeys", "paper_tables", "plain_text", "ranks", "recipes")
"""What those files are about that do not."""

CHECKED = ("dropin", "paper", "study", "trainer")
"""Folders whose tests run with shapes checked, a tenth of a run's time, besides the core's own."""


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Import the floors whose coverage is measured: what a module does when it is imported counts too."""
    global _tracing
    worker = hasattr(session.config, "workerinput")
    if worker:  # for which pytest-cov has just started another
        _tracing = _Tracing(coverage.Coverage.current())
    if _tracing.measured is None or (session.config.getoption("numprocesses", None) and not worker):
        return
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    (floors,) = (each["source_modules"] for each in contracts if each["name"].startswith("The core needs"))
    _tracing.turn(True)
    for floor in map(importlib.import_module, floors):
        for module in pkgutil.walk_packages(getattr(floor, "__path__", []), f"{floor.__name__}."):
            with contextlib.suppress(ImportError):  # of an extra that is not installed
                importlib.import_module(module.name)
    _tracing.turn(False)


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Start the fork server before Ray is imported, which its workers must do after they are forked."""
    if "ray" in module_path.stem.split("_"):
        fork_server.start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with Ray, which is long and waits: one worker of pytest's is at it, the others go on."""
    items.sort(key=lambda item: "ray" not in item.path.stem.split("_"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Trace what counts for the coverage of the core; leave the upper floors' tests alone."""
    folder, *below = item.path.parts[len((REPOSITORY / "tests").parts) :]
    core = not below or folder in COVERED
    marked = item.get_closest_marker("no_cover") is not None
    _tracing.turn(core and not marked and item.path.stem[len("test_") :] not in NOT_COVERED)
    checked = core or not {folder, *below}.isdisjoint(CHECKED)
    jaxtyping.config.update("jaxtyping_disable", not checked)
    result = yield
    _tracing.on |= marked  # as pytest-cov leaves it
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage again, of what comes from now on; all that tests fork has what is here."""
    arrow = sys.modules.get("datasets.arrow_dataset")
    if arrow is not None:  # it pickles all rows to name them, for caches of files that are nowhere here
        vars(arrow)["generate_fingerprint"] = lambda dataset: os.urandom(8).hex()
    gc.freeze()
    if "lorica.train.run" in sys.modules:  # else there may be nothing that forks
        fork_server.start()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Hide what the modules before left alive from the garbage collector, which every training run calls.

    A process that has imported all libraries holds millions of objects, and a walk over them takes as long as
    a small run itself.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def tied() -> None:
    """Have transformers tie weights again where the modules before left it without.

    It takes the method out for the length of each `from_pretrained`, in all threads: a test that loads one
    model while its server's thread loads another may put back the empty one.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None:
        cls = modeling.PreTrainedModel
        if cls.tie_weights.__name__ == "tie_weights":
            _TIE.append(cls.tie_weights)
        else:
            cls.tie_weights = _TIE[0]


@pytest.fixture(autouse=True)
def seed() -> int:
    """Start every test from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Run without the shape checks, for a compiler or an exporter: they cannot trace the checks."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of shared data sets: ``LORICA_DATA``, or ``shared/data`` beside the repository."""
    folder = Path(os.environ.get("LORICA_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the shared data sets: no folder {folder}; set LORICA_DATA to where they are")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder of two layers, made once."""
    from train import tiny

    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of few rows, made once."""
    from train import tiny

    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_recipe(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe on both, with the training options given."""
    from train import tiny

    def make(**training: object) -> Recipe:
        return tiny.recipe(tiny_model, tiny_data, tmp_path / "run", **training)

    return make
