"""Compiled products against torch's own, and what happens where they cannot be compiled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_reading import nobody_at_home
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lorica.functional import lora_linear
from lorica.kernels import thin

needs_kernels = pytest.mark.skipif(thin.load() is None, reason="needs a C compiler, and OpenMP under torch")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "LEAST", 1)


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is loaded yet, and the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    thin.load.cache_clear()
    yield tmp_path / "lorica" / f"kernels-{os.getuid()}"
    monkeypatch.undo()
    thin.load.cache_clear()


def results(
    shape: tuple[int, ...], d_out: int, r: int, p: float, trained: str, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The output and the gradients of one layer, drawn from a seed, dropout too."""
    draw = torch.Generator().manual_seed(1)
    d_in = shape[-1]
    sizes = {"x": shape, "W": (d_out, d_in), "b": (d_out,), "A": (r, d_in), "B": (d_out, r)}
    given = {
        name: torch.randn(size, generator=draw).to(dtype).requires_grad_(name in trained)
        for name, size in sizes.items()
    }
    torch.manual_seed(2)
    x, W, b, A, B = given.values()
    y = lora_linear(x, W, b, A, B, 0.7, p)
    y.backward(torch.randn(y.shape, generator=draw).to(dtype))
    return [y.detach(), *(t.grad for t in given.values() if t.grad is not None)]


@needs_kernels
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("trained", ["xAB", "AB", "xA", "xB", "xWbAB"])
@pytest.mark.parametrize(("shape", "d_out"), [((37, 24), 40), ((3, 2, 8), 16), ((1, 64), 8)])
def test_they_compute_what_torch_does(
    shape: tuple[int, ...], d_out: int, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    for r, p, count in ((1, 0.0, 1), (3, 0.3, 2), (8, 0.0, 2), (8, 0.5, 1), (13, 0.1, 3), (16, 0.0, 1)):
        torch.set_num_threads(count)
        try:
            found = results(shape, d_out, r, p, trained)
        finally:
            torch.set_num_threads(threads)
        with monkeypatch.context() as patch:
            patch.setattr(thin, "fit", lambda *_: None)
            wanted = results(shape, d_out, r, p, trained)
        assert len(found) == len(wanted) == 1 + len(trained)
        for own, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_a_token_is_computed_alike_in_whatever_company() -> None:
    x, A = torch.randn(1024, 64), torch.randn(8, 64)
    kernels = thin.load()
    whole, _ = thin.down(kernels, x, A, None, 0)
    for rows in (slice(0, 1), slice(5, 18), slice(1000, None)):
        assert torch.equal(thin.down(kernels, x[rows], A, None, 0)[0], whole[rows])


@needs_kernels
def test_what_they_are_asked_for() -> None:
    rows, A, B = torch.randn(1024, 64), torch.randn(8, 64), torch.randn(16, 8)
    assert thin.fit(rows, nn.Parameter(A), nn.Parameter(B)) is thin.load()
    assert thin.fit(rows[:8], A, B) is None
    assert thin.fit(rows.bfloat16(), A, B) is None
    assert thin.fit(rows.to("meta"), A, B) is None
    assert thin.fit(torch.randn(64, 1024).t(), A, B) is None
    assert thin.fit(rows, A.double(), B) is None
    assert thin.fit(rows, torch.randn(32, 64), torch.randn(16, 32)) is None
    assert thin.fit(rows, A, torch.randn(12, 8)) is None
    with FlopCounterMode(display=False):
        assert thin.fit(rows, A, B) is None


@needs_kernels
def test_several_gradients_at_once() -> None:
    x, W = torch.randn(1024, 64, requires_grad=True), torch.randn(32, 64)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    y, dy = lora_linear(x, W, None, A, B, 1.0), torch.randn(2, 1024, 32)
    together = torch.autograd.grad(y, (x, A, B), dy, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        alone = torch.autograd.grad(y, (x, A, B), dy[i], retain_graph=True)
        for several, one in zip(together, alone, strict=True):
            torch.testing.assert_close(several[i], one, rtol=1e-4, atol=1e-3)


@needs_kernels
def test_they_are_compiled_once(anew: Path) -> None:
    assert thin.load() is not None
    (library,) = anew.iterdir()
    made = library.stat().st_mtime_ns
    thin.load.cache_clear()
    assert thin.load() is not None
    assert [path.stat().st_mtime_ns for path in anew.iterdir()] == [made]


@pytest.mark.parametrize(
    "why", ["switched off", "no compiler", "it fails", "it is wrong", "nobody", "a folder of all"]
)
def test_without_them_torch_computes(
    anew: Path, tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "switched off":
        monkeypatch.setenv(thin.SWITCH, "0")
    elif why == "no compiler":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    elif why == "it fails":
        monkeypatch.setenv("CC", shutil.which("false") or "false")
    elif why == "it is wrong":
        monkeypatch.setattr(thin, "_is_right", lambda _: False)
    elif why == "nobody":
        nobody_at_home(monkeypatch)
    else:
        anew.mkdir(parents=True)
        anew.chmod(0o777)
    assert thin.load() is None
    results((1024, 64), 16, 8, 0.1, "xAB")
    assert why == "it is wrong" or not list(anew.glob("*"))
