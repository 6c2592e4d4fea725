"""METEOR, ROUGE-L and CIDEr as coco-caption defines them, which is how the E2E challenge scores.

All three read texts as the Penn Treebank splits them, in lower case and without punctuation. A Java program
splits them, and METEOR is one; pycocoevalcap brings both.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorica.errors import FileError, LoricaError, require


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """METEOR 1.5 (Denkowski and Lavie, 2014): words, stems, synonyms and paraphrases, in order.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right; the best of a row counts.

    Returns:
        ``meteor``, from 0 to 1, of all matches of the set together.
    """
    return {"meteor": meteor_15(*_split(predictions, references))}


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-L as coco-caption has it: recall weighs 1.44 times precision, the best of each over a row.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right.

    Returns:
        ``rouge_l``, from 0 to 1, the mean over rows.
    """
    return {"rouge_l": _coco("rouge.rouge", "Rouge", predictions, references)}


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D (Vedantam et al., 2015): n-grams weighed by how few rows have them, compared by their cosine.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right.

    Returns:
        ``cider``, from 0 to 10, the mean over rows.
    """
    return {"cider": _coco("cider.cider", "Cider", predictions, references)}


def _coco(module: str, name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    scorer = getattr(require(f"pycocoevalcap.{module}", extra="generation"), name)()
    said, true = _split(predictions, references)
    score, _ = scorer.compute_score(dict(enumerate(true)), {i: [text] for i, text in enumerate(said)})
    return float(score)


def _split(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    # In one call: the program takes longer to start than to split a test set.
    words = iter(ptb_tokens([*predictions, *(text for texts in references for text in texts)]))
    return [next(words) for _ in predictions], [[next(words) for _ in texts] for texts in references]


# In whatever locale this process runs: a pound sign must reach the other side.
_JAVA = ("java", "-Xmx2G", "-Dfile.encoding=UTF-8")

_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def has_java() -> bool:
    """Whether this machine can run them."""
    return shutil.which("java") is not None


def ptb_tokens(texts: Sequence[str]) -> list[str]:
    """Split texts as the Penn Treebank does, in lower case and without punctuation, spaces between words.

    Raises:
        LoricaError: Java is missing or fails.
    """
    jar = _package() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    options = ("-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    given = "".join(" ".join(text.split()) + "\n" for text in texts)
    with _started(*options) as java:
        found = java.communicate(given)[0].split("\n")
    if len(found) <= len(texts):
        raise LoricaError(f"the Treebank tokenizer gave {len(found)} lines for {len(texts)} texts")
    return [" ".join(w for w in line.split() if w not in _PUNCTUATION) for line in found[: len(texts)]]


def meteor_15(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 over a whole set of texts in `ptb_tokens`, from 0 to 1.

    Raises:
        LoricaError: Java is missing or fails.
    """
    jar = _package() / "meteor" / "meteor-1.5.jar"
    with _started("-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm") as java:
        assert java.stdin is not None
        assert java.stdout is not None
        found = []
        for said, true in zip(predictions, references, strict=True):
            texts = [text.replace("|||", " ") for text in (*true, said)]
            # One answer per question: else the program would block on its output while we still write to it.
            java.stdin.write(" ||| ".join(["SCORE", *texts]) + "\n")
            java.stdin.flush()
            found.append(java.stdout.readline().strip())
        java.stdin.write(" ||| ".join(["EVAL", *found]) + "\n")
        java.stdin.flush()
        scores = [java.stdout.readline() for _ in (*predictions, "the whole set")]
        java.stdin.close()
    try:
        return float(scores[-1])
    except ValueError as error:
        raise LoricaError(f"METEOR answered {scores[-1]!r} where a number was due") from error


@contextmanager
def _started(*options: str) -> Iterator[subprocess.Popen[str]]:
    """A Java program, its pipes open; its error output is shown if it fails."""
    if not has_java():
        raise FileError("there is no java on this machine; install a Java runtime (8 or newer)")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        with subprocess.Popen(
            [*_JAVA, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
        ) as java:
            try:
                yield java
            except BrokenPipeError:
                pass  # it ended early, and its status below says so
            except BaseException:
                java.kill()
                raise
        if java.returncode:
            log.seek(0)
            raise LoricaError(f"java failed with status {java.returncode}: {log.read().strip()[-500:]}")


def _package() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        require("pycocoevalcap", extra="generation")
        raise FileError("pycocoevalcap has no folder")
    return Path(next(iter(spec.submodule_search_locations)))
