"""``lorica generate``: write texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lorica.cli.shared.parsing import Parser, add_generation, add_output, add_trust, generation_of


def parser() -> Parser:
    """The command's options."""
    result = Parser("generate", description="Write texts with a trained model, an adapter, or any model.")
    result.add_argument(
        "source",
        type=str,
        help="folder that `lorica train` or `lorica merge` wrote; an adapter's folder; or a model, by folder "
        "or Hub name",
    )
    result.add_argument(
        "prompts", type=str, nargs="*", default=[], help="prompts (default: standard input, one a line)"
    )
    result.add_argument("--file", type=str | None, help="text file of prompts, one a line")
    add_output(result, "file for the texts, one JSON object a line (default: print them)")
    result.add_argument(
        "--adapter",
        type=str,
        action="append",
        default=[],
        help="one more adapter for the same base, which answers every prompt too; may be given several times",
    )
    result.add_argument("--merge", action="store_true", help="fold the adapter into the weights first")
    result.add_argument(
        "--chat",
        type=bool | None,
        help="lay prompts out as a user's messages (default: where the recipe learned conversations)",
    )
    result.add_argument("--sequences", type=int, default=1, help="texts a prompt; needs beams or sampling")
    result.add_argument("--seed", type=int, default=0, help="seed of sampling")
    add_generation(result)
    add_trust(result)
    return result


def run(argv: list[str]) -> int:
    """Write, and print each text; one alone on a terminal as it comes."""
    parsed: Any = parser().parse_args(argv)
    prompts = _prompts(parsed)

    from lorica.train.generation.generate import generate, opened
    from lorica.train.system import writable_file, write_lines

    if parsed.output is not None:
        writable_file(parsed.output)
    trained = opened(parsed.source, trust_task=parsed.trust_task)
    config = generation_of(parsed, trained.recipe.generation)
    alone = len(prompts) == parsed.sequences == config.num_beams == 1 and not parsed.adapter
    live = alone and parsed.output is None and sys.stdout.isatty()
    rows = generate(
        trained,
        prompts,
        config,
        adapters=parsed.adapter,
        merged=parsed.merge,
        chat=parsed.chat,
        sequences=parsed.sequences,
        seed=parsed.seed,
        stream=(lambda text: print(text, end="", flush=True)) if live else None,
    )
    if parsed.output is not None:
        write_lines(parsed.output, rows)
    elif live:
        print()
    else:
        for row in rows:
            print(f"{row['adapter'] or 'base'}: {row['generated']}" if "adapter" in row else row["generated"])
    return 0


def _prompts(parsed: Any) -> list[str]:
    from lorica.errors import FileError

    if parsed.prompts and parsed.file is not None:
        raise FileError("give prompts or --file, not both")
    if parsed.prompts:
        return list(parsed.prompts)
    if parsed.file is None and sys.stdin.isatty():
        raise FileError("give a prompt, --file, or prompts on standard input, one a line")
    try:
        text = sys.stdin.read() if parsed.file is None else Path(parsed.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {parsed.file or 'standard input'}: {error}") from error
    if not (lines := [line for line in text.splitlines() if line.strip()]):
        raise FileError(f"{parsed.file or 'standard input'} holds no prompts")
    return lines
