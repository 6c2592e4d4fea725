"""A merged checkpoint's bytes, a block at a time: no tensor is ever in memory whole."""

from __future__ import annotations

import errno
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.checkpoint.stream.placement import Update
from lorica.checkpoint.stream.plan import Piece, ShardPlan
from lorica.checkpoint.stream.shards import DTYPES, Entry, as_bytes, read_into
from lorica.errors import AdapterError, FileError
from lorica.folding import fold, fold_rows

_BLOCK = 1 << 20  # elements, of tensors that are only converted
_FOLDED = 4  # blocks of `fold` that are read and written together
_FEW, _MEASURED = 16, 4  # an update of more blocks than the first has rounding measured in every fourth
# Bytes written at once: for more, the kernel looks for large pages, which can cost five times as much.
_WRITE = 1 << 17
_COPY = 1 << 26  # bytes that the kernel is asked to copy at once
_COPY_THROUGH = 1 << 20  # bytes, where the kernel cannot
_NOT_HERE = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}

Advance = Callable[[int], None]


class Buffers:
    """Reused memory, one buffer per purpose."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, purpose: str, dtype: torch.dtype, count: int) -> Tensor:
        """`count` elements of arbitrary content; the purpose's previous buffer is overwritten."""
        size = count * dtype.itemsize
        if purpose not in self._memory or self._memory[purpose].numel() < size:
            self._memory[purpose] = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._memory[purpose][:size].view(dtype)


class Reader:
    """Reads a piece's values, as a model would hold them before the merge."""

    def __init__(self, file: FileIO, buffers: Buffers) -> None:
        self.file, self.buffers = file, buffers

    def read(self, piece: Piece, start: int, count: int, *, slot: int = 0) -> Tensor:
        """`count` elements from `start` on, flat; overwritten by the next read into the same slot."""
        if isinstance(piece.source, Entry):
            dtype = DTYPES[piece.source.dtype]
            raw = self.buffers.take(f"raw {slot}", dtype, count)
            read_into(self.file, piece.source.offset + start * dtype.itemsize, raw)
            return raw
        values = piece.source.detach().contiguous().view(-1)[start : start + count]
        return values.to(piece.base_dtype or values.dtype)


class Step(NamedTuple):
    """Some elements of a piece; or, without a piece, a range of bytes to copy from the base's file.

    Args:
        start: first element, or byte.
        length: number of elements, or bytes.
        piece: the tensor that they belong to; None to copy bytes.
        update: the update that is added to them, if any.
    """

    start: int
    length: int
    piece: Piece | None = None
    update: Update | None = None


def write_shard(shard: ShardPlan, path: Path, buffers: Buffers, advance: Advance) -> dict[str, float]:
    """Write a file of the merged checkpoint.

    One thread reads ahead and one writes behind, so disk and arithmetic do not wait for each other.

    Args:
        shard: the file's content.
        path: of the file.
        buffers: working memory.
        advance: called with the number of bytes as they are handed to the disk.

    Returns:
        Module → share of its update that rounding took away or added.

    Raises:
        AdapterError: a merged weight would hold NaN or infinity.
        FileError: the base's file changed while it was read.
        OSError: it cannot be written.
    """
    foldings: dict[str, _Folding] = {}
    pending: deque[tuple[Future[None], Tensor | None]] = deque()
    with (
        shard.base.path.open("rb", buffering=0) as base,
        shard.base.path.open("rb", buffering=0) as source,
        path.open("wb", buffering=0) as out,
        ThreadPoolExecutor(1) as behind,
        ThreadPoolExecutor(1) as ahead,
    ):
        reader = Reader(base, buffers)
        _write(out, memoryview(b"" if shard.copied else shard.header))
        steps = [Step(0, shard.base.nbytes)] if shard.copied else list(_steps(shard))
        values = _read(ahead, reader, steps, 0)
        for i, step in enumerate(steps):
            if len(pending) == 2:  # its buffers come next
                written, held = pending.popleft()  # held, so that its memory stays until it is written
                written.result()
                del held
            given, values = values, _read(ahead, reader, steps, i + 1)
            if step.piece is None or given is None:
                pending.append((behind.submit(_copy, source, step.start, step.length, out), None))
                advance(step.length)
                continue
            block = _stored(step, step.piece, given.result(), buffers, i % 2, foldings)
            pending.append((behind.submit(_write, out, as_bytes(block)), block))
            advance(block.numel() * block.element_size())
        for written, _ in pending:
            written.result()
        status = os.fstat(base.fileno())
    if (status.st_size, status.st_mtime_ns) != shard.base.identity[:2]:
        raise FileError(f"{shard.base.path} was changed while it was read; merge again once it stays")
    return {label: folding.loss() for label, folding in foldings.items()}


def _read(ahead: ThreadPoolExecutor, reader: Reader, steps: list[Step], i: int) -> Future[Tensor] | None:
    """Begin to read what step `i` needs, if it is there and needs anything."""
    piece = steps[i].piece if i < len(steps) else None
    if piece is None:
        return None
    # One block is being worked on, another being written.
    return ahead.submit(reader.read, piece, steps[i].start, steps[i].length, slot=i % 3)


def _steps(shard: ShardPlan) -> Iterator[Step]:
    """A file's content in order; neighbouring tensors whose bytes are copied form one range."""
    start = count = 0
    for piece in shard.pieces:
        copied = piece.source if piece.copied and isinstance(piece.source, Entry) else None
        if count and not (copied and copied.offset == start + count):
            yield Step(start, count)
            start = count = 0
        if copied:
            start, count = start if count else copied.offset, count + copied.nbytes
        else:
            yield from _steps_of(piece)
    if count:
        yield Step(start, count)


def _steps_of(piece: Piece) -> Iterator[Step]:
    total = torch.Size(piece.shape).numel()
    if not piece.updates:
        yield from (Step(start, min(_BLOCK, total - start), piece) for start in range(0, total, _BLOCK))
        return
    columns = total // piece.shape[0]
    step, row = _FOLDED * fold_rows(columns), 0
    for update in (*piece.updates, None):
        # Rows between those of one module and those of the next belong to others.
        stop = piece.shape[0] if update is None else update.start
        for i in range(row, stop, step):
            yield Step(i * columns, min(step, stop - i) * columns, piece)
        if update is not None:
            for i in range(update.start, update.stop, step):
                yield Step(i * columns, min(step, update.stop - i) * columns, piece, update)
            row = update.stop


def _stored(
    step: Step, piece: Piece, values: Tensor, buffers: Buffers, slot: int, foldings: dict[str, _Folding]
) -> Tensor:
    """The values to store for a step, flat; the step after the next overwrites them."""
    dtype = DTYPES.get(piece.dtype, values.dtype)
    if step.update is None:
        return _convert(piece, values, buffers.take(f"stored {slot}", dtype, step.length))
    columns = torch.Size(piece.shape[1:]).numel()
    if step.update.label not in foldings:
        foldings[step.update.label] = _Folding(step.update, values.dtype, columns)
    stored = buffers.take(f"stored {slot}", dtype, step.length)
    row = step.start // columns - step.update.start
    foldings[step.update.label].block(row, values.view(-1, columns), stored.view(-1, columns), buffers)
    return stored


class _Folding:
    """One update, added to its rows block by block: W0 + scale·B·A in float32 or higher, rounded once."""

    def __init__(self, update: Update, dtype: torch.dtype, columns: int) -> None:
        self.update = update
        self.precision = torch.promote_types(dtype, torch.float32)
        self.left, self.right = update.product(self.precision)
        self.rows = fold_rows(columns)
        # Measuring costs half as much as adding, and a quarter of many rows tells as much as all of them.
        self.every = self.rows * (1 if update.stop - update.start <= _FEW * self.rows else _MEASURED)
        self.gram = (self.right.double() @ self.right.double().t()) * update.factors.scale**2
        self.lost = self.total = 0.0

    def block(self, row: int, values: Tensor, stored: Tensor, buffers: Buffers) -> None:
        """Fill `stored` from the base's `values`, rows of the update from `row` on."""
        for i in range(0, len(values), self.rows):
            self._block(row + i, values[i : i + self.rows], stored[i : i + self.rows], buffers)

    def _block(self, row: int, values: Tensor, stored: Tensor, buffers: Buffers) -> None:
        left, scale = self.left[row : row + len(values)], self.update.factors.scale
        work = buffers.take("work", self.precision, values.numel()).view_as(values).copy_(values)
        stored.copy_(fold(work, left, self.right, scale, out=work))
        # A sum shows NaN and infinity at once; the slow look at every element is only for a suspect sum.
        if not math.isfinite(float(stored.sum())) and not stored.isfinite().all():
            raise AdapterError(
                f"{self.update.label}: the merged weight would hold NaN or infinity in {stored.dtype}"
            )
        if row % self.every == 0:
            self._measure(left.double(), values, work, stored)

    def _measure(self, left: Tensor, values: Tensor, work: Tensor, stored: Tensor) -> None:
        """Add up what rounding lost, and ‖ΔW‖² = tr(LᵀL·RRᵀ) of these rows."""
        if stored.dtype == self.precision:
            # The loss of this precision itself shows only in a higher one.
            error = stored.double() - values.double()
            error -= self.update.factors.scale * (left @ self.right.double())
        else:
            error = work.sub_(stored)
        self.lost += float(torch.linalg.vector_norm(error)) ** 2
        self.total += float(((left.t() @ left) * self.gram).sum())

    def loss(self) -> float:
        """‖stored − (W0 + ΔW)‖ / ‖ΔW‖."""
        return (self.lost / self.total) ** 0.5 if self.total > 0 else 0.0


def _convert(piece: Piece, values: Tensor, stored: Tensor) -> Tensor:
    if values.dtype == stored.dtype:
        return values
    stored.copy_(values)
    if not torch.isfinite(stored).all() and torch.isfinite(values).all():
        raise AdapterError(f"{piece.name} holds values that {stored.dtype} cannot; choose another dtype")
    return stored


def _write(file: FileIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view[:_WRITE]) :]


def _copy(source: FileIO, offset: int, nbytes: int, target: FileIO) -> None:
    """Copy a range of bytes inside the kernel, which shares blocks where the file system can."""
    while nbytes:
        try:
            count = os.copy_file_range(source.fileno(), target.fileno(), min(nbytes, _COPY), offset)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NOT_HERE:
                raise
            source.seek(offset)
            data = source.read(min(nbytes, _COPY_THROUGH))
            _write(target, memoryview(data))
            count = len(data)
        if not count:
            raise FileError(f"{source.name} became shorter while it was read; merge again once it stays")
        offset, nbytes = offset + count, nbytes - count
