"""A checkpoint's index: the file that names each tensor's shard."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lorica.errors import FileError, lines
from lorica.reading import read_object


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of an index, and the shard of each tensor by it.

    Shards lie beside their index. Files are written and downloaded by these names, so a name that leads out
    of the folder is refused.

    Raises:
        FileError: the index is damaged, or a name in it is not that of a file beside it.
    """
    try:
        content = read_object(path)
    except FileNotFoundError:
        raise FileError(f"{path} is not there") from None
    home = content.get("weight_map")
    if not isinstance(home, dict) or not home:
        raise FileError(f"{path} has no weight_map; the file is damaged")
    wrong = [f"{name}: {file!r}" for name, file in home.items() if not _is_plain(file)]
    if wrong:
        raise FileError(
            f"{path} should name files that stand beside it, such as 'model-00001-of-00002.safetensors', and "
            f"has:\n{lines(wrong)}"
        )
    metadata = content.get("metadata")
    if not isinstance(metadata, dict | None):
        raise FileError(f"{path} should hold an object as metadata, not {metadata!r}; the file is damaged")
    return content, home


def _is_plain(file: object) -> bool:
    """Whether this is the name of a file and not a path, on any system."""
    return (
        isinstance(file, str)
        and file not in ("", ".", "..")
        and all(kind(file).name == file for kind in (PurePosixPath, PureWindowsPath))
    )
