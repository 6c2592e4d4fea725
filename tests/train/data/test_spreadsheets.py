"""Files as spreadsheets, pandas and corpora write them, against the rows that a reader of the file sees."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.errors import ConfigError, FileError
from lorica.train.data.sources import read_file
from lorica.train.data.tables import Form, Found


def read(path: Path, content: str | bytes, form: Form | None = None) -> Found:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (found,) = read_file(path, form or Form()).values()
    return found


def cells(found: Found) -> list[tuple[str, ...]]:
    return [tuple(row.values()) for row in found.rows.to_list()]


COMMON: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "Windows' line ends and blank lines": ("text,label\r\n\r\na,x\r\n\r\nb,y\r\n", [("a", "x"), ("b", "y")]),
    "old Macs' line ends": ("text,label\ra,x\rb,y\r", [("a", "x"), ("b", "y")]),
    "no line end at the end": ("text,label\na,x", [("a", "x")]),
    "numbers as they are written": (
        "text,label\n1.10,01\n1e5,1\n-0,+1\n",
        [("1.10", "01"), ("1e5", "1"), ("-0", "+1")],
    ),
    "words for nothing": ("text,label\nnull,NA\nnan,None\n", [("null", "NA"), ("nan", "None")]),
    "spaces of a text": ("text, label\n  two , x\n", [("  two ", " x")]),
    "a quoted text": ('text,label\n"two\nlines, ""so""",x\n', [('two\nlines, "so"', "x")]),
    "a quote within a cell": (
        'text,label\na 5" disc,x\nthe "so" case,y\n',
        [('a 5" disc', "x"), ('the "so" case', "y")],
    ),
    "separators that are no line ends": ("text,label\na\x0bb\u2028c\x85d,x\n", [("a\x0bb\u2028c\x85d", "x")]),
    "Excel's own first line": ("sep=;\r\ntext;label\r\na, b;x\r\n", [("a, b", "x")]),
    "semicolons": ("text;label\na, b, c;x\n", [("a, b, c", "x")]),
    "semicolons, and commas in the header": ('text;"good, bad"\na, b;x\nc;y\n', [("a, b", "x"), ("c", "y")]),
    "bars": ("text|label\na|x\n", [("a", "x")]),
    "tabs": ("text\tlabel\na, b\tx\n", [("a, b", "x")]),
    "one column": ("text\nhello\n", [("hello",)]),
    "empty columns on the right": ("text,label,,\na,x,,\nb,y,,\n", [("a", "x"), ("b", "y")]),
    "an empty cell": ("text,label\n,x\n", [("", "x")]),
    "a cell of 300,000 letters": (f"text,label\n{'a' * 300_000},x\n", [("a" * 300_000, "x")]),
}


@pytest.mark.parametrize("name", COMMON)
def test_csv(name: str, tmp_path: Path) -> None:
    content, expected = COMMON[name]
    found = read(tmp_path / "rows.csv", content)
    assert cells(found) == expected
    assert not found.broken


GLUE = ["He said", '"Quite so', 'third "word" here', 'a 5" disc', 'and "that', '"all of it"', "last"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text\tlabel\n" + "".join(f"{text}\tx\n" for text in GLUE), [(text, "x") for text in GLUE]),
        # Two quotes that a reader of csv would take for the two ends of one cell.
        (
            'text\tlabel\n"Quite so\tx\nfilm\ty\nand that"\tz\n',
            [('"Quite so', "x"), ("film", "y"), ('and that"', "z")],
        ),
        ('text\tlabel\n"Quite so"\tx\nfilm\ty\n', [('"Quite so"', "x"), ("film", "y")]),
        # As pandas and Excel write them: what needs quotes has them, or all cells have.
        ('text\tlabel\n"a ""so"" b"\tx\nfilm\ty\n', [('a "so" b', "x"), ("film", "y")]),
        ('text\tlabel\n"tab\there"\tx\nfilm\ty\n', [("tab\there", "x"), ("film", "y")]),
        ('text\tlabel\n"two\nlines"\tx\nfilm\ty\n', [("two\nlines", "x"), ("film", "y")]),
        ('"text"\t"label"\n"film"\t"x"\n"song"\t3\n', [("film", "x"), ("song", "3")]),
    ],
)
def test_quotes_of_a_tsv(content: str, expected: list[tuple[str, ...]], tmp_path: Path) -> None:
    assert cells(read(tmp_path / "rows.tsv", content)) == expected


@given(st.lists(st.tuples(st.text(min_size=1), st.text()), min_size=1, max_size=5), st.booleans())
def test_what_python_writes_is_read_back(rows: list[tuple[str, str]], everything: bool) -> None:
    from lorica.train.data.spreadsheets import read_delimited

    rows = [tuple(cell.replace("\x00", "").replace("\r", "") for cell in row) for row in rows]  # type: ignore[misc]
    rows = [(text if text.strip() else "x", label) for text, label in rows]
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL if everything else csv.QUOTE_MINIMAL)
    writer.writerows([("text", "label"), *rows])
    assert cells(read_delimited(file.getvalue(), Path("rows.csv"), "csv", Form())) == rows


def test_rows_know_their_lines(tmp_path: Path) -> None:
    found = read(tmp_path / "rows.csv", 'text,label\n\n"a\nb",x\n,\nc,y\n')
    assert cells(found) == [("a\nb", "x"), ("c", "y")]
    assert list(found.lines or []) == [3, 6]
    assert found.notes == ("1 rows without a filled cell are left out",)


def test_uneven_rows_are_broken(tmp_path: Path) -> None:
    found = read(tmp_path / "rows.csv", "text,label\na,x\nb, and c,y\nd\n")
    assert {row: problem[:11] for row, problem in found.broken.items()} == {
        1: "has 3 cells",
        2: "has 1 cell,",
    }
    assert "2 columns: text, label" in found.broken[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            'text,label\nfilm,x\n"Quite so,x\nsong "that",y\n',
            r"row that begins in line 3 has a quote that does not",
        ),
        ('text,label\n"Quite so,x\nfilm,y\n', "row that begins in line 2 has a quote"),
        ("text,label,text\na,b,c\n", "has two columns of the name 'text'"),
        (
            "great film,pos\nbad film,neg\nfine,pos\n",
            r"looks like a row: 'great film', 'pos'.*--data.columns",
        ),
        ("It was a dark and stormy night and the rain fell\nNo\n", "looks like a row"),
        ("", "has no rows"),
        ("text,label\n", "has no rows"),
        ("text,label\n,\n,\n", "has no rows"),
    ],
)
def test_files_that_are_refused(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message):
        read(tmp_path / "rows.csv", content)


def test_a_file_without_names(tmp_path: Path) -> None:
    form = Form(columns=["text", "label"])
    assert cells(read(tmp_path / "rows.csv", "a,pos\nb,pos\n", form)) == [("a", "pos"), ("b", "pos")]
    # One that has them all the same.
    assert cells(read(tmp_path / "rows.csv", "text,label\na,pos\n", form)) == [("a", "pos")]
    cola = "gj04\t1\t\tOur friends won't buy this.\n"
    names = ["source", "label", "mark", "text"]
    assert (
        read(tmp_path / "in.tsv", cola, Form(columns=names)).rows["text"][0] == "Our friends won't buy this."
    )
    with pytest.raises(FileError, match="whose first line does so too: text, label; leave out one"):
        read(tmp_path / "rows.csv", "text,label\na,pos\n", Form(columns=["first", "second"]))
    with pytest.raises(ConfigError, match="each column once, not a, a"):
        read(tmp_path / "rows.csv", "1,2\n", Form(columns=["a", "a"]))


def test_the_index_that_pandas_writes(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"text": ["a", "b"], "label": [1, 2]})
    frame.to_csv(tmp_path / "rows.csv")
    (found,) = read_file(tmp_path / "rows.csv", Form()).values()
    assert found.rows.to_list()[0] == {"Unnamed: 0": "0", "text": "a", "label": "1"}


def test_a_cell_that_swallows_rows_is_told(tmp_path: Path) -> None:
    found = read(tmp_path / "rows.csv", 'text,label\n"Quite so,x\n' + "film,y\n" * 20 + 'a 5",z\nend,y\n')
    assert len(found.rows) == 2
    assert "from line 2: if that is no long text, a quote there is not closed" in found.notes[0]


def test_delimiters_other_than_the_usual_are_told(tmp_path: Path) -> None:
    assert read(tmp_path / "rows.csv", "text;label\na;x\n").notes == ("its cells are apart at ';'",)
    assert read(tmp_path / "rows.csv", "text,label\na,x\n").notes == ()
