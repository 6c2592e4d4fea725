"""Rows from wherever they are: a file, a folder of files, images or texts, the Hub, the embedded data set."""

from __future__ import annotations

import difflib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from lorica.errors import ConfigError, FileError, listing
from lorica.train import embedded
from lorica.train.console import quiet
from lorica.train.data.json import read_objects
from lorica.train.data.mapped import mapped_rows
from lorica.train.data.running import is_running, paragraphs, read_running_text, running_columns
from lorica.train.data.spreadsheets import read_delimited, read_sheets
from lorica.train.data.tables import Form, Found
from lorica.train.data.text import PACKED, content, decoded, read_conll, read_lines_of_text

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "testing"),
}

IN_PYTHON = "(rows given in Python)"
"""The name, in a recipe, of rows that were given in memory."""

_KNOWN = {name for names in SPLITS.values() for name in names}


def read(source: str, subset: str | None = None, form: Form | None = None) -> dict[str, Dataset]:
    """Rows by split; see `find_rows`.

    Raises:
        FileError: they cannot be read, or some of them are broken.
    """
    found = find_rows(source, subset, form)
    for split, each in found.items():
        for row, problem in each.broken.items():
            raise FileError(f"row {row + 1} of {describe(source, split)} {problem}")
    return {split: each.rows for split, each in found.items()}


def find_rows(source: str, subset: str | None = None, form: Form | None = None) -> dict[str, Found]:
    """Read a file, a folder or a Hub data set.

    Args:
        source: path or name; see `DataConfig.train`. With ``#`` and a split's name after it, that split.
        subset: configuration of a Hub data set that has several.
        form: as far as it is known, the form of its files.

    Returns:
        The rows by split; a single file is the ``train`` split.

    Raises:
        FileError: it is missing or unreadable, or the Hub does not have it or cannot be reached.
    """
    source, split = _parts(source)
    path = Path(source).expanduser()
    with quiet():
        found = _read(source, path, subset, split, form or Form())
    if split is None:
        if len(found) > 1 and path.is_file() and not _KNOWN & set(found):
            raise FileError(
                f"{source} holds {listing(found)}; name one of them: {source}#{next(iter(found))}"
            )
        return found
    if split not in found:
        raise FileError(f"{source} has no {split} split; it has: {listing(found)}")
    return {split: found[split]}


def _read(source: str, path: Path, subset: str | None, split: str | None, form: Form) -> dict[str, Found]:
    if path.is_file():
        return _file(path, form)
    if path.is_dir():
        return _folder(path, split, form)
    if source == IN_PYTHON:
        raise FileError(
            "the rows of this recipe were given in Python; give them again: train(recipe, rows), "
            "evaluate(folder, rows)"
        )
    if source == embedded.DATA:
        return _plain(embedded.docstrings())
    if format_of(path) or source.startswith((".", "/", "~")):
        raise FileError(f"no file or folder {source}{_neighbours(path)}")
    return _plain(_hub(source, subset))


def _plain(found: dict[str, Dataset]) -> dict[str, Found]:
    return {split: Found(rows) for split, rows in found.items()}


def describe(source: str, split: str) -> str:
    """The name of a split of a source in a message: its file, if it has one."""
    source, _ = _parts(source)
    path = Path(source).expanduser()
    if path.is_file():
        return source
    if source == IN_PYTHON:
        return f"the {split} rows"
    if path.is_dir() and split in (files := _files(path)):
        return str(files[split])
    return f"the {split} split of {source}"


def folder_of(source: str) -> Path | None:
    """The folder of the file, or of the files, that a source means; None where it is on the Hub."""
    path = Path(_parts(source)[0]).expanduser()
    return path.parent if path.is_file() else path if path.is_dir() else None


def _file(path: Path, form: Form) -> dict[str, Found]:
    return {name or "train": found for name, found in read_file(path, form).items()}


def _files(folder: Path, wanted: str | None = None) -> dict[str, Path]:
    """Files of rows in a folder by the part of their names before the first dot.

    A ``.txt`` file counts if it is named as a split: others are notes and licences.

    Raises:
        FileError: two have one name.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        kind, name = format_of(file) if file.is_file() else None, file.name.split(".")[0]
        if kind is None or (kind == "text" and name not in _KNOWN and name != wanted):
            continue
        if name in found and name != "metadata":
            raise FileError(
                f"the folder {folder} has {found[name].name} and {file.name}; name the one to read"
            )
        found[name] = file
    return found


def _parts(source: str) -> tuple[str, str | None]:
    """A source and the split that is named after its ``#``, if one is; a file may have one in its name."""
    name, mark, split = source.rpartition("#")
    return (name, split) if mark and not Path(source).expanduser().exists() else (source, None)


def _folder(path: Path, wanted: str | None, form: Form) -> dict[str, Found]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        stored = datasets.load_from_disk(str(path))
        return _plain(
            {str(name): rows for name, rows in stored.items()}
            if isinstance(stored, DatasetDict)
            else {"train": stored}
        )
    files = {name: file for name, file in _files(path, wanted).items() if name != "metadata"}
    if not files and holds_images(path):
        return _images(path, form)
    if not files and holds_documents(path):
        return _plain(_parts_of(path, lambda part: document_rows(part, form)))
    named = {name: file for name, file in files.items() if name in _KNOWN or name == wanted}
    if not named and len(files) == 1:
        named = {"train": next(iter(files.values()))}
    if not named:
        there = ", ".join(file.name for file in files.values()) or "no file of rows"
        raise FileError(
            f"the folder {path} must hold train.csv, .tsv, .json, .jsonl, .txt, .xlsx, .parquet or .arrow "
            "(or "
            f".gz), or images; it has {there}"
        )
    return {name: _only(_file(file, form), file) for name, file in named.items()}


def _only(found: dict[str, Found], file: Path) -> Found:
    if len(found) > 1:
        raise FileError(f"{file} holds {listing(found)}, where one file of a folder is one split")
    return next(iter(found.values()))


def _images(path: Path, form: Form) -> dict[str, Found]:
    def listed(file: Path) -> Dataset:
        return _only(_file(file, form), file).rows

    return _plain(_parts_of(path, lambda part: image_rows(part, listed)))


def _parts_of(path: Path, rows: Callable[[Path], Dataset]) -> dict[str, Dataset]:
    """Rows of each folder that is named as a split, or of the whole one."""
    parts = {each.name: each for each in sorted(path.iterdir()) if each.is_dir() and each.name in _KNOWN}
    return {name: rows(part) for name, part in (parts or {"train": path}).items()}


def _hub(name: str, subset: str | None) -> dict[str, Dataset]:
    try:
        found = datasets.load_dataset(name, subset)
    except ValueError as error:
        raise FileError(f"cannot load {name} from the Hub: {reason(error)}") from error
    except Exception as error:  # the Hub's client has a class for each way in which a network can fail
        raise FileError(
            f"{name} is no file or folder here, and could not be had from the Hugging Face Hub "
            f"({reason(error)}). A csv, tsv, json, jsonl, parquet or arrow file works without the Hub, as "
            "does a folder of such files, of images, or one that save_to_disk wrote: --data.train PATH"
        ) from error
    if not isinstance(found, DatasetDict):
        raise ConfigError(f"{name} is streamed, which is not supported; download it and name the files")
    return {str(split): rows for split, rows in found.items()}


def _neighbours(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; there is no folder {path.parent} either"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(str(path.parent / name) for name in close)}?" if close else ""


_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_LISTS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def holds_images(folder: Path) -> bool:
    """Whether there is an image in a folder, or in one below it."""
    return any(file.suffix.lower() in _SUFFIXES for file in folder.rglob("*"))


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and those below it, in the order of their paths."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)


def image_rows(folder: Path, read: Callable[[Path], Dataset]) -> Dataset:
    """Rows of an ``image`` and its ``label``, or whatever ``metadata.csv`` or ``.jsonl`` says of each image.

    Args:
        folder: holds a folder for each class; or images, and a file with the column ``file_name``.
        read: reads that file.

    Raises:
        FileError: there is neither, or the file lacks the column.
    """
    listed = next((folder / name for name in _LISTS if (folder / name).is_file()), None)
    if listed is not None:
        rows = read(listed)
        if "file_name" not in rows.column_names:
            raise FileError(
                f"{listed} has no column 'file_name' with the images' names; it has: "
                f"{', '.join(rows.column_names)}"
            )
        paths = [None if name is None else str(folder / name) for name in rows["file_name"]]
        return rows.remove_columns("file_name").add_column("image", paths).cast_column("image", Image())  # type: ignore[call-arg]
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and holds_images(each))
    if not classes:
        raise FileError(
            f"the images in {folder} have no labels: put them into a folder for each class, or list them in "
            "metadata.csv, with the columns file_name and label"
        )
    found = [(str(file), number) for number, name in enumerate(classes) for file in images_in(folder / name)]
    columns = {"image": [path for path, _ in found], "label": [number for _, number in found]}
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=classes)}))


def holds_documents(folder: Path) -> bool:
    """Whether there is a ``.txt`` file in a folder, or in one right below it or below a split's."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.txt", "*/*.txt", "*/*/*.txt"))


def document_rows(folder: Path, form: Form) -> Dataset:
    """Rows of a ``text``, and its ``label`` where the files stand in a folder for each class.

    Args:
        folder: holds text files, or folders of them.
        form: as far as it is known, their form. Running texts are rows of paragraphs that go on.

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
    encoding = form.encoding
    if files and form.running:
        return Dataset.from_dict(running_columns([paragraphs(_text(file, encoding)) for file in files]))
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


FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
    ".conll": "conll",
    ".conllu": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
    ".parquet": "parquet",
    ".arrow": "arrow",
}

_TABLES = ("parquet", "arrow")


def format_of(path: Path) -> str | None:
    """Format of a file of rows by its name, or None."""
    packed = path.suffix.lower() in PACKED
    kind = FORMATS.get(Path(path.name[: -len(path.suffix)] if packed else path.name).suffix.lower())
    return None if packed and kind in _TABLES else kind


def read_file(path: Path, form: Form) -> dict[str | None, Found]:
    """Rows of a file, by split or sheet; under None where it has neither.

    Args:
        path: the file.
        form: as far as it is known, its form.

    Raises:
        FileError: its format cannot be told by its name, or it cannot be read as that.
    """
    kind = format_of(path)
    if kind is None:
        raise FileError(f"cannot tell the format of {path} by its name; {_expected(path)}")
    if form.streaming and not form.tagged and not form.running:
        return {None: Found(mapped_rows(path, kind, form.encoding, form.columns))}
    if kind in _TABLES:
        return {None: Found(_stored(path, kind))}
    raw = content(path, kind)
    if not raw.strip():
        raise FileError(f"{path} has no rows")
    collects = gc.isenabled()
    gc.disable()  # or the collector walks over all the cells again and again, for half of the time
    try:
        return read_sheets(raw, path, form) if kind == "xlsx" else _read_text(raw, path, kind, form)
    finally:
        if collects:
            gc.enable()


def _read_text(raw: bytes, path: Path, kind: str, form: Form) -> dict[str | None, Found]:
    text, notes = decoded(raw, path, form.encoding)
    if kind in ("csv", "tsv"):
        found = {None: read_delimited(text, path, kind, form)}
    elif kind == "json":
        found = read_objects(text, path)
    elif kind == "conll" or form.tagged:
        found = {None: read_conll(text, path)}
    elif form.running or (form.running is None and is_running(text)):
        found = {None: read_running_text(text, path)}
    else:
        found = {None: read_lines_of_text(text, path)}
    return {
        name: Found(each.rows, each.lines, (*notes, *each.notes), each.broken) for name, each in found.items()
    }


def _stored(path: Path, kind: str) -> Dataset:
    try:
        rows: Any = datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # each reader raises its own kinds, wrapped in datasets' own
        if "corresponds to no data" in str(error):
            raise FileError(f"{path} has no rows") from error
        raise FileError(f"cannot read {path} as {kind}: {reason(error)}") from error
    assert isinstance(rows, Dataset)
    return rows


def reason(error: BaseException) -> str:
    """The first line of an error's message, or of the error's that caused it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no detail'}"


def _expected(path: Path) -> str:
    if path.suffix.lower() in (".xls", ".ods", ".numbers"):
        return "save it as .xlsx or .csv"
    return f"expected one of {', '.join(FORMATS)}; of those that are text, also packed: {', '.join(PACKED)}"
