"""One SQLite file: sessions, runs, samplers, checkpoints, and every call that was accepted.

call accepted ─▶ row (committed, then acknowledged) ─▶ done ─▶ result in the row
a run = its last snapshot + its rows after it, in the order of their numbers
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lorica.service.errors import GoneError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions(
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created REAL NOT NULL, seen REAL NOT NULL,
  ended INTEGER NOT NULL DEFAULT 0, about TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs(
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, session TEXT NOT NULL, made TEXT NOT NULL, rank INTEGER NOT NULL,
  created REAL NOT NULL, used REAL NOT NULL, unloaded INTEGER NOT NULL DEFAULT 0,
  snapshot INTEGER NOT NULL DEFAULT -1, about TEXT);
CREATE TABLE IF NOT EXISTS samplers(
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, session TEXT NOT NULL, path TEXT, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS checkpoints(
  path TEXT PRIMARY KEY, tenant TEXT NOT NULL, run TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
  created REAL NOT NULL, size INTEGER NOT NULL, expires REAL, optimizer INTEGER NOT NULL, about TEXT,
  listed INTEGER NOT NULL DEFAULT 1, public INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS calls(
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, target TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL,
  body BLOB, result BLOB, failed TEXT, created REAL NOT NULL, done REAL, UNIQUE(target, seq));
CREATE INDEX IF NOT EXISTS waiting ON calls(done) WHERE done IS NULL;
"""


class Call(NamedTuple):
    """A call that was accepted.

    Args:
        id: by which its result is asked for.
        tenant: whose it is.
        target: the run, sampler or session that it is for.
        seq: its number there.
        kind: sort of call.
        body: the request as it came; None once a snapshot holds its work.
        result: what it gave; None while it is not done.
        failed: category of its failure (``"user"``, ``"server"``), of which `result` is the message; or None.
    """

    id: str
    tenant: str
    target: str
    seq: int
    kind: str
    body: bytes | None
    result: bytes | None
    failed: str | None


_CALL = "id, tenant, target, seq, kind, body, result, failed"


class Row(dict[str, Any]):
    """A row by its columns' names."""

    @property
    def about(self) -> Any:
        """Its maker's notes, as JSON."""
        return None if self["about"] is None else json.loads(self["about"])


class Registry:
    """The file.

    Args:
        path: of it; created if missing.
    """

    def __init__(self, path: Path) -> None:
        """Open it, or make it."""
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        if "public" not in {row["name"] for row in self._rows("PRAGMA table_info(checkpoints)")}:
            self._db.execute("ALTER TABLE checkpoints ADD COLUMN public INTEGER NOT NULL DEFAULT 0")

    def close(self) -> None:
        """Close it."""
        with self._lock:
            self._db.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Changes within it are kept all, or none."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, sql: str, *values: Any) -> list[Row]:
        with self._lock:
            cursor = self._db.execute(sql, values)
            names = [column[0] for column in cursor.description]
            return [Row(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _do(self, sql: str, *values: Any) -> int:
        with self.together():
            return self._db.execute(sql, values).rowcount

    def add(self, table: str, **values: Any) -> bool:
        """Add a row; False where its key is there already."""
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        given = [json.dumps(v) if isinstance(v, (dict, list)) else v for v in values.values()]
        return self._do(f"INSERT OR IGNORE INTO {table}({columns}) VALUES({marks})", *given) > 0

    def change(self, table: str, key: str, **values: Any) -> None:
        """Change a row."""
        sets = ", ".join(f"{name} = ?" for name in values)
        self._do(f"UPDATE {table} SET {sets} WHERE {_KEYS[table]} = ?", *values.values(), key)

    def remove(self, table: str, key: str) -> None:
        """Remove a row."""
        self._do(f"DELETE FROM {table} WHERE {_KEYS[table]} = ?", key)

    def one(self, table: str, key: str, tenant: str | None = None) -> Row:
        """A row by its key.

        Raises:
            GoneError: there is none, or it is another tenant's.
        """
        rows = self._rows(f"SELECT * FROM {table} WHERE {_KEYS[table]} = ?", key)
        if not rows or (tenant is not None and rows[0]["tenant"] != tenant):
            raise GoneError(f"there is no {table[:-1]} {key!r}")
        return rows[0]

    def readable(self, path: str, tenant: str) -> Row:
        """A checkpoint that a tenant may read: one of its own, or one that was published.

        Raises:
            GoneError: there is none.
        """
        row = self._rows("SELECT * FROM checkpoints WHERE path = ? AND (tenant = ? OR public)", path, tenant)
        if not row:
            raise GoneError(f"there is no checkpoint {path!r}")
        return row[0]

    def all(self, table: str, **where: Any) -> list[Row]:
        """Rows that have certain values, the newest first."""
        conditions = " AND ".join(f"{name} = ?" for name in where) or "1"
        sql = f"SELECT * FROM {table} WHERE {conditions} ORDER BY created DESC, rowid DESC"
        return self._rows(sql, *where.values())

    def total(self, tenant: str) -> int:
        """Bytes of a tenant's checkpoints."""
        return int(self._rows("SELECT total(size) AS n FROM checkpoints WHERE tenant = ?", tenant)[0]["n"])

    def expired(self, now: float) -> list[Row]:
        """Checkpoints whose time is over."""
        return self._rows("SELECT * FROM checkpoints WHERE expires IS NOT NULL AND expires < ?", now)

    # Calls.

    def accept(self, call: Call) -> bool:
        """Write a call down; False where its number was used already."""
        return self.add(
            "calls",
            id=call.id,
            tenant=call.tenant,
            target=call.target,
            seq=call.seq,
            kind=call.kind,
            body=call.body,
            created=time.time(),
        )

    def done(self, call_id: str, result: bytes, failed: str | None = None) -> None:
        """Write down a call's result."""
        self._do(
            "UPDATE calls SET result = ?, failed = ?, done = ? WHERE id = ? AND done IS NULL",
            *(result, failed, time.time(), call_id),
        )

    def call(self, call_id: str, tenant: str | None = None) -> Call:
        """A call by its id.

        Raises:
            GoneError: there is none, or it is another tenant's.
        """
        found = self._calls("id = ?", call_id)
        if not found or (tenant is not None and found[0].tenant != tenant):
            raise GoneError(f"there is no future {call_id!r}")
        return found[0]

    def calls_after(self, target: str, seq: int) -> list[Call]:
        """The calls of a run or sampler with larger numbers, in order."""
        return self._calls("target = ? AND seq > ? ORDER BY seq", target, seq)

    def waiting(self) -> list[Call]:
        """Calls that are not done, in the order in which they came."""
        return self._calls("done IS NULL ORDER BY created, seq")

    def _calls(self, where: str, *values: Any) -> list[Call]:
        return [Call(**row) for row in self._rows(f"SELECT {_CALL} FROM calls WHERE {where}", *values)]

    def snapshot(self, run: str, seq: int) -> None:
        """A run's files hold all that its calls up to a number did."""
        with self.together():
            self.change("runs", run, snapshot=seq)
            done = "target = ? AND seq <= ? AND done IS NOT NULL"
            self._do(f"UPDATE calls SET body = NULL WHERE {done}", run, seq)

    def forget(self, before: float) -> None:
        """Drop results that were there to be fetched for long."""
        self._do(
            "DELETE FROM calls WHERE done < ? AND (body IS NULL OR kind = 'sample') AND kind != 'create'",
            before,
        )


_KEYS: Mapping[str, str] = {
    "sessions": "id",
    "runs": "id",
    "samplers": "id",
    "checkpoints": "path",
    "calls": "id",
}
__all__: Sequence[str] = ["Call", "Registry", "Row"]
