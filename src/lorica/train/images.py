"""A folder of images: in folders named after their classes, or listed in a file beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image

from lorica.errors import FileError

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
