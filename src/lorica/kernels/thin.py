"""Compiled products for a CPU: what has r numbers a token, in one pass over the activations.

    x, random bytes ──▶ A·(keep ⊙ x), bits       down      dy ──▶ Bᵀ·dy and dyᵀ·u                    beside
    y += s·B·u                                   up        dx += s·keep ⊙ (Aᵀ·g), gᵀ·(keep ⊙ x)      back

torch takes each of these in several passes, each of which finds its matrix in cold memory, and splits few of
them over threads. `thin.c` is compiled for this machine by its C compiler when it is first wanted, which
takes a second, and kept in the user's cache. Where there is no compiler, or no OpenMP that torch has loaded,
plain torch computes the same. The environment's ``LORICA_KERNELS=0`` leaves them out.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lorica.kernels import masks
from lorica.reading import cache_folder

SWITCH = "LORICA_KERNELS"
"""Variable of the environment; 0 leaves the kernels out."""

_SOURCE = Path(__file__).with_name("thin.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
_is_batched: Any = torch._C._functorch.is_legacy_batchedtensor  # type: ignore[attr-defined]
"""Whether a tensor stands for several, of the gradients that `is_grads_batched` asks for at once."""

LEAST = 32_768
"""Numbers of an activation from which on a call pays; below, Python's own time is what counts."""
_WIDEST = 16
"""The largest rank; above it, the products are large enough for torch's own to be as fast."""
_SECONDS = 120.0

_REAL = ctypes.c_float
_COUNT = ctypes.c_int64
_PLACE = ctypes.c_void_p


def fit(rows: Tensor, A: Tensor | None, B: Tensor) -> Any:
    """The kernels, where they compute a layer's products; else None.

    Args:
        rows: (tokens, d_in), or (tokens, d_out) where A is None.
        A: (r, d_in); None where it has no part in what is computed.
        B: (d_out, r).
    """
    width = B.shape[0] if A is None else B.shape[0] | A.shape[1]
    if not 0 < B.shape[1] <= _WIDEST or width % 8 or not takes(rows):
        return None
    if not takes(B, factor=True) or not (A is None or takes(A, factor=True)):
        return None
    if torch._C._len_torch_dispatch_stack():  # who counts or records operations sees torch's alone
        return None
    return load()


def takes(tensor: Tensor, *, factor: bool = False) -> bool:
    """Whether they can read a tensor.

    Args:
        tensor: activations, contiguous, of enough numbers for a call to pay.
        factor: whether it is A or B, of whatever size and strides.
    """
    kind = type(tensor)
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        return False
    if factor:
        return kind is Parameter or kind is Tensor
    many = kind is Tensor and tensor.numel() >= LEAST and tensor.is_contiguous()
    return many and not _is_batched(tensor)


def down(
    kernels: Any, rows: Tensor, A: Tensor, random: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor | None]:
    """``A·(keep ⊙ rows)``.

    Args:
        kernels: what `fit` gave.
        rows: (tokens, d_in).
        A: (r, d_in).
        random: a byte for each number of rows, or None to keep all.
        threshold: a number is kept whose byte is at least this.

    Returns:
        (tokens, r); and what was kept as bits, flat.
    """
    tokens, width = rows.shape
    At = _padded(A.t())
    u = rows.new_empty(tokens, At.shape[1])
    bits = None if random is None else random.new_empty(rows.numel() // 8)
    _check(
        kernels.lorica_down(
            *_places(rows, At, random), threshold, tokens, width, u.shape[1], _threads(), *_places(bits, u)
        )
    )
    return u[:, : A.shape[0]], bits


def up(kernels: Any, y: Tensor, u: Tensor, B: Tensor, scale: float) -> None:
    """``y += scale · u·Bᵀ`` in place; y (tokens, d_out) contiguous."""
    u = _padded(u)
    Bt = y.new_zeros(u.shape[1], B.shape[0])
    Bt[: B.shape[1]] = B.t()
    kernels.lorica_up(*_places(u, Bt), scale, *y.shape, u.shape[1], _threads(), *_places(y))


def beside(kernels: Any, dy: Tensor, B: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``g = dy·B`` (tokens, r) and ``dyᵀ·u`` (d_out, r), in one pass over dy."""
    padded, u = _padded(B), _padded(u)
    g, dB = dy.new_empty(u.shape), torch.zeros_like(padded)
    _check(kernels.lorica_beside(*_places(dy, padded, u), *dy.shape, u.shape[1], _threads(), *_places(g, dB)))
    return g[:, : B.shape[1]], dB[:, : B.shape[1]]


def back(
    kernels: Any, rows: Tensor, bits: Tensor | None, A: Tensor, g: Tensor, scale: float, dx: Tensor | None
) -> Tensor:
    """``dx += scale · keep ⊙ (g·A)`` in place, and ``gᵀ·(keep ⊙ rows)``, in one pass over both."""
    (tokens, width), g = rows.shape, _padded(g)
    padded = A.new_zeros(g.shape[1], width)
    padded[: A.shape[0]] = A
    dA = torch.zeros_like(padded)
    _check(
        kernels.lorica_back(
            *_places(rows, bits, padded, g), scale, tokens, width, g.shape[1], _threads(), *_places(dx, dA)
        )
    )
    return dA[: A.shape[0]]


def _padded(columns: Tensor) -> Tensor:
    """(n, r), contiguous, with zeros up to a multiple of 8 columns."""
    r = columns.shape[1]
    if r % 8 == 0:
        return columns.detach().contiguous()
    wide = columns.new_zeros(columns.shape[0], r + -r % 8)
    wide[:, :r] = columns
    return wide


def _places(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _threads() -> int:
    return torch.get_num_threads()


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory is left for a layer's products")


@functools.cache
def load() -> Any:
    """The compiled functions; None where there are none, or where they do not compute what they should."""
    if os.environ.get(SWITCH) == "0" or sys.platform != "linux" or masks.numpy is None:
        return None
    try:
        # Another OpenMP beside torch's would have threads of its own, and wait on the same cores.
        if "libgomp" not in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace"):
            return None
        kernels = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError):
        return None
    kernels.lorica_down.argtypes = [
        _PLACE,
        _PLACE,
        _PLACE,
        ctypes.c_int,
        *[_COUNT] * 3,
        ctypes.c_int,
        _PLACE,
        _PLACE,
    ]
    kernels.lorica_up.argtypes = [_PLACE, _PLACE, _REAL, *[_COUNT] * 3, ctypes.c_int, _PLACE]
    kernels.lorica_beside.argtypes = [*[_PLACE] * 3, *[_COUNT] * 3, ctypes.c_int, _PLACE, _PLACE]
    kernels.lorica_back.argtypes = [*[_PLACE] * 4, _REAL, *[_COUNT] * 3, ctypes.c_int, _PLACE, _PLACE]
    kernels.lorica_up.restype = None
    kernels.lorica_begin()
    return kernels if _is_right(kernels) else None


def _is_right(kernels: Any) -> bool:
    """Whether they compute a small layer as torch does: a compiler may be broken."""
    draw = torch.Generator("cpu").manual_seed(0)
    x, A, B, dy = (
        torch.randn(shape, generator=draw, device="cpu", dtype=torch.float32)
        for shape in ((11, 24), (3, 24), (16, 3), (11, 16))
    )
    random = torch.randint(256, (11 * 24,), generator=draw, device="cpu", dtype=torch.uint8)
    kept = x * (random >= 100).view(x.shape)
    with torch.no_grad():
        u, bits = down(kernels, x, A, random, 100)
        y = dy.clone()
        up(kernels, y, u, B, 0.5)
        g, dB = beside(kernels, dy, B, u)
        dx = x.clone()
        dA = back(kernels, x, bits, A, g, 0.5, dx)
        pairs = (
            (u, kept @ A.t()),
            (y, dy + 0.5 * kept @ A.t() @ B.t()),
            (g, dy @ B),
            (dB, dy.t() @ (kept @ A.t())),
            (dx, x + 0.5 * (dy @ B @ A) * (random >= 100).view(x.shape)),
            (dA, (dy @ B).t() @ kept),
        )
        return all(torch.allclose(found, wanted, rtol=1e-4, atol=1e-4) for found, wanted in pairs)


def _built() -> Path:
    """The compiled library, from the cache or made now.

    Raises:
        OSError: there is no compiler, or no place for what it makes.
        subprocess.SubprocessError: it failed.
    """
    compiler = next(
        (
            found
            for name in (os.environ.get("CC"), "cc", "gcc", "clang")
            if name and (found := shutil.which(name))
        ),
        None,
    )
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    key = hashlib.sha256(_SOURCE.read_bytes())
    for part in (*_FLAGS, compiler, str(Path(compiler).stat().st_mtime_ns), platform.machine(), _processor()):
        key.update(b"\0" + part.encode())
    folder = _folder()
    library = folder / f"thin-{key.hexdigest()[:24]}.so"
    if not library.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / library.name
            subprocess.run(
                [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)],
                check=True,
                capture_output=True,
                timeout=_SECONDS,
                stdin=subprocess.DEVNULL,
            )
            made.replace(library)
    return library


def _processor() -> str:
    """The processor that the compiler compiles for: a cache may be shared by machines."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _folder() -> Path:
    """A folder that nobody else can write to: what lies there is loaded."""
    cache = cache_folder() / f"kernels-{os.getuid()}"  # several users may share the folder
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = cache.stat()  # of one that others put in its place, too: it would be theirs
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise PermissionError(f"others can write to {cache}")
    return cache
