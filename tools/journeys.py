"""How far a reader walks: traces the README's journeys through lorica and counts the files they visit.

``python tools/journeys.py`` prints, for each journey, how many of lorica's files and functions run, and how
often a call goes from one file to another (a hop). ``--show adapt`` prints one walk, ``--sizes`` line counts.
CONTRIBUTING.md says how to read it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import graphlib
import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lorica"

# What everybody reads who wants to know how lorica works; what is a plug-in is not among it.
CORE = (
    "config",
    "functional.py",
    "folding.py",
    "adapter.py",
    "state.py",
    "layers",
    "find.py",
    "check.py",
    "pieces",
    "inits",
    "model",
    "checkpoint/peft",
)
PLUGINS = (
    "config/plugins",
    "layers/quantized",
    "layers/plugins",
    "layers/rows",
    "layers/slots",
    "pieces/plugins",
    "inits/plugins",
    "model/hub",
    "model/merging/plugins",
    "model/mixed",
    "model/pretrained",
    "model/sharded",
    "model/slots",
    "model/starts",
    "model/watch",
)


@dataclass
class Walk:
    """The calls of one journey, in order: (file relative to the package, function)."""

    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Each file once, in the order of the first visit."""
        return list(dict.fromkeys(file for file, _ in self.calls))

    @property
    def functions(self) -> int:
        """How many functions run."""
        return len(set(self.calls))

    @property
    def hops(self) -> int:
        """How often one call and the next are in different files."""
        return sum(a != b for (a, _), (b, _) in zip(self.calls, self.calls[1:], strict=False))


@contextlib.contextmanager
def traced() -> Iterator[Walk]:
    """Note every call of a function of lorica's, on all threads."""
    walk, names = Walk(), dict[CodeType, tuple[str, str] | None]()
    prefix = f"{SOURCE}{os.sep}"

    def seen(frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in names:
            ours = code.co_filename.startswith(prefix) and not code.co_name.startswith("<")
            names[code] = (code.co_filename[len(prefix) :], code.co_qualname) if ours else None
        if (call := names[code]) is not None:
            walk.calls.append(call)

    threading.setprofile(seen)
    sys.setprofile(seen)
    try:
        yield walk
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


Journey = Callable[[], Any]


def core_journeys(folder: Path) -> dict[str, Walk]:
    """Everything the README's ten lines of Python do, on a model of one linear layer."""
    import torch
    from torch import nn

    import lorica

    def fresh() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4))

    config = lorica.LoraConfig(r=2, target_modules=["0"])
    x = torch.ones(1, 4)

    def all_of_them() -> dict[str, Walk]:
        model, walks = fresh(), dict[str, Walk]()

        def take(name: str, journey: Journey) -> None:
            with traced() as walks[name]:
                journey()

        take("adapt", lambda: lorica.adapt(model, config))
        model(x)  # the first pass also looks for layers that it does not call
        take("forward", lambda: model(x))
        take("save", lambda: lorica.save(model, folder / "adapter"))
        take("load_weights", lambda: lorica.load_weights(model, folder / "adapter"))
        take("load", lambda: lorica.load(model, folder / "adapter", name="again"))

        def act() -> None:
            with lorica.active(model, "again"):
                pass

        take("active", act)
        take("merge", lambda: lorica.merge(model, "again"))
        take("restore", lambda: lorica.restore(model))
        take("detach", lambda: lorica.detach(model))
        return walks

    all_of_them()  # what is imported or built at the first call is not part of the journey
    return all_of_them()


def train_journey(folder: Path) -> Walk:
    """``lorica train`` on a csv: one step, one evaluation."""
    from lorica.cli import main

    rows = folder / "rows.csv"
    rows.write_text("text,label\n" + "a fine film,good\na dull film,bad\n" * 4)
    arguments = [
        "train",
        "--data.train",
        str(rows),
        "--data.validation",
        str(rows),
        "--training.max_steps",
        "1",
    ]
    arguments += ["--training.batch_size", "4"]

    def run(output: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if main([*arguments, "--output", str(folder / output)]):
                raise SystemExit("lorica train failed; run it by hand to see why")

    run("first")
    with traced() as walk:
        run("second")
    return walk


def lines_of_code(path: Path) -> int:
    """Lines of a file that are neither empty, nor comments, nor docstrings."""
    text = path.read_text(encoding="utf-8")
    documented = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                documented.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(
        1
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#") and number not in documented
    )


def in_core(path: Path) -> bool:
    """Whether a file is one that everybody reads."""
    name = path.relative_to(SOURCE).as_posix()
    return name.startswith(CORE) and not name.startswith(PLUGINS)


def imports_of(path: Path) -> Iterator[Path]:
    """The files of lorica that a file imports from, for types and inside functions too.

    What a package only hands on, as itself or for type checkers, says nothing of what it needs.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "__init__.py":
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # What is taken from a package is one of its modules, or stands in its __init__.py.
            within = [f"{node.module}.{each.name}" for each in node.names if each.asname != each.name]
            names = [name if file_of(name) else node.module for name in within]
        else:
            continue
        yield from filter(None, map(file_of, names))


def file_of(module: str) -> Path | None:
    """The file of a module of lorica's; None where there is none."""
    first, *rest = module.split(".")
    place = SOURCE.joinpath(*rest)
    found = (place.with_suffix(".py"), place / "__init__.py") if first == SOURCE.name else ()
    return next((path for path in found if path.is_file()), None)


def find_circle() -> list[str]:
    """Files that import from one another, the first of them once more at the end; empty where none do."""
    needs = {path: set(imports_of(path)) - {path} for path in sorted(SOURCE.rglob("*.py"))}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        return [str(path.relative_to(SOURCE)) for path in error.args[1]]
    return []


def print_sizes() -> None:
    """How large the house is, and each part of it."""
    files = sorted(SOURCE.rglob("*.py"))
    parts: dict[str, list[Path]] = {}
    for path in files:
        parts.setdefault(path.relative_to(SOURCE).parts[0], []).append(path)
    print(f"{'part':24}{'files':>7}{'lines':>8}{'code':>8}")
    for part, held in [
        *sorted(parts.items()),
        ("reading core", list(filter(in_core, files))),
        ("all", files),
    ]:
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in held)
        print(f"{part:24}{len(held):7}{lines:8}{sum(map(lines_of_code, held)):8}")
    longest = max(files, key=lambda path: len(path.read_text(encoding="utf-8").splitlines()))
    print(f"longest file: {longest.relative_to(SOURCE)}, {len(longest.read_text().splitlines())} lines")
    folders = {folder: len(list(folder.glob("*.py"))) for folder in {path.parent for path in files}}
    widest = max(folders, key=lambda folder: folders[folder])
    print(f"widest folder: {widest.relative_to(SOURCE.parent)}, {folders[widest]} files")
    print(f"circle of imports: {' imports from '.join(find_circle()) or 'none'}")


def main() -> None:
    """Parse the command line, walk, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", metavar="JOURNEY", help="print the calls of one journey in order")
    parser.add_argument("--no-train", action="store_true", help="leave out lorica train (some 20 s)")
    parser.add_argument("--sizes", action="store_true", help="count lines in place of calls")
    chosen = parser.parse_args()
    if chosen.sizes:
        print_sizes()
        return
    with tempfile.TemporaryDirectory() as folder:
        walks = core_journeys(Path(folder))
        if not chosen.no_train and chosen.show in (None, "train"):
            walks["train"] = train_journey(Path(folder))
    if chosen.show is None:
        print(f"{'journey':16}{'files':>7}{'functions':>11}{'hops':>7}")
        for name, walk in walks.items():
            print(f"{name:16}{len(walk.files):7}{walk.functions:11}{walk.hops:7}")
    elif chosen.show in walks:
        for file, function in walks[chosen.show].calls:
            print(f"{file:40} {function}")
    else:
        parser.error(f"no journey is named {chosen.show!r}; there are: {', '.join(walks)}")


if __name__ == "__main__":
    main()
