"""Keys: who may ask, for which adapters, and who may load and unload them.

A file of keys has one on each line, as itself or as ``sha256:`` and its hash in hexadecimal, with what it may
do behind it::

    sk-first-tenant      name=first  adapters=sentiment,topics
    sha256:9f86d0...     name=ops    admin
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorica.errors import ConfigError, FileError

_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_SHORTEST = 8


@dataclass(frozen=True)
class Key:
    """One key.

    Args:
        digest: sha256 of it.
        name: to call it by in metrics and logs.
        adapters: the adapters that it may use, beside the base; None for all.
        admin: whether it may load and unload adapters.
    """

    digest: bytes
    name: str
    adapters: frozenset[str] | None = None
    admin: bool = False

    def may_use(self, adapter: str | None) -> bool:
        """Whether an adapter is there for it; the base is for all."""
        return adapter is None or self.adapters is None or adapter in self.adapters


NOBODY = Key(b"", "", None, True)
"""Stands for every caller of a server without keys."""


class Keys:
    """All keys of a server.

    Args:
        keys: none of them: everybody may do everything.
    """

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        """Keep them."""
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._keys)

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [key.name for key in self._keys]

    def find(self, given: str | None) -> Key | None:
        """The key that was given, or None; it takes the same time whichever it is.

        Args:
            given: the key in the request.
        """
        if not self._keys:
            return NOBODY
        digest = hashlib.sha256((given or "").encode("utf-8", "surrogatepass")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    @classmethod
    def read(cls, path: str | Path) -> Keys:
        """The keys in a file.

        Raises:
            FileError: it cannot be read.
            ConfigError: a line is no key, or the file has none.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"cannot read the keys in {path}: {error}") from error
        keys = [
            _key(line.split(), f"line {number} of {path}", f"key-{number}")
            for number, line in enumerate(lines, 1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        if not keys:
            raise ConfigError(f"{path} holds no keys; write one on each line")
        if len({key.digest for key in keys}) < len(keys) or len({key.name for key in keys}) < len(keys):
            raise ConfigError(f"{path} has a key or a key's name twice")
        return cls(keys)


def _key(words: list[str], where: str, name: str) -> Key:
    secret, *options = words
    if hashed := _HASH.fullmatch(secret):
        digest = bytes.fromhex(hashed[1])
    elif secret.startswith("sha256:"):
        raise ConfigError(f"{where}: 64 hexadecimal digits are due behind sha256:")
    elif len(secret) < _SHORTEST:
        raise ConfigError(f"{where}: a key has at least {_SHORTEST} characters, this one has {len(secret)}")
    else:
        digest = hashlib.sha256(secret.encode()).digest()
    adapters: frozenset[str] | None = None
    admin = False
    for option in options:
        field, _, value = option.partition("=")
        if option == "admin":
            admin = True
        elif field == "name" and value:
            name = value
        elif field == "adapters":
            adapters = frozenset(part for part in value.split(",") if part)
        else:
            raise ConfigError(f"{where}: {option!r} is none of name=NAME, adapters=NAME,NAME and admin")
    return Key(digest, name, adapters, admin)
