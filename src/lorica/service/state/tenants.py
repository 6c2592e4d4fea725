"""Keys, each tenant's quotas, and their use.

A file of keys has one on each line, as itself or as ``sha256:`` and its hash in hexadecimal, with its tenant
and limits behind it; several keys may be one tenant's::

    tml-first-secret     name=first   runs=4  tokens=60000  bytes=2000000000
    sha256:9f86d0...     name=second
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorica.errors import ConfigError, FileError
from lorica.service.errors import QuotaError


@dataclass(frozen=True, slots=True)
class Tenant:
    """The tenants of a server, and their quotas.

    Args:
        name: of the tenant.
        runs: adapters in training at once; None for any number.
        tokens: read, trained and sampled in a minute.
        bytes: of checkpoints on disk.
    """

    name: str = "all"
    runs: int | None = None
    tokens: int | None = None
    bytes: int | None = None


class Tenants:
    """All tenants of a server.

    Args:
        keys: digest (sha256, hexadecimal) of a key → its tenant; empty: every key is one tenant's.
    """

    def __init__(self, keys: Mapping[str, Tenant] | None = None) -> None:
        """Nothing is used yet."""
        self._keys = dict(keys or {})
        self._spent: dict[str, deque[tuple[float, int]]] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, keys: Mapping[str, Tenant]) -> Tenants:
        """From keys as they are."""
        return cls({_digest(key): tenant for key, tenant in keys.items()})

    @classmethod
    def read(cls, path: str | Path) -> Tenants:
        """From a file.

        Raises:
            FileError: it cannot be read.
            ConfigError: a line is no key, or says something unknown.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"cannot read the keys in {path}: {error}") from error
        keys: dict[str, Tenant] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if words and not words[0].startswith("#"):
                key, tenant = _line(words, f"line {number} of {path}")
                if key in keys:
                    raise ConfigError(f"line {number} of {path} has a key that another line has")
                keys[key] = tenant
        if not keys:
            raise ConfigError(f"{path} holds no keys; write one on each line")
        return cls(keys)

    def find(self, key: str | None) -> Tenant | None:
        """Whose key it is; None for nobody's."""
        # By the digest: what a comparison takes tells nothing of the key.
        return self._keys.get(_digest(key or "")) if self._keys else Tenant()

    def named(self, name: str) -> Tenant:
        """A tenant by name, as it is now; one that has no key any more has no limits either."""
        return next((tenant for tenant in self._keys.values() if tenant.name == name), Tenant(name))

    def spend(self, tenant: Tenant, tokens: int) -> float:
        """Count tokens, unless that is too many for this minute.

        Returns:
            0, or the seconds after which to try again.
        """
        if tenant.tokens is None:
            return 0.0
        now = time.monotonic()
        with self._lock:
            spent = self._spent.setdefault(tenant.name, deque())
            while spent and spent[0][0] <= now - 60:
                spent.popleft()
            # What is larger than a minute's share goes through by itself.
            if spent and sum(n for _, n in spent) + tokens > tenant.tokens:
                return max(0.1, spent[0][0] + 60 - now)
            spent.append((now, tokens))
            return 0.0


def check_bytes(tenant: Tenant, used: int, more: int) -> None:
    """Refuse a file that does not fit on a tenant's part of the disk.

    Raises:
        QuotaError: naming the bytes in use.
    """
    if tenant.bytes is not None and used + more > tenant.bytes:
        raise QuotaError(
            f"the checkpoint has {more:,} bytes, and {tenant.name!r} uses {used:,} of {tenant.bytes:,}; "
            "delete some, or give them a time to live"
        )


def check_runs(tenant: Tenant, running: Iterable[object]) -> None:
    """Refuse one adapter too many.

    Raises:
        QuotaError: naming their number.
    """
    if tenant.runs is not None and len(list(running)) >= tenant.runs:
        raise QuotaError(
            f"{tenant.name!r} may train {tenant.runs} adapters at once, and does; unload one, or end its "
            "session"
        )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _line(words: list[str], where: str) -> tuple[str, Tenant]:
    secret, *settings = words
    named = {name: value for name, _, value in (setting.partition("=") for setting in settings)}
    try:
        limits = {name: int(named[name]) for name in ("runs", "tokens", "bytes") if name in named}
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; limits are whole numbers") from None
    unknown = sorted(set(named) - {"name", "runs", "tokens", "bytes"})
    if unknown or "name" not in named:
        raise ConfigError(
            f"{where}: behind a key are name=, runs=, tokens= and bytes=, not {unknown or 'none'}"
        )
    digest = secret.removeprefix("sha256:") if secret.startswith("sha256:") else _digest(secret)
    if len(digest) != 64:
        raise ConfigError(f"{where}: 64 hexadecimal digits are due behind sha256:")
    return digest.lower(), Tenant(named["name"], **limits)
