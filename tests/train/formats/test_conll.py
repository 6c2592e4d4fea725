from __future__ import annotations

from pathlib import Path

import pytest

from lorica.errors import FileError
from lorica.train.data.files import read_file
from lorica.train.data.tables import Form, Found

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
