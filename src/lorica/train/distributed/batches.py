"""Each step's rows split over the processes of a run: together they read what one process would.

    one process of 8 rows     0 1 2 3 4 5 6 7 │ 8 9 … │ the last: 16 17 18 19 20
    first of two, 4 rows      0 1 2 3         │ 8 9 … │           16 17 18
    second                            4 5 6 7 │       │                    19 20

No row is read twice. The last batch is split as evenly as can be; a process for which no row is left reads
one all the same, since the others wait for its part of the sums, and that row counts for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader

from lorica.errors import ConfigError, listing

SHARE = "lorica_share"
"""Key in a batch: how many of the step's rows it has, over an even part of them. Absent where that is 1."""


class Part(list[int]):
    """Rows of a batch, by their numbers, with their `share`."""

    share = 1.0


class RankBatches(BatchSampler):
    """The part of each batch that one process reads.

    Args:
        sampler: the rows' numbers, in the same order in each process.
        batch_size: rows per step in each process.
        drop_last: leave out a last batch that is not full.
        rank: number of the process.
        world: number of processes.
    """

    def __init__(
        self, sampler: Iterable[int], batch_size: int, drop_last: bool, rank: int, world: int
    ) -> None:
        """Nothing is drawn yet."""
        super().__init__(sampler, batch_size * world, drop_last)  # type: ignore[arg-type]
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        """This process's rows of each batch."""
        for batch in super().__iter__():
            if len(batch) == self.batch_size:
                size = self.batch_size // self.world
                yield batch[self.rank * size : (self.rank + 1) * size]
                continue
            low, high = (len(batch) * place // self.world for place in (self.rank, self.rank + 1))
            part = Part(batch[low:high] or batch[:1])
            part.share = (high - low) * self.world / len(batch)
            yield part


class _Noted:
    """Rows that remember the share of the batch they were asked for in."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Any:
        if name == "rows":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.rows, name)

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]

    def __getitems__(self, rows: list[int]) -> list[Any]:
        several = getattr(self.rows, "__getitems__", None)
        found = several(list(rows)) if several is not None else [self.rows[row] for row in rows]
        if not isinstance(rows, Part):
            return found
        noted = _Rows(found)
        noted.share = rows.share
        return noted


class _Rows(list[Any]):
    share = 1.0


class _Collating:
    """A collator that notes the share in the batch."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(list(rows))
        if isinstance(rows, _Rows) and rows.share != 1.0:
            batch[SHARE] = rows.share
        return batch


def can_split(accelerator: Accelerator) -> bool:
    """Whether a run's loaders are to be split so.

    Accelerate's own ways to feed processes stay where they are asked for, or where the model is split too.
    """
    own_way = accelerator.split_batches or accelerator.dispatch_batches
    return accelerator.num_processes > 1 and not own_way and accelerator.parallelism_config is None


@contextlib.contextmanager
def split_over(accelerator: Accelerator) -> Iterator[None]:
    """Within it, the accelerator splits loaders as above, and not as accelerate does, which repeats rows."""

    def prepare(loader: DataLoader, device_placement: bool | None = None, **_: Any) -> DataLoader:
        options = {
            name: getattr(loader, name)
            for name in ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
        }
        if loader.num_workers > 0:
            options |= {
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
            }
        assert isinstance(loader.batch_size, int)
        batches = RankBatches(
            loader.sampler,
            loader.batch_size,
            loader.drop_last,
            accelerator.process_index,
            accelerator.num_processes,
        )
        collate = _Collating(loader.collate_fn)
        own = DataLoader(_Noted(loader.dataset), batch_sampler=batches, collate_fn=collate, **options)  # type: ignore[arg-type]
        prepared = prepare_data_loader(
            own,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            rng_types=None,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    vars(accelerator)["prepare_data_loader"] = prepare
    try:
        yield
    finally:
        del vars(accelerator)["prepare_data_loader"]


def put_together(part: Any, rows: int) -> Any:
    """The parts of a batch that all processes have, one after the other.

    Args:
        part: what this one has: tensors (rows or more, ...), also in tuples and dictionaries; whatever else
            stays as it is.
        rows: how many of them count.
    """
    if isinstance(part, dict):
        return {name: put_together(value, rows) for name, value in part.items()}
    if isinstance(part, (tuple, list)):
        return type(part)(put_together(value, rows) for value in part)
    if not isinstance(part, Tensor):
        return part
    world = distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.long, device=part.device) for _ in range(world)]
    distributed.all_gather(counts, torch.tensor([rows], device=part.device))
    sizes = [int(count) for count in counts]
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[:rows] = part[:rows]
    found = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(found, padded.contiguous())
    return torch.cat([each[:size] for each, size in zip(found, sizes, strict=True)])


def without_targets(batch: Any) -> Any:
    """A batch that counts for nothing, as those do that count targets; any other batch as it is."""
    if not isinstance(batch, Mapping) or batch.get(SHARE) != 0.0:
        return batch
    blank = {name: torch.full_like(batch[name], -100) for name in ("labels", "shift_labels") if name in batch}
    mask = {name: torch.zeros_like(batch[name]) for name in ("attention_mask",) if name in batch}
    return {**batch, **blank, **mask}


def check_all_used(model: Any) -> None:
    """Refuse to go on after a backward pass that left out a parameter, which the other processes wait for.

    Raises:
        ConfigError: naming it.
    """
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
        return
    unused = [n for n, p in model.module.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        raise ConfigError(
            f"{listing(unused, limit=3)} had no part in the loss, and the other processes wait for the "
            "gradients; leave out modules that the model does not call (method.exclude_modules), or let "
            "torch look for them in each step: training.arguments.ddp_find_unused_parameters: true"
        )
