"""Merging an adapter into a checkpoint on disk: memory, and throughput against copying the files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import safetensors.torch
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import lorica
from lorica import checkpoint
from lorica.adapter import Adapter, Factors
from lorica.checkpoint import stream
from lorica.errors import LoricaWarning

WIDTH, INNER, VOCABULARY, LAYERS, SHARDS = 4096, 11008, 32000, 10, 4
R = 16
PROJECTIONS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def main() -> None:
    """Measure memory in a process of its own, then take turns with `cp`."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*map(Path, sys.argv[2:5]))))
        return
    options = harness.options(__doc__)
    if not shutil.which("cp"):
        raise SystemExit("there is no cp to compare with")
    with tempfile.TemporaryDirectory(
        prefix="lorica-bench-", dir=os.environ.get("LORICA_BENCH_DIR")
    ) as folder:
        place = Path(folder)
        nbytes = write_base(place / "base")
        checkpoint.write(make_adapter(), place / "adapter")
        memory = in_child(place)
        print(
            f"{nbytes / 1e9:.2f} GB; anonymous memory over the import: {memory['peak'] / 1e6:.0f} MB",
            flush=True,
        )
        # Turns that take ten seconds vary little, and each writes gigabytes.
        comparison = compare(place, replace_options(options))
        equal = equal_to_memory(place)
        print(f"equal to the merge in memory, bit for bit: {equal}")
    speed = {name: nbytes / comparison.median(name) / 1e9 for name in comparison.seconds}
    figures = [
        ["size of the checkpoint", f"{nbytes / 1e9:.2f} GB in {SHARDS} files"],
        ["peak anonymous memory over the import", f"{memory['peak'] / 1e6:.0f} MB"],
        *([f"throughput, {name}", f"{value:.2f} GB/s"] for name, value in speed.items()),
        ["throughput over that of cp", f"{1 / comparison.ratio('lorica merge --stream'):.2f}"],
        ["equal to the merge in memory, bit for bit", "yes" if equal else "NO"],
    ]
    harness.publish(
        "stream_merge",
        title="Merging a large checkpoint on disk",
        claim=(
            "An adapter on every linear layer is merged into a bfloat16 checkpoint on disk without loading "
            "the model, in memory that does not grow with the checkpoint. Before each turn the disk is idle "
            "and the base in the page cache as far as it fits. lorica waits for the disk to have each file, "
            "which cp does not; so cp followed by sync stands beside it."
        ),
        tables=[{"caption": "", "columns": ["", ""], "rows": figures}, harness.table([comparison], "")],
        data={"seconds": harness.seconds([comparison]), "memory": memory, "equal": equal},
        settings={"r": R, "targets": "all-linear", "layers": LAYERS, "width": WIDTH},
        device=options.device,
        rounds=options.rounds,
    )


def replace_options(options: argparse.Namespace) -> argparse.Namespace:
    """The same, with one turn to warm up: the files are in the page cache after it."""
    return argparse.Namespace(**{**vars(options), "warmup": min(options.warmup, 1)})


def compare(place: Path, options: argparse.Namespace) -> harness.Comparison:
    """Time the merge and the copies, each into a new folder."""
    out = place / "out"

    def clean() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()

    def copy(*, flush: bool) -> Callable[[Any], object]:
        def run(_: Any) -> None:
            subprocess.run(["cp", "-r", place / "base", out], check=True)
            if flush:
                subprocess.run(["sync", *out.iterdir()], check=True)

        return run

    contestants = {
        "cp": harness.Contestant(copy(flush=False), clean),
        "cp, then sync": harness.Contestant(copy(flush=True), clean),
        "lorica merge --stream": harness.Contestant(
            lambda _: stream.merge(place / "base", place / "adapter", out), clean
        ),
    }
    result = harness.alternate("4-shard bfloat16 checkpoint", contestants, reference="cp", options=options)
    clean()
    return result


def write_base(folder: Path) -> int:
    """Write a Llama-shaped checkpoint of random weights; returns its bytes of weights."""
    folder.mkdir()
    noise = (torch.randn(1 << 26) * 0.02).bfloat16()
    start = 0

    def draw(*shape: int) -> Tensor:
        nonlocal start
        start = (start + 1_000_003) % (1 << 25)
        count = torch.Size(shape).numel()
        return noise.repeat(1 + (start + count) // noise.numel())[start : start + count].view(shape)

    table = (VOCABULARY, WIDTH)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    shapes["model.norm.weight"] = (WIDTH,)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in PROJECTIONS.items()}
        shapes |= {
            f"{prefix}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    home: dict[str, str] = {}
    total = sum(torch.Size(shape).numel() * 2 for shape in shapes.values())
    shard: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        shard[name] = draw(*shape).clone()
        if sum(t.nbytes for t in shard.values()) >= total / SHARDS or name == list(shapes)[-1]:
            file = f"model-{len(set(home.values())) + 1:05}-of-{SHARDS:05}.safetensors"
            safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
            home |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def make_adapter() -> Adapter:
    """An adapter on every linear layer, whose updates are about as large as trained ones."""
    draw = torch.Generator().manual_seed(0)

    def factors(d_out: int, d_in: int) -> Factors:
        A, B = (torch.randn(*shape, generator=draw) * 0.02 for shape in ((R, d_in), (d_out, R)))
        return Factors(A, B, 2.0)

    updates = {
        f"model.layers.{layer}.{name}": factors(*shape)
        for layer in range(LAYERS)
        for name, shape in PROJECTIONS.items()
    }
    config = lorica.LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="CAUSAL_LM")
    return Adapter(config, updates)


def in_child(place: Path) -> dict[str, float]:
    """Merge in a new process, and have it say how its memory grew."""
    paths = [place / name for name in ("base", "adapter", "out")]
    command = [sys.executable, __file__, "--measure", *map(str, paths)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(place / "out")
    return json.loads(answer.stdout.splitlines()[-1])


def measure(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Anonymous memory in bytes, after the import and at its highest above that; sampled every 2 ms."""
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    stream.merge(base, adapter, out)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"imported": before, "peak": most - before, "seconds": seconds}


def anonymous() -> int:
    """Bytes of the process's memory that no file stands behind."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def equal_to_memory(place: Path) -> bool:
    """Whether a smaller model comes to the same bits when it is merged in memory and saved."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 3,
        "vocab_size": 8000,
    }
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=16, **small)).bfloat16()
    model.save_pretrained(place / "small", max_shard_size="40MB")
    config = lorica.LoraConfig(
        r=R, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    lorica.adapt(model, config, seed=0)
    lorica.save(model, place / "small-adapter")
    lorica.merge(model)
    model.save_pretrained(place / "small-memory", max_shard_size="40MB")
    stream.merge(place / "small", place / "small-adapter", place / "small-disk")
    one, other = (read_all(place / name) for name in ("small-memory", "small-disk"))
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    files = [safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


if __name__ == "__main__":
    disable_progress_bar()
    warnings.simplefilter("ignore", LoricaWarning)
    main()
