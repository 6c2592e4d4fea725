"""Shared by `lorica combine` and `lorica compress`: the place of the result, the table of its errors."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lorica.cli.shared import hints
from lorica.errors import FileError, LoricaWarning
from lorica.train.recipe import Recipe, check_file
from lorica.train.system import write_atomically

if TYPE_CHECKING:
    from lorica.adapter import Adapter
    from lorica.algebra import ErrorReport

SHOWN = 10
RECIPE = "recipe.yaml"
# What a tokenizer, an image processor or a processor writes.
_CARRIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model"),
    *("vocab.*", "merges.txt", "preprocessor_config.json", "processor_config.json"),
)


def check_new(out: str) -> Path:
    """The folder to write to.

    Raises:
        FileError: it is there, and not empty.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileError(f"{folder} is not empty; give a new folder")
    return folder


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Tell lorica's warnings in one line each, on standard error."""
    from lorica.train.console import make_console

    notes = make_console(stderr=True)
    with warnings.catch_warnings():
        warnings.simplefilter("always", LoricaWarning)
        warnings.showwarning = lambda message, *_args, **_kwargs: notes.print(f"warning: {message}")
        yield


def save_and_show(
    adapter: Adapter,
    report: ErrorReport,
    out: Path,
    compared_to: str,
    more: str = "",
    *,
    of: Sequence[str | Path] = (),
) -> None:
    """Write the result, print the error of its worst layers, and of all, and what to type next.

    Args:
        adapter: the result.
        report: its error.
        out: folder to write.
        compared_to: name of the reference of the error.
        more: text behind the mean.
        of: folders of the adapters that it was made of, the one whose head it has first: what evaluation
            and prediction need beside an adapter comes from there.
    """
    from lorica.checkpoint import write
    from lorica.train.console import make_console, print_table, size

    write(adapter, out)
    console = make_console()
    layers = sorted(report.layers.items(), key=lambda item: -item[1].error)
    rows = [
        [path, str(layer.rank), f"{layer.norm:.4g}", f"{layer.error:.2e}"] for path, layer in layers[:SHOWN]
    ]
    title = f"relative error of the update, to {compared_to}"
    print_table(console, title, ["layer", "rank", "norm", "error"], rows)
    if len(layers) > SHOWN:
        console.print(f"... and {len(layers) - SHOWN} more layers with less")
    path, worst = report.worst
    console.print(f"worst {worst:.2e} ({path}), mean {report.mean:.2e}{more}")
    ranks = [layer.rank for _, layer in layers]
    rank = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    console.print(
        f"wrote an adapter of rank {rank}, {size(adapter.nbytes)}, to {out}", soft_wrap=True, markup=False
    )
    hints.show(*carry(of, out))


def carry(of: Sequence[str | Path], out: Path) -> list[str | None]:
    """Copy the recipe and the tokenizer beside an adapter that was made of others.

    Only where their recipes agree on the task, the base and the classes: otherwise the result is for neither.

    Returns:
        The next commands.
    """
    made = [Path(folder) for folder in of if (Path(folder) / RECIPE).is_file()]
    recipes = [_plain(folder / RECIPE) for folder in made]
    if not recipes or any(_kind(recipe) != _kind(recipes[0]) for recipe in recipes):
        return [hints.command("info", out)]
    source, recipe = made[0], recipes[0]
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
    recipe["output"] = str(out)
    write_atomically(out / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120))
    loaded = Recipe.load(out / RECIPE, trust_task=True)  # nothing of it runs here
    scored = hints.has_test_rows(source)
    return [hints.to_evaluate(out, loaded, scored=scored), hints.to_use(out, loaded)]


def _plain(path: Path) -> dict[str, Any]:
    return dict(check_file(path))


def _kind(recipe: Mapping[str, Any]) -> tuple[Any, ...]:
    data = recipe.get("data") or {}
    return recipe.get("task"), recipe.get("model"), data.get("labels"), data.get("text_pair") is None
