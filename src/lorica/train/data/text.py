"""Text files: unpacked, decoded by a rule that says where it guesses, and read as lines or as CoNLL's words.

EU NNP B-NP B-ORG          one word and its classes per line, a blank line between sentences (CoNLL-2003)
rejects VBZ B-VP O

1<tab>The<tab>the<tab>DET...      CoNLL-U: ten columns, and comments that begin with #
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from lorica.errors import ConfigError, FileError, listing
from lorica.train.data.tables import Found, table

FALLBACK = "cp1252"
"""Encoding of a text file that is no UTF-8: Western Windows', which has latin-1's letters."""

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

_OTHERS = (
    (b"PK\x03\x04", "a zip archive, as Excel's .xlsx files are"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file; save it as .xlsx or .csv"),
    (b"\x1f\x8b", "compressed by gzip; call it .gz"),
    (b"(\xb5/\xfd", "compressed by zstd; call it .zst"),
    (b"BZh", "compressed by bzip2; call it .bz2"),
    (b"\xfd7zXZ", "compressed by xz; call it .xz"),
    (b"PAR1", "a parquet file; call it .parquet"),
    (b"%PDF", "a PDF file"),
    (b"SQLite format", "a database of SQLite"),
)

_LINE_END = re.compile(r"\r\n|\n|\r")


def content(path: Path, kind: str = "text") -> bytes:
    """A file's bytes, unpacked where its name says that it is packed.

    Args:
        path: the file.
        kind: kind of file that it is read as, for errors.

    Raises:
        FileError: it cannot be read or unpacked.
    """
    packed = path.suffix.lower()
    try:
        raw = path.read_bytes()
        if packed == ".gz":
            return gzip.decompress(raw)
        if packed == ".bz2":
            return bz2.decompress(raw)
        if packed == ".xz":
            return lzma.decompress(raw)
        if packed == ".zst":
            return pa.CompressedInputStream(pa.BufferReader(raw), "zstd").read()
        return _unzipped(raw, path) if packed == ".zip" else raw
    except (
        OSError,
        EOFError,
        ValueError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        RuntimeError,
    ) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"cannot read {path} as {kind}: {type(error).__name__}: {reason}") from error


def decoded(raw: bytes, path: Path, encoding: str | None) -> tuple[str, tuple[str, ...]]:
    """The text of some bytes.

    Args:
        raw: the bytes.
        path: where they came from.
        encoding: the encoding, or None to find it. A byte-order mark at the start goes before either.

    Returns:
        The text without its byte-order mark, and notes for the user on the way it was decoded.

    Raises:
        FileError: it is no text, or text of another encoding.
        ConfigError: there is no such encoding.
    """
    for mark, marked in _MARKS:
        if raw.startswith(mark):
            return _strictly(raw[len(mark) :], path, marked), ()
    if encoding is not None:
        return _strictly(raw, path, encoding), ()
    if kind := next((kind for start, kind in _OTHERS if raw.startswith(start)), None):
        raise FileError(f"cannot read {path} as text: it is {kind}")
    if wide := _wide(raw):
        return _strictly(raw, path, wide), (f"it has no byte-order mark; it is read as {wide.upper()}",)
    if b"\0" in raw:
        line = raw[: raw.index(b"\0")].count(b"\n") + 1
        raise FileError(f"cannot read {path} as text: line {line} holds a zero byte, as no text does")
    try:
        return raw.decode("utf-8"), ()
    except UnicodeDecodeError as error:
        return _by_fallback(raw, path, error)


def lines_of(text: str) -> list[str]:
    r"""The lines of a text, which end at ``\n``, ``\r\n`` or ``\r`` and at nothing else.

    `str.splitlines` also ends them at form feeds and at Unicode's separators, which texts hold.
    """
    lines = _LINE_END.split(text)
    return lines[:-1] if lines and not lines[-1] else lines


def read_lines(path: Path, encoding: str | None = None) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        FileError: it cannot be read.
    """
    text, _ = decoded(content(path), path, encoding)
    return [line for line in lines_of(text) if line.strip()]


def _unzipped(raw: bytes, path: Path) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        # Macs add a folder of their own.
        names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
        if len(names) != 1:
            raise FileError(
                f"{path} holds {len(names)} files ({listing(names, limit=5)}), where one of rows is due; "
                "unpack it "
                "and name the file or the folder"
            )
        return archive.read(names[0])


def _strictly(raw: bytes, path: Path, encoding: str) -> str:
    try:
        return raw.decode(encoding).removeprefix("\ufeff")
    except LookupError as error:
        raise ConfigError(f"data.encoding is {encoding!r}, which Python has not; cp1251 is one") from error
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        raise FileError(
            f"cannot read {path} as {encoding}: {error.__class__.__name__} at byte {start}"
        ) from error


def _wide(raw: bytes) -> str | None:
    """UTF-16 of which kind, where every other byte of much of it is zero."""
    start = raw[:4096]
    even, odd = start[::2].count(0), start[1::2].count(0)
    half = len(start) / 2
    if len(raw) % 2 or max(even, odd) < 0.4 * half or min(even, odd) > 0.05 * half:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _by_fallback(raw: bytes, path: Path, error: UnicodeDecodeError) -> tuple[str, tuple[str, ...]]:
    loose = raw.decode("utf-8", errors="surrogateescape")
    strange = sum("\udc80" <= letter <= "\udcff" for letter in loose)
    sound = sum(letter > "\x7f" for letter in loose) - strange
    line = raw[: error.start].count(b"\n") + 1
    if sound >= strange:
        raise FileError(
            f"cannot read {path} as text: it is UTF-8, but for {strange:,} bytes, the first of them "
            f"0x{raw[error.start]:02x} in line {line}; mend it, or name its encoding with --data.encoding"
        )
    try:
        text = raw.decode(FALLBACK)
    except UnicodeDecodeError as other:
        raise FileError(
            f"cannot read {path} as text: it is neither UTF-8 (line {line}) nor {FALLBACK} (byte "
            f"0x{raw[other.start]:02x}); name its encoding with --data.encoding, such as cp1251, "
            "shift_jis or gb18030"
        ) from other
    place = len(raw[: error.start].decode(FALLBACK))
    word = re.search(r"\S*\Z", text[max(place - 20, 0) : place])
    tail = re.match(r"\S{1,20}", text[place:])
    shown = (word.group() if word else "") + (tail.group() if tail else "")
    return text, (
        f"it is no UTF-8, so it is read as {FALLBACK} (line {line}: {shown!r}); name another with "
        "--data.encoding",
    )


def read_lines_of_text(text: str, path: Path) -> Found:
    """A row with a ``text`` for each line that is not blank, spaces and all.

    Raises:
        FileError: it does not exist.
    """
    found = [(number, line) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    if not found:
        raise FileError(f"{path} has no rows")
    data, notes = table({"text": [line for _, line in found]}, path)
    return Found(data, [number for number, _ in found], ("each of its lines is a text", *notes))


_2003 = ("tokens", "pos_tags", "chunk_tags", "ner_tags")

_UNIVERSAL = ("id", "tokens", "lemmas", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")

_SPAN = re.compile(r"O|[BIESLUM]-\S+")

_COMMENT = re.compile(r"#\s*(\S+\s*=|id\b|sent_id\b|text\b|newdoc|newpar)")


def read_conll(text: str, path: Path) -> Found:
    """A row for each sentence: ``tokens``, and a list for each column of classes.

    With two columns the classes are ``tags``; with four they are named as in CoNLL-2003; with ten as in
    CoNLL-U, whose ranges (``1-2``) and empty words (``1.1``) are left out. With another number the last is
    ``tags``. A first column of spans' classes beside words is taken for what it is.

    Raises:
        FileError: there are no sentences, or lines have unlike numbers of columns.
    """
    sentences: list[tuple[int, list[list[str]]]] = []
    current: list[list[str]] = []
    width, skipped = 0, 0
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            current = []
            continue
        if not current and _COMMENT.match(line):
            skipped += 1
            continue
        cells = line.split("\t") if "\t" in line else re.split(r" +", line.strip(" "))
        cells = [cell.strip(" ") for cell in cells]
        width = width or len(cells)
        if len(cells) != width or width < 2:
            raise FileError(
                f"cannot read {path} as CoNLL: line {number} has {len(cells)} columns, where "
                f"{max(width, 2)} are due, a "
                f"word and its classes: {line!r:.60}"
            )
        if width == len(_UNIVERSAL) and not cells[0].isdecimal():
            continue
        if not current:
            sentences.append((number, current))
        current.append(cells)
    if not sentences:
        raise FileError(f"{path} has no rows")
    columns = [[[cells[place] for cells in words] for _, words in sentences] for place in range(width)]
    names = _names(width)
    if width == 2 and _are_spans(columns[0]) and not _are_spans(columns[1]):
        names = names[::-1]
    data, notes = table(dict(zip(names, columns, strict=True)), path)
    told = [f"it is read as CoNLL: sentences of words, with the columns {', '.join(names)}"]
    if skipped:
        told.append(f"{skipped:,} lines of comments are left out")
    return Found(data, [number for number, _ in sentences], (*told, *notes))


def _names(width: int) -> Sequence[str]:
    if width == len(_UNIVERSAL):
        return _UNIVERSAL
    if width == len(_2003):
        return _2003
    return ("tokens", *(f"column{place}" for place in range(2, width)), "tags")


def _are_spans(column: Sequence[Sequence[str]]) -> bool:
    return all(_SPAN.fullmatch(cell) for cells in column for cell in cells)
