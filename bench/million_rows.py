"""A million short rows: seconds from `lorica train` to the end of its first step, and the memory it takes.

A prompt of eight words and a completion of two, as JSON lines. Each case is a command of its own: rows that
are encoded and kept (`--data.cache`), the first time and again, in one process and in two; and rows that stay
on disk (`--data.streaming`), the first time and again. A last figure counts how often rows were encoded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import harness
import psutil
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROWS = 1_000_000
WORDS = ["[PAD]", "[UNK]", "[END]", *(f"w{i}" for i in range(997))]
KEPT = ("--data.cache", "true", "--data.processes", "2")
CASES: dict[str, tuple[str, tuple[str, ...], int]] = {
    "kept, the first time": ("one", KEPT, 1),
    "kept, again": ("one", KEPT, 1),
    "kept, two ranks, the first time": ("two", KEPT, 2),
    "kept, two ranks, again": ("two", KEPT, 2),
    "on disk, the first time": ("disk", ("--data.streaming", "true"), 1),
    "on disk, again": ("disk", ("--data.streaming", "true"), 1),
}
"""Case → the folder of its caches, its options, and how many processes train."""


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"how many (default {ROWS:,})")
    parser.add_argument("--only", help="cases whose name holds this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.rows)
        found = {case: run(folder, case) for case in CASES if (options.only or "") in case}
    for case, each in found.items():
        print(case, each)
    if options.rows < ROWS or options.only:
        print(f"not written: a trial; a result takes {ROWS:,} rows and all cases")
        return
    harness.publish(
        "million_rows",
        title="A million short rows",
        claim=(
            f"{ROWS:,} rows of {SIZE} tokens: seconds from the command to the end of its first step, imports "
            "and the checkpoint aside, and the most that any process of it held."
        ),
        tables=[
            {
                "columns": ["rows", "seconds to the first step", "of them imports", "GB resident, at most"],
                "rows": [
                    [
                        case,
                        f"{each['seconds']:.0f}",
                        f"{each['imports']:.0f}",
                        f"{each['resident'] / 1e9:.2f}",
                    ]
                    for case, each in found.items()
                ],
            }
        ],
        data=found,
        settings={"model": "Llama, 1 × 32", "rows a step": 8, "processes that encode": 2},
        device="cpu",
    )


SIZE = 11


def write(folder: Path, count: int) -> None:
    """A model, its tokenizer and rows."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "model")
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[END]"}
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **special).save_pretrained(
        folder / "model"
    )
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(count):
            words = draw.choices(WORDS[3:], k=SIZE - 1)
            row = {"prompt": " ".join(words[:-2]), "completion": " ".join(words[-2:])}
            file.write(json.dumps(row) + "\n")


def run(folder: Path, case: str) -> dict[str, float]:
    """One command: seconds to its first step, those of its imports, bytes that one process held at most."""
    home, more, ranks = CASES[case]
    output = folder / case
    command = [
        *(sys.executable, "-m", "lorica", "train", "-t", "causal-lm", "-m", str(folder / "model")),
        *("-d", str(folder / "rows.jsonl"), "-o", str(output), "--data.validation_fraction", "0"),
        *("--max-steps", "1", "-b", str(8 // ranks), "--training.logging_steps", "1", *more),
        *("--training.report_to", "[]", "--method.r", "4"),
        *(("--launch.processes", str(ranks)) if ranks > 1 else ()),
    ]
    environment = {
        **os.environ,
        "LORICA_CACHE": str(folder / home / "lorica"),
        "HF_DATASETS_CACHE": str(folder / home / "datasets"),
        "PYTHONUNBUFFERED": "1",
    }
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch = Memory(process.pid)
    watch.start()
    imports = seconds = 0.0
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if not imports and line.startswith("reading"):
            imports = time.monotonic() - began
        if line.startswith("train  step 1/1"):
            seconds = time.monotonic() - began
    if process.wait() or not seconds:
        sys.exit("".join(said))
    watch.join()
    encoded = len(list((folder / home / "lorica" / "rows").glob("*")))
    print(f"{case}: {seconds:.1f} s, {watch.most / 1e9:.2f} GB", flush=True)
    return {"seconds": seconds, "imports": imports, "resident": watch.most, "in the cache": encoded}


class Memory(threading.Thread):
    """Watches a command and its children for the most that one of them holds, pages of files included.

    Args:
        pid: of the command.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.command, self.most = psutil.Process(pid), 0

    def run(self) -> None:
        """Look ten times a second, until it has ended."""
        while True:
            try:
                for each in (self.command, *self.command.children(recursive=True)):
                    self.most = max(self.most, each.memory_info().rss)
                if self.command.status() == psutil.STATUS_ZOMBIE:
                    return
            except psutil.NoSuchProcess:
                if not self.command.is_running():
                    return
            time.sleep(0.1)


if __name__ == "__main__":
    main()
