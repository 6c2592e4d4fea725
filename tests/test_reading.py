"""Files that others wrote: plain values come back, or one kind of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.errors import FileError
from lorica.reading import DEPTH, cache_folder, load, parse_json, read_json, read_object


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, {"b": "é\n"}], "big": 10**40, "small": 1e-300}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_object(tmp_path / "x.json") == value


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b"[" * 100_000,
        b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1),
        b'{"a": ' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1),
        b"1" + b"0" * 400,
        b"-1" + b"0" * 400,
        b"1" + b"0" * 5000,
    ],
    ids=range(11),
)
def test_what_cannot_be_borne_is_refused_by_the_file(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(FileError, match=r"x\.json cannot be read as JSON"):
        read_json(path)


@pytest.mark.parametrize("value", [[], 3, "text", None])
def test_an_object_is_asked_for(tmp_path: Path, value: Any) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(FileError, match="should hold a JSON object"):
        read_object(tmp_path / "x.json")


def test_a_folder_where_a_file_was_due(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


class Runs:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return print, ("it ran",)


def test_a_pickle_of_more_than_tensors_is_told_without_advice_to_run_it(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": Runs()}, path)
    with pytest.raises(FileError) as caught:
        load(path)
    assert "print" in str(caught.value)
    path.write_text("data: {}")
    with pytest.raises(FileError) as other:
        load(path)
    for told in (str(caught.value), str(other.value)):
        assert "no file of tensors: Unsupported" in told
        assert "weights_only" not in told
        assert "Please" not in told
        assert "\n" not in told


def test_depth_is_what_it_says() -> None:
    deepest = "[" * (DEPTH - 1) + "1" + "]" * (DEPTH - 1)
    assert parse_json(deepest, "it")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"LORICA_CACHE": "/own", "XDG_CACHE_HOME": "/shared"}, "/own"),
        ({"XDG_CACHE_HOME": "/shared"}, "/shared/lorica"),
        ({"XDG_CACHE_HOME": "beside"}, "/home/me/.cache/lorica"),
        ({"LORICA_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/lorica"),
        ({}, "/home/me/.cache/lorica"),
    ],
)
def test_where_a_users_files_are_kept(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LORICA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def nobody_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a user whom the machine does not know."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LORICA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)


def test_nobody_may_be_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_at_home(monkeypatch)
    with pytest.raises(FileNotFoundError, match="LORICA_CACHE"):
        cache_folder()
