"""A pytest plugin: run PEFT's tests of LoRA alone, offline, and note what became of each as a line of JSON.

``SUITE_NOTES`` names the file of notes; ``SUITE_ONLY`` a file of test ids, a line each, to run no others.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# What an error says where a test wanted the network.
NETWORK = re.compile(
    "|".join(
        (
            *("OfflineModeIsEnabled", "LocalEntryNotFoundError", "couldn't connect to", "Couldn't reach"),
            *("Connect(ion)?Error", "NameResolution", "Max retries exceeded", "offline mode"),
            *("traffic has been disabled", "cannot find the requested files", "Cannot reach"),
            *("No address associated", "Name or service not known", "Connection refused"),
            *(
                "is not a valid model identifier",
                "Can't load the configuration of",
                "Can't load tokenizer for",
            ),
        )
    ),
    re.IGNORECASE,
)
_CONFIGS = re.compile(r"\b(?!Lora)(\w+)Config\s*\(")
# Configurations that are no method of PEFT's, or a variant of LoRA.
_NO_METHOD = {
    *(
        "Auto",
        "Bits",
        "Bnb",
        "Quanto",
        "GPTQ",
        "Torchao",
        "Compressor",
        "Opt",
        "Bert",
        "GPT2",
        "Llama",
        "Qwen",
    ),
    *("LoraRuntime", "Eva", "Corda", "LoftQ", "LoraGA", "Arrow", "BdLora", "Velora", "Kasa", "Monteclora"),
}
_OTHER_LORAS = re.compile("vblora|unilora|randlora|xlora|adalora")
_notes: dict[str, dict[str, Any]] = {}


def pytest_configure() -> None:
    """Keep PEFT's helper from going online inside a test."""
    with contextlib.suppress(ImportError):
        helpers: Any = importlib.import_module("tests.testing_utils")

        @contextlib.contextmanager
        def offline(model_id: str) -> Iterator[None]:
            yield

        helpers.hub_online_once = offline


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests of LoRA, or those that were asked for."""
    if only := os.environ.get("SUITE_ONLY"):
        wanted = set(Path(only).read_text().splitlines())
        kept = [item for item in items if item.nodeid in wanted]
    else:
        kept = [item for item in items if _is_of_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _is_of_lora(item: Any) -> bool:
    """Whether a test is of LoRA: by the configurations that it is given or names, or that its class names."""
    from peft import LoraConfig, PeftConfig

    given = set[type]()

    def look(value: Any, depth: int = 0) -> None:
        if inspect.isclass(value) and issubclass(value, PeftConfig):
            given.add(value)
        elif isinstance(value, PeftConfig):
            given.add(type(value))
        elif depth < 2 and isinstance(value, list | tuple):
            for each in value:
                look(each, depth + 1)

    for value in getattr(getattr(item, "callspec", None), "params", {}).values():
        look(value)
    if given:
        return given == {LoraConfig}
    text = _source(inspect.unwrap(item.function))
    if re.search(r"\bLoraConfig\b", text):
        return True
    if {*_CONFIGS.findall(text)} - _NO_METHOD:
        return False
    if item.cls is None:
        return "LoraConfig" in _source(item.module)
    name = item.cls.__name__.lower()
    return "LoraConfig" in _source(item.cls) or ("lora" in name and not _OTHER_LORAS.search(name))


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


@pytest.hookimpl(tryfirst=True, hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    """Note what became of a test once it is torn down."""
    outcome: Any = yield
    report = outcome.get_result()
    note = _notes.setdefault(item.nodeid, {"id": item.nodeid, "outcome": None})
    if report.skipped:
        note["outcome"] = "skipped"
    elif report.failed:
        errors = list(_chain(call.excinfo.value)) if call.excinfo else []
        texts = [f"{type(error).__name__}: {error}" for error in errors]
        note["outcome"] = "network" if NETWORK.search(" | ".join(texts)) else "failed"
        note["error"] = texts[0][:1000] if texts else str(report.longrepr)[-500:]
        note["causes"] = [text[:300] for text in texts[1:]]
        note["where"] = _where(call.excinfo.tb) if call.excinfo else ""
    elif report.when == "call" and note["outcome"] is None:
        note["outcome"] = "passed"
    if report.when == "teardown" and (path := os.environ.get("SUITE_NOTES")):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(12):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _where(trace: Any) -> str:
    """The last frame of lorica's, or else of the tests'."""
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames if "/lorica/" in frame.filename]
    tests = [frame for frame in frames if "/tests/" in frame.filename]
    frame = (own or tests or list(frames))[-1]
    return f"{frame.filename.rpartition('/lorica/' if own else '/tests/')[2]}:{frame.lineno}"
