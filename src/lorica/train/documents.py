"""A folder of text files, each of them one text: alone, or in folders named after their classes."""

from __future__ import annotations

from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from lorica.errors import FileError
from lorica.train.formats.text import content, decoded


def holds_documents(folder: Path) -> bool:
    """Whether there is a ``.txt`` file in a folder, or in one right below it or below a split's."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.txt", "*/*.txt", "*/*/*.txt"))


def document_rows(folder: Path, encoding: str | None) -> Dataset:
    """Rows of a ``text``, and its ``label`` where the files stand in a folder for each class.

    Args:
        folder: holds text files, or folders of them.
        encoding: theirs; None as for any text file.

    Raises:
        FileError: it holds both, or a file cannot be read.
    """
    files = sorted(folder.glob("*.txt"))
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and any(each.glob("*.txt")))
    if files and classes:
        raise FileError(
            f"{folder} has text files ({files[0].name}) beside folders of them ({classes[0]}); give one "
            "or the other"
        )
    if files:
        return Dataset.from_dict({"text": [_text(file, encoding) for file in files]})
    found = [
        (_text(file, encoding), number)
        for number, name in enumerate(classes)
        for file in sorted((folder / name).glob("*.txt"))
    ]
    columns = {"text": [text for text, _ in found], "label": [number for _, number in found]}
    return Dataset.from_dict(columns, Features({"text": Value("string"), "label": ClassLabel(names=classes)}))


def _text(file: Path, encoding: str | None) -> str:
    return decoded(content(file), file, encoding)[0]
