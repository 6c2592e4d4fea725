"""What a model card says of a run: task, data, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorica.checkpoint.markup import as_markdown
from lorica.errors import listing
from lorica.train.console import scores
from lorica.train.recipe import Recipe


def about(
    recipe: Recipe, inputs: Sequence[str], rows: Mapping[str, int], metrics: Mapping[str, Mapping[str, float]]
) -> str:
    """Two sections of a model card.

    Args:
        recipe: the run.
        inputs: columns that the model reads.
        rows: split → rows.
        metrics: split → scores.
    """
    data, training = recipe.data, recipe.training
    source = data.preset or (Path(data.train).name if Path(data.train).exists() else data.train)
    learned = " + ".join(inputs) + (f" → {data.label}" if data.label else "")
    facts = {
        "task": recipe.task,
        "data": " ".join(filter(None, [source, data.subset if data.preset is None else None])),
        "learned": learned,
        **({"classes": listing(data.labels, limit=12)} if data.labels else {}),
        "rows": ", ".join(f"{count:,} {split}" for split, count in rows.items()),
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler}",
        "rows a step": str(training.batch_size * training.gradient_accumulation),
        "passes": f"{training.epochs:g}" if training.max_steps is None else f"{training.max_steps:,} steps",
        "seed": str(training.seed),
    }
    parts = ["## Training", "", *_table(["", ""], list(facts.items())), ""]
    names = list(dict.fromkeys(name for each in metrics.values() for name in each))
    if names:
        found = [
            [split, *(dict(scores(each)).get(name, "") for name in names)] for split, each in metrics.items()
        ]
        parts += ["## Scores", "", *_table(["split", *names], found), ""]
    parts += ["`run.json` beside this file holds the whole run; `lorica train --from run.json` repeats it."]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(as_markdown, line))} |" for line in lines]
