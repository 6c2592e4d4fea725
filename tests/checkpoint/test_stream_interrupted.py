"""A merge on disk that stops in the middle: what it leaves, and how it goes on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streams import adapter, assert_same, factors, read_all, write_base

from lorica import checkpoint
from lorica.adapter import Adapter
from lorica.checkpoint import stream
from lorica.checkpoint.stream import blocks, merging
from lorica.errors import FileError


class Stop(BaseException):
    """Not an Exception: as Ctrl-C is not."""


def stop_at(fraction: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= fraction * total:
            raise Stop

    return progress


def test_the_same_call_goes_on_after_the_last_finished_file(
    toy: tuple[Path, Adapter], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        stream.merge(*toy, out, progress=stop_at(0.6))
    assert [path.name for path in out.iterdir()] == [".merging"]
    report = stream.merge(*toy, out)
    assert report.resumed[:1] == ["model-00001-of-00003.safetensors"]
    assert len(report.resumed) < 3
    assert report.layers.keys() == {"a", "b"}
    stream.merge(*toy, tmp_path / "whole")
    assert_same(read_all(tmp_path / "whole"), read_all(out))
    assert not (out / ".merging").exists()


def test_going_on_with_other_inputs_is_refused(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, value = toy
    out = tmp_path / "out"
    with pytest.raises(Stop):
        stream.merge(base, value, out, progress=stop_at(0.6))
    other = adapter({"a": factors(8, 6)})
    with pytest.raises(FileError, match=r"not the same: adapter, dtype"):
        stream.merge(base, other, out, dtype="float32")
    stream.merge(base, other, out, resume=False)
    stream.merge(base, other, tmp_path / "whole")
    assert_same(read_all(tmp_path / "whole"), read_all(out))


def test_a_finished_file_that_was_changed_is_written_again(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        stream.merge(*toy, out, progress=stop_at(0.6))
    (out / ".merging" / "files" / "model-00001-of-00003.safetensors").write_bytes(b"")
    assert "model-00001-of-00003.safetensors" not in stream.merge(*toy, out).resumed
    stream.merge(*toy, tmp_path / "whole")
    assert_same(read_all(tmp_path / "whole"), read_all(out))


@pytest.mark.parametrize("name", ["../victim.txt", "ABSOLUTE", "link/victim.txt"])
def test_a_manifest_that_names_files_elsewhere(name: str, toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    (tmp_path / "out" / ".merging").mkdir(parents=True)
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    name = str(victim) if name == "ABSOLUTE" else name
    done = {name: {"identity": [0, 0], "record": None}}
    for content in ({"job": {}, "done": done}, {"done": {}}, {"job": {}, "done": []}, []):
        (tmp_path / "out" / ".merging" / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(FileError, match=r"manifest\.json is damaged: .*; remove .* and start again"):
            stream.merge(*toy, tmp_path / "out", resume=False)
    assert victim.read_text() == "mine"


def test_a_full_disk(toy: tuple[Path, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_write", full)
        with pytest.raises(FileError, match="No space left on device; what is finished is kept"):
            stream.merge(*toy, out)
    with monkeypatch.context() as patch:
        patch.setattr(merging.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(FileError, match="more bytes for weights, and 0 are free"):
            stream.merge(*toy, out)
    stream.merge(*toy, out)


def test_a_base_that_changes_meanwhile(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, value = toy
    path = base / "model-00001-of-00003.safetensors"
    with pytest.raises(FileError, match="was changed while it was read"):
        stream.merge(base, value, tmp_path / "out", progress=lambda *_: os.utime(path, ns=(1, 1)))


def test_two_processes_do_not_write_to_one_folder(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    def again(*_: int) -> None:
        with pytest.raises(FileError, match="another process is writing"):
            stream.merge(*toy, tmp_path / "out")

    stream.merge(*toy, tmp_path / "out", progress=again)


@pytest.fixture
def server() -> Any:
    """Processes that start in milliseconds, for they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorica.checkpoint.stream"])
    return context


def test_killed_at_fifty_moments_it_never_leaves_what_loads_and_is_wrong(tmp_path: Path, server: Any) -> None:
    shards = [{f"m{i}.weight": torch.randn(64, 64), f"n{i}.bias": torch.randn(7)} for i in range(4)]
    base = write_base(tmp_path / "base", *shards, config={"model_type": "toy"})
    checkpoint.write(adapter({f"m{i}": factors(64, 64) for i in range(4)}), tmp_path / "adapter")
    stream.merge(base, tmp_path / "adapter", tmp_path / "right")
    right = read_all(tmp_path / "right")
    names = {path.name for path in (tmp_path / "right").iterdir()}

    def start() -> Any:
        process = server.Process(target=stream.merge, args=(base, tmp_path / "adapter", out))
        process.start()
        return process

    out, draw, kills, whole, resumed = tmp_path / "out-0", random.Random(0), 0, 0, 0
    start().join()  # the server itself takes seconds to start
    shutil.rmtree(out)
    began = time.perf_counter()
    start().join()
    duration = time.perf_counter() - began
    shutil.rmtree(out)
    while kills < 50 or (not resumed and kills < 200):
        process = start()
        time.sleep(draw.uniform(0, duration))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        # The machine's pace changes; the moments are to fall all over the work.
        duration *= 1.05 if process.exitcode == -signal.SIGKILL else 0.8
        if (out / "config.json").exists():  # without it nothing loads it
            assert names <= {path.name for path in out.iterdir()}
            assert_same(right, read_all(out))
            whole += 1
            out = tmp_path / f"out-{kills}-{whole}"
        elif draw.random() < 0.4 and out.exists():
            report = stream.merge(base, tmp_path / "adapter", out)
            resumed += bool(report.resumed)
            assert_same(right, read_all(out))
            assert names == {path.name for path in out.iterdir()}
            out = tmp_path / f"out-{kills}-{whole}"
    assert resumed, "no kill came after a first file was finished: the test shows nothing"
