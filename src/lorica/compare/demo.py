"""The demonstration: one task, learned by a head on a frozen encoder, by LoRA, and by full fine-tuning.

Each way trains in its own process, so that its peak memory is its own.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from lorica.config import LoraConfig
from lorica.errors import LoricaError
from lorica.model import adapt, merge, save, trainable_parameters
from lorica.plain import as_json
from lorica.train.console import make_console, quiet
from lorica.train.prepared import Prepared, prepare
from lorica.train.recipe import Recipe
from lorica.train.record import versions
from lorica.train.system import alone_in, bytes_of, in_new_process, peak_memory, write_atomically
from lorica.train.trained import open_run
from lorica.train.trainer.fit import Interrupted, fit

TITLES = {"frozen": "frozen encoder + head", "lora": "LoRA", "full": "full fine-tuning"}

# LoRA's settings are the best of six on the validation rows; those of the other two were set by hand after a
# few runs. So the table shows typical results, and is not a benchmark.
TRAINING: Mapping[str, Mapping[str, Any]] = {
    "frozen": {"learning_rate": 2e-2, "epochs": 5},
    "lora": {"learning_rate": 1e-3, "epochs": 8},
    "full": {"learning_rate": 2e-4, "epochs": 3},
}

METHOD = LoraConfig(r=12, lora_alpha=24, target_modules="all-linear", task_type="SEQ_CLS")


@dataclass(frozen=True)
class Row:
    """The results of one way of training.

    Args:
        method: ``"frozen"``, ``"lora"`` or ``"full"``.
        test_accuracy: share of the test rows classified correctly.
        trainable_parameters: parameters that trained, the new head included.
        checkpoint_bytes: bytes to store beside the base: of the head, the adapter, or the whole model.
        step_seconds: median seconds per training step.
        peak_memory_bytes: largest memory of the process (on a GPU, of torch's tensors).
        training_seconds: duration of training.
        steps: optimizer steps.
    """

    method: str
    test_accuracy: float
    trainable_parameters: int
    checkpoint_bytes: int
    step_seconds: float
    peak_memory_bytes: int
    training_seconds: float
    steps: int


@dataclass(frozen=True)
class Demo:
    """The results of the demonstration.

    Args:
        rows: one per way of training.
        logits_difference: largest difference between the logits before and after merging, over the test rows.
        logits_scale: largest logit before merging, for comparison.
        same_modules: whether the merged model has the base's own modules, by name and class.
        commands: commands to try next.
    """

    rows: list[Row]
    logits_difference: float
    logits_scale: float
    same_modules: bool
    commands: list[str]


def run_demo(recipe: Recipe, console: Console | None = None) -> Demo:
    """Train the three ways, then merge the adapter and compare.

    Args:
        recipe: the model, the data, the batch size and the output folder. The method and its training are the
            demonstration's own, unless `recipe.training.max_steps` cuts them short.
        console: shows progress. None makes one.

    Returns:
        The results, which are also in ``results.json`` in the output folder, beside ``adapter/`` and
        ``merged/``.

    Raises:
        LoricaError: the model or the data cannot be used, or the data has no test rows.
    """
    console = console or make_console()
    with alone_in(recipe.output, "demonstration") as output:
        return _run_demo(recipe, output, console)


def _run_demo(recipe: Recipe, output: Path, console: Console) -> Demo:
    # Bad data is found here, before three processes start.
    prepared = prepare(recipe, console=console)
    if "test" not in prepared.splits:
        raise LoricaError("the demonstration needs test rows; give --data.test")
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in prepared.splits.items())
    classes = len(prepared.recipe.data.labels or [])
    console.print(f"{recipe.model} on {recipe.data.train}: {counts} rows, {classes} classes")
    for stale in ("adapter", "merged", "results.json"):
        path = output / stale
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    rows = [_in_own_process(method, recipe) for method in TITLES]

    console.print("merging the adapter into the encoder")
    difference, scale, same = _merge(prepared, output)
    demo = Demo(rows, difference, scale, same, _commands(recipe, output))
    recorded = prepared.recipe.to_dict()
    write_atomically(
        output / "results.json",
        as_json({**dataclasses.asdict(demo), "recipe": recorded, "versions": versions()}) + "\n",
    )
    return demo


def _in_own_process(method: str, recipe: Recipe) -> Row:
    outcome = in_new_process(train_row, method, recipe)
    if outcome is None:
        raise KeyboardInterrupt
    return outcome


def train_row(method: str, recipe: Recipe) -> Row | None:
    """Train and score one way, in the calling process; None if the user interrupted it."""
    training = dataclasses.replace(
        recipe.training, **{**TRAINING[method], "load_best": False, "report_to": []}
    )
    recipe = dataclasses.replace(recipe, training=training)
    prepared = prepare(recipe)
    model = prepared.model
    if method == "lora":
        model = adapt(model, METHOD, seed=training.seed)
    elif method == "frozen":
        freeze_encoder(model)
    output = Path(recipe.output)
    work = output / f".{method}"
    try:
        done = fit(
            model,
            prepared.task,
            prepared.tokenizer,
            prepared.splits["train"].features,
            None,
            training,
            work,
            title=f"{TITLES[method]:<21}",
        )
        scores = done.evaluate(prepared.splits["test"].features)
        size = _store(method, model, prepared, output, work)
    except Interrupted:
        return None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Row(
        method,
        scores["accuracy"],
        trainable_parameters(model).trainable,
        size,
        done.step_seconds or 0.0,
        peak_memory(),
        done.seconds,
        done.steps,
    )


def freeze_encoder(model: PreTrainedModel) -> None:
    """Let only the head train: the parameters outside the pretrained base model."""
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)


def _store(method: str, model: PreTrainedModel, prepared: Prepared, output: Path, work: Path) -> int:
    """Write the files that one way of training must store, and return their size; only the adapter's stay."""
    if method == "lora":
        folder = output / "adapter"
        save(model, folder)
        prepared.tokenizer.save_pretrained(folder)
        recipe = dataclasses.replace(prepared.recipe, method=METHOD, output=str(folder))
        recipe.save(folder / "recipe.yaml")
        return bytes_of(folder / "adapter_model.safetensors")
    kept = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    work.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(kept, work / "model.safetensors")
    return bytes_of(work / "model.safetensors")


def _merge(prepared: Prepared, output: Path) -> tuple[float, float, bool]:
    trained = open_run(output / "adapter")
    model = trained.model
    # `prepared` is the base with its head, and was never adapted.
    base = _modules(prepared.model)
    before = _logits(model, prepared)
    merge(model)
    after = _logits(model, prepared)
    same = _modules(model) == base and set(model.state_dict()) == set(prepared.model.state_dict())
    folder = output / "merged"
    with quiet():
        model.save_pretrained(folder)
        prepared.tokenizer.save_pretrained(folder)
    shutil.copyfile(output / "adapter" / "recipe.yaml", folder / "recipe.yaml")
    return float((after - before).abs().max()), float(before.abs().max()), same


def _modules(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules()]


@torch.no_grad()
def _logits(model: PreTrainedModel, prepared: Prepared, batch: int = 64) -> torch.Tensor:
    columns = ["input_ids", "attention_mask"]
    rows = prepared.splits["test"].features.select_columns(columns)
    collate = prepared.task.collator(prepared.tokenizer)
    parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    listed = [
        [{name: part[name][k] for name in columns} for k in range(len(part[columns[0]]))] for part in parts
    ]
    return torch.cat([model(**collate(part)).logits for part in listed])


def _commands(recipe: Recipe, output: Path) -> list[str]:
    text = "Send a datagram over the transport and wait until the event loop has written it."
    adapter, merged = str(output / "adapter"), str(output / "merged")
    commands = (["predict", adapter, text], ["info", adapter], ["evaluate", merged])
    return [shlex.join(["lorica", *words]) for words in commands]
