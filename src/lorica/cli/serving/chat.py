"""``lorica chat``: talk to a model and its adapters in the terminal."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from lorica.cli.serving.serve import add_engine, engine_of
from lorica.cli.shared.parsing import Parser

if TYPE_CHECKING:
    from lorica.serve.talking import Conversation


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "chat",
        description="Talk to a model and its adapters; /help lists what can be said beside messages. Without "
        "a terminal, each line of standard input is a message.",
    )
    add_engine(result)
    result.add_argument("--adapter", type=str | None, help="the adapter that answers (default: the source's)")
    result.add_argument("--max-tokens", type=int, default=512, help="the most tokens of an answer")
    result.add_argument(
        "--temperature", type=float, default=0.7, help="0 takes the most likely token each time"
    )
    result.add_argument("--top-p", type=float, default=0.95, help="draw among tokens that have this share")
    result.add_argument("--seed", type=int | None, help="the same seed and messages give the same answers")
    return result


def run(argv: list[str]) -> int:
    """Talk until the user leaves."""
    parsed: Any = parser().parse_args(argv)

    from lorica.errors import require

    require("fastapi", extra="serve")

    from lorica.errors import ConfigError
    from lorica.serve.engine import Sampling

    source, engine = engine_of(parsed)
    if source.kind != "decoder":
        raise ConfigError(
            f"{source.model} reads texts and writes none; `lorica serve` shows what it says of them"
        )
    sampling = Sampling(
        max_tokens=parsed.max_tokens, temperature=parsed.temperature, top_p=parsed.top_p, seed=parsed.seed
    )
    asyncio.run(_talk(engine, sampling, parsed.adapter or source.default))
    return 0


async def _talk(engine: Any, sampling: Any, adapter: str | None) -> None:
    from lorica.errors import LoricaError
    from lorica.serve.talking import BASE, Conversation
    from lorica.train.console import make_console

    live, notes = sys.stdin.isatty() and sys.stdout.isatty(), make_console(stderr=True)
    async with engine:
        talk = Conversation(engine, sampling)
        talk.names = (talk.known(adapter or BASE),)
        if live:
            notes.print(f"{adapter or BASE} answers; /help says what else there is, Ctrl-D ends", style="dim")
        while (line := await asyncio.to_thread(_line, live)) is not None:
            try:
                if not line.startswith("/"):
                    await _answer(talk, line, live=live)
                elif (told := talk.command(line)) is not None:
                    notes.print(told, style="dim")
                else:
                    return
            except LoricaError as error:
                notes.print(str(error), style="red")


def _line(live: bool) -> str | None:
    """The next line that says something; None at the end."""
    while True:
        try:
            line = input("> ") if live else sys.stdin.readline()
        except EOFError:
            return None
        if not live and not line:
            return None
        if line.strip():
            return line.strip()


async def _answer(talk: Conversation, line: str, *, live: bool) -> None:
    """Ask, and show the answers as they come: one as plain text, two side by side."""
    from lorica.serve.talking import BASE

    names = [name or BASE for name in talk.names]
    if len(names) == 1:
        await talk.ask(line, lambda _, text: print(text, end="", flush=True))
        print()
        return
    texts = ["" for _ in names]
    if not live:
        for name, text in zip(names, await talk.ask(line, lambda *_: None), strict=True):
            print(f"{name}: {text}")
        return

    from rich.columns import Columns
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    from lorica.train.console import make_console

    def both() -> Columns:
        panels = [Panel(Text(text), title=Text(name)) for name, text in zip(names, texts, strict=True)]
        return Columns(panels, equal=True, expand=True)

    with Live(both(), console=make_console(), refresh_per_second=12) as shown:

        def more(which: int, text: str) -> None:
            texts[which] += text
            shown.update(both())

        await talk.ask(line, more)
