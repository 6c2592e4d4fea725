"""A whole study of one adapter."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lorica.adapter import Adapter
from lorica.config import method_of
from lorica.errors import AdapterError
from lorica.study.adding import Interference, between
from lorica.study.advice import Advice, advise
from lorica.study.modules import Spot, base_weights, spots
from lorica.study.projection import Amplification, Overlap, amplified, overlapped
from lorica.study.results import Result
from lorica.study.sizes import Drift, Norms, drifted, normed
from lorica.study.spectra import SpectrumReport, spectrum
from lorica.study.subspaces import LayerCorrelation, SimilarityReport, correlation, similarity


@dataclass(frozen=True, eq=False)
class Report(Result):
    """A whole study of an adapter.

    Args:
        name: of the adapter.
        facts: its base, its task, the date of the report and the like: title → text.
        spots: module path → block and projection.
        spectrum: singular values of each layer's update.
        advice: proposed ranks.
        norms: module path → norms.
        correlation: similarity of the inputs that each two layers' updates read; None for fewer than two.
        against: name of the adapter compared with, if one was given.
        similarity: similarity with that adapter: the directions that ΔW reads (its right singular vectors).
        written: the same for the directions that it writes (the left ones).
        alike: module path → the interference of the two ΔW.
        amplification: module path → table 7; empty without a base.
        overlap: module path → figure 8; empty without a base.
        drift: module path → loss to a merge in bfloat16; empty without a base.
        notes: results that are missing, with the reasons.
    """

    name: str
    facts: dict[str, str]
    spots: dict[str, Spot]
    spectrum: SpectrumReport
    advice: Advice | None
    norms: dict[str, Norms]
    correlation: LayerCorrelation | None
    against: str | None
    similarity: SimilarityReport | None
    written: SimilarityReport | None
    alike: dict[str, Interference]
    amplification: dict[str, Amplification]
    overlap: dict[str, Overlap]
    drift: dict[str, Drift]
    notes: tuple[str, ...]


def gather(
    adapter: Adapter,
    *,
    name: str = "adapter",
    base: str | Path | None = None,
    against: Adapter | None = None,
    against_name: str = "the other adapter",
    energy: float = 0.99,
    budget: int | None = None,
    facts: Mapping[str, str] | None = None,
) -> Report:
    """Study an adapter; the base's weights are read once, one at a time.

    Args:
        adapter: the adapter to study.
        name: its name in the report.
        base: folder, file of safetensors or Hub name of the base; None leaves out the results that need it.
        against: another adapter to compare with: another seed, rank or task.
        against_name: its name in the report.
        energy: share of each layer's energy that the advice keeps.
        budget: the most parameters that the advice may propose.
        facts: more facts for the top of the report, title → text; None for those of its configuration alone.

    Raises:
        AdapterError: the base does not fit the adapter, nothing in the other adapter can be compared, or the
            adapter has no low-rank update (full fine-tuning has none).
        ConfigError: `energy` or `budget` is out of range.
        FileError: the base cannot be read.
    """
    notes: list[str] = []
    _check_studied(adapter, name)
    found = spectrum(adapter)
    trained = {path: f for path, f in adapter.factors.items() if found.layers[path].norm}
    if len(trained) < len(adapter.factors):
        notes.append(f"{len(adapter.factors) - len(trained)} of {len(adapter.factors)} updates are zero")
    single = {path: f for path, f in trained.items() if f.groups == 1}
    if len(single) < len(trained):
        notes.append("convolutions in groups have a spectrum, and no common directions to compare")
    if any(f.magnitude is not None or f.bias is not None for f in trained.values()):
        notes.append("of DoRA's magnitudes and of biases on B nothing is said here: this is about s·B·A")
    rest = Adapter(adapter.config, single, adapter.extras)
    rows: dict[str, tuple[Norms, Amplification, Overlap, Drift]] = {}
    if base is not None and single:
        for w in base_weights(rest, base):
            rows[w.path] = (normed(w.factors, w), amplified(w), overlapped(w), drifted(w, torch.bfloat16))
    compared = written = None
    alike: dict[str, Interference] = {}
    if against is not None:
        compared = similarity(adapter, against)
        paths = list(compared.layers)
        same = [p for p in paths if _shape(adapter, p) == _shape(against, p)]
        written = similarity(adapter, against, side="output", paths=same) if same else None
        alike = {p: between(adapter.factors[p], against.factors[p], p) for p in same}
    return Report(
        name=name,
        facts={**_facts(adapter, base), **({} if facts is None else facts)},
        spots=spots([*adapter.factors, *rows]),
        spectrum=found,
        advice=advise(adapter, energy=energy, budget=budget) if trained else None,
        norms={path: normed(f) for path, f in adapter.factors.items()}
        | {path: r[0] for path, r in rows.items()},
        correlation=correlation(rest) if len(single) > 1 else None,
        against=None if against is None else against_name,
        similarity=compared,
        written=written,
        alike=alike,
        amplification={path: row[1] for path, row in rows.items()},
        overlap={path: row[2] for path, row in rows.items()},
        drift={path: row[3] for path, row in rows.items()},
        notes=(*notes, *(compared.notes if compared else ())),
    )


def spread(paths: list[str], count: int) -> list[str]:
    """At most this number of a list's items, evenly from the first to the last."""
    if len(paths) <= count:
        return paths
    return [paths[round(i * (len(paths) - 1) / (count - 1))] for i in range(count)]


def _check_studied(adapter: Adapter, name: str) -> None:
    """Refuse an adapter without a low-rank update.

    Raises:
        AdapterError: naming its method and its tensors.
    """
    if not Adapter.check(adapter).factors:
        held = len(adapter.extras) + len(adapter.added)
        raise AdapterError(
            f"{name} has no update s·B·A to study: its method is {method_of(adapter.config)}, of which it "
            f"holds {held:,} tensors. `lorica info` lists them; `lorica study forget` says what they "
            "cost elsewhere"
        )


def _shape(adapter: Adapter, path: str) -> tuple[int, int]:
    B, A = (block.shape for block in adapter.factors[path].blocks())
    return B[1], A[2]


def _facts(adapter: Adapter, base: str | Path | None) -> dict[str, str]:
    """The facts in its configuration."""
    config = adapter.config
    found = {
        "base model": config.base_model_name_or_path or (None if base is None else str(base)),
        "task": config.task_type,
        "parameters": f"{adapter.numel:,}",
        "date": datetime.date.today().isoformat(),
    }
    return {title: text for title, text in found.items() if text}
