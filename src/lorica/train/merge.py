"""A base and an adapter, on disk, to one plain checkpoint."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from lorica.adapter import Adapter
from lorica.checkpoint import read
from lorica.checkpoint.atomic import staged, usual_mode
from lorica.errors import ConfigError, FileError
from lorica.model import MergeReport, attach, merge
from lorica.model.pretrained.skeleton import AUTO_CLASSES
from lorica.train import tasks
from lorica.train.console import quiet
from lorica.train.embedded import resolve_model
from lorica.train.recipe import Recipe
from lorica.train.system import writable_directory
from lorica.train.tasks.base import loading


def merge_checkpoint(
    base: str, adapter: str | Path, out: str | Path, *, dtype: str = "auto", trust_task: bool = False
) -> tuple[MergeReport, Path]:
    """Fold an adapter into its base and write a plain checkpoint: weights, configuration, tokenizer.

    The products are summed in float32 and rounded once. The folder appears whole or not at all. Where the
    adapter has a recipe, the merged model gets it too, so that ``lorica evaluate`` and ``lorica predict``
    take its folder.

    Args:
        base: folder or Hub name of the base.
        adapter: folder of the adapter, lorica's or PEFT's.
        out: folder to write; new or empty.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for the base's own.
        trust_task: as in `lorica.train.Recipe.load`, for the recipe beside the adapter.

    Returns:
        The losses to rounding, and the folder.

    Raises:
        FileError: something is missing or cannot be written.
        ConfigError: the adapter does not say which kind of model it belongs to, or the dtype is none.
        AdapterError: the adapter belongs to another base.
    """
    adapter, out = Path(adapter), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} is there already and not empty; choose a new folder")
    value = read(adapter)
    path = adapter / "recipe.yaml"
    recipe = Recipe.load(path, trust_task=trust_task) if path.is_file() else None
    model = load_base(base, value, recipe, dtype)
    with quiet():
        attach(model, value)
        report = merge(model)
        writable_directory(out.parent)
        with staged(out.parent) as stage:
            made = stage / out.name
            made.mkdir()
            reader = _reader(adapter, base, recipe)
            if recipe is not None:
                tasks.get(recipe.task).pad(model, reader)
            if reader is not None:
                reader.save_pretrained(made)
            model.save_pretrained(made)
            if recipe is not None:
                shutil.copyfile(path, made / "recipe.yaml")
            for file in made.rglob("*"):
                if file.is_file():
                    file.chmod(usual_mode(stage))
            if out.is_dir():
                out.rmdir()
            made.replace(out)
    return report, out


def load_base(base: str, adapter: Adapter, recipe: Recipe | None, dtype: str = "auto") -> PreTrainedModel:
    """Load the base of an adapter with the head that the adapter was trained with.

    Raises:
        FileError: there is no such base.
        ConfigError: the adapter does not say which kind of model it belongs to, or the dtype is none.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, not {dtype!r}")
    options: dict[str, Any] = {}
    if recipe is not None:
        task = tasks.get(recipe.task)
        auto, options = task.auto_class, task.head(recipe.data)
    else:
        kind = adapter.config.task_type
        auto = AUTO_CLASSES.get(kind or "") or _architecture(base)
        if kind in ("SEQ_CLS", "TOKEN_CLS") and (outputs := _outputs(adapter)) is not None:
            options = {"num_labels": outputs}
    with quiet(), loading(f"the base {base!r} as {auto}"):
        return getattr(transformers, auto).from_pretrained(
            resolve_model(base),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )


def _architecture(base: str) -> str:
    with loading(f"the base {base!r}"):
        config = AutoConfig.from_pretrained(resolve_model(base), trust_remote_code=False)
    architectures = config.architectures or []
    if len(architectures) == 1 and hasattr(transformers, architectures[0]):
        return architectures[0]
    raise ConfigError(
        "neither the adapter nor its base says which kind of model this is; "
        f"set task_type in adapter_config.json to one of {', '.join(AUTO_CLASSES)}"
    )


def _outputs(adapter: Adapter) -> int | None:
    """Classes of the adapter's own head: of its matrices the one with the fewest rows is the last."""
    rows = [tensor.shape[0] for tensor in adapter.extras.values() if tensor.dim() == 2]
    return min(rows, default=None)


def _reader(adapter: Path, base: str, recipe: Recipe | None) -> Any:
    """The tokenizer or image processor, the adapter's own or else the base's, or None."""
    own = any((adapter / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))
    source = str(adapter) if own else base
    if recipe is not None:
        return tasks.get(recipe.task).tokenizer(source)
    for kind in (AutoTokenizer, AutoImageProcessor):
        with contextlib.suppress(OSError, ValueError):
            return kind.from_pretrained(resolve_model(source), trust_remote_code=False)
    return None
