"""Folders of adapters, which strangers may write to: their adapters listed, refused, and read.

Only what stands inside a root is read, links followed; only safetensors, whose header is checked against the
file before anything is allocated; never a pickle.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.adapter import Adapter
from lorica.checkpoint.peft import CONFIG_FILE, PICKLED_FILE, WEIGHTS_FILE, in_order
from lorica.checkpoint.peft import read as read_folder
from lorica.errors import LoricaError
from lorica.serve.engine import RefusedAdapter, UnknownAdapter

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEADER = 8 << 20
_CONFIG = 1 << 20
_TEMPLATE = 1 << 18
_TOKENIZER = 16 << 20
_WORDS = ("chat_template.jinja", "tokenizer_config.json")
"""Files that may hold a chat template; the first goes before the second."""
_FILES = (CONFIG_FILE, WEIGHTS_FILE, *_WORDS)
_INSIDE = "adapter"
"""Under this name a training run keeps its adapter in its own folder."""

Signature = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A folder that may hold an adapter.

    Args:
        name: to serve it under.
        path: of the folder, links followed.
        signature: changes when its files do.
        size: bytes of its weights.
        rank: the largest that its configuration names; None where it names none.
        problem: why it cannot be served; None where nothing is known against it.
        template: the chat template that it brings; None where it brings none.
    """

    name: str
    path: Path
    signature: Signature
    size: int
    rank: int | None
    problem: str | None = None
    template: str | None = None


def check_name(name: str) -> str:
    """A name that an adapter can be served under.

    Raises:
        RefusedAdapter: it is none.
    """
    if not NAME.fullmatch(name):
        raise RefusedAdapter(
            f"{name[:80]!r} cannot be an adapter's name: at most 128 letters, digits, dots, dashes and "
            "underscores, the first a letter or digit"
        )
    return name


def scan(roots: Iterable[Path], known: Mapping[str, Found] | None = None) -> dict[str, Found]:
    """The adapters in some folders: a folder itself, or those in it, or in the runs in it (``adapter``).

    A folder without configuration and weights is passed over, as are names that cannot be served.
    Of two with one name the first root's is taken.

    Args:
        roots: the folders.
        known: what was found before; of those whose files are the same nothing is read again.
    """
    found: dict[str, Found] = {}
    for root in roots:
        own = root.parent if root.name == _INSIDE else root
        places = [(own.name, root)] if _looks_like_one(root) else []
        if not places:
            children = sorted(root.iterdir()) if root.is_dir() else []
            for child in children:
                inside = child / _INSIDE
                places.append((child.name, child if _looks_like_one(child) else inside))
        for name, path in places:
            if name not in found and NAME.fullmatch(name) and _looks_like_one(path):
                found[name] = look(name, path, (root,), (known or {}).get(name))
    return found


def look(name: str, path: Path, roots: Iterable[Path], known: Found | None = None) -> Found:
    """The content of a folder, without its tensors; `known` again where its files are the same."""
    try:
        folder = within(path, roots)
        config, weights = (_regular(folder / part, roots) for part in (CONFIG_FILE, WEIGHTS_FILE))
        words = {part: _regular(folder / part, roots) for part in _WORDS if (folder / part).exists()}
        signature = sign(folder)
    except (OSError, LoricaError) as error:
        return Found(name, path, (), 0, None, str(error))
    if known is not None and known.problem is None and (known.path, known.signature) == (folder, signature):
        return known
    size = weights.stat().st_size
    try:
        settings = _settings(config)
        header(weights)
        own = _template(words)
    except (OSError, LoricaError) as error:
        return Found(name, folder, signature, size, None, str(error))
    return Found(name, folder, signature, size, _rank(settings), template=own)


def sign(folder: Path) -> Signature:
    """A mark that changes with an adapter's files; files that are not there are left out."""
    stats = (path.stat() for name in _FILES if (path := folder / name).exists())
    return tuple((own.st_mtime_ns, own.st_size, own.st_ino) for own in stats)


def changed(found: Found) -> bool:
    """Whether a folder's files are other ones than they were."""
    try:
        return sign(found.path) != found.signature
    except OSError:  # they are just being replaced
        return True


def within(path: str | Path, roots: Iterable[Path]) -> Path:
    """A path with its links followed, if it is inside a root.

    Raises:
        UnknownAdapter: it is not there, or outside; the message does not tell which.
    """
    try:
        real = Path(path).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        real = None
    if real is not None and any(real.is_relative_to(root.resolve()) for root in roots):
        return real
    raise UnknownAdapter(f"there is no folder {str(path)[:200]!r} among those that adapters are served from")


def read(found: Found, *, max_rank: int, max_bytes: int) -> tuple[Adapter, str]:
    """Read a folder's adapter.

    Args:
        found: as `look` saw it.
        max_rank: a larger one is refused before it is read.
        max_bytes: likewise of weights.

    Returns:
        The adapter; and its identity, the sha256 of its configuration and its tensors' names, dtypes, shapes
        and bytes.

    Raises:
        RefusedAdapter: it cannot be served, or changes while it is read.
    """
    if found.problem is not None:
        raise RefusedAdapter(f"{found.name}: {found.problem}")
    if found.rank is not None and found.rank > max_rank:
        raise RefusedAdapter(
            f"{found.name}: its rank is {found.rank}, and at most {max_rank} is served; raise max_rank, or "
            "lower the adapter's: lorica compress"
        )
    if found.size > max_bytes:
        raise RefusedAdapter(
            f"{found.name}: its weights are {found.size:,} bytes, and at most {max_bytes:,} are read"
        )
    try:
        identity = digest(found.path)
        adapter = read_folder(found.path)
    except (OSError, LoricaError) as error:
        raise RefusedAdapter(f"{found.name}: {error}") from error
    if changed(found):
        raise RefusedAdapter(f"{found.name}: {found.path} changed while it was read; load it again")
    return adapter, identity


def digest(folder: Path) -> str:
    """The identity of an adapter's files, whatever the order of their tensors."""
    settings, weights = _settings(folder / CONFIG_FILE), folder / WEIGHTS_FILE
    found = hashlib.sha256(json.dumps(in_order(settings)).encode())
    tensors, start = header(weights)
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        view = memoryview(memory)
        for name in sorted(tensors):
            own = tensors[name]
            found.update(json.dumps([name, own["dtype"], own["shape"]]).encode())
            begin, end = own["data_offsets"]
            found.update(view[start + begin : start + end])
        view.release()
    return found.hexdigest()


def header(weights: Path) -> tuple[dict[str, Any], int]:
    """The tensors that a safetensors file says it has, and where their bytes begin.

    Raises:
        RefusedAdapter: it is no such file, or not whole.
    """
    size = weights.stat().st_size
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER, size - 8):
            raise RefusedAdapter(f"{weights.name} is no safetensors file, or not written to its end")
        text = file.read(length)
    try:
        entries = {name: own for name, own in json.loads(text).items() if name != "__metadata__"}
        end = max((own["data_offsets"][1] for own in entries.values()), default=0)
        spans = sorted(tuple(own["data_offsets"]) for own in entries.values())
        joined = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        raise RefusedAdapter(f"the header of {weights.name} is damaged") from None
    if not entries or not joined or spans[0][0] != 0 or 8 + length + end != size:
        raise RefusedAdapter(
            f"{weights.name} has {size:,} bytes, and its header speaks of {8 + length + end:,}: it was not "
            "written to its end, or is damaged"
        )
    return entries, 8 + length


def _looks_like_one(path: Path) -> bool:
    return any((path / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE))


def _regular(path: Path, roots: Iterable[Path]) -> Path:
    """A file of an adapter, if it is a plain one inside a root."""
    if not path.exists():
        pickled = path.name == WEIGHTS_FILE and path.with_name(PICKLED_FILE).exists()
        raise RefusedAdapter(
            f"{PICKLED_FILE} is a pickle, which is never served; save the adapter as safetensors "
            "(lorica convert)"
            if pickled
            else f"{path.name} is missing; the adapter was not saved to its end"
        )
    try:
        real = within(path, roots)
    except UnknownAdapter:
        raise RefusedAdapter(f"{path.name} is a link that leaves the folder of adapters") from None
    if not stat.S_ISREG(real.stat().st_mode):
        raise RefusedAdapter(f"{path.name} is no plain file")
    return real


def _template(files: Mapping[str, Path]) -> str | None:
    """The chat template that an adapter brings, of its file or its tokenizer's settings."""
    for name, path in files.items():
        if name == _WORDS[0]:
            return _text(path, _TEMPLATE)
        given = _settings(path, _TOKENIZER).get("chat_template")
        if isinstance(given, list):  # several, by their names
            named = (own for own in given if isinstance(own, dict) and own.get("name") == "default")
            given = next((own.get("template") for own in named), None)
        if isinstance(given, str):
            if len(given) > _TEMPLATE:
                raise RefusedAdapter(f"the chat template in {name} is larger than {_TEMPLATE:,} bytes")
            return given
    return None


def _text(path: Path, most: int) -> str:
    if path.stat().st_size > most:
        raise RefusedAdapter(f"{path.name} is larger than {most:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise RefusedAdapter(f"{path.name} is damaged: {error}") from None


def _settings(path: Path, most: int = _CONFIG) -> Mapping[str, Any]:
    text = _text(path, most)
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedAdapter(f"{path.name} is damaged: {error}") from None
    if not isinstance(settings, dict):
        raise RefusedAdapter(f"{path.name} is no JSON object")
    return settings


def _rank(settings: Mapping[str, Any]) -> int | None:
    pattern = settings.get("rank_pattern")
    ranks = [settings.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((r for r in ranks if isinstance(r, int)), default=None)
