"""Advice on ranks, by the energy of each layer's directions, and the evidence for it."""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorica.adapter import Adapter
from lorica.algebra import compress, error
from lorica.algebra.settings import describing
from lorica.config import LoraConfig, exactly
from lorica.config.checks import check_count
from lorica.errors import AdapterError, ConfigError, listing
from lorica.study.modules import spots
from lorica.study.results import Result
from lorica.study.spectra import Spectrum, SpectrumReport, spectrum

_FEW = 4  # below this rank a spectrum is too short to fall off
_SEEDS_APART = 0.25  # relative difference of effective ranks at which two adapters disagree


@dataclass(frozen=True, eq=False)
class LayerAdvice(Result):
    """The advice for one layer.

    Args:
        r: rank that it was trained with.
        used: its effective rank.
        needed: the smallest rank that keeps the requested energy.
        rank: the proposed rank; 0 leaves the layer out.
        kept: share of its energy that the proposed rank keeps.
        text: the same in a sentence.
    """

    r: int
    used: float
    needed: int
    rank: int
    kept: float
    text: str


@dataclass(frozen=True, eq=False)
class Advice(Result):
    """A proposal for the next run, with its evidence.

    Args:
        layers: module path → the advice for it.
        energy: share of each layer's energy that `needed` keeps.
        budget: the most parameters that the proposal may have; None for no limit.
        parameters: number of parameters in the proposed A and B.
        before: number of parameters in the present A and B.
        kept: share of the energy of all updates together that the proposal keeps.
        config: the proposal: `r`, `rank_pattern`, `target_modules`; α stays as it was, so that the learning
            rate can stay too.
        evidence: sentences on what supports the proposal and what does not.
        thin: whether the evidence is too little to act on without a check.
    """

    layers: dict[str, LayerAdvice]
    energy: float
    budget: int | None
    parameters: int
    before: int
    kept: float
    config: LoraConfig
    evidence: tuple[str, ...]
    thin: bool

    def __str__(self) -> str:
        """A line for each layer, then the proposal and its evidence."""
        rows = [f"  {layer.text}" for layer in self.layers.values()]
        config = self.config
        proposal = f"r={config.r}, target_modules={config.target_modules}, rank_pattern={config.rank_pattern}"
        return "\n".join(
            [
                "rank that each layer used:",
                *rows,
                f"proposal: {proposal}",
                f"  {self.parameters:,} parameters instead of {self.before:,}, {self.kept:.2%} of the energy",
                "evidence:",
                *(f"  {line}" for line in self.evidence),
            ]
        )


@dataclass(frozen=True, eq=False)
class Check(Result):
    """An adapter's score before and after it was cut to lower ranks.

    Args:
        before: score of the adapter.
        after: score of the cut adapter.
        parameters: number of parameters in all its tensors, before and after.
        energy: share of the energy of all updates that was kept.
    """

    before: float
    after: float
    parameters: tuple[int, int]
    energy: float


def advise(
    adapter: Adapter,
    *,
    energy: float = 0.99,
    budget: int | None = None,
    others: Mapping[str, Adapter] | None = None,
) -> Advice:
    """Propose ranks and targets for the next run from the ranks that this one used.

    Without a budget each layer gets the smallest rank that keeps the energy. With one, directions are taken
    in the order of their energy per parameter (each has d_out + d_in) until no more fit; a layer that gets
    none is left out of the targets.

    Args:
        adapter: a trained adapter.
        energy: share of each layer's ‖ΔW‖² to keep, in (0, 1].
        budget: the most parameters that the proposed A and B may have; None sets no limit.
        others: name → adapter of the same task with another seed: more evidence.

    Raises:
        AdapterError: the adapter is another method's than LoRA.
        ConfigError: the energy is not in (0, 1], or the budget is too small for one direction.
    """
    _ = Adapter.check(adapter).lora  # refuses other methods
    if budget is not None:
        check_count("budget", budget)
    found = spectrum(adapter)
    # The rank of a grouped convolution is a multiple of its groups.
    steps = {path: f.groups for path, f in adapter.factors.items()}
    needed = {path: -(-s.needed(energy) // steps[path]) * steps[path] for path, s in found.layers.items()}
    ranks = needed if budget is None else _bought(found, needed, steps, budget)
    costs = {path: sum(s.shape) // steps[path] for path, s in found.layers.items()}
    places = spots(adapter.factors)
    layers = {}
    for path, s in found.layers.items():
        where = places[path]
        name = path if where.layer is None else f"{where.projection} of layer {where.layer}"
        kept = s.energy[ranks[path] - 1] if ranks[path] else 0.0
        layers[path] = LayerAdvice(
            s.r, s.effective_rank, needed[path], ranks[path], kept, _sentence(name, s, needed[path], energy)
        )
    total = sum(s.norm**2 for s in found.layers.values())
    kept = sum(s.norm**2 * layers[path].kept for path, s in found.layers.items())
    evidence, thin = _evidence(found, needed, adapter, others or {})
    return Advice(
        layers=layers,
        energy=energy,
        budget=budget,
        parameters=sum(ranks[path] * costs[path] for path in ranks),
        before=sum(s.r * costs[path] for path, s in found.layers.items()),
        kept=kept / total if total else 0.0,
        config=proposed(adapter, ranks),
        evidence=evidence,
        thin=thin,
    )


def proposed(adapter: Adapter, ranks: Mapping[str, int]) -> LoraConfig:
    """The adapter's configuration with other ranks and each layer's α unchanged.

    Args:
        adapter: the adapter whose configuration to change.
        ranks: module path → rank; 0 leaves the module out.

    Raises:
        ConfigError: all ranks are 0.
    """
    chosen = {path: rank for path, rank in ranks.items() if rank}
    if not chosen:
        raise ConfigError("no layer's update has any energy: the adapter has not been trained")
    r = Counter(chosen.values()).most_common(1)[0][0]

    def alpha(path: str) -> float:
        f = adapter.factors[path]
        return f.scale * (f.r**0.5 if adapter.lora.use_rslora else f.r)

    usual = Counter(map(alpha, chosen)).most_common(1)[0][0]
    whole = len(chosen) == len(ranks)
    return adapter.lora.replace(
        r=r,
        lora_alpha=usual,
        rank_pattern={exactly(path): rank for path, rank in chosen.items() if rank != r},
        alpha_pattern={exactly(path): alpha(path) for path in chosen if alpha(path) != usual},
        target_modules=adapter.lora.target_modules if whole else sorted(chosen),
        layers_to_transform=adapter.lora.layers_to_transform if whole else None,
        layers_pattern=adapter.lora.layers_pattern if whole else None,
        exclude_modules=adapter.lora.exclude_modules if whole else None,
        inference_mode=False,  # an adapter from a file may be for inference; a proposal is to be trained
    )


def _bought(
    found: SpectrumReport, needed: Mapping[str, int], steps: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks within a budget: directions with the most energy per parameter first."""
    costs = {path: sum(s.shape) for path, s in found.layers.items()}  # of a step
    ranks, left = dict.fromkeys(needed, 0), budget

    def offer(path: str) -> tuple[float, str]:
        gained = found.layers[path].values[ranks[path] : ranks[path] + steps[path]]
        return -sum(value**2 for value in gained) / costs[path], path

    # Within a layer the values fall, so its next direction is offered when the one before is taken.
    offers = [offer(path) for path in found.layers if needed[path]]
    heapq.heapify(offers)
    while offers:
        _, path = heapq.heappop(offers)
        if costs[path] > left:
            continue
        left -= costs[path]
        ranks[path] += steps[path]
        if ranks[path] < needed[path]:
            heapq.heappush(offers, offer(path))
    if not any(ranks.values()):
        raise ConfigError(
            f"a budget of {budget:,} parameters buys no direction; the cheapest has {min(costs.values()):,}"
        )
    return ranks


def _sentence(name: str, s: Spectrum, needed: int, energy: float) -> str:
    if not s.norm:
        return f"{name}: its update is zero; it learned nothing"
    used = f"used {s.effective_rank:.1f} of its {s.r} ranks"
    return f"{name}: this adapter {used}; {needed} keep {100 * energy:.6g}% of the energy"


def _evidence(
    found: SpectrumReport, needed: Mapping[str, int], adapter: Adapter, others: Mapping[str, Adapter]
) -> tuple[tuple[str, ...], bool]:
    """Sentences on the evidence for the proposal, and whether it is thin."""
    lines = [
        "energy is not quality: only a score without a direction shows what that direction does for the task"
    ]
    full = [path for path, s in found.layers.items() if needed[path] == s.r]
    small = [path for path, s in found.layers.items() if s.r < _FEW]
    zero = [path for path, s in found.layers.items() if not s.norm]
    if full:
        lines.append(
            f"{len(full)} of {len(found.layers)} layers use every rank they have, so the spectrum cannot say "
            "whether a higher rank would help them"
        )
    if small:
        lines.append(f"{len(small)} layers have a rank below {_FEW}, too low for a spectrum to fall off")
    if zero:
        lines.append(f"the update is zero in {listing(zero, limit=3)}")
    if extras := list(adapter.extras):
        lines.append(f"{len(extras)} tensors were trained whole ({listing(extras, limit=3)}) and count too")
    apart = 0.0
    if not isinstance(others, Mapping):
        raise ConfigError(f"others must be adapters by their names, not a {type(others).__name__}")
    for name, other in others.items():
        again = spectrum(other).layers
        pairs = [
            (s.effective_rank, again[p].effective_rank)
            for p, s in found.layers.items()
            if p in again and s.norm
        ]
        if not pairs:
            lines.append(f"{name} adapts other layers, and says nothing of these")
            continue
        off = sum(abs(a - b) / max(a, b) for a, b in pairs) / len(pairs)
        apart = max(apart, off)
        lines.append(f"beside {name}, effective ranks differ by {off:.0%} on average ({len(pairs)} layers)")
    if not others:
        lines.append("one adapter, so one seed: give another of the same task to see what is chance")
    thin = not others or apart > _SEEDS_APART or len(full) + len(small) > len(found.layers) / 2
    lines.append(
        "the evidence is thin: cut the adapter to these ranks and score it again before acting on it"
        if thin
        else "cut the adapter to these ranks and score it again to be sure"
    )
    return tuple(lines), thin


def cut(adapter: Adapter, advice: Advice) -> Adapter:
    """The adapter cut to the advised ranks.

    Each update becomes the nearest one of its rank; an update of rank 0 is left out. Heads and biases stay.

    Args:
        adapter: the adapter that was studied.
        advice: `advise`'s result for it.

    Raises:
        AdapterError: the advice is for another adapter, or the adapter has updates of parameters.
    """
    if not isinstance(advice, Advice):
        raise ConfigError(f"advice must be what lorica.study.advise returned, not a {type(advice).__name__}")
    if Adapter.check(adapter).factors.keys() != advice.layers.keys():
        apart = sorted(adapter.factors.keys() ^ advice.layers.keys())
        raise AdapterError(
            f"the advice is for another adapter: only one of the two has {listing(apart, limit=3)}"
        )
    factors = {}
    for path, layer in advice.layers.items():
        if layer.rank:
            alone = Adapter(adapter.config, {path: adapter.factors[path]})
            factors[path] = compress(alone, rank=layer.rank)[0].factors[path]
    config = describing(advice.config, factors)
    return dataclasses.replace(adapter, config=config, factors=factors, trained_as=None)


def check(
    adapter: Adapter,
    score: Callable[[Adapter], float],
    advice: Advice | None = None,
    *,
    energy: float = 0.99,
) -> Check:
    """Cut each layer to the advised rank, and score the adapter again.

    Args:
        adapter: the trained adapter.
        score: returns an adapter's score on the task; called twice.
        advice: the ranks to cut to, within a budget or not. None takes the smallest ranks that keep `energy`.
        energy: share of each layer's ‖ΔW‖² to keep, in (0, 1], if no advice is given.

    Raises:
        AdapterError: the advice is for another adapter.
        ConfigError: the energy is not in (0, 1].
    """
    smaller = cut(adapter, advise(adapter, energy=energy) if advice is None else advice)
    kept = error(smaller, [adapter]).energy
    return Check(score(adapter), score(smaller), (adapter.numel, smaller.numel), kept)
