"""Merging an adapter into a checkpoint on disk, in a few megabytes of memory, without making the model.

    base/model-*.safetensors ── rows ──▶ float32 ── + scale·B·A ──▶ rounded once ──▶ out/model-*.safetensors
    base/config.json, tokenizer, ... ─────────────────────────────────────────────▶ out/config.json, ...

The result has the same bits as `lorica.merge` followed by `save_pretrained`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorica.adapter import Adapter
from lorica.checkpoint.peft import read
from lorica.checkpoint.stream.blocks import Buffers, write_shard
from lorica.checkpoint.stream.plan import CONFIG, Plan, make_plan
from lorica.checkpoint.stream.rounding import warn_of_rounding
from lorica.checkpoint.stream.shards import CODES, as_bytes, open_checkpoint, short
from lorica.checkpoint.stream.staging import Staging
from lorica.errors import AdapterError, ConfigError, FileError, listing
from lorica.folding import one_thread

Progress = Callable[[int, int], None]

_FORMAT = 1  # raised whenever the same inputs give other files


@dataclass(frozen=True)
class StreamReport:
    """The result of a merge on disk.

    Args:
        folder: the merged checkpoint.
        layers: module path → ‖stored − (W0 + ΔW)‖ / ‖ΔW‖ (Frobenius): the share of the update that rounding
            to the stored dtype took away or added. 0 is exact; at 1 the error is as large as the update. In
            large layers a quarter of the rows is measured.
        nbytes: size of all weights, in bytes.
        seconds: time that the merge took.
        copied: files of weights without an update, copied unchanged.
        resumed: files of weights that an earlier, interrupted run had finished.
        untied: names of an output and an input embedding that are no longer tied.
        left_out: files of the base that were not copied, because they hold weights that are not merged.
    """

    folder: Path
    layers: dict[str, float]
    nbytes: int
    seconds: float
    copied: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    untied: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest loss, and that loss."""
        return max(self.layers.items(), key=lambda item: item[1], default=("", 0.0))

    def __str__(self) -> str:
        """One line per layer, the worst first, and notes on files and ties."""
        rows = sorted(self.layers.items(), key=lambda item: -item[1])
        rest = {
            "copied as they are": self.copied,
            "finished by an earlier run": self.resumed,
            "no longer tied": self.untied,
            "not carried over": self.left_out,
        }
        return "\n".join(
            [
                f"merged into {len(self.layers)} layers; share of each update lost to rounding:",
                *(f"  {loss:9.2e}  {path}" for path, loss in rows),
                *(f"{what}: {listing(names)}" for what, names in rest.items() if names),
            ]
        )


def merge(
    base: str | Path,
    adapter: Adapter | str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    resume: bool = True,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> StreamReport:
    """Merge an adapter into a checkpoint on disk and write the merged checkpoint, a block of rows at a time.

    Sums are float32 (or the weight's higher precision), rounded once. Names, files and everything that is not
    weights are the base's. `out` does not load before it is complete: until then all files are in a folder
    inside it, and after an interruption the same call continues after the last finished file.

    Args:
        base: folder with `config.json` and safetensors, one file or several.
        adapter: the adapter, or its folder. A tokenizer in that folder replaces the base's.
        out: folder to write; new, empty, or left by an interrupted merge of the same inputs.
        dtype: dtype in which floating-point tensors are stored, such as ``"float32"``; None keeps each
            tensor's own.
        resume: False discards the files of an interrupted merge.
        config: entries to set in `config.json`, such as the names of a new head's classes.
        progress: called with the bytes of weights written so far, and the bytes of all weights.

    Returns:
        The loss to rounding per layer, and the files by what became of them.

    Raises:
        FileError: the base cannot be read or changes while it is read; `out` holds other files, or cannot be
            written.
        AdapterError: lists the tensors that have no place in the base; or a merged weight would hold NaN or
            infinity. Nothing is left in `out`.
        ConfigError: the dtype is not one that weights are stored in.

    Warns:
        LoricaWarning: storing the sum would lose a good part of the update; a sample of rows shows how much.
    """
    # The disk needs a core too; and threads that wait for each other at every block gain nothing.
    with one_thread():
        return _merge(Path(base), adapter, Path(out), _dtype(dtype), resume, config or {}, progress)


def _merge(
    base: Path,
    adapter: Adapter | str | Path,
    out: Path,
    dtype: torch.dtype | None,
    resume: bool,
    config: Mapping[str, Any],
    progress: Progress | None,
) -> StreamReport:
    start = time.perf_counter()
    folder = None if isinstance(adapter, Adapter) else Path(adapter)
    value = adapter if isinstance(adapter, Adapter) else read(adapter)
    _ = value.lora  # another method's has nothing that could be merged here
    value.check_finite()
    value.check_on_base("merge on disk")
    plan = make_plan(value, open_checkpoint(base), folder, dtype, config)
    warn_of_rounding(plan)
    job = {
        "format": _FORMAT,
        "adapter": _fingerprint(value),
        "base": {name: list(shard.identity) for name, shard in plan.base.shards.items()},
        "config": hashlib.sha256(json.dumps([plan.base.config, config]).encode()).hexdigest(),
        "dtype": str(dtype),
    }
    try:
        # The disk needs a core too; and threads that wait for each other at every block gain nothing.
        with Staging.open(out, job, resume=resume) as stage:
            layers, resumed = _write(plan, stage, progress)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise FileError(
            f"cannot merge {base} into {out}: {error.strerror or error}{where}; what is finished is "
            "kept, and the same call continues from there"
        ) from error
    return StreamReport(
        out,
        layers,
        plan.nbytes,
        time.perf_counter() - start,
        [shard.name for shard in plan.shards if shard.copied],
        resumed,
        plan.untied,
        plan.left_out,
    )


def _write(plan: Plan, stage: Staging, progress: Progress | None) -> tuple[dict[str, float], list[str]]:
    """Write the files not finished yet, and publish; returns the losses and the files finished before."""
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        if progress is not None:
            progress(written, plan.nbytes)

    finished = {shard.name: stage.record(shard.name) for shard in plan.shards}
    _check_room(plan, stage, sum(shard.nbytes for shard in plan.shards if finished[shard.name] is None))
    layers: dict[str, float] = {}
    buffers = Buffers()
    # The disk takes as long to take a file in as the next one takes to compute.
    with ThreadPoolExecutor(max_workers=1) as finisher:
        finishing = []
        for shard in plan.shards:
            losses = finished[shard.name]
            if losses is None:
                try:
                    losses = write_shard(shard, stage.part(shard.name), buffers, advance)
                except AdapterError:
                    finisher.shutdown()
                    stage.discard()  # however often, it would come to this
                    raise
                finishing.append(finisher.submit(stage.finish, shard.name, losses))
            else:
                advance(shard.nbytes)
            layers |= losses
        for outcome in finishing:
            outcome.result()
    for name, path in plan.files.items():
        shutil.copyfile(path, stage.part(name))
        stage.finish(name, None)
    for name, text in plan.texts.items():
        stage.part(name).write_text(text, encoding="utf-8")
        stage.finish(name, None)
    # Nothing loads without the configuration, nor shards without their index.
    small = [name for name in (*plan.files, *plan.texts) if name != CONFIG and name not in plan.indices]
    stage.publish([*finished, *small, *plan.indices, CONFIG])
    return layers, [name for name, losses in finished.items() if losses is not None]


def _check_room(plan: Plan, stage: Staging, needed: int) -> None:
    free = shutil.disk_usage(stage.folder).free
    if needed > free:
        raise FileError(
            f"{stage.out} needs {needed:,} more bytes for weights, and {free:,} are free; make room, or "
            "choose a folder on another disk"
        )


def _fingerprint(adapter: Adapter) -> str:
    """A hash of everything in an adapter that decides the result of a merge."""
    digest = hashlib.sha256()
    config = adapter.lora
    facts: list[Any] = [config.task_type, config.modules_to_save, config.fan_in_fan_out]
    digest.update(
        json.dumps([facts, [(path, f.scale, f.kind) for path, f in adapter.factors.items()]]).encode()
    )
    for name, tensor in adapter.named_tensors().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    names = {short(known): known for known in CODES}
    if dtype not in names:
        raise ConfigError(f"dtype must be one of {listing(names)}, not {dtype!r}")
    return names[dtype]
