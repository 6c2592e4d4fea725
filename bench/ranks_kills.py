"""Runs of two processes that lose one, or are stopped, at random moments: they end with the same bits.

`lorica train --launch.processes 2`, with the model whole in each process (DDP) and in parts (FSDP2). In each
run one rank is killed by SIGKILL, or some ranks get Ctrl-C, each at a moment of its own; then the run is
resumed to its end, and its adapter compared with that of the run that nothing happened to.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import harness
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lorica.cli import main as lorica

TIMES, RANKS, STEPS, LIMIT = 10, 2, 40, 30.0
ENGINES = {"ddp": "whole in each (DDP)", "fsdp2": "in parts (FSDP2)"}
INCIDENTS = ("kill", "Ctrl-C")
WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(60))]


def main() -> None:
    """Stop as often as asked, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=TIMES, help=f"of each kind (default {TIMES})")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        runs = {engine: Runs(Path(folder), engine, draw) for engine in ENGINES}
        found: list[dict[str, Any]] = [
            {"engine": engine, "what": kind, **runs[engine].stopped(f"{kind} {i}", kind)}
            for i in range(options.times)
            for kind in INCIDENTS
            for engine in [list(ENGINES)[i % len(ENGINES)]]
        ]
    rows = []
    for engine in ENGINES:
        for kind in INCIDENTS:
            some = [one for one in found if (one["engine"], one["what"]) == (engine, kind)]
            if some:
                longest = max(one["seconds"] for one in some)
                same = sum(one["same"] for one in some)
                rows.append([ENGINES[engine], kind, len(some), same, f"{longest:.1f}"])
    for row in rows:
        print(*row, sep="\t")
    good = all(one["same"] and one["seconds"] < LIMIT for one in found)
    if options.times < TIMES or not good:
        sys.exit(0 if good else 1)
    harness.publish(
        "ranks_kills",
        title="Runs of two processes that are killed and stopped",
        claim=(
            f"{len(found)} runs of two processes that lost one by SIGKILL, or got Ctrl-C on some of them, at "
            "random moments: resumed, all of them ended with the adapter of the run that nothing happened "
            "to, byte for byte, and none hung."
        ),
        tables=[
            {
                "columns": [
                    "model",
                    "what happened",
                    "runs",
                    "same bytes",
                    "seconds to the end of all, at most",
                ],
                "rows": rows,
            }
        ],
        data=found,
        settings={"model": "BERT, 2 × 32", "ranks": RANKS, "steps": STEPS, "a checkpoint every": "5 steps"},
        device="cpu",
    )


def write(folder: Path) -> None:
    """A model, its tokenizer and rows."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    BertModel(BertConfig(**sizes)).save_pretrained(folder / "model")
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=32, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder / "model")
    draw = random.Random(0)
    lines = [
        json.dumps({"text": " ".join(draw.choices(WORDS[2:], k=12)), "label": "ab"[i % 2]})
        for i in range(240)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


class Runs:
    """Runs of one engine, and the one of them to which nothing happens.

    Args:
        folder: of the model and the rows.
        engine: how the ranks share the model.
        draw: chooses moments and ranks.
    """

    def __init__(self, folder: Path, engine: str, draw: random.Random) -> None:
        self.folder, self.engine, self.draw = folder, engine, draw
        nothing = Incident("nothing", 0.0, [], 0.0)
        nothing.start()
        assert self._train("whole") == 0
        self.took = time.monotonic() - nothing.began
        self.whole = self._adapter("whole")

    def stopped(self, name: str, kind: str) -> dict[str, Any]:
        """A run to which something happens before its end, and that is resumed: what became of it."""
        while True:
            at, ranks = self.draw.uniform(0, self.took), self._ranks(kind)
            happens = Incident(kind, at, ranks, self.draw.random())
            happens.start()
            code = self._train(name, "--overwrite")
            ended = time.monotonic()
            happens.join()
            if code:
                break
        step = self._step(name)
        same = self._train(name, "--resume") == 0 and self._adapter(name) == self.whole
        seconds = ended - happens.ended
        found = {"at": at, "ranks": ranks, "checkpoint": step, "seconds": seconds, "same": same}
        print(self.engine, kind, found, flush=True)
        return found

    def _ranks(self, kind: str) -> list[int]:
        """One to kill; some, or all, to interrupt."""
        if kind == "kill":
            return [self.draw.randrange(RANKS)]
        return sorted(self.draw.sample(range(RANKS), self.draw.randint(1, RANKS)))

    def _train(self, name: str, *more: str) -> int:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = lorica(
                [
                    *("train", "-m", str(self.folder / "model"), "-d", str(self.folder / "rows.jsonl")),
                    *("-o", str(self.folder / self.engine / name), "--data.validation_fraction", "0"),
                    *("--max-steps", str(STEPS), "-b", "4", "--training.save_steps", "5", "--lr", "0.01"),
                    *("--method.r", "4", "--method.lora_dropout", "0.1", "--training.report_to", "[]"),
                    *("--launch.processes", str(RANKS), "--launch.engine", self.engine, *more),
                ]
            )
        if code not in (0, 1, 130):
            print(said.getvalue())
        return code

    def _adapter(self, name: str) -> str:
        file = self.folder / self.engine / name / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def _step(self, name: str) -> int:
        """The step of the last checkpoint; 0 where there is none."""
        files = (self.folder / self.engine / name).glob("checkpoints/checkpoint-*/trainer_state.json")
        return max((int(file.parent.name.rpartition("-")[2]) for file in files), default=0)


class Incident(threading.Thread):
    """What happens to ranks at a moment, counted from their start.

    Args:
        kind: "kill", "Ctrl-C" or "nothing".
        at: the moment, in seconds.
        ranks: to which it happens.
        apart: seconds between one rank and the next.
    """

    def __init__(self, kind: str, at: float, ranks: list[int], apart: float) -> None:
        super().__init__(daemon=True)
        self.kind, self.at, self.ranks, self.apart = kind, at, ranks, apart
        self.began = self.ended = 0.0

    def run(self) -> None:
        """Wait for the ranks, then for the moment."""
        while len(ranks := multiprocessing.active_children()) < RANKS:
            time.sleep(0.01)
        self.began = time.monotonic()
        ranks.sort(key=lambda process: process.pid or 0)
        time.sleep(self.at)
        for place, rank in enumerate(self.ranks):
            if place:
                time.sleep(self.apart)
            with contextlib.suppress(ProcessLookupError):
                os.kill(ranks[rank].pid or 0, signal.SIGKILL if self.kind == "kill" else signal.SIGINT)
        self.ended = time.monotonic()


if __name__ == "__main__":
    main()
