"""One base for many trials: rows are encoded once, weights loaded once; which recipes can share it."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar, cast

import numpy
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel

from lorica.config.inits import FROM_DATA
from lorica.train import tasks
from lorica.train.prepared import Encoding, Prepared, encode, load_model
from lorica.train.recipe import Recipe
from lorica.train.tasks import Task
from lorica.tune.population.joint_layers import module_order

M = TypeVar("M", bound=nn.Module)

_ARGUMENTS = (
    "torch_compile",
    "deepspeed",
    "fsdp",
    "auto_find_batch_size",
    "full_determinism",
    "use_liger_kernel",
    "use_cpu",
    "bf16_full_eval",
    "fp16_full_eval",
    "parallelism_config",
)


class SharedBase:
    """Shared by trials on one base: rows, and weights.

    Args:
        recipe: of one of the trials.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Load nothing yet."""
        self.key = base_of(recipe)
        self._rows: dict[int, Encoding] = {}
        self._models: dict[int, PreTrainedModel] = {}
        self.places: dict[str, int] = {}

    def prepared(self, recipe: Recipe) -> Prepared:
        """As `lorica.train.prepare`, around the shared weights."""
        length, seed = recipe.training.max_length, recipe.training.seed
        if length not in self._rows:
            self._rows[length] = encode(recipe)
        read = self._rows[length]
        if seed not in self._models:
            model = load_model(read.recipe.replace(training={"seed": seed}), read)
            if self._models:  # only what is new hangs on the seed
                share(model, next(iter(self._models.values())))
            self._models[seed] = model
            self.places = module_order(model)
        recipe, model = dataclasses.replace(recipe, data=read.recipe.data), shared_copy(self._models[seed])
        return Prepared(recipe, read.task, read.tokenizer, model, read.splits, read.data)

    def packed(self) -> tuple[Any, ...]:
        """The loaded parts, for `unpacked` in another process."""
        # A task in a file of the user's has no module that could be imported there.
        rows = {length: read._replace(task=cast(Task, None)) for length, read in self._rows.items()}
        return self.key, rows, {seed: PackedModel.of(model) for seed, model in self._models.items()}

    @classmethod
    def unpacked(cls, packed: tuple[Any, ...]) -> Self:
        """The base in this process, around the very bytes that came."""
        key, rows, models = packed
        base = cls.__new__(cls)
        base.key = key
        base._rows = {
            length: read._replace(task=tasks.get(read.recipe.task).settled(read.recipe))
            for length, read in rows.items()
        }
        base._models = {seed: model.model() for seed, model in models.items()}
        base.places = {}
        return base


def why_alone(recipe: Recipe) -> str | None:
    """Why a recipe has to be trained by itself; None if it can share a base with others."""
    training = recipe.training
    if recipe.quantization is not None:
        return f"its base is quantized ({recipe.quantization})"
    for name in ("fp16", "gradient_checkpointing"):
        if getattr(training, name):
            return f"training.{name} changes how the base is computed"
    if training.auto_batch_size:
        return "training.auto_batch_size measures the memory of one training"
    for name in _ARGUMENTS:
        if training.arguments.get(name):
            return f"training.arguments.{name} changes how the base is computed"
    if tasks.get(recipe.task).carrier is not None:
        return f"the task {recipe.task} has a trainer of its own"
    start = getattr(recipe.configuration(), "init_lora_weights", True)
    if start in FROM_DATA:
        return f"it starts from data (init_lora_weights={start!r})"
    if torch.cuda.device_count() > 1:
        return "several GPUs are visible, over which the trainer spreads each model"
    return None


def shared_fields(name: str) -> bool:
    """Whether recipes that differ in a field, by its dotted name, can share a base."""
    part, _, leaf = name.partition(".")
    apart = ("bf16", "fp16", "gradient_checkpointing", "auto_batch_size", "arguments")
    own = ("method", "baseline", "init_from", "init_head", "generation")
    return part in own or (part == "training" and leaf not in apart)


def base_of(recipe: Recipe) -> str:
    """The settings that recipes must agree in to share a base."""
    return json.dumps([recipe.task, recipe.model, asdict(recipe.data), recipe.training.bf16], sort_keys=True)


def shared_copy(model: M) -> M:
    """A copy of a model's modules and buffers that shares every parameter with it."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def share(model: nn.Module, base: nn.Module) -> None:
    """Let a model use a base's parameters wherever its own have the same values.

    A model loaded anew with another seed differs in its new head alone.
    """
    theirs = dict(base.named_parameters())
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            shared = theirs.get(f"{path}.{name}".lstrip("."))
            if shared is not None and _same(shared, parameter):
                module._parameters[name] = shared


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@dataclass(frozen=True)
class PackedModel:
    """A model in parts.

    Ray keeps the arrays once a machine, in shared memory that is read-only, and every process on it works on
    those very bytes: nothing is read or copied for each trial, and nothing can write to them.

    Args:
        modules: the model without its parameters, pickled.
        weights: the parameters as bytes, each with its dtype and shape.
    """

    modules: bytes
    weights: list[tuple[numpy.ndarray, torch.dtype, tuple[int, ...]]]

    @classmethod
    def of(cls, model: nn.Module) -> PackedModel:
        """Take a model apart. Tied parameters stay tied."""
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(model)
        weights = [
            (p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), p.dtype, tuple(p.shape))
            for p in pickler.parameters.values()
        ]
        return cls(file.getvalue(), weights)

    def model(self) -> Any:
        """Put it together again, around the arrays as they are; its parameters are frozen."""
        with warnings.catch_warnings():
            # That they cannot be written to is the point.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            parameters = [
                Parameter(torch.from_numpy(array).view(dtype).view(shape), requires_grad=False)
                for array, dtype, shape in self.weights
            ]
        return _Unpickler(io.BytesIO(self.modules), parameters).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.parameters: dict[int, Parameter] = {}

    def persistent_id(self, obj: Any) -> int | None:
        """A parameter's number, in place of the parameter."""
        if not isinstance(obj, Parameter):
            return None
        self.parameters.setdefault(id(obj), obj)
        return list(self.parameters).index(id(obj))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, parameters: list[Parameter]) -> None:
        super().__init__(file)
        self._parameters = parameters

    def persistent_load(self, pid: Any) -> Parameter:
        """The parameter of that number."""
        return self._parameters[pid]
