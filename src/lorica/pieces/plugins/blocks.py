"""The blocks of a transformer that are adapted (`layers_to_transform`)."""

from __future__ import annotations

from collections.abc import Sequence

from lorica.config import LoraConfig, full_match
from lorica.errors import TargetError, listing
from lorica.find import NARROWING
from lorica.tree import Place


def _in_blocks(chosen: list[Place], config: LoraConfig) -> list[Place]:
    layers = config.layers_to_transform
    wanted = {layers} if isinstance(layers, int) else set(layers or ())
    names = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    found = {p: block for p in chosen if (block := block_of(p.path, names)) is not None}
    # A full path is targeted whatever block it is in.
    exact = config.target_modules if isinstance(config.target_modules, list) else []
    missing = wanted - set(found.values())
    if missing:
        have = listing(map(str, sorted(set(found.values())))) or "none"
        where = f" in {listing(names)}" if names else ""
        raise TargetError(
            f"layers_to_transform names block {listing(map(str, sorted(missing)))}; the targeted "
            f"modules{where} are in blocks {have}"
        )
    return [p for p in chosen if p.path in exact or found.get(p) in wanted]


def block_of(path: str, holders: Sequence[str] | None = None) -> int | None:
    """The index of the outermost block that contains a module; None outside all blocks.

    Args:
        path: the module's path.
        holders: names of the lists that hold blocks, or regular expressions for the ends of their paths, as
            in PEFT; None accepts any list.
    """
    holders = [holder for holder in holders or () if holder]
    parts = path.split(".")
    for i, part in enumerate(parts[1:], 1):
        above = ".".join(parts[:i])
        if part.isdecimal() and (
            not holders or any(full_match(rf"(?:.*\.)?(?:{holder})", above) for holder in holders)
        ):
            return int(part)
    return None


NARROWING["layers_to_transform"] = _in_blocks
