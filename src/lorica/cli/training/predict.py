"""``lorica predict``: use a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorica.cli.shared.parsing import (
    Parser,
    add_generation,
    add_launch,
    add_output,
    add_trust,
    generation_of,
    launched,
    tells,
)
from lorica.plain import as_json


def parser() -> Parser:
    """The command's options."""
    result = Parser("predict", description="Predict with a trained adapter, or a model merged from one.")
    result.add_argument("directory", type=str, help="folder that `lorica train` or `lorica merge` wrote")
    result.add_argument(
        "input",
        type=str,
        help="a text (of a pair: two texts with a tab or \\t between) or an image's path, a .txt file of "
        "one a line, a file of rows (csv, tsv, json, jsonl, xlsx, parquet), or a folder of images",
    )
    add_output(result, "file for the predictions, one JSON object a line (default: print them)")
    result.add_argument("--json", action="store_true", help="print JSON lines also for a single text")
    add_generation(result)
    add_launch(result)
    add_trust(result)
    return result


def run(argv: list[str]) -> int:
    """Predict, and print a line for each row."""
    command = parser()
    parsed: Any = command.parse_args(argv)
    if (code := launched(command, parsed, "predict", argv, "start it again")) is not None:
        return code

    from lorica.errors import FileError
    from lorica.train import tasks
    from lorica.train.data.sources import format_of
    from lorica.train.system import writable_file, write_lines
    from lorica.train.trained import predict, recipe_of

    recipe = recipe_of(parsed.directory, trust_task=parsed.trust_task)
    path = Path(parsed.input)
    holds_rows = path.suffix == ".txt" or format_of(path) is not None
    there = 0 < len(parsed.input) < 1024 and path.exists()
    if holds_rows and " " not in parsed.input and not there:
        raise FileError(f"there is no file {path}")
    reads_files = tasks.get(recipe.task).reads_files
    if there and path.is_dir() and not reads_files:
        raise FileError(f"{path} is a folder; give a file of rows, or a text (one word alone in a .txt file)")
    # A file by any other name is one that no rows can be read from, unless the task itself reads it.
    from_file = there and (holds_rows or path.is_dir() or not reads_files)
    if parsed.output is not None:
        writable_file(parsed.output)
    text = parsed.input
    task = tasks.get(recipe.task)
    if "\t" not in text and not task.writes and len(task.inputs(recipe.data)) == 2:
        text = text.replace(r"\t", "\t")  # as a shell's quotes leave it
    generation = generation_of(parsed, recipe.generation)
    rows = predict(
        parsed.directory,
        path if from_file else [text],
        generation=generation,
        trust_task=parsed.trust_task,
    )
    if not tells():
        return 0
    if not (from_file or parsed.json or parsed.output):
        print(
            f"{rows[0]['label']}  {rows[0]['probability']:.4f}"
            if "label" in rows[0]
            else as_json(rows[0], indent=None)
        )
    elif parsed.output is None:
        print("".join(as_json(row, indent=None) + "\n" for row in rows), end="")
    else:
        write_lines(parsed.output, rows)
    return 0
