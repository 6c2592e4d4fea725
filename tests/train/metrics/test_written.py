"""Metrics of written text: equal to their libraries', to published examples and to plain sums."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from lorica.errors import LoricaError
from lorica.train.metrics import captions as jars
from lorica.train.metrics import written
from lorica.train.metrics.written import METRICS

for needed in ("sacrebleu", "rouge_score", "pycocoevalcap"):
    pytest.importorskip(needed, reason="needs: pip install 'lorica[generation]'")
java = pytest.mark.skipif(not jars.has_java(), reason="needs a Java runtime")

# The first example of Papineni et al. (2002), with its three references.
SAID = "It is a guide to action which ensures that the military always obeys the commands of the party"
OTHER = "It is to insure the troops forever hearing the activity guidebook that party direct"
TRUE = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of "
    "the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]
ROWS = [SAID, OTHER, "The Vaults is a pub near Café Adriatic. Prices start at £30."]
REFERENCES = [
    TRUE,
    TRUE[:2],
    ["The Vaults, a pub near Café Adriatic, costs more than £30.", "A pub: The Vaults."],
]


def score(name: str, predictions: list[str], references: list[list[str]]) -> float:
    found = METRICS[name](predictions, references)
    return next(iter(found.values()))


def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def allowed(references: list[list[str]], n: int) -> Counter[tuple[str, ...]]:
    most: Counter[tuple[str, ...]] = Counter()
    for words in references:
        most |= grams(words, n)
    return most


def plain_bleu(said: list[list[str]], true: list[list[list[str]]]) -> float:
    precisions, length, due = [], 0, 0
    for n in range(1, 5):
        right = sum((grams(s, n) & allowed(t, n)).total() for s, t in zip(said, true, strict=True))
        precisions.append(right / sum(max(len(s) - n + 1, 0) for s in said))
    for s, t in zip(said, true, strict=True):
        length += len(s)
        due += min((abs(len(each) - len(s)), len(each)) for each in t)[1]
    return math.exp(sum(map(math.log, precisions)) / 4 + min(0, 1 - due / length))


def plain_nist(said: list[list[str]], true: list[list[list[str]]]) -> float:
    every = [words for texts in true for words in texts]
    counts = {n: sum((grams(words, n) for words in every), Counter()) for n in range(1, 6)}
    counts[0] = Counter({(): sum(map(len, every))})
    total = 0.0
    for n in range(1, 6):
        bits = 0.0
        for s, t in zip(said, true, strict=True):
            for gram, hits in (grams(s, n) & allowed(t, n)).items():
                bits += hits * math.log2(counts[n - 1][gram[:-1]] / counts[n][gram])
        total += bits / sum(max(len(s) - n + 1, 0) for s in said)
    ratio = sum(map(len, said)) / sum(sum(map(len, t)) / len(t) for t in true)
    beta = -math.log(0.5) / math.log(1.5) ** 2
    return total * math.exp(-beta * math.log(min(ratio, 1)) ** 2)


def words(text: str) -> list[str]:
    return text.lower().split()


@pytest.mark.parametrize(("name", "plain"), [("bleu", plain_bleu), ("nist", plain_nist)])
@pytest.mark.parametrize("rows", [[SAID], [SAID, OTHER], [OTHER, SAID, "to action"]])
def test_bleu_and_nist_are_the_plain_sums(name: str, plain: object, rows: list[str]) -> None:
    references = [TRUE, TRUE[:1], TRUE[1:]][: len(rows)]
    assert callable(plain)
    expected = plain([words(row) for row in rows], [[words(text) for text in texts] for texts in references])
    assert score(name, rows, references) == pytest.approx(expected, rel=1e-12)


def test_with_one_reference_a_row_nist_is_that_of_nltk() -> None:
    from nltk.translate.nist_score import corpus_nist

    ours = score("nist", [SAID, OTHER], [[TRUE[0]], [TRUE[1]]])
    theirs = corpus_nist([[words(TRUE[0])], [words(TRUE[1])]], [words(SAID), words(OTHER)])
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_punctuation_is_a_word_and_case_does_not_matter() -> None:
    assert score("bleu", ["a pub , cheap and near it ."], [["A pub, cheap and near it."]]) == pytest.approx(1)
    assert score("nist", ["a pub , cheap ."], [["A pub, cheap."]]) == score(
        "nist", ["A pub, cheap."], [["a pub, cheap."]]
    )


def test_edits_by_hand() -> None:
    assert score("ter", ["a c b d"], [["a b c d"]]) == pytest.approx(1 / 4)  # one shift
    assert score("ter", ["a b"], [["a b c", "x y z"]]) == pytest.approx(1 / 3)
    assert score("ter", ["a b c d e"], [["v w"]]) == pytest.approx(5 / 2)


def test_rouge_as_its_authors_print_it() -> None:
    said, true = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    found = written([said, said], [[true], [true, said]], ["rouge"])
    assert found["rouge1"] == pytest.approx((2 * 0.75 * (6 / 9) / (0.75 + 6 / 9) + 1) / 2)
    assert found["rougeL"] == pytest.approx((2 * 0.625 * (5 / 9) / (0.625 + 5 / 9) + 1) / 2)
    assert set(found) == {"rouge1", "rouge2", "rougeL"}


@java
def test_the_caption_metrics_are_those_of_coco_caption() -> None:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    plain = jars.ptb_tokens([*ROWS, "", *(text for texts in REFERENCES for text in texts)])
    assert plain[2:4] == ["the vaults is a pub near café adriatic prices start at # 30", ""]
    said, rest = dict(enumerate([text] for text in plain[:3])), iter(plain[4:])
    true = {row: [next(rest) for _ in texts] for row, texts in enumerate(REFERENCES)}
    assert score("rouge_l", ROWS, REFERENCES) == pytest.approx(Rouge().compute_score(true, said)[0])
    assert score("cider", ROWS, REFERENCES) == pytest.approx(Cider().compute_score(true, said)[0])


@java
def test_meteor_is_that_of_coco_caption_over_the_whole_set() -> None:
    # By pycocoevalcap's own Meteor on the same words, with an empty text and the program's own separator.
    said = [*ROWS, "", "Words ||| apart"]
    assert score("meteor", said, [*REFERENCES, ["A pub."], ["Words apart"]]) == pytest.approx(
        0.3592703074141194, abs=1e-9
    )


def test_references_of_e2e_against_themselves_and_in_disorder(data_dir: Path) -> None:
    with gzip.open(data_dir / "e2e_nlg" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        references = [json.loads(line)["references"] for _, line in zip(range(60), lines, strict=False)]
    first = [texts[0] for texts in references]
    mixed = random.Random(0).sample(first, len(first))
    names = ["bleu", "nist", "rouge", *(["rouge_l", "cider"] if jars.has_java() else [])]
    right, wrong = (written(texts, references, names) for texts in (first, mixed))
    for name in right:
        assert wrong[name] < right[name]
    for name in set(right) - {"nist", "cider"}:
        assert right[name] == pytest.approx(1)


@pytest.mark.parametrize(
    ("said", "true", "right"),
    [
        ("SELECT Name FROM table WHERE a = 3 AND B = f", "select name from table where b = F and a = 3", 1),
        ("SELECT a FROM table WHERE b = x and y AND c > 1", "SELECT a FROM table WHERE c>1 AND b=x and y", 1),
        ("SELECT COUNT Name FROM table", "SELECT COUNT(Name) FROM table;", 1),
        ("SELECT MAX Age FROM table WHERE Name = Ann", "SELECT MIN Age FROM table WHERE Name = Ann", 0),
        ("SELECT Age FROM table WHERE Name = Ann", "SELECT Age FROM table WHERE Name > Ann", 0),
        ("SELECT Age FROM table WHERE a = 1 AND a = 1", "SELECT Age FROM table WHERE a = 1", 0),
        ("SELECT Age", "SELECT  age", 1),
        ("", "SELECT Age FROM table", 0),
        ("SELECT No. in set FROM table WHERE x = 1", "SELECT No. in set FROM table WHERE x = 1", 1),
    ],
)  # fmt: skip
def test_queries_by_what_they_say(said: str, true: str, right: int) -> None:
    assert score("logical_form", [said], [[true]]) == right


def test_without_java_the_rest_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jars.shutil, "which", lambda name: None)
    assert set(written([SAID], [TRUE], ["bleu", "meteor", "cider"])) == {"bleu"}
    with pytest.raises(LoricaError, match="no java on this machine"):
        METRICS["meteor"]([SAID], [TRUE])


@java
def test_java_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jars, "_JAVA", ("java", "-XX:NoSuchOption"))
    with pytest.raises(LoricaError, match=r"java failed with status 1: .*NoSuchOption"):
        jars.ptb_tokens(["a"])


@pytest.mark.parametrize(
    ("predictions", "references", "names", "message"),
    [
        (["a"], [["a"]], ["blue"], "no metric 'blue' .* did you mean 'bleu'"),
        (["a"], [["a"], ["b"]], ["bleu"], "1 texts cannot be scored by 2 rows"),
        ([], [], ["bleu"], "0 texts"),
        (["a", "b"], [["a"], []], ["bleu"], "row 2 has no reference"),
    ],
)
def test_what_cannot_be_scored(
    predictions: list[str], references: list[list[str]], names: list[str], message: str
) -> None:
    with pytest.raises(LoricaError, match=message):
        written(predictions, references, names)
