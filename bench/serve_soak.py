"""Half an hour of mixed load with faults on `lorica serve`: nothing lost, nothing wrong, memory flat.

A server of its own process; two processes of clients, each of which is stopped and continued now and then;
adapters that come, go and change over HTTP and in the watched folder. Each answer is compared with what its
adapter says alone. At the end the server is told to stop while requests run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import httpx
from soak import client, world

MINUTES, SHARE = 30.0, 6
"""Of a decoder; an encoder has one in so many of them."""
PROCESSES, SLOTS, SAMPLED = 2, 4, 5.0
WARM = 0.2
"""Share of the time after which memory is expected to stay."""
_STARTING = 180.0
"""Seconds that a process of clients may take to begin and end, on a machine that does other things too."""
GROWTH = 48.0
"""MiB an hour: what memory may grow by, and be called flat."""


def main() -> None:
    """Soak a decoder, then an encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of load (default {MINUTES:g})")
    parser.add_argument("--seed", type=int, default=0, help="of what clients and faults do (default 0)")
    parser.add_argument("--only", choices=("decoder", "encoder"), help="one of the two")
    options = parser.parse_args()
    minutes = {"decoder": options.minutes, "encoder": options.minutes / SHARE}
    found: dict[str, Soak] = {}
    for kind, length in minutes.items():
        if options.only in (None, kind):
            with tempfile.TemporaryDirectory() as folder:
                soak = found[kind] = Soak(Path(folder), options.seed, reads=kind == "encoder")
                soak.run(60 * length)
                print(json.dumps({"kind": kind, **soak.told()}, indent=1), flush=True)
    wrong = [line for soak in found.values() for line in soak.wrong]
    if wrong:
        sys.exit(f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20]))
    if options.minutes < MINUTES or options.only:
        print(f"not written: a result takes {MINUTES:g} minutes of both")
        return
    publish(found)


def publish(found: dict[str, Soak]) -> None:
    """Write the result."""
    asked = {kind: sum(soak.counts.values()) for kind, soak in found.items()}
    names = list(dict.fromkeys(name for soak in found.values() for name in [*soak.counts, *soak.faults]))
    rows = [[name, *(soak.counts[name] + soak.faults[name] for soak in found.values())] for name in names]
    memory = [
        [
            kind,
            f"{soak.memory[-1][0] / 60:.0f} min",
            *(f"{value:.0f} MiB" for value in (soak.warm()[0][1], max(m for _, m in soak.memory))),
            f"{soak.slope():+.1f} MiB",
        ]
        for kind, soak in found.items()
    ]
    harness.publish(
        "serve_soak",
        title="A server under mixed load with faults",
        claim=(
            f"`lorica serve`, {MINUTES:g} minutes of a decoder and {MINUTES / SHARE:g} of an encoder: "
            f"{asked['decoder']:,} and {asked['encoder']:,} requests, none lost, each answer its adapter's "
            "own; no lease, block or queued request at the end; told to stop, it finished what ran and ended "
            "with 0."
        ),
        tables=[
            {
                "caption": "What was asked, and what went wrong on purpose",
                "columns": ["", *found],
                "rows": rows,
            },
            {
                "caption": "Memory of the server",
                "columns": ["", "time", "warm", "at most", "slope an hour"],
                "rows": memory,
            },
        ],
        data={kind: soak.told() for kind, soak in found.items()},
        settings={
            "decoder": "Llama, 2 × 64",
            "encoder": "MiniLM",
            "adapters": len(client.MEANS) - 1,
            "slots": SLOTS,
            "clients": PROCESSES * client.CLIENTS,
        },
        device="cpu",
    )


class Soak:
    """One server's time under load.

    Args:
        folder: to make its models in.
        seed: of what clients and faults do.
        reads: whether the model reads texts, in place of writing them.

    Attributes:
        counts: what was asked.
        faults: what went wrong on purpose.
        wrong: what should not have been.
        memory: seconds since the start, and MiB of the server.
    """

    def __init__(self, folder: Path, seed: int, *, reads: bool) -> None:
        self.folder, self.seed, self.reads, self.random = folder, seed, reads, random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.memory: list[tuple[float, float]] = []
        self.end: dict[str, Any] = {}
        self._begun = 0.0

    def run(self, seconds: float) -> None:
        """Make the models, start a server, put it under load, and tell it to stop."""
        (world.write_encoder if self.reads else world.write_decoder)(self.folder)
        served = self.folder / "adapters"
        served.mkdir()
        for i in range(world.FIXED):
            shutil.copytree(self.folder / "pool" / f"c{i}", served / f"a{i}")
        shutil.copytree(self.folder / "pool" / "c6", served / world.SWAPPED)
        shutil.copytree(self.folder / "pool", served / "pool")
        with self._server() as (process, url):
            self._begun = time.time()
            over = threading.Event()
            watching = [
                threading.Thread(target=self._guarded, args=(work, over))
                for work in (lambda o: self._sample(process.pid, o), lambda o: self._change(url, o))
            ]
            for thread in watching:
                thread.start()
            self._clients(url, seconds)
            over.set()
            for thread in watching:
                thread.join()
            self._settle(url)
            self._stop(process, url)
        if (slope := self.slope()) > GROWTH and seconds >= 600:
            self.wrong.append(f"memory grows by {slope:.1f} MiB an hour")

    def told(self) -> dict[str, Any]:
        """All of it."""
        memory = [(round(at), round(mib, 1)) for at, mib in self.memory]
        own = {"counts": self.counts, "faults": self.faults, "wrong": self.wrong[:100], "end": self.end}
        return {**own, "slope": round(self.slope(), 2), "memory": memory[:: max(1, len(memory) // 60)]}

    def warm(self) -> list[tuple[float, float]]:
        """Memory, but for the beginning."""
        return self.memory[int(WARM * len(self.memory)) :]

    def slope(self) -> float:
        """MiB an hour that memory grew by once it was warm."""
        warm = self.warm()
        if len(warm) < 3:
            return 0.0
        return 3600 * statistics.linear_regression(*zip(*warm, strict=True)).slope

    @contextlib.contextmanager
    def _server(self) -> Iterator[tuple[subprocess.Popen[str], str]]:
        model = harness_model() if self.reads else str(self.folder / "model")
        command = [sys.executable, "-m", "lorica", "serve", model, "--port", "0", "--slots", str(SLOTS)]
        command += ["--adapters", str(self.folder / "adapters"), "--allow-load", "--name", "base"]
        log = (self.folder / "log").open("w")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert process.stdout is not None
            found = re.search(r"at (http://[^:]+:\d+)", process.stdout.readline())
            if found is None:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            yield process, found[1]
        finally:
            process.kill()
            process.wait()
            log.close()
        text = (self.folder / "log").read_text()
        for line in text.splitlines():
            if "Traceback" in line or " ERROR " in line:
                self.wrong.append(f"the server's log: {text[text.index(line) :][:1500]}")
                break

    def _guarded(self, work: Callable[[threading.Event], None], over: threading.Event) -> None:
        try:
            work(over)
        except Exception as error:
            self.wrong.append(f"a fault could not be made: {type(error).__name__}: {error}")

    def _clients(self, url: str, seconds: float) -> None:
        """Processes of clients; now and then one of them is stopped for some seconds."""
        context = multiprocessing.get_context("spawn")
        results = [self.folder / f"result{i}.json" for i in range(PROCESSES)]
        expected = str(self.folder / "expected.json")
        processes = [
            context.Process(target=client.run, args=(url, expected, seconds, seed, self.reads, str(result)))
            for seed, result in enumerate(results, self.seed)
        ]
        for process in processes:
            process.start()
        until = time.time() + seconds
        while time.time() < until - 15:
            time.sleep(self.random.uniform(4, 12))
            own = self.random.choice(processes)
            if own.is_alive() and own.pid is not None:
                os.kill(own.pid, signal.SIGSTOP)
                time.sleep(self.random.uniform(1, 6))
                os.kill(own.pid, signal.SIGCONT)
                self.faults["a process of clients stopped for seconds"] += 1
        for process in processes:
            process.join(client.PATIENCE + _STARTING)
            if process.is_alive():
                self.wrong.append("clients wait for answers that do not come")
                process.kill()
        for result in results:
            if result.exists():
                told = json.loads(result.read_text(encoding="utf-8"))
                self.counts.update(told["counts"])
                self.wrong += told["wrong"]
            else:
                self.wrong.append("a process of clients has no result")

    def _change(self, url: str, over: threading.Event) -> None:
        """Have adapters come, go and change."""
        served = self.folder / "adapters"
        turn = 0
        with httpx.Client(base_url=url, timeout=client.PATIENCE) as asking:

            def ask(path: str, **body: Any) -> None:
                answer = asking.post(path, json=body)
                if answer.status_code != 200:
                    self.wrong.append(f"{path} {body}: {answer.status_code}: {answer.text[:300]}")

            while not over.wait(self.random.uniform(1, 3)):
                turn += 1
                step, visitor = turn % 4, {"lora_name": world.VISITOR}
                if step == 1:
                    path = str(served / "pool" / self.random.choice(("c7", "c8")))
                    ask("/v1/load_lora_adapter", **visitor, lora_path=path)
                    self.faults["adapters loaded over HTTP"] += 1
                    self._half(self.folder / "pool" / "c8", served / world.GUEST)
                    self.faults["adapters put into the folder, half at first"] += 1
                elif step == 2:
                    own = self.random.choice(("c7", "c8"))
                    path = str(served / "pool" / own)
                    ask("/v1/load_lora_adapter", **visitor, lora_path=path, load_inplace=True)
                    self.faults["adapters replaced over HTTP"] += 1
                elif step == 3:
                    content = ("c6", "c7")[turn // 4 % 2]
                    self._swap(self.folder / "pool" / content, served / world.SWAPPED)
                    self.faults["adapters whose files were changed"] += 1
                else:
                    ask("/v1/unload_lora_adapter", **visitor)
                    self.faults["adapters unloaded over HTTP"] += 1
                    shutil.rmtree(served / world.GUEST)
                    self.faults["adapters taken out of the folder"] += 1

    def _half(self, source: Path, target: Path) -> None:
        """Write an adapter slowly: its configuration, a part of its weights, all of them."""
        target.mkdir()
        shutil.copy(source / "adapter_config.json", target)
        weights = (source / "adapter_model.safetensors").read_bytes()
        with (target / "adapter_model.safetensors").open("wb") as file:
            for part in (weights[: len(weights) // 2], weights[len(weights) // 2 :]):
                file.write(part)
                file.flush()
                time.sleep(self.random.uniform(0, 3))

    def _swap(self, source: Path, target: Path) -> None:
        """Replace an adapter's folder by another's, at once but for a moment without any."""
        fresh, old = target.with_name(".fresh"), target.with_name(".old")
        shutil.copytree(source, fresh)
        target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old)

    def _sample(self, pid: int, over: threading.Event) -> None:
        while not over.wait(SAMPLED):
            status = Path(f"/proc/{pid}/status").read_text()
            found = re.search(r"VmRSS:\s+(\d+) kB", status)
            assert found is not None
            self.memory.append((time.time() - self._begun, int(found[1]) / 1024))

    def _settle(self, url: str) -> None:
        """Nobody asks any more: nothing may be held."""
        until = time.time() + 30
        while True:
            stats = httpx.get(f"{url}/stats", timeout=30).json()
            engine = stats["engine"]
            self.end = {
                "leases": sum(each["requests_running"] for each in stats["adapters"]),
                "cache in use": engine["cache_use"],
                "waiting": engine["waiting"],
                "running": engine["running"],
            }
            if not any(self.end.values()):
                break
            if time.time() > until:
                self.wrong.append(f"held at the end: {self.end}")
                break
            time.sleep(0.2)
        self.end["mounts"], self.end["restarts"] = engine["mounts_total"], engine["restarts_total"]
        self.end["evictions"], self.end["slot waits"] = engine["evictions_total"], engine["slot_waits_total"]
        if httpx.get(f"{url}/health", timeout=30).status_code != 200 or self.end["restarts"]:
            self.wrong.append(f"the engine died: {self.end}")

    def _stop(self, process: subprocess.Popen[str], url: str) -> None:
        """SIGTERM while requests run: they finish, and the server ends with 0."""
        texts: list[str] = []

        def ask(name: str) -> None:
            try:
                texts.append(self._long_answer(url, name))
            except Exception as error:
                self.wrong.append(f"cut off by SIGTERM: {name}: {type(error).__name__}: {error}")

        names = [f"a{i}" for i in range(world.FIXED)] * 2
        threads = [threading.Thread(target=ask, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        until = time.time() + 30
        while self._held(url) < len(names) and time.time() < until:
            time.sleep(0.01)
        self.end["running at SIGTERM"] = self._held(url)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        try:
            status = process.wait(60)
        except subprocess.TimeoutExpired:
            status = None
        self.end |= {"finished after SIGTERM": len(texts), "exit status": status}
        whole = len(texts) == len(names) and len(set(texts)) == world.FIXED
        if status != 0 or not whole or not self.end["running at SIGTERM"]:
            self.wrong.append(f"after SIGTERM: {self.end}, {len(set(texts))} different answers")

    def _held(self, url: str) -> int:
        """Requests that hold an adapter."""
        adapters = httpx.get(f"{url}/stats", timeout=30).json()["adapters"]
        return sum(each["requests_running"] for each in adapters)

    def _long_answer(self, url: str, name: str) -> str:
        if self.reads:
            texts = list(world.TEXTS) * 25
            answer = httpx.post(f"{url}/classify", json={"model": name, "input": texts}, timeout=120)
            answer.raise_for_status()
            return json.dumps([round(each["probs"][0], 4) for each in answer.json()["data"]])
        body = {"model": name, "prompt": "w5 w6", "max_tokens": 1500, "ignore_eos": True}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**body, "temperature": 0, "stream": True}, timeout=120
        ) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]", lines[-1]
        chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
        assert chunks[-1]["finish_reason"] == "length"
        return "".join(chunk["text"] for chunk in chunks)


def harness_model() -> str:
    """The encoder that needs no download."""
    from lorica.train import embedded

    return str(embedded.model_directory())


if __name__ == "__main__":
    main()
