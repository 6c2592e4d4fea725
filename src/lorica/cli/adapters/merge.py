"""``lorica merge``: an adapter folded into its base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.cli.shared import hints
from lorica.cli.shared.parsing import Parser, add_output, add_trust, output_of
from lorica.errors import FileError, LoricaWarning

if TYPE_CHECKING:
    from lorica.checkpoint.stream import StreamReport


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "merge",
        description="Fold an adapter into its base, in float32, rounded once to the base's dtype, and "
        "write a plain checkpoint "
        "that needs neither lorica nor PEFT.",
    )
    result.add_argument("base", type=str, help="the base model: a folder or a Hub name")
    result.add_argument("adapter", type=str, help="folder with the adapter, lorica's or PEFT's")
    add_output(result, "folder for the merged model; it must be new or empty", required=True)
    result.add_argument(
        "--dtype",
        type=str,
        default="auto",
        help="dtype of the merged model: float32, bfloat16, float16, or auto, which keeps the base's",
    )
    result.add_argument(
        "--stream",
        action="store_true",
        help="merge file by file in a few megabytes of memory, without loading the model; given again, the "
        "same command goes on where it was interrupted",
    )
    result.add_argument(
        "--restart",
        action="store_true",
        help="with --stream: throw away what an interrupted merge left, and start afresh",
    )
    add_trust(result)
    return result


def run(argv: list[str]) -> int:
    """Merge, save, and print the error of rounding."""
    command = parser()
    parsed: Any = command.parse_args(argv)
    out = output_of(command, parsed)
    if parsed.restart and not parsed.stream:
        command.error("--restart belongs to --stream")

    from lorica.train.console import make_console, size
    from lorica.train.system import bytes_of

    console = make_console()
    if parsed.stream:
        report = _stream(parsed)
    else:
        from lorica.train.merge import merge_checkpoint

        report, out = merge_checkpoint(
            parsed.base, parsed.adapter, out, dtype=parsed.dtype, trust_task=parsed.trust_task
        )
    path, worst = report.worst
    head, *lines = str(report).splitlines()
    layers, rest = lines[: len(report.layers)], lines[len(report.layers) :]
    more = [f"  ... and {len(layers) - 10} more layers that lost less"] if len(layers) > 10 else []
    made = [
        f"worst: {path}, {worst:.2e} of its update",
        f"wrote a plain checkpoint of {size(bytes_of(Path(out)))} to {out}",
    ]
    for line in (head, *layers[:10], *more, *rest, *made):
        console.print(line, markup=False, soft_wrap=True)  # brackets in a path are no markup
    hints.show(*_next(Path(out), Path(parsed.adapter)))
    return 0


def _next(out: Path, adapter: Path) -> list[str | None]:
    """The next commands for a merged model."""
    from lorica.train.recipe import Recipe

    if not (out / "recipe.yaml").is_file():
        return []
    recipe = Recipe.load(out / "recipe.yaml", trust_task=True)  # nothing of it runs here
    scored = hints.has_test_rows(adapter)
    return [hints.to_evaluate(out, recipe, scored=scored), hints.to_use(out, recipe)]


def _stream(parsed: Any) -> StreamReport:
    """Merge on disk, with a bar, and warnings told in one line each."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from lorica.checkpoint import stream
    from lorica.train.console import make_console

    notes = make_console(stderr=True)
    dtype = None if parsed.dtype == "auto" else parsed.dtype
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with warnings.catch_warnings(), Progress(*columns, console=notes, disable=not notes.is_terminal) as bar:
        warnings.simplefilter("always", LoricaWarning)
        warnings.showwarning = lambda message, *_args, **_kwargs: notes.print(f"warning: {message}")
        task = bar.add_task("merge", total=None)
        return stream.merge(
            _folder(parsed.base),
            parsed.adapter,
            parsed.output,
            dtype=dtype,
            resume=not parsed.restart,
            config=_labels(Path(parsed.adapter), trust_task=parsed.trust_task),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _labels(adapter: Path, *, trust_task: bool) -> dict[str, Any]:
    """The head and the padding that an adapter's recipe names, as `config.json` has them."""
    from lorica.train import tasks
    from lorica.train.recipe import Recipe

    if not (adapter / "recipe.yaml").is_file():
        return {}
    recipe = Recipe.load(adapter / "recipe.yaml", trust_task=trust_task)
    task = tasks.get(recipe.task)
    head = task.head(recipe.data)
    head.pop("num_labels", None)  # as many as there are names
    if (adapter / "tokenizer_config.json").is_file():
        head["pad_token_id"] = task.tokenizer(str(adapter)).pad_token_id
    return json.loads(json.dumps(head))  # whose keys are text


def _folder(base: str) -> Path:
    """The base's folder: itself, or where the Hub's client keeps it."""
    from lorica.train.embedded import resolve_model

    found = Path(resolve_model(base))
    if found.is_dir():
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kinds = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(base, allow_patterns=kinds))
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileError(
            f"cannot find the base {base!r}: no such folder, and the Hub says: {reason}"
        ) from error
