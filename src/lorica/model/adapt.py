"""Putting a new adapter on a model, choosing which adapters act, and taking them off again.

All or nothing: what can fail (finding, checking, drawing, allocating) comes first, and only then is the model
touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn import Parameter

from lorica import init
from lorica.config import AdapterConfig, LoraConfig, as_config
from lorica.config.inits import FROM_DATA
from lorica.layers.quantized import release_layout
from lorica.model import classes, pretrained
from lorica.model.methods import resolve_methods
from lorica.model.mount import Mount, mount, open_for, parameter_for, remove_parts, uncollected
from lorica.model.stack import stacked, unstack
from lorica.model.starting import PREPARED, Source, begin, check_alone, check_start, prepared
from lorica.model.statistics import give_statistics, release
from lorica.model.structure import (
    STATE,
    Target,
    adapted,
    added_modules,
    find_adapted,
    lora_layers,
    saved_modules,
    token_modules,
)
from lorica.model.tied import check_pair, pairs, warn_if_idle
from lorica.model.tokens import starting_rows, token_targets
from lorica.model.uncalled import stop_watching
from lorica.state import AdapterState, parameter_at

M = TypeVar("M", bound=nn.Module)


def adapt(
    model: M,
    config: AdapterConfig | Iterable[AdapterConfig] | None = None,
    name: str = "default",
    *,
    seed: int | None = None,
) -> M:
    """Put a new adapter on a model, in place; it acts at once, and trains.

    Targeted layers change class where they stand (`nn.Linear` → `LoraLinear`) and gain A and B; the base is
    frozen. At the start B is zero, or what B·A adds is taken out of W0, so the model computes what it did.
    Another method's configuration puts that method on the model in the same way: a copy of what it trains of
    the base, or a part added to its modules.

    Args:
        model: any model. Its own parameters keep their names, values and memory.
        config: what to train; the defaults of `LoraConfig` if None. Several make up one adapter, such as LoRA
            with a prefix.
        name: of the adapter; letters, digits, ``_`` and ``-``.
        seed: fixes how A starts. None draws one from torch's global generator, so that `torch.manual_seed`
            fixes it. A's start depends on the seed and the module's path alone.

    Returns:
        The same model.

    Raises:
        ConfigError: several configurations that cannot be combined.
        TargetError: a pattern matches nothing, or something that cannot be adapted; the architecture cannot
            take the method; or two methods own the same parameter.
        AdapterError: the name is taken or cannot be one.
        StateError: an adapter is merged, or the start is made from data that the model was not shown.

    Source: Hu et al., 2021, §4.1.
    """
    config = as_config(config)
    root, state = open_for(model, name, trainable=not config.inference_mode)
    with uncollected(), stacked(root, state, config), state.base_in_place(root):
        _adapt(root, state, config, name, seed)
    active(root, name)
    return model


def _adapt(root: nn.Module, state: AdapterState, config: AdapterConfig, name: str, seed: int | None) -> None:
    seed = init.draw_seed() if seed is None else seed
    found = resolve_methods(root, config, seed)
    lora = found.lora
    tokens = token_targets(root, lora, {target.path for target in found.layers}, found.saved)
    mounts, tied = [], []
    if lora is not None:
        check_alone(lora, found.config)
        targets = {target.path: target for target in found.layers if target.parameter is None}
        shared = pairs(root, lora, targets)
        for path, table in shared.items():
            check_pair(targets[path], targets[table], lora)
        heads = {table: targets[path] for path, table in shared.items()}
        tied = [(targets[path], table) for path, table in shared.items()]
        warn_if_idle(root, lora, (*targets, *found.saved, *(table.path for table in tokens)))
        mounts = [
            _fresh(target, lora, seed, prepared(root), heads.get(target.path))
            for target in found.layers
            if target.path not in shared
        ]
    slots = _slots(root, found.trained)
    rows = [(table, starting_rows(table)) for table in tokens]
    trainable = not found.config.inference_mode
    mount(
        root,
        state,
        name,
        found.config,
        mounts,
        found.saved,
        slots,
        found.parts,
        rows,
        tied,
        trainable=trainable,
    )
    give_statistics(root, state, name, found.saved, {}, trainable=trainable)
    classes.give(root, state, name)
    if lora is not None and lora.init_lora_weights in FROM_DATA:
        root.__dict__.pop(PREPARED, None)


def detach(model: M, name: str | None = None) -> M:
    """Take an adapter off, or all of them: then the model is as it was.

    Its classes, tensors, keys and `requires_grad` too.

    Args:
        model: adapted model.
        name: of the adapter to drop; None drops all.

    Returns:
        The same model.

    Raises:
        AdapterError: no such adapter.
        StateError: the model carries no adapter, some are merged, or it was sharded since.
    """
    root, state = adapted(model)
    state.check_unmerged("detach an adapter")
    state.check_alone("detach an adapter")
    gone = tuple(state.configs) if name is None else (state.known(name),)
    swapped = (
        *lora_layers(root).values(),
        *saved_modules(root).values(),
        *added_modules(root).values(),
        *token_modules(root).values(),
    )
    for module in swapped:
        module.check_own_class()
    state.activate(root, tuple(n for n in state.active if n not in gone))
    for layer in lora_layers(root).values():
        for n in gone:
            if n in layer.scaling:
                layer.remove_factors(n)
        if not layer.scaling:
            layer.leave()
    for module in saved_modules(root).values():
        for n in gone:
            if n in module.modules_to_save:
                module.remove_copy(n)
        if not module.modules_to_save:
            module.leave()
    for table in token_modules(root).values():
        for n in gone:
            if n in table.adapters:
                table.remove_rows(n)
        if not table.adapters:
            table.leave()
    for n in gone:
        remove_parts(root, n)
        state.slots.pop(n, None)
        state.statistics.pop(n, None)
        state.starts.pop(n, None)
        state.whole.pop(n, None)
        state.parts.pop(n, None)
        classes.take_back(state, n)
        del state.configs[n]
    if not state.configs:
        for parameter in state.frozen:
            parameter.requires_grad_(True)
        release_layout(state.layouts)
        for hook in state.hooks:
            hook.remove()
        unstack(root, state)
        pretrained.leave(root)
        stop_watching(root)
        release(root)
        delattr(root, STATE)
    return model


def adapters(model: nn.Module) -> dict[str, AdapterConfig]:
    """The adapters a model carries, by name, in the order of arrival; empty if it carries none."""
    found = find_adapted(model)
    return dict(found[1].configs) if found else {}


class active:
    """Let exactly the named adapters act; their updates add up. As a context manager, undone on exit.

    They act on all rows, though others were `mixed` before. Like `torch.set_grad_enabled` it takes effect
    when it is made, so a plain call switches for good. It costs the same however many layers and adapters
    there are, and changes neither `requires_grad` nor the training mode.

    Threads and tasks of asyncio choose for themselves: what one chooses holds for no other. In the thread
    that adapted the model a choice is the model's too, for all that chose nothing; a task's block is not. A
    thread that is to go on with its caller's choice is started by `contextvars.copy_context().run`.

    Where parameters of an adapter stand in the base's place (trained biases, a start that was taken out of
    W0), they are one for all threads: a choice that exchanges them is refused in other threads, and while
    others are inside a block.

    Args:
        model: adapted model.
        names: an adapter's name, or several.
        rows: which acts on which row; `mixed` gives it.

    Raises:
        AdapterError: no such adapter, or two that cannot act together.
        StateError: an adapter is merged; or parameters would be exchanged under others' computations.
    """

    def __init__(self, model: nn.Module, names: str | Iterable[str], rows: Any = None) -> None:
        self._root, self._state = root, state = adapted(model)
        state.check_unmerged("choose another adapter")
        self._here, self._own, self._shared = state.last, state.own_choice(), state.shared
        state.activate(root, (names,) if isinstance(names, str) else tuple(names))
        state.decide(state.last._replace(rows=rows, resting=None))
        state.name_classes()

    def __enter__(self) -> None:
        """From here on it is a block: the thread's or task's own, and no longer the model's."""
        self._state.enter(self, self._shared)
        self._state.name_classes()

    def __exit__(self, *error: object) -> None:
        """Let those act that did before, as far as they are still there."""
        state = self._state
        state.check_unmerged("leave the choice of another adapter")
        now = state.shared
        state.activate(self._root, state.present(self._here).names)
        own = None if self._own is None else state.present(self._own)
        state.leave(self, own, state.present(self._shared), now)
        state.name_classes()


def disabled(model: nn.Module) -> active:
    """Let no adapter act: the base itself. Takes effect at once; as a context manager, undone on exit."""
    return active(model, ())


def _fresh(
    target: Target, config: LoraConfig, seed: int, prepared: Mapping[str, Source], head: Target | None = None
) -> Mount:
    check_start(target, config)
    drawn_for = target if head is None else head
    random, r = init.generator(seed, drawn_for.pattern_path), config.rank(target.pattern_path)
    A, B, start = begin(drawn_for, config, random, prepared)
    if drawn_for.layer.transposed != target.layer.transposed:  # a head's start, as its embedding stores it
        A, B = B.t(), A.t()
    A, B = (parameter_for(target, factor, copy=False) for factor in (A, B))
    scale = config.scale(target.pattern_path)
    weight = None if start is None else start.weight
    magnitude = _norms(target, weight, A, B, scale) if config.use_dora else None
    bias = None
    if config.lora_bias:
        drawn = init.start_bias(B.shape[0], r, config.init_lora_weights, random)
        bias = parameter_for(target, drawn, copy=False)
    return Mount(target, A, B, scale, config.lora_dropout, magnitude, bias, start)


def _norms(target: Target, weight: Parameter | None, A: Parameter, B: Parameter, scale: float) -> Parameter:
    """DoRA's magnitudes at the start: what leaves the weight as it is."""
    return Parameter(target.layer.row_norm(target.module, A.flatten(1), B.flatten(1), scale, weight))


def _slots(root: nn.Module, paths: Iterable[str]) -> dict[str, Parameter]:
    """A copy of each named parameter of the base; tied ones stay tied."""
    bases = {path: parameter_at(root, path) for path in paths}
    own = {base: Parameter(base.detach().clone()) for base in bases.values()}
    return {path: own[base] for path, base in bases.items()}
