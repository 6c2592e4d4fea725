"""``lorica demo``: LoRA beside a frozen encoder and full fine-tuning."""

from __future__ import annotations

from typing import Any

from lorica.cli.shared.parsing import Parser, add_output


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "demo",
        description="Train one task three ways (a head on the frozen encoder, LoRA, full fine-tuning), "
        "compare them, and merge the "
        "adapter. By default the MiniLM encoder learns which module a docstring of Python's standard "
        "library belongs to; nothing "
        "is downloaded. Takes a few minutes on two cores.",
    )
    result.add_argument("--model", type=str | None, help="another encoder: a folder or a Hub name")
    result.add_argument(
        "--data",
        type=str | None,
        help="other rows: a file, a folder or a Hub data set, with text and label columns",
    )
    result.add_argument(
        "--data.test", dest="test", type=str | None, help="test rows, if the data has no split of that name"
    )
    add_output(result, "folder for adapter/, merged/ and results.json", "runs/demo")
    result.add_argument("--max_length", type=int, default=32, help="tokens kept of each row")
    result.add_argument("--batch_size", type=int, default=16, help="rows a training step")
    result.add_argument(
        "--seed", type=int, default=0, help="seed of the head, the adapter and the order of rows"
    )
    result.add_argument(
        "--max_steps",
        type=int | None,
        help="steps of each training, to try it out (default: as many as it takes)",
    )
    return result


def run(argv: list[str]) -> int:
    """Run it, and print the table."""
    parsed: Any = parser().parse_args(argv)

    from lorica.compare.demo import TITLES, run_demo
    from lorica.train.console import make_console, print_table, size
    from lorica.train.recipe import Recipe

    recipe = Recipe()
    recipe = recipe.replace(
        model=parsed.model or recipe.model,
        output=parsed.output,
        data={"train": parsed.data or recipe.data.train, "test": parsed.test},
        training={
            "max_length": parsed.max_length,
            "batch_size": parsed.batch_size,
            "seed": parsed.seed,
            "max_steps": parsed.max_steps,
        },
    )
    console = make_console()
    demo = run_demo(recipe, console)
    print_table(
        console,
        f"{recipe.model} on {recipe.data.train}",
        ["", "test accuracy", "trainable parameters", "checkpoint", "seconds a step", "peak memory"],
        [
            [
                TITLES[row.method],
                f"{row.test_accuracy:.1%}",
                f"{row.trainable_parameters:,}",
                size(row.checkpoint_bytes),
                f"{row.step_seconds:.3f}",
                size(row.peak_memory_bytes),
            ]
            for row in demo.rows
        ],
    )
    console.print(
        f"merged and unmerged logits differ by at most {demo.logits_difference:.1e} (largest logit "
        f"{demo.logits_scale:.1f}); "
        f"the merged model {'has' if demo.same_modules else 'DOES NOT have'} the base's module tree"
    )
    console.print(f"saved: {recipe.output}/adapter, {recipe.output}/merged, {recipe.output}/results.json")
    console.print("try next:")
    for command in demo.commands:
        console.print(f"  {command}", soft_wrap=True)
    return 0
