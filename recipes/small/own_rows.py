"""Rows for the recipes whose public sets are not at hand, from the docstrings of Python's standard library.

    python recipes/small/own_rows.py FOLDER

writes, each with its training, validation and test rows:

    questions/      what does a function do? Its sentence stands among those of five others, or in one row of
                    eight does not
    parameters/     which words of a docstring name a parameter of its function?
    conversations/  a user asks what a function does, and the assistant answers
    summaries/      the first sentence of a docstring, from the rest of it
    preferences/    what does a function do? Its sentence is better than the same one broken off

A function is in one split alone. The same Python gives the same rows; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import random
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = {"train": range(80), "validation": range(80, 90), "test": range(90, 100)}
"""Per cent of the hashes of functions' names."""

_ASKED = "What does {} do?"
_NOT_READ = {"test", "tests", "idlelib", "lib2to3", "turtledemo"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Function:
    """A documented function.

    Args:
        name: its name.
        sentence: the first paragraph of its docstring.
        rest: the other paragraphs.
        parameters: their names.
    """

    name: str
    sentence: str
    rest: str
    parameters: tuple[str, ...]


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, counts in write(folder).items():
        print(f"{folder / name}: {', '.join(f'{count:,} {split}' for split, count in counts.items())}")


def write(folder: Path) -> dict[str, dict[str, int]]:
    """Write all data sets into a folder, and count their rows by split."""
    found = functions()
    counts: dict[str, dict[str, int]] = {}
    for make in MAKERS:
        counts[make.__name__] = {}
        for split, shares in SPLITS.items():
            rows = list(make([each for each in found if _share(each.name) in shares]))
            path = folder / make.__name__ / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
            )
            counts[make.__name__][split] = len(rows)
    return counts


@functools.cache  # seconds of parsing, and asked for by the models as well
def functions() -> list[Function]:
    """Functions of the standard library, one of each name and sentence, the modules mixed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    by_name: dict[str, Function] = {}
    for module in sorted(sys.stdlib_module_names - _NOT_READ):
        for file in [root / f"{module}.py", *sorted((root / module).rglob("*.py"))]:
            if file.is_file() and not _NOT_READ & set(file.relative_to(root).parts):
                for function in _documented(file):
                    by_name.setdefault(function.name, function)
    once = {function.sentence: function for function in by_name.values()}
    return sorted(once.values(), key=lambda function: _digest(function.sentence))


def questions(found: Sequence[Function]) -> Iterator[Row]:
    """Rows as in SQuAD 2.0."""
    for i, function in enumerate(found):
        draw = random.Random(i)
        shown = draw.sample([each for each in found if each is not function], 5)
        answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
        if i % 8 != 7:
            shown.append(function)
            draw.shuffle(shown)
        context = " ".join(f"{each.name}: {each.sentence}" for each in shown)
        if function in shown:
            start = context.index(f"{function.name}: {function.sentence}") + len(function.name) + 2
            answers = {"text": [function.sentence], "answer_start": [start]}
        yield {"question": _ASKED.format(function.name), "context": context, "answers": answers}


def parameters(found: Sequence[Function]) -> Iterator[Row]:
    """The words of each sentence that names a parameter, and their classes."""
    for function in found:
        words = function.sentence.split()
        named = [word.strip("`'\"*(),.:;") in function.parameters for word in words]
        if any(named):
            yield {"tokens": words, "ner_tags": ["B-PARAMETER" if each else "O" for each in named]}


def conversations(found: Sequence[Function]) -> Iterator[Row]:
    """A question and its answer, as messages."""
    for function in found:
        said = {"user": _ASKED.format(function.name), "assistant": function.sentence}
        yield {"messages": [{"role": role, "content": content} for role, content in said.items()]}


def summaries(found: Sequence[Function]) -> Iterator[Row]:
    """Columns as SAMSum has them."""
    for function in found:
        if len(function.rest.split()) >= 8:
            yield {"dialogue": function.rest, "summary": function.sentence}


def preferences(found: Sequence[Function]) -> Iterator[Row]:
    """A question, the answer to it, and the same answer broken off after half of its words."""
    for function in found:
        words = function.sentence.split()
        said = {"chosen": words, "rejected": words[: len(words) // 2]}
        answers = {side: f" {' '.join(part)}" for side, part in said.items()}
        yield {"prompt": _ASKED.format(function.name), **answers}


MAKERS: tuple[Callable[[Sequence[Function]], Iterator[Row]], ...] = (
    questions,
    parameters,
    conversations,
    summaries,
    preferences,
)


def _documented(file: Path) -> Iterator[Function]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            first, *rest = (ast.get_docstring(node) or "").split("\n\n")
            sentence = " ".join(first.split())
            if sentence.endswith(".") and 4 <= len(sentence.split()) <= 30:
                given = [
                    each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                ]
                # "a" is an article more often than a parameter.
                named = tuple(name for name in given if name not in ("self", "cls", "a"))
                yield Function(node.name, sentence, " ".join(" ".join(rest).split()), named)


def _share(name: str) -> int:
    return int(_digest(name)[:8], 16) % 100


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
