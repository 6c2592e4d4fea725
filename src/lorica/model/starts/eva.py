"""EVA: A from the principal directions of the layers' inputs, and ranks where those inputs vary most."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica import inits
from lorica.config import EvaConfig, LoraConfig, exactly
from lorica.errors import AdapterError, ConfigError, listing
from lorica.find import Target
from lorica.layers import LoraLayer, lora_layers
from lorica.model.watch.watching import (
    Batches,
    Forward,
    as_it_was,
    check_batches,
    device_of,
    run,
    to_device,
    watching,
)
from lorica.pieces import resolve
from lorica.state import adapted
from lorica.tree import shortest_suffixes, walk

M = TypeVar("M", bound=nn.Module)
Progress = Callable[[int, int], None]
_PASSES = 100
"""Passes over the data after which directions that have not settled never will."""


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Batches,
    config: LoraConfig | None = None,
    *,
    name: str | None = None,
    seed: int = 0,
    forward: Forward = run,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The principal directions of each targeted layer's inputs: A, by module path, of the rank it deserves.

    Batches are taken again and again until no direction turns any more. Of each layer only the directions
    found so far are kept, and of layers with the same inputs (query, key and value) only one's.

    Args:
        model: adapted, or not yet.
        dataloader: batches for the model, of at least rho·r tokens each. An ``attention_mask`` in them, and
            labels as `EvaConfig` says, leave out tokens.
        config: of a model that is not adapted yet. None takes the adapter's.
        name: of the adapter; None takes the only one, or the only active one.
        seed: of the randomized decompositions.
        forward: calls the model on a batch.
        progress: is told after each batch how many layers have settled, and of how many.

    Returns:
        Module path → A (rank, d_in). The rank may be 0.

    Raises:
        AdapterError: the data loader is empty, a layer gets no inputs or too few tokens a batch, or the
            directions do not settle.
        TargetError: a targeted layer cannot start so.

    Source: Paischer et al., 2024, algorithm 1.
    """
    check_batches(dataloader)
    if config is None:
        root, state = adapted(model)
        key = state.one(name)
        given = state.configs[key]
        if not isinstance(given, LoraConfig):
            raise ConfigError(f"{key!r} is not LoRA alone, and only that starts from its inputs")
        config = given
        state.check_unmerged("look at the layers")
        layers = lora_layers(root)
        targets = [
            Target(path, layer, layer.mixin())  # pyright: ignore[reportArgumentType]
            for path, layer in layers.items()
            if key in layer.scaling
        ]
        with state.base_in_place(root):
            return _Search(targets, config, seed).run(model, dataloader, forward, progress)
    return _Search(resolve(model, config).targets, config, seed).run(model, dataloader, forward, progress)


def initialize_lora_eva_weights(
    model: M,
    dataloader: Batches | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    *,
    name: str | None = None,
    seed: int = 0,
    forward: Forward = run,
    progress: Progress | None = None,
) -> M:
    """Carry out ``init_lora_weights="eva"`` on an adapted model, before it is trained.

    Layers whose rank came out as 0 lose their update; the configuration gets the ranks as they are, and with
    `adjust_scaling_factors` alphas that leave each scale as it was.

    Args:
        model: adapted with ``init_lora_weights="eva"``.
        dataloader: as for `get_eva_state_dict`.
        eva_state_dict: what that returned, in place of data.
        name: of the adapter; None takes the only one, or the only active one.
        seed: as for `get_eva_state_dict`.
        forward: as for `get_eva_state_dict`.
        progress: as for `get_eva_state_dict`.

    Returns:
        The same model. Its factors are new parameters: make the optimizer after this.

    Raises:
        ConfigError: the adapter is not one of EVA's, or there is neither data nor a state dict.
        AdapterError: as `get_eva_state_dict`; or the state dict does not fit the model.
    """
    root, state = adapted(model)
    key = state.one(name)
    config = state.configs[key]
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        value = config.init_lora_weights if isinstance(config, LoraConfig) else None
        raise ConfigError(f"{key!r} has init_lora_weights={value!r}; adapt the model with 'eva' first")
    state.check_unmerged("start an adapter")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("give a dataloader, or the eva_state_dict that get_eva_state_dict returned")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, name=key, seed=seed, forward=forward, progress=progress
        )
    layers = {path: layer for path, layer in lora_layers(root).items() if key in layer.scaling}
    _check_fits(layers, eva_state_dict)
    ranks = {path: len(eva_state_dict[path]) for path in layers}
    config = with_ranks(root, config, ranks)
    for path, layer in layers.items():
        A, B = layer.factor_parameters(key)
        dropout, magnitude = layer.lora_dropout[key], layer.magnitude_parameter(key)
        layer.remove_factors(key)
        if ranks[path]:
            start = Parameter(eva_state_dict[path].detach().to(A, copy=True), A.requires_grad)
            zeros = Parameter(B.new_zeros(len(B), ranks[path]), B.requires_grad)
            layer.add_factors(key, start, zeros, config.scale(path), dropout)
            if magnitude is not None:
                layer.add_magnitude(key, magnitude)
        elif not layer.scaling:
            layer.leave()
    state.configs[key] = config
    return model


class _Search:
    """One run over the data: a decomposition for each distinct input, and who shares it."""

    def __init__(self, targets: list[Target], config: LoraConfig, seed: int) -> None:
        for target in targets:
            inits.of(config).check(target, config)
        self.modules = {target.path: target.module for target in targets}
        self.settings = config.eva_config or EvaConfig()
        self.ranks = {path: config.rank(path) for path in self.modules}
        self.most = {target.path: self._most(target) for target in targets}
        self.seed = seed
        self.keep: Tensor | None = None
        self.same: dict[str, str] = {}
        self.found: dict[str, inits.IncrementalSVD] = {}

    def _most(self, target: Target) -> int:
        """The most directions that a layer may get."""
        (_, d_in), (d_out, _) = target.layer.factor_shapes(target.module, 1)
        return min(round(self.ranks[target.path] * self.settings.rho), d_in, d_out)

    def run(
        self, model: nn.Module, batches: Batches, forward: Forward, progress: Progress | None
    ) -> dict[str, Tensor]:
        device = device_of(model)
        with as_it_was(model, training=False), torch.no_grad():
            self._find_same_inputs(model, to_device(next(iter(batches)), device), forward)
            for inputs in itertools.chain.from_iterable(itertools.repeat(batches, _PASSES)):
                self._show(model, to_device(inputs, device), forward, self.unsettled())
                left = self.unsettled()
                if progress is not None:
                    progress(len(self.found) - len(left), len(self.found))
                if not left:
                    return {path: self._directions(path, rank) for path, rank in self.shares().items()}
        raise self._unsettled_error()

    def unsettled(self) -> list[str]:
        """The layers of which one of the directions that they deserve still turns."""
        wanted, tau = self.shares(), self.settings.tau
        return [path for path, svd in self.found.items() if not (svd.settled[: wanted[path]] >= tau).all()]

    def shares(self) -> dict[str, int]:
        """The rank each layer deserves by what was seen so far; the most it may get, until all were seen."""
        if any(svd.Vh is None for svd in self.found.values()):
            return dict(self.most)
        explained = {path: svd.explained() for path, svd in self.found.items()}
        explained |= {path: explained[other] for path, other in self.same.items()}
        return inits.share_ranks(explained, sum(self.ranks.values()), self.same)

    def _show(self, model: nn.Module, inputs: Any, forward: Forward, paths: list[str]) -> None:
        self._choose(inputs)
        modules = {path: self.modules[path] for path in paths}
        with watching(modules, lambda path, x: self.found[path].add(self._rows(x))):
            forward(model, inputs)

    def _find_same_inputs(self, model: nn.Module, inputs: Any, forward: Forward) -> None:
        """Run once, and see which layers are given the very same tensor."""
        alive: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        owners: dict[str, str] = {}

        def look(path: str, x: Tensor) -> None:
            seen, owner = alive.get(id(x), (None, path))
            if seen is None or seen() is not x:
                alive[id(x)], owner = (weakref.ref(x), path), path
            owners.setdefault(path, owner)

        with watching(self.modules, look):
            forward(model, inputs)
        missing = [path for path in self.modules if path not in owners]
        if missing:
            raise AdapterError(f"{listing(missing)} was never called on the first batch; leave it out")
        self.same = {path: owner for path, owner in owners.items() if owner != path}
        for path, owner in self.same.items():
            self.most[owner] = max(self.most[owner], self.most[path])
        for path in owners:
            if path not in self.same:
                self.found[path] = inits.IncrementalSVD(self.most[path], inits.generator(self.seed, path))

    def _choose(self, inputs: Any) -> None:
        """The tokens of a batch that count."""
        self.keep = None
        if isinstance(inputs, Mapping):
            mask, labels = inputs.get("attention_mask"), inputs.get("labels")
            if mask is not None and mask.dim() == 2:
                self.keep = mask.bool()
            if self.settings.use_label_mask and labels is not None and labels.dim() == 2:
                targets = labels != self.settings.label_mask_value
                self.keep = targets if self.keep is None else self.keep & targets

    def _rows(self, x: Tensor) -> Tensor:
        if self.keep is not None and x.dim() == 3 and x.shape[:2] == self.keep.shape:
            return x[self.keep.to(x.device)]
        return x.reshape(-1, x.shape[-1])

    def _directions(self, path: str, rank: int) -> Tensor:
        svd = self.found[self.same.get(path, path)]
        assert svd.Vh is not None
        assert svd.S is not None
        A = svd.Vh[:rank].clone(memory_format=torch.contiguous_format)
        return A / svd.S[:rank, None].sqrt() if self.settings.whiten else A

    def _unsettled_error(self) -> AdapterError:
        left = self.unsettled()
        starved = [path for path in left if self.found[path].Vh is None]
        if starved:
            k = max(self.found[path].k for path in starved)
            return AdapterError(
                f"{listing(starved)} never had {k} tokens in one batch, and so many directions are asked "
                "for; take larger batches, a smaller r or rho, or use_label_mask=False"
            )
        return AdapterError(
            f"the directions of {listing(left)} still turn after {_PASSES} passes over the data; take more "
            "or larger batches, or a lower tau"
        )


def _check_fits(layers: Mapping[str, LoraLayer], found: Mapping[str, Tensor]) -> None:
    missing, unknown = layers.keys() - found.keys(), found.keys() - layers.keys()
    if missing or unknown:
        raise AdapterError(
            f"the eva_state_dict is of another model: missing {listing(sorted(missing)) or 'nothing'}, "
            f"unexpected {listing(sorted(unknown)) or 'nothing'}"
        )
    for path, layer in layers.items():
        d_in = layer.factor_shapes(layer, 1)[0][1]
        if found[path].dim() != 2 or found[path].shape[1] != d_in:
            raise AdapterError(f"{path}: A must be (rank, {d_in}), not {tuple(found[path].shape)}")
    if not any(len(found[path]) for path in layers):
        raise AdapterError("every rank in the eva_state_dict is 0")


def with_ranks(root: nn.Module, config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The configuration with each layer's rank as it is, and its scale as it was, if that is asked for."""
    keep = (config.eva_config or EvaConfig()).adjust_scaling_factors
    rank_pattern, alpha_pattern = {}, {}
    for path, rank in ranks.items():
        before = config.rank(path)
        if not rank:
            continue
        if rank != config.r:
            rank_pattern[exactly(path)] = rank
        alpha = config.alpha(path) * (rank / before if keep else 1)
        if alpha != config.lora_alpha:
            alpha_pattern[exactly(path)] = alpha
    paths = [place.path for place in walk(root) if place.path]
    chosen = [path for path, rank in ranks.items() if rank]
    names = config.target_modules if len(chosen) == len(ranks) else shortest_suffixes(chosen, paths)
    return config.replace(rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, target_modules=names)
