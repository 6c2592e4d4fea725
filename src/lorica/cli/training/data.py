"""``lorica data``: the rows of a recipe, as the model will see them."""

from __future__ import annotations

from typing import Any

from lorica.cli.shared.parsing import Parser, add_trust, expanded, print_help
from lorica.plain import as_json
from lorica.train.recipe import add_recipe, check_file, check_trusted, from_parsed

_MOST = 2000
"""Letters of a stretch that are shown; of a longer one both ends are."""


def parser() -> Parser:
    """The command's options: those of `lorica train`, and the number of rows to show."""
    result = Parser(
        "data",
        usage="lorica data [RECIPE.yaml] [any option of lorica train] [--rows N] [--json]",
        description="The rows of a recipe before anything is trained: which form they have, how long they "
        "are, what is cut, duplicates, the balance of classes, and the first rows as the model will see "
        "them, with what is learned marked. Loads the tokenizer, and no model.",
    )
    add_recipe(result)
    result.add_argument("--rows", type=int, default=2, help="training rows to show")
    result.add_argument("--json", action="store_true", help="print JSON")
    add_trust(result)
    return result


def run(argv: list[str]) -> int:
    """Look at the rows, and print the report."""
    if {"-h", "--help"} & {*argv}:
        print_help(parser(), "data")
        return 0
    argv = ["--help" if argument == "--help-all" else argument for argument in expanded(argv)]
    if argv and not argv[0].startswith("-"):
        check_file(argv[0])
        argv = ["--config", *argv]
    command = parser()
    parsed: Any = command.parse_args(argv)
    recipe = from_parsed(command, parsed)
    typed = {part for argument in argv for part in (argument, argument.partition("=")[2])}
    unseen = [code for code in recipe.code() if code not in typed]  # what was typed is the user's own
    check_trusted(unseen, "the recipe", trust_task=parsed.trust_task)

    from lorica.train.console import make_console
    from lorica.train.preview import preview

    report = preview(recipe, first=max(parsed.rows, 0), console=make_console(stderr=True))
    if parsed.json:
        print(as_json(report.to_dict()))
        return 0
    console = make_console()
    for line in report.lines():
        console.print(line, markup=False, soft_wrap=True)
    for number, row in enumerate(report.first, 1):
        _show(console, number, row)
    return 0


def _show(console: Any, number: int, row: Any) -> None:
    """Print a row: on a terminal its targets are green, elsewhere they stand in brackets."""
    from rich.text import Text

    facts = [f"{row.tokens:,} tokens"] if row.tokens else []
    facts += [f"{row.learned:,} learned"] if row.learned else []
    facts += [f"→ {row.answer}"] if row.answer is not None else []
    console.print(f"\ntraining row {number}: {', '.join(facts)}", markup=False, soft_wrap=True)
    text = Text()
    for each in row.stretches:
        shown = each.text if len(each.text) <= _MOST else _shortened(each.text)
        if console.is_terminal:
            text.append(shown, style="bold green" if each.learned else "")
        else:
            text.append(f"⟦{shown}⟧" if each.learned else shown)
    console.print(text, soft_wrap=True)


def _shortened(text: str) -> str:
    half = _MOST // 2
    return f"{text[:half]} … ({len(text) - _MOST:,} letters) … {text[-half:]}"
