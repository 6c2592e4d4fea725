"""Files that belong together are replaced so that an interruption at any moment leaves no mixture."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorica
from lorica.checkpoint.atomic import Writer, replace_files, staged
from lorica.errors import FileError
from lorica.train.system import write_atomically


def text(content: str) -> Writer:
    """A writer of that content."""

    def write(path: Path) -> None:
        path.write_text(content)

    return write


def test_files_are_written_and_nothing_else_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    replace_files(folder, {"a": text("1"), "key": text("2")})
    (folder / "mine").write_text("3")
    replace_files(folder, {"a": text("4"), "key": text("5")})
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "4", "key": "5", "mine": "3"}


def test_a_writer_that_fails_leaves_the_old_files(tmp_path: Path) -> None:
    replace_files(tmp_path, {"a": text("1"), "key": text("2")})

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ZeroDivisionError

    for writers in ({"a": fail, "key": text("3")}, {"a": text("3"), "key": fail}):
        with pytest.raises(ZeroDivisionError):
            replace_files(tmp_path, writers)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "1", "key": "2"}


def test_what_does_not_belong_to_the_new_set_goes_with_the_old_key(tmp_path: Path) -> None:
    replace_files(tmp_path, {"old": text("1"), "key": text("1")})

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError):
        replace_files(tmp_path, {"new": fail, "key": text("2")}, gone=["old"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "1", "key": "1"}
    replace_files(tmp_path, {"new": text("2"), "key": text("2")}, gone=["old", "never there"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"new": "2", "key": "2"}


@pytest.mark.parametrize("call", range(3))
def test_a_rename_that_fails_leaves_a_set_without_its_key_or_the_whole(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_files(tmp_path, {"a": text("1"), "b": text("1"), "key": text("1")})
    calls = iter(range(99))
    replace = os.replace

    def fail(source: str, target: str) -> None:
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FileError, match=f"cannot write to {tmp_path}: No space left on device"):
        replace_files(tmp_path, {"a": text("2"), "b": text("2"), "key": text("2")})
    assert not (tmp_path / "key").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(FileError, match=r"cannot write to .*; give a folder that can be written"):
            replace_files(folder, {"a": text("1")})
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)  # root may write anywhere, so a mode would refuse nothing
    with pytest.raises(FileError, match="Permission denied; give a folder"):
        replace_files(tmp_path, {"a": text("1")})


# Forks once for each file operation of a save, and kills the child there, or has the operation fail.
_INTERRUPT = """
import json, os, signal, sys
from pathlib import Path
import torch
import lorica
from lorica.checkpoint import write

pickled = sys.argv[2] == "pickled"

def adapter(value):
    config = lorica.LoraConfig(r=1, target_modules=["q"], lora_alpha=value)
    A, B = torch.full((1, 3), value), torch.full((2, 1), value)
    return lorica.Adapter(config, {"q": lorica.Factors(A, B, value)})

def found(folder):
    try:
        read = lorica.read(folder)
    except lorica.LoricaError:
        return "refused"
    tensors = [t.flatten() for t in read.named_tensors().values()]
    values = {*torch.cat(tensors).tolist(), read.config.lora_alpha}
    return {(1.0,): "old", (2.0,): "new"}.get(tuple(values), "mixture")

def save(folder, how, at):
    # 0: done, 1: a FileError, 2: anything else
    events = 0
    def hook(event, arguments):
        nonlocal events
        concerned = any(str(folder) in str(argument) for argument in arguments)
        if concerned and event.partition(".")[0] in ("open", "os", "shutil"):
            events += 1
            if events == at:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, "No space left on device")
    sys.addaudithook(hook)
    try:
        write(adapter(2.0), folder, pickled=pickled)
    except lorica.LoricaError as error:
        os._exit(1 if isinstance(error, lorica.errors.FileError) else 2)
    except BaseException:
        os._exit(2)
    os._exit(0)

def interrupted(how, at):
    folder = Path(sys.argv[1]) / f"{how}-{at}"
    lorica.write(adapter(1.0), folder)
    child = os.fork()
    if child == 0:
        save(folder, how, at)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), found(folder)

results = {"kill": [], "fail": []}
while not results["kill"] or results["kill"][-1][0] != 0:
    results["kill"].append(interrupted("kill", len(results["kill"]) + 1))
for at in range(1, len(results["kill"])):
    results["fail"].append(interrupted("fail", at))
print(json.dumps(results))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("form", ["safetensors", "pickled"])
def test_interrupted_anywhere_the_folder_holds_old_or_new_or_refuses(form: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _INTERRUPT, str(tmp_path), form], capture_output=True, text=True, check=True
    )
    results = json.loads(run.stdout)
    *killed, last = map(tuple, results["kill"])
    assert last == (0, "new")
    assert len(killed) > 8
    assert {status for status, _ in killed} == {-9}
    assert {found for _, found in killed} == {"old", "new", "refused"}
    # What fails may be of no consequence; if not, it is told as an error of a file, never as another.
    assert {status for status, _ in results["fail"]} == {0, 1}
    assert {found for _, found in results["fail"]} == {"old", "new", "refused"}
    assert {found for status, found in results["fail"] if status == 0} == {"new"}


class TestStages:
    """The folders that files are written in before they are renamed."""

    def test_what_a_killed_writer_left_goes_with_the_next_write(self, tmp_path: Path) -> None:
        for _ in range(3):
            process = os.fork()
            if process == 0:
                with staged(tmp_path) as stage:
                    (stage / "half").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            os.waitpid(process, 0)
        (tmp_path / "mine").touch()
        replace_files(tmp_path, {"a": lambda path: path.write_text("x")})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]

    def test_one_that_is_written_to_stays(self, tmp_path: Path) -> None:
        with staged(tmp_path) as first:
            (first / "half").touch()
            with staged(tmp_path) as second:
                assert first != second
            assert (first / "half").is_file()
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
    def test_every_file_takes_the_umasks_mode(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            adapter = lorica.Adapter(
                lorica.LoraConfig(r=1, target_modules=["q"]),
                {"q": lorica.Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)},
            )
            lorica.write(adapter, tmp_path / "a")
            lorica.write(adapter, tmp_path / "b", pickled=True)
            write_atomically(tmp_path / "a" / "text", "x")
        finally:
            os.umask(before)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
        assert len(files) == 7
