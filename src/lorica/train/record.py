"""``run.json``: what a run was made of and what came of it, enough to repeat it bit for bit; its card."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lorica.checkpoint.card import as_markdown
from lorica.errors import ConfigError, FileError, listing
from lorica.kernels.thin import load
from lorica.plain import as_json
from lorica.reading import read_object
from lorica.train.console import scores
from lorica.train.distributed.group import on_cpu, world
from lorica.train.recipe import Recipe
from lorica.train.system import write_atomically

RECORD = "run.json"

_THREADS = 4096
"""More than any machine has; torch would try to start as many."""

_PACKAGES = ("lorica", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Record:
    """A run, as its ``run.json`` holds it.

    Args:
        recipe: the recipe, with the columns and labels that were found.
        data: split → ``sha256`` of the rows' content, and ``rows``, their number.
        versions: package → version.
        machine: what decides the last bits besides these: ``device``, ``threads``, the ``instructions`` of
            the processor that torch uses, and ``processes``, how many trained together.
        results: scores, counts and times.
        adapter_sha256: of the adapter's file.
    """

    recipe: Recipe
    data: dict[str, dict[str, Any]]
    versions: dict[str, str]
    machine: dict[str, Any]
    results: dict[str, Any]
    adapter_sha256: str

    def save(self, directory: Path) -> Path:
        """Write ``run.json`` into a folder, whole or not at all, and return its path."""
        seeds = {"training": self.recipe.training.seed, "split": self.recipe.data.split_seed}
        values = {**dataclasses.asdict(self), "recipe": self.recipe.to_dict()}
        write_atomically(directory / RECORD, as_json({**values, "seeds": seeds}) + "\n")
        return directory / RECORD

    @classmethod
    def load(cls, path: str | Path, *, trust_task: bool = False) -> Record:
        """Read a ``run.json``, or the one in a folder.

        Args:
            path: of the file, or its folder.
            trust_task: as in `Recipe.load`.

        Raises:
            FileError: there is none, or it is not one.
            ConfigError: its recipe has a field that this version does not know, or a task that is code and
                not trusted.
        """
        path = Path(path)
        path = path / RECORD if path.is_dir() else path
        try:
            values = read_object(path)
        except FileNotFoundError as error:
            raise FileError(f"cannot read the run {path}: {error.strerror}") from error
        names = [item.name for item in dataclasses.fields(cls)]
        wrong = [f"it has no {name}" for name in names if name not in values] or list(_wrong(values))
        if wrong:
            raise FileError(f"{path} is no {RECORD} of `lorica train`: {listing(wrong)}")
        parts: dict[str, Any] = {name: values[name] for name in names}
        parts["recipe"] = Recipe.from_dict(parts["recipe"], str(path), trust_task=trust_task)
        return cls(**parts)

    def check_data(self, data: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse rows that are not the recorded ones.

        Raises:
            ConfigError: naming each split that changed.
        """
        if changed := changed_rows(self.data, data):
            raise ConfigError(
                f"the data of the recorded run have changed: {', '.join(changed)}. Bring back the rows as "
                "they were, or repeat the run on the new ones with --changed_data"
            )

    def differences(self) -> list[str]:
        """Differences from where the run was recorded, such as ``torch 2.11.0 then, 2.13.0 now``."""
        then, now = (
            {**self.versions, "processes": 1, **self.machine},
            {**versions(self.versions), **machine()},
        )
        return [
            f"{name} {then.get(name, 'absent')} then, {now.get(name, 'absent')} now"
            for name in dict.fromkeys([*then, *now])
            if then.get(name) != now.get(name)
        ]

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """Compute with as many threads as the run had: sums are taken in another order with more or fewer."""
        before = torch.get_num_threads()
        torch.set_num_threads(int(self.machine.get("threads", before)))
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _wrong(values: Mapping[str, Any]) -> Iterator[str]:
    """The parts of a run.json that cannot be used."""
    for name in ("recipe", "data", "versions", "machine", "results"):
        if not isinstance(values[name], dict):
            yield f"{name} is {values[name]!r}"
            return
    if not isinstance(values["adapter_sha256"], str):
        yield f"adapter_sha256 is {values['adapter_sha256']!r}"
    for split, facts in values["data"].items():
        if not (
            isinstance(facts, dict) and is_whole(facts.get("rows")) and isinstance(facts.get("sha256"), str)
        ):
            yield f"data.{split} is {facts!r}"
    if not isinstance(values["machine"].get("device"), str):
        yield f"machine.device is {values['machine'].get('device')!r}"
    if not is_whole(threads := values["machine"].get("threads", 1)) or not 1 <= threads <= _THREADS:
        yield f"machine.threads is {threads!r}"


def is_whole(value: object) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def changed_rows(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The splits whose rows are others, such as ``the train rows (40 then, 42 now)``.

    Args:
        before: split → `fingerprint` of its rows.
        now: the same, of another time.
    """
    return [
        f"the {split} rows ({_count(before, split)} then, {_count(now, split)} now)"
        for split in dict.fromkeys([*before, *now])
        if before.get(split, {}).get("sha256") != now.get(split, {}).get("sha256")
    ]


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Versions of the packages that decide the numbers.

    Args:
        more: packages that do so in one run and not in others.
    """
    found = {"python": platform.python_version()}
    for package in dict.fromkeys([*_PACKAGES, *more]):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine() -> dict[str, Any]:
    """The machine's properties that decide the last bits besides the versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "kernels": on_cpu() and load() is not None,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processes": world(),
    }


def _count(data: Mapping[str, Mapping[str, Any]], split: str) -> str:
    return f"{data[split]['rows']:,}" if split in data else "none"


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
        "rows a step": str(training.batch_size * training.gradient_accumulation * world()),
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
