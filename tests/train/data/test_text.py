from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from lorica.errors import ConfigError, FileError
from lorica.train.data.sources import read_file
from lorica.train.data.tables import Form, Found
from lorica.train.data.text import content, decoded, lines_of, read_lines

TEXT = "text,label\ncafé ☕,x\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_tell_the_encoding(encoding: str) -> None:
    assert decoded(TEXT.encode(encoding), Path("rows.csv"), None) == (TEXT, ())
    # A mark goes before what is named.
    if encoding != "utf-8":
        assert decoded(TEXT.encode(encoding), Path("rows.csv"), "cp1251") == (TEXT, ())


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_told(encoding: str) -> None:
    text, notes = decoded(TEXT.encode(encoding), Path("rows.csv"), None)
    assert text == TEXT
    assert notes == (f"it has no byte-order mark; it is read as {encoding.upper()}",)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_other_bytes_are_read_by_a_fallback_that_is_told(encoding: str) -> None:
    text, (note,) = decoded("text\nun café noir\nthé\n".encode(encoding), Path("rows.csv"), None)
    assert text == "text\nun café noir\nthé\n"
    assert note == (
        "it is no UTF-8, so it is read as cp1252 (line 2: 'café'); name another with --data.encoding"
    )


def test_a_named_encoding_goes_before_the_fallback() -> None:
    assert decoded("привет".encode("cp1251"), Path("a.csv"), "cp1251") == ("привет", ())
    with pytest.raises(ConfigError, match=r"data.encoding is 'klingon', which Python has not"):
        decoded(b"a", Path("a.csv"), "klingon")
    with pytest.raises(FileError, match=r"cannot read a\.csv as ascii: UnicodeDecodeError at byte 1"):
        decoded(b"a\xff", Path("a.csv"), "ascii")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            "text\ncafé\n".encode() + "thé\n".encode("latin-1"),
            r"is UTF-8, but for 1 bytes, .* 0xe9 in line 3",
        ),
        ("text\ncafé".encode()[:-1] + b"\nx" + "é".encode(), "UTF-8, but for 1 bytes"),
        (b"text\n\x81\x8d\xff\n", r"neither UTF-8 \(line 2\) nor cp1252 \(byte 0x81\); name its encoding"),
        (b"text\na\x00b\n", "line 2 holds a zero byte"),
        (b"PK\x03\x04rest", "is a zip archive"),
        (b"\x1f\x8brest", "compressed by gzip; call it .gz"),
        (b"PAR1", "a parquet file"),
        (b"\xd0\xcf\x11\xe0", "an old Excel"),
    ],
)
def test_what_is_no_text(raw: bytes, message: str) -> None:
    with pytest.raises(FileError, match=message):
        decoded(raw, Path("rows.csv"), None)


def zipped(raw: bytes, *names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names or ("rows.csv",):
            archive.writestr(name, raw)
    return file.getvalue()


def zstd(raw: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zip": lambda raw: zipped(raw, "rows.csv", "__MACOSX/._rows.csv"),
    "zst": zstd,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.csv.{suffix}"
    path.write_bytes(PACKERS[suffix](TEXT.encode()))
    assert content(path) == TEXT.encode()
    path.write_bytes(PACKERS[suffix](TEXT.encode() * 99)[:30])
    with pytest.raises(FileError, match=rf"cannot read .*rows\.csv\.{suffix} as text"):
        content(path)


def test_an_archive_of_several_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.zip"
    path.write_bytes(zipped(b"text\na\n", "train.csv", "test.csv"))
    with pytest.raises(FileError, match=r"holds 2 files \(train.csv, test.csv\), where one of rows is due"):
        content(path)


def test_lines_end_at_line_ends_alone(tmp_path: Path) -> None:
    assert lines_of("a\r\nb\rc\n\nd\x0be\u2028f\x85g\n") == ["a", "b", "c", "", "d\x0be\u2028f\x85g"]
    assert lines_of("") == []
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\n \r\n b\u2028c\r\n".encode())
    assert read_lines(tmp_path / "a.txt") == ["a", " b\u2028c"]


CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
# NN I-NP O

Peter NNP B-NP B-PER
"""

CONLL_U = """# sent_id = 1
# text = du
1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_
1\tde\tde\tADP\tE\t_\t0\troot\t_\t_
2\tle\tle\tDET\tR\t_\t1\tdet\t_\t_
2.1\tnull\t_\t_\t_\t_\t_\t_\t_\t_

# sent_id = 2
1\tici là\tici\tADV\tB\t_\t0\troot\t_\t_
"""


def read(path: Path, content: str, **form: bool) -> Found:
    path.write_text(content)
    (found,) = read_file(path, Form(**form)).values()  # type: ignore[arg-type]
    return found


def test_conll_2003(tmp_path: Path) -> None:
    found = read(tmp_path / "train.txt", CONLL_2003, tagged=True)
    assert found.rows.to_list() == [
        {
            "tokens": ["EU", "rejects", "#"],
            "pos_tags": ["NNP", "VBZ", "NN"],
            "chunk_tags": ["B-NP", "B-VP", "I-NP"],
            "ner_tags": ["B-ORG", "O", "O"],
        },
        {"tokens": ["Peter"], "pos_tags": ["NNP"], "chunk_tags": ["B-NP"], "ner_tags": ["B-PER"]},
    ]
    assert list(found.lines or []) == [3, 7]
    assert found.notes[0].endswith("with the columns tokens, pos_tags, chunk_tags, ner_tags")


def test_conll_u(tmp_path: Path) -> None:
    found = read(tmp_path / "fr.conllu", CONLL_U)
    assert found.rows["tokens"][:] == [["de", "le"], ["ici là"]]
    assert found.rows["upos"][:] == [["ADP", "DET"], ["ADV"]]
    assert found.notes[1] == "3 lines of comments are left out"


@pytest.mark.parametrize(
    ("content", "tokens", "tags"),
    [
        ("EU B-ORG\r\nit O\r\n\r\nyes O\r\n", [["EU", "it"], ["yes"]], [["B-ORG", "O"], ["O"]]),
        ("EU\tB-ORG\nNew York\tO\n", [["EU", "New York"]], [["B-ORG", "O"]]),
        ("EU   B-ORG \nit O\n", [["EU", "it"]], [["B-ORG", "O"]]),
        ("a\u00a0b O\n", [["a\u00a0b"]], [["O"]]),  # a space that does not break is no space between columns
        ("O\twhat\nB-ACTOR\ttom\n", [["what", "tom"]], [["O", "B-ACTOR"]]),
        ("# id 7 domain=en\nEU _ _ B-ORG\n", [["EU"]], None),
        ("it PRP O\n", [["it"]], [["O"]]),
    ],
)
def test_other_columns(
    content: str, tokens: list[list[str]], tags: list[list[str]] | None, tmp_path: Path
) -> None:
    rows = read(tmp_path / "rows.conll", content).rows
    assert rows["tokens"][:] == tokens
    if tags is not None:
        assert rows["tags"][:] == tags


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("EU B-ORG\nit\n", r"line 2 has 1 columns, where 2 are due, a word and its classes: 'it'"),
        ("EU\nit\n", "line 1 has 1 columns, where 2 are due"),
        ("-DOCSTART- O\n\n", "has no rows"),
    ],
)
def test_files_that_are_refused(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message):
        read(tmp_path / "rows.conll", content)


def test_a_txt_file_of_texts(tmp_path: Path) -> None:
    found = read(tmp_path / "notes.txt", "one\r\n\r\n  two\u2028 \r\nthree")
    assert found.rows.to_list() == [{"text": "one"}, {"text": "  two\u2028 "}, {"text": "three"}]
    assert list(found.lines or []) == [1, 3, 4]
    assert found.notes == ("each of its lines is a text",)
