"""Putting an adapter on a model, new or as a value, and taking it off again.

    adapt    config  ──▶ find pieces ──▶ put           attach   adapter ──▶ find pieces ──▶ fill ──▶ put

All or nothing: what can fail (finding, checking, drawing, allocating) comes first; then the model changes.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lorica import checkpoint
from lorica.adapter import Adapter
from lorica.checkpoint.peft import as_path
from lorica.checkpoint.peft import read as read_folder
from lorica.config import AdapterConfig, LoraConfig, as_config
from lorica.config.checks import check_seed
from lorica.config.inits import FROM_DATA
from lorica.errors import AdapterError, ConfigError, StateError, TargetError, listing
from lorica.find import targeted
from lorica.inits import PREPARED, draw_seed
from lorica.layers.quantized import REPACKS, hold_layout, release_layout
from lorica.model.pretrained import classes
from lorica.model.pretrained import root as pretrained
from lorica.model.sharded import check_whole
from lorica.model.watch.uncalled import FUSED, watch_pass
from lorica.model.watch.unfilled import watch_filling
from lorica.model.watch.wrapped import check_unnoted
from lorica.pieces import Kind, Search, asked, find_pieces, surroundings
from lorica.state import STATE, AdapterState, adapted, check_name, find_adapted, in_group
from lorica.tree import base_parameters, unwrapped, walk

M = TypeVar("M", bound=nn.Module)


def adapt(
    model: M,
    config: AdapterConfig | Iterable[AdapterConfig] | None = None,
    name: str = "default",
    *,
    data: Any = None,
    seed: int | None = None,
) -> M:
    """Put a new adapter on a model, in place; it acts at once, and trains.

    Targeted layers change class in place (`nn.Linear` → `LoraLinear`) and gain A and B; the base is frozen.
    At the start B is zero, or scale·B·A is subtracted from W0, so the model computes what it did before.
    Another method's configuration puts that method on the model in the same way.

    Args:
        model: any model. Its own parameters keep their names, values and memory.
        config: what to train; None takes the defaults of `LoraConfig`. Several configurations make up one
            adapter, such as LoRA with a prefix.
        name: the adapter's name; letters, digits, ``_`` and ``-``.
        data: data for the inits that look at some (``"eva"``, ``"corda"``, ``"lora_ga"``): batches of the
            model's arguments, for ``"lora_ga"`` with labels; for the last two also a function that runs the
            model (and calls `backward`). The model stays as it is.
        seed: fixes how A starts. None draws one from torch's global generator, so that `torch.manual_seed`
            fixes it. A's start depends on the seed and the module's path alone.

    Returns:
        The same model.

    Raises:
        ConfigError: several configurations that cannot be combined.
        TargetError: a pattern matches nothing, or something that cannot be adapted; the architecture cannot
            take the method; or two methods own the same parameter.
        AdapterError: the name is taken or cannot be one.
        StateError: an adapter is merged, or the init needs data and none was given.

    Source: Hu et al., 2021, §4.1.
    """
    chosen = config if isinstance(config, LoraConfig) else as_config(config)
    trainable = not chosen.inference_mode
    seen = None
    check_seed(seed)
    if data is not None:
        open_for(model, name, trainable=trainable)  # refused before the work, not after it
        seed = draw_seed() if seed is None else seed
        chosen, seen = importlib.import_module("lorica.model.starts").look(model, chosen, data, seed)
    with changing(model, name, chosen, trainable=trainable) as (root, state):
        if root is not unwrapped(model):
            _check_reached(model, root, chosen)
        seed = draw_seed() if seed is None else int(seed)
        seen = root.__dict__.get(PREPARED, {}) if seen is None else seen
        search = Search(root, chosen, state=state, seed=seed, trainable=trainable, seen=seen)
        find_pieces(search)
        _put(search, state, name, search.settled())
        if search.lora is not None and search.lora.init_lora_weights in FROM_DATA:
            root.__dict__.pop(PREPARED, None)
    state.activate(root, (name,))
    state.decide(state.last._replace(rows=None, resting=None))
    return model


def attach(model: M, adapter: Adapter, name: str = "default", *, trainable: bool = False) -> M:
    """Put an adapter that is a value on a model, in place.

    The first adapter on a model acts at once; a later one waits for `active`.

    Args:
        model: the base, or a model that carries other adapters.
        adapter: the adapter; its tensors are copied.
        name: its name on this model.
        trainable: whether it may be trained further. A start is then subtracted from W0 again.

    Returns:
        The same model.

    Raises:
        AdapterError: lists all that is missing, unexpected or of another shape; the model is untouched.
        TargetError: the model has a module that cannot be trained whole, and the adapter does; the model is
            untouched.
        StateError: an adapter is merged.
    """
    adapter.check_finite()
    return attach_finite(model, adapter, name, trainable=trainable)


def attach_finite(model: M, adapter: Adapter, name: str, *, trainable: bool) -> M:
    """As `attach`, for an adapter known to be finite, as one that was just read."""
    if not isinstance(trainable, bool):
        raise ConfigError(f"trainable must be True or False, not {trainable!r:.80}")
    with changing(model, name, adapter.config, trainable=trainable) as (root, state):
        given, starts = adapter, None
        if trainable and adapter.trained_as is not None:
            given, starts = adapter.without_starts()
        search = Search(
            root,
            given.config,
            state=state,
            adapter=given,
            trainable=trainable,
            seen=root.__dict__.get(PREPARED, {}),
            starts=starts,
        )
        find_pieces(search)
        _put(search, state, name, search.config)
        if adapter.classes is not None:
            classes.take(state, name, adapter)
    if len(state.configs) == 1:
        state.activate(root, (name,))
    return model


def load(
    model: M,
    directory: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> M:
    """Put an adapter from a folder or the Hub on a model, in place; PEFT's files or lorica's.

    The first adapter on a model acts at once; a later one waits for `active`.

    Args:
        model: the base, or a model that carries other adapters.
        directory: folder with `adapter_config.json` and `adapter_model.safetensors`; or the name of a
            repository on the Hub, ``"user/sentiment"``, if there is no such folder.
        name: its name on this model.
        trainable: whether it may be trained further.
        revision: branch, tag or commit of the repository.
        subfolder: path of the adapter inside the folder or repository.
        token: token for a private or gated repository; None takes that of ``HF_TOKEN`` or ``hf auth login``.

    Returns:
        The same model.

    Raises:
        FileError: a file is missing or damaged; or the Hub has no such adapter, or cannot be reached.
        ConfigError: the configuration asks for what lorica does not support.
        AdapterError: lists all that is missing, unexpected or of another shape; the model is untouched.
        MissingExtra: a repository is named, and huggingface_hub is not installed.
    """
    here = as_path(directory)
    if here.is_dir() and revision is None:
        adapter = read_folder(here / (subfolder or ""))
    else:
        adapter = checkpoint.read(directory, revision=revision, subfolder=subfolder, token=token)
    return attach_finite(model, adapter, name, trainable=trainable)


def detach(model: M, name: str | None = None) -> M:
    """Take an adapter off, or all of them: the model is then what it was before.

    Its classes, tensors, keys and `requires_grad` are restored.

    Args:
        model: adapted model.
        name: the adapter's name; None takes all off.

    Returns:
        The same model.

    Raises:
        AdapterError: no such adapter.
        StateError: the model carries no adapter, some are merged, or it was sharded since.
    """
    root, state = adapted(model)
    state.check_unmerged("detach an adapter")
    state.check_alone("detach an adapter")
    if in_group():
        check_whole(root, "detach an adapter", "lorica.disabled(model) lets it rest")
    gone = tuple(state.configs) if name is None else (state.known(name),)
    for n in gone:
        for piece in state.pieces[n]:
            piece.check_class()
    state.activate(root, tuple(n for n in state.active if n not in gone))
    for n in gone:
        state.off(root, n)
    if not state.configs:
        for parameter in state.frozen:
            parameter.requires_grad_(True)
        close(root, state)
    return model


def adapters(model: nn.Module) -> dict[str, AdapterConfig]:
    """The adapters a model carries, by name, in the order of arrival; empty if it carries none."""
    found = find_adapted(model)
    return dict(found[1].configs) if found else {}


def _check_reached(model: nn.Module, part: nn.Module, config: AdapterConfig) -> None:
    """Refuse a configuration that names modules outside the part of a model that carries adapters.

    Raises:
        StateError: naming them.
    """
    if not isinstance(config, LoraConfig) or not config.target_modules:
        return
    inside, places = {*part.modules()}, list(walk(model))
    path = next(place.path for place in places if place.module is part)
    try:
        found = targeted(model, [place for place in places if place.module not in inside], config)
    except TargetError:  # none of its names is outside, or not all of them
        return
    missed = [place.path for place in found]
    if missed:
        raise StateError(
            f"{path} of this {type(model).__name__} carries adapters, and a new one would go on that part "
            f"alone, without {listing(missed, limit=3)}; pass the part, or take its adapters off "
            "(lorica.detach) and adapt the whole model"
        )


@contextmanager
def changing(
    model: nn.Module, name: str, config: AdapterConfig, *, trainable: bool
) -> Iterator[tuple[nn.Module, AdapterState]]:
    """A context for adding an adapter, in which the model has the base's own parameters in place.

    A model that `torch.compile` wrapped is adapted inside its wrapper. Inference mode is left meanwhile: what
    is made in it can never train.

    Raises:
        AdapterError: the name is taken, or cannot be one.
        StateError: an adapter is merged, or the model was wrapped for training on several devices.
    """
    root, state = open_for(model, name, trainable=trainable)
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with outside, uncollected(), surroundings(root, state, config), state.originals_in_place(root):
        yield root, state


def open_for(model: nn.Module, name: str, *, trainable: bool) -> tuple[nn.Module, AdapterState]:
    """The adapted model and its state; for a model without adapters, itself and a new state.

    Raises:
        AdapterError: the name is taken, or cannot be one.
        StateError: an adapter is merged, or the model was wrapped for training on several devices.
    """
    check_name(name)
    root, state = find_adapted(model) or (unwrapped(model), AdapterState())
    state.check_unmerged("add an adapter")
    if name in state.configs:
        raise AdapterError(
            f"the model already has an adapter named {name!r}; give another name, or "
            f"lorica.detach(model, {name!r}) first"
        )
    if in_group():
        check_unnoted(root, trainable=trainable)
    return root, state


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector off: a new adapter holds no garbage, and a walk through it takes time.

    A hundred adapters are some twenty thousand small modules.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _put(search: Search, state: AdapterState, name: str, config: AdapterConfig) -> None:
    """Put the found pieces on the model; the first adapter freezes the base."""
    root = search.root
    if not state.configs:
        _open(search, state)
    # For a model on the meta device no piece has values; the first and the last show it.
    ends = (*search.pieces[:1], *search.pieces[-1:])
    bare = any(held.tensor.is_meta for piece in ends for held in piece.tensors(""))
    state.put(root, name, config, search.pieces, trainable=search.trainable)
    if bare:
        watch_filling(root, state)
        if search.adapter is not None:
            state.unfilled.add(name)
    watched = isinstance(root, FUSED) or watch_pass in root._forward_pre_hooks.values()
    if not watched and any(piece.called for piece in search.pieces):
        state.watch = root.register_forward_pre_hook(watch_pass, with_kwargs=True)
    if hasattr(root, "config"):
        classes.give(root, state, name)


def _open(search: Search, state: AdapterState) -> None:
    """Prepare a model for its first adapter."""
    root = search.root
    state.frozen = [p for p in base_parameters(root).values() if p.requires_grad]
    for parameter in state.frozen:
        parameter.requires_grad_(False)
    state.layouts = [module for module in root.modules() if module.__dict__.get(REPACKS)]
    if state.layouts:
        hold_layout(state.layouts)
    setattr(root, STATE, state)
    if "transformers.modeling_utils" in sys.modules:
        pretrained.enter(root)
    for kind in asked(search):
        if type(kind).opened is not Kind.opened:
            kind.opened(root, state)
            state.opened.append(kind)


def close(root: nn.Module, state: AdapterState) -> None:
    """Remove the state of a model whose last adapter is off."""
    if state.layouts:
        release_layout(state.layouts)
    for hook in (*state.hooks, state.watch):
        if hook is not None:
            hook.remove()
    for kind in state.opened:
        kind.closed(root, state)
    if isinstance(root, pretrained.Pretrained):
        pretrained.leave(root)
    delattr(root, STATE)
