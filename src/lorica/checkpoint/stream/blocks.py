"""A merged checkpoint's bytes, a block at a time: no tensor is ever held whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from lorica.checkpoint.stream.placement import Update
from lorica.checkpoint.stream.plan import Piece, ShardPlan
from lorica.checkpoint.stream.shards import DTYPES, Entry, as_bytes, read_into
from lorica.errors import AdapterError, FileError
from lorica.functional import fold, fold_rows

_BLOCK = 1 << 20  # elements, of tensors that are only converted
_COPY = 1 << 26  # bytes that the kernel is asked to copy at once
_NOT_HERE = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}

Advance = Callable[[int], None]


class Buffers:
    """Memory that is used over and over, a stretch for each purpose."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, purpose: str, dtype: torch.dtype, count: int) -> Tensor:
        """`count` elements of arbitrary content; what was taken for this purpose before is overwritten."""
        size = count * dtype.itemsize
        if purpose not in self._memory or self._memory[purpose].numel() < size:
            self._memory[purpose] = torch.empty(size, dtype=torch.uint8)
        return self._memory[purpose][:size].view(dtype)


class Reader:
    """Reads a piece's values from where they are, as a model would hold them before the merge."""

    def __init__(self, file: FileIO, buffers: Buffers) -> None:
        self.file, self.buffers = file, buffers

    def read(self, piece: Piece, start: int, count: int) -> Tensor:
        """`count` elements from the one at `start` on, flat."""
        if isinstance(piece.source, Entry):
            dtype = DTYPES[piece.source.dtype]
            raw = self.buffers.take("raw", dtype, count)
            read_into(self.file, piece.source.offset + start * dtype.itemsize, raw)
            return raw
        values = piece.source.detach().contiguous().view(-1)[start : start + count]
        return values.to(piece.base_dtype or values.dtype)


def write_shard(shard: ShardPlan, path: Path, buffers: Buffers, advance: Advance) -> dict[str, float]:
    """Write a file of the merged checkpoint.

    Args:
        shard: what it holds.
        path: where to.
        buffers: to work in.
        advance: told of bytes as they are written.

    Returns:
        Module → share of its update that rounding took away or added.

    Raises:
        AdapterError: a merged weight would hold NaN or infinity.
        FileError: the base's file changed meanwhile.
        OSError: it cannot be written.
    """
    losses: dict[str, float] = {}
    with shard.base.path.open("rb", buffering=0) as base, path.open("wb", buffering=0) as out:
        reader = Reader(base, buffers)
        if shard.copied:
            _copy(base, 0, shard.base.nbytes, out, advance)
        else:
            _write(out, memoryview(shard.header))
            for offset, nbytes, piece in _runs(shard):
                if piece is None:
                    _copy(base, offset, nbytes, out, advance)
                    continue
                for block in _blocks(piece, reader, losses):
                    _write(out, as_bytes(block))
                    advance(block.numel() * block.element_size())
        status = os.fstat(base.fileno())
    if (status.st_size, status.st_mtime_ns) != shard.base.identity[:2]:
        raise FileError(f"{shard.base.path} was changed while it was read; merge again once it stays")
    return losses


def _runs(shard: ShardPlan) -> Iterator[tuple[int, int, Piece | None]]:
    """The pieces in order; neighbours whose bytes are copied as one range of the base's file."""
    offset = nbytes = 0
    for piece in shard.pieces:
        if piece.copied and isinstance(piece.source, Entry):
            if nbytes and piece.source.offset == offset + nbytes:
                nbytes += piece.source.nbytes
                continue
            if nbytes:
                yield offset, nbytes, None
            offset, nbytes = piece.source.offset, piece.source.nbytes
        else:
            if nbytes:
                yield offset, nbytes, None
            nbytes = 0
            yield 0, 0, piece
    if nbytes:
        yield offset, nbytes, None


def _blocks(piece: Piece, reader: Reader, losses: dict[str, float]) -> Iterator[Tensor]:
    """A piece's stored values; a block is to be used before the next is asked for."""
    dtype = DTYPES.get(piece.dtype)
    total = torch.Size(piece.shape).numel()
    if not piece.updates:
        for start in range(0, total, _BLOCK):
            yield _convert(
                piece, reader.read(piece, start, min(_BLOCK, total - start)), dtype, reader.buffers
            )
        return
    assert dtype is not None
    rows, row = 0, 0
    columns = total // piece.shape[0]
    for update in (*piece.updates, None):
        # Rows between those of one module and those of the next belong to others.
        stop = piece.shape[0] if update is None else update.start
        for row in range(rows, stop, fold_rows(columns)):
            count = min(fold_rows(columns), stop - row) * columns
            yield _convert(piece, reader.read(piece, row * columns, count), dtype, reader.buffers)
        if update is not None:
            yield from _updated(piece, update, columns, dtype, reader, losses)
            rows = update.stop


def _updated(
    piece: Piece, update: Update, columns: int, dtype: torch.dtype, reader: Reader, losses: dict[str, float]
) -> Iterator[Tensor]:
    """The rows of one update: W0 + scale·B·A in float32 or W0's higher precision, rounded once."""
    scale, lost = update.factors.scale, 0.0
    factors: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    step = fold_rows(columns)
    for i in range(update.start, update.stop, step):
        count = min(step, update.stop - i)
        raw = reader.read(piece, i * columns, count * columns).view(count, columns)
        precision = torch.promote_types(raw.dtype, torch.float32)
        if precision not in factors:
            factors[precision] = update.product(precision)
        left, right = factors[precision]
        part = slice(i - update.start, i - update.start + count)
        work = reader.buffers.take("work", precision, raw.numel()).view_as(raw).copy_(raw)
        fold(work, left[part], right, scale, out=work)
        stored = reader.buffers.take("stored", dtype, raw.numel()).view_as(raw).copy_(work)
        if stored.dtype == precision:
            # What this precision itself loses shows only in a higher one.
            left, right = (side.double() for side in (left[part], right))
            error = (stored.double() - raw.double()).sub_(scale * (left @ right))
        else:
            error = work.sub_(stored)
        norm = float(torch.linalg.vector_norm(error))
        if not norm < float("inf") and not torch.isfinite(stored).all():
            raise AdapterError(f"{update.label}: the merged weight would hold NaN or infinity in {dtype}")
        lost += norm**2
        yield stored.view(-1)
    whole = update.factors.norm()
    losses[update.label] = lost**0.5 / whole if whole else 0.0


def _convert(piece: Piece, values: Tensor, dtype: torch.dtype | None, buffers: Buffers) -> Tensor:
    if dtype is None or values.dtype == dtype:
        return values
    stored = buffers.take("stored", dtype, values.numel()).copy_(values)
    if not torch.isfinite(stored).all() and torch.isfinite(values).all():
        raise AdapterError(f"{piece.name} holds values that {dtype} cannot; choose another dtype")
    return stored


def _write(file: FileIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def _copy(source: FileIO, offset: int, nbytes: int, target: FileIO, advance: Advance) -> None:
    """Copy a range of bytes inside the kernel, which shares blocks where the file system can."""
    while nbytes:
        try:
            count = os.copy_file_range(source.fileno(), target.fileno(), min(nbytes, _COPY), offset)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NOT_HERE:
                raise
            count = _copy_through(source, offset, min(nbytes, 1 << 20), target)
        if not count:
            raise FileError(f"{source.name} became shorter while it was read; merge again once it stays")
        offset, nbytes = offset + count, nbytes - count
        advance(count)


def _copy_through(source: FileIO, offset: int, nbytes: int, target: FileIO) -> int:
    source.seek(offset)
    data = source.read(nbytes)
    _write(target, memoryview(data))
    return len(data)
