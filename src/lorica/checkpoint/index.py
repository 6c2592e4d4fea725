"""The file that lists a checkpoint's tensors, each with the shard that holds it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lorica.errors import FileError, lines
from lorica.reading import read_object


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of an index, and from it the name of each tensor's shard.

    Shards stand beside their index. Whoever writes or fetches files by these names stays in one folder, so a
    name that leads anywhere else is refused.

    Raises:
        FileError: it is damaged, or names what is no file beside it.
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
    """Whether this is the name of a file, and no path to it; on any system."""
    return (
        isinstance(file, str)
        and file not in ("", ".", "..")
        and all(kind(file).name == file for kind in (PurePosixPath, PureWindowsPath))
    )
