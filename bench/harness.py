"""Side-by-side measurements: contestants take turns in one process, and what came out is written as JSON.

Taking turns is what makes a ratio trustworthy on a machine that does other things too: whatever slows one
contestant down for a while slows the others as well. A script under bench/ makes one claim, measures it with
`alternate`, and ends with `publish`; `report.py` turns everything published into RESULTS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

T = TypeVar("T")

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 15
PACKAGES = ("lorica", "torch", "transformers", "peft", "loralib")


Work = Callable[[Any], object]


@dataclass(frozen=True)
class Contestant:
    """One way of doing the work.

    Args:
        run: the work; only this is timed. It gets what `prepare` returned.
        prepare: called before each turn, untimed.
    """

    run: Work
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Comparison:
    """What contestants took under one setting.

    Args:
        setting: what was the same for all.
        seconds: contestant → one figure a round, in seconds.
        reference: the contestant that ratios are taken to.
    """

    setting: str
    seconds: Mapping[str, Sequence[float]]
    reference: str

    def median(self, name: str) -> float:
        """The contestant's median, in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str) -> float:
        """The median over rounds of the contestant's time divided by the reference's of the same round."""
        pairs = zip(self.seconds[name], self.seconds[self.reference], strict=True)
        return statistics.median(own / other for own, other in pairs)

    def spread(self, name: str) -> float:
        """Half the distance between the quartiles, in seconds."""
        low, _, high = statistics.quantiles(self.seconds[name], n=4)
        return (high - low) / 2


def options(
    description: str | None, rounds: int = ROUNDS, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """The flags that every script has: ``--rounds``, ``--warmup``, ``--device``, ``--threads``.

    Args:
        description: what ``--help`` says.
        rounds: how many there are without ``--rounds``.
        parser: with flags of the script's own.
    """
    parser = parser or argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help=f"timed turns of each contestant (default {rounds}; fewer than {ROUNDS} write nothing)",
    )
    parser.add_argument("--warmup", type=int, default=3, help="turns before these, untimed (default 3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: one a core)")
    chosen = parser.parse_args()
    if chosen.rounds < 2:
        parser.error("--rounds must be at least 2, or there is no median to speak of")
    if chosen.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {chosen.device}: this machine has no such device")
    torch.set_num_threads(chosen.threads or len(os.sched_getaffinity(0)))
    return chosen


def alternate(
    setting: str,
    contestants: Mapping[str, Contestant],
    *,
    reference: str,
    options: argparse.Namespace,
) -> Comparison:
    """Time contestants in turns.

    Args:
        setting: what is the same for all; the row's name in the report.
        contestants: by name. Each round runs every one once, starting one further along than the round
            before, so that none always runs first.
        reference: the contestant that ratios are taken to.
        options: how many turns, and the device to wait for before the clock is read.

    Returns:
        The seconds of every turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(options.warmup + options.rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            elapsed = _once(contestants[name], options.device)
            if turn >= options.warmup:
                seconds[name].append(elapsed)
    result = Comparison(setting, seconds, reference)
    shown = ", ".join(
        f"{name} {1e3 * result.median(name):.2f} ms ({result.ratio(name):.2f}×)" for name in names
    )
    print(f"{setting}: {shown}", flush=True)
    return result


def _once(contestant: Contestant, device: str) -> float:
    subject = contestant.prepare()
    gc.collect()
    gc.disable()
    try:
        _wait(device)
        start = time.perf_counter()
        contestant.run(subject)
        _wait(device)
        return time.perf_counter() - start
    finally:
        gc.enable()


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def table(comparisons: Sequence[Comparison], caption: str) -> dict[str, Any]:
    """A table of comparisons of the same contestants: a row a setting, with medians and ratios."""
    names = list(dict.fromkeys(name for comparison in comparisons for name in comparison.seconds))
    rows = [[c.setting, *(_cell(c, name) for name in names)] for c in comparisons]
    return {"caption": caption, "columns": ["", *names], "rows": rows}


def _cell(comparison: Comparison, name: str) -> str:
    if name not in comparison.seconds:
        return ""
    cell = f"{_milliseconds(comparison.median(name))} ± {_milliseconds(comparison.spread(name))} ms"
    return cell if name == comparison.reference else f"{cell} ({comparison.ratio(name):.2f}×)"


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def publish(
    name: str,
    *,
    title: str,
    claim: str,
    tables: Sequence[Mapping[str, Any]],
    data: Any,
    settings: Mapping[str, Any],
    device: str,
    rounds: int | None = None,
    each_processor: bool = False,
    script: str | None = None,
) -> None:
    """Write a result for `report.py`, unless it rests on too few rounds to be one.

    Args:
        name: the script's.
        title: heading in the report.
        claim: one or two sentences: what was measured, and what it shows.
        tables: what the report prints: ``caption``, ``columns``, ``rows``.
        data: everything measured, for whoever wants more than the medians.
        settings: how it was measured.
        device: what it ran on. Results of a GPU stand beside the CPU's.
        rounds: turns of each contestant, where there were turns.
        each_processor: keep one result for each maker of processors, side by side in the report.
        script: how it is called, if that is not by `name`.
    """
    if rounds is not None and rounds < ROUNDS:
        print(f"not written: {rounds} rounds are a trial, a result takes {ROUNDS}")
        return
    result = {
        "name": name,
        **({} if script is None else {"script": script}),
        "title": title,
        "claim": claim,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        "settings": {**settings, **({} if rounds is None else {"rounds": rounds})},
        "tables": list(tables),
        "data": data,
    }
    kind = device.partition(":")[0] if device != "cpu" else _maker() if each_processor else None
    path = RESULTS / (f"{name}.json" if kind is None else f"{name}.{kind}.json")
    write(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path.relative_to(RESULTS.parents[1])}")


def seconds(comparisons: Sequence[Comparison]) -> dict[str, dict[str, list[float]]]:
    """Every turn of every comparison, rounded to the microsecond, as the ``data`` of `publish`."""
    return {
        c.setting: {name: [round(s, 6) for s in turns] for name, turns in c.seconds.items()}
        for c in comparisons
    }


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """What a module's function returns in a process of its own, with as many threads as this one."""
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *args).result()


def resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process in memory, as Linux counts: now (``VmRSS``) or at their height (``VmHWM``)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine, as far as it bears on the figures."""
    facts = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return facts if device == "cpu" else {"gpu": torch.cuda.get_device_name(device), **facts}


def versions() -> dict[str, str]:
    """Versions of everything that took part, and the commit."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude", "*"]
    answer = subprocess.run(git, capture_output=True, text=True, check=False)
    return {**found, "commit": answer.stdout.strip()} if answer.returncode == 0 else found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def _maker() -> str:
    """Who made the processor: amd, intel, or another word of its name."""
    words = re.findall(r"[a-z]+", _cpu_model().lower())
    return next((word for word in words if word in ("amd", "intel", "apple")), words[0] if words else "cpu")


def note(file: Path, run: Any) -> None:
    """Add a run, a dataclass, to a file of JSON lines, so that a benchmark that is stopped can go on."""
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(dataclasses.asdict(run)) + "\n")


def noted(file: Path, kind: type[T]) -> Iterator[T]:
    """The runs that `note` wrote; a line cut off by a kill is passed over."""
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                yield kind(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue
