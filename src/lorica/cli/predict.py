"""``lorica predict``: use a trained adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorica.cli.parsing import Parser
from lorica.cli.writing import add_generation, generation_of


def parser() -> Parser:
    """The command's options."""
    result = Parser("predict", description="Predict with a trained adapter, or a model merged from one.")
    result.add_argument("directory", type=str, help="folder that `lorica train` or `lorica merge` wrote")
    result.add_argument(
        "input",
        type=str,
        help="a text (of a pair: two texts with a tab between), a .txt file of one a line, or a csv, tsv, "
        "json, jsonl (.gz) or parquet file",
    )
    result.add_argument(
        "--output",
        type=str | None,
        help="file to write the predictions to, one JSON object a line (default: print them)",
    )
    result.add_argument("--json", action="store_true", help="print JSON lines also for a single text")
    add_generation(result)
    return result


def run(argv: list[str]) -> int:
    """Predict, and print a line for each row."""
    parsed: Any = parser().parse_args(argv)

    from lorica.errors import FileError
    from lorica.train.files import write_atomically
    from lorica.train.use import predict, recipe_of

    path = Path(parsed.input)
    known = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".gz", ".parquet", ".arrow")
    if path.suffix in known and " " not in parsed.input and not path.is_file():
        raise FileError(f"there is no file {path}")
    from_file = len(parsed.input) < 1024 and path.is_file()
    generation = generation_of(parsed, recipe_of(parsed.directory).generation)
    rows = predict(parsed.directory, path if from_file else [parsed.input], generation=generation)
    if not (from_file or parsed.json or parsed.output):
        print(
            f"{rows[0]['label']}  {rows[0]['probability']:.4f}"
            if "label" in rows[0]
            else json.dumps(rows[0], ensure_ascii=False)
        )
        return 0
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if parsed.output is None:
        print(lines, end="")
    else:
        try:
            write_atomically(Path(parsed.output), lines)
        except OSError as error:
            raise FileError(f"cannot write {parsed.output}: {error.strerror or error}") from error
    return 0
