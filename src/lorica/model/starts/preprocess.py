"""The facts that CorDA and LoRA-GA need of a model before it is adapted.

preprocess_corda     the layers' inputs    ─┐
preprocess_loraga    the layers' gradients ─┴─▶ kept on the model, r vectors a layer ──▶ adapt
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorica import inits
from lorica.checkpoint.atomic import replace_files
from lorica.config import CordaConfig, LoraConfig
from lorica.errors import AdapterError, ConfigError, FileError, listing
from lorica.find import Target
from lorica.inits import PREPARED, base_weight
from lorica.model.watch.watching import Batches, as_it_was, run, run_all, watching
from lorica.pieces import resolve
from lorica.state import find_adapted
from lorica.tree import module_at, uncompiled

Source = inits.Oriented | inits.Triple
Data = Batches | Callable[[], Any]
T = TypeVar("T")
_GRADIENT = "_peft_loraga_grad"
_ORIENTED = ("U_WC", "S_WC", "V_WC")


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    config: LoraConfig,
    run_model: Data | None = None,
    *,
    hooked_model: nn.Module | None = None,
) -> None:
    """Find out along which directions each layer's inputs lie, for ``init_lora_weights="corda"``.

    Call it before `adapt`, with the same configuration. A layer's inputs are added up into a covariance
    (d_in × d_in, float32) while the model runs, and decomposed layer by layer after that; r vectors of each
    stay on the model until `adapt` takes them.

    Args:
        model: the model, not adapted by this configuration yet.
        config: its `corda_config` says how, and which files to read or write.
        run_model: batches to show the model, or a function that calls it on some: 256 texts of 2,048 tokens
            do for a width of 4,096. None where a file of `corda_config` is there.
        hooked_model: another model of the same make whose inputs are looked at instead, such as one that is
            spread over devices; None looks at `model`.

    Raises:
        ConfigError: the configuration is not one of CorDA's.
        TargetError: it targets a layer that cannot start so.
        AdapterError: a layer got no inputs, or none that say anything; naming it.
        FileError: a file cannot be read or written, or belongs to another model.

    Source: Yang et al., 2024.
    """
    root, _ = find_adapted(model) or (uncompiled(model), None)
    root.__dict__[PREPARED] = seen_by_corda(model, config, run_model, hooked_model=hooked_model)


@torch.no_grad()
def seen_by_corda(
    model: nn.Module,
    config: LoraConfig,
    run_model: Data | None = None,
    *,
    hooked_model: nn.Module | None = None,
) -> dict[str, Source]:
    """As `preprocess_corda`; returns what it keeps on the model: path → what is to be trained of W0."""
    _, targets = _targets(model, config, "corda")
    settings = config.corda_config or CordaConfig()
    if settings.cache_file and _is_there(settings.cache_file):
        cache = _read(settings.cache_file)
        found: dict[str, Source] = {}
        for target in targets:
            U, S, V = (_entry(cache, f"{target.path}.eigens.{key}", settings.cache_file) for key in _ORIENTED)
            found[target.path] = inits.Oriented(U, S, V.t())
        return found
    covariances = _covariances(hooked_model or model, targets, settings, run_model)
    found = {}
    for target in targets:
        if settings.verbose:
            print(f"corda: {target.path}")
        weight = target.layer.as_matrix(base_weight(target).detach()).float()
        C = covariances.pop(target.path).to(weight)
        oriented = inits.orient(weight, C, config.rank(target.path), settings.corda_method)
        found[target.path] = inits.Oriented(*(tensor.clone() for tensor in oriented))
    if settings.cache_file:
        tensors = {}
        for path, (U, S, V) in found.items():
            tensors |= {f"{path}.eigens.{k}": t for k, t in zip(_ORIENTED, (U, S, V.t()), strict=True)}
        _write(settings.cache_file, tensors)
    return found


def preprocess_loraga(
    model: nn.Module, config: LoraConfig, train_step: Data, cache_file: str | os.PathLike[str] | None = None
) -> None:
    """Find each weight's gradient over some batches, for ``init_lora_weights="lora_ga"``.

    Call it before `adapt`, with the same configuration. Each weight's gradient is moved to the CPU as soon as
    it is whole, so that the device holds one of them at a time; 2r vectors of each stay on the model until
    `adapt` takes them.

    Args:
        model: the model, not adapted by this configuration yet. In training mode meanwhile.
        config: its `lora_ga_config` says what `adapt` makes of the gradients.
        train_step: a function that runs the model and calls `backward` on a loss, for some batches; or
            batches on which the model gives an output with a ``loss``.
        cache_file: file for the gradients; read if it is there. As large as the model.

    Raises:
        ConfigError: the configuration is not one of LoRA-GA's.
        TargetError: it targets a layer that cannot start so.
        AdapterError: a weight got no gradient, or one that is not finite; naming it.
        FileError: the file cannot be read or written, or belongs to another model.

    Source: Wang, Yu and Li, 2024.
    """
    root, _ = find_adapted(model) or (uncompiled(model), None)
    root.__dict__[PREPARED] = seen_by_loraga(model, config, train_step, cache_file)


def seen_by_loraga(
    model: nn.Module, config: LoraConfig, train_step: Data, cache_file: str | os.PathLike[str] | None = None
) -> dict[str, Source]:
    """As `preprocess_loraga`; returns what it keeps on the model: path → the gradient's leading part."""
    _, targets = _targets(model, config, "lora_ga")
    if cache_file is not None and _is_there(cache_file):
        cache = _read(cache_file)
        gradients = {t.path: _entry(cache, f"{t.path}.{_GRADIENT}", cache_file) for t in targets}
    else:
        gradients = _gradients(model, targets, train_step)
        if cache_file is not None:
            _write(cache_file, {f"{path}.{_GRADIENT}": g for path, g in gradients.items()})
    found: dict[str, Source] = {}
    for target in targets:
        gradient = target.layer.as_matrix(gradients.pop(target.path)).to(base_weight(target).device).float()
        random = inits.generator(0, target.path)
        triples = inits.lead(gradient, config.rank(target.path), random)
        found[target.path] = inits.Triple(*(tensor.clone() for tensor in triples))
    return found


_WANTED = {"corda": "", "lora_ga": "If you want to use LoRA-GA, say so in the configuration: "}


def _targets(model: nn.Module, config: LoraConfig, value: str) -> tuple[nn.Module, list[Target]]:
    if config.init_lora_weights != value:
        raise ConfigError(
            f"{_WANTED[value]}init_lora_weights is {config.init_lora_weights!r}; set it to {value!r}, and "
            "give adapt the same configuration"
        )
    root, state = find_adapted(model) or (uncompiled(model), None)
    if state is not None:
        state.check_unmerged("look at the layers")
        if state.active:
            raise AdapterError(
                f"{listing(map(repr, state.active))} is active, and the start is made from the base; do "
                "this inside lorica.disabled(model)"
            )
    targets = resolve(root, config).targets
    for target in targets:
        inits.of(config).check(target, config)
    return root, targets


def _covariances(
    model: nn.Module, targets: list[Target], settings: CordaConfig, run_model: Data | None
) -> dict[str, Tensor]:
    file = settings.covariance_file
    if file and _is_there(file):
        cache = _read(file)
        return {target.path: _entry(cache, target.path, file) for target in targets}
    if run_model is None:
        raise ConfigError("run_model is needed: corda_config names no file that is there")
    dtype = torch.float16 if settings.use_float16_for_covariance else torch.float32
    sums = {target.path: inits.Covariance(dtype) for target in targets}

    modules = {target.path: _twin(model, target) for target in targets}
    with (
        as_it_was(model, training=False),
        watching(modules, lambda path, x: _naming(path, sums[path].add, x)),
    ):
        run_all(model, run_model, run)
    found = {path: _naming(path, total.mean).float() for path, total in sums.items()}
    if file:
        _write(file, found)
    return found


def _twin(model: nn.Module, target: Target) -> nn.Module:
    """The module of this model that a target stands for."""
    root, _ = find_adapted(model) or (uncompiled(model), None)
    try:
        return module_at(root, target.path)
    except KeyError:
        raise AdapterError(f"hooked_model has no {target.path}; it must be of the model's own make") from None


def _gradients(model: nn.Module, targets: list[Target], train_step: Data) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(path: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.detach().to(device="cpu", dtype=torch.float32)
            sums[path] = sums[path].add_(gradient) if path in sums else gradient
            counts[path] = counts.get(path, 0) + 1
            parameter.grad = None

        return take

    with as_it_was(model, training=True), contextlib.ExitStack() as hooks, torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for target in targets:
            weight = base_weight(target).requires_grad_(True)
            hooks.callback(weight.register_post_accumulate_grad_hook(hook(target.path)).remove)
        run_all(model, train_step, _loss_backward)
    missing = [target.path for target in targets if target.path not in sums]
    if missing:
        raise AdapterError(
            f"no gradient came to {listing(missing)}; train_step must run the model and call backward() on a "
            "loss that depends on them"
        )
    bad = [path for path, total in sums.items() if not torch.isfinite(total).all()]
    if bad:
        raise AdapterError(f"the gradient of {listing(bad)} holds NaN or infinity")
    return {path: total / counts[path] for path, total in sums.items()}


def _loss_backward(model: nn.Module, inputs: Any) -> None:
    outputs = run(model, inputs)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise AdapterError(
            "the model gives no loss for these batches; put labels into them, or pass a function that runs "
            "the model and calls backward()"
        )
    loss.backward()


def _naming(path: str, call: Callable[..., T], *args: Any) -> T:
    try:
        return call(*args)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


def _is_there(file: str | os.PathLike[str]) -> bool:
    return Path(file).is_file() and Path(file).stat().st_size > 0


def _read(file: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileError(f"{file} cannot be read: {error}; delete it, and it is made again") from error


def _entry(cache: Mapping[str, Any], key: str, file: str | os.PathLike[str]) -> Tensor:
    if not isinstance(cache, Mapping) or key not in cache:
        raise FileError(
            f"{file} has no {key}; it belongs to another model or another target_modules. Delete it, and it "
            "is made again"
        )
    return cache[key]


def _write(file: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    def write(path: Path) -> None:
        torch.save({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)

    replace_files(Path(file).parent, {Path(file).name: write})
