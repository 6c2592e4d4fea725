"""Makes the files that `test_earlier.py` reads: run once, at version 0.1.0; what it made stays as it is.

``PYTHONPATH=src:tests python tests/earlier/make.py FOLDER`` writes into an empty folder:

    bases/NAME.safetensors      weights of tiny models
    adapters/NAME/              an adapter of each kind, as `lorica.save` wrote it
    outputs.safetensors         what each base computes with each adapter
    work/                       a model, rows, a run with a checkpoint, a search and a comparison
    loralib.pt                  a checkpoint as loralib's users write it
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from compare.spec import content
from rich.console import Console
from safetensors.torch import save_file
from tiny import adapted, outputs, transformer
from train import tiny
from tune.searches import SPACE

import lorica
from lorica.compare.file import Comparison
from lorica.compare.loop import compare
from lorica.train import train
from lorica.tune import SearchConfig, search

QKV = ["query", "value"]

# Name → the base, its settings, and what is put on it.
ADAPTERS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "plain": ("bert-classifier", {}, lorica.LoraConfig(r=2, lora_alpha=4, target_modules=QKV)),
    "all-linear": (
        "bert-classifier",
        {},
        lorica.LoraConfig(r=2, target_modules="all-linear", use_rslora=True, lora_dropout=0.1),
    ),
    "head": ("bert-classifier", {}, lorica.LoraConfig(r=2, target_modules=QKV, task_type="SEQ_CLS")),
    "biases": (
        "bert-classifier",
        {},
        lorica.LoraConfig(r=2, target_modules=["query", "dense"], bias="all", lora_bias=True),
    ),
    "lora-only": ("bert-classifier", {}, lorica.LoraConfig(r=2, target_modules=QKV, bias="lora_only")),
    "patterns": (
        "bert-classifier",
        {},
        lorica.LoraConfig(
            r=2,
            target_modules=r".*\.(query|value|key)",
            rank_pattern={"key": 3},
            alpha_pattern={r"layer\.0\..*\.query": 5},
        ),
    ),
    "dora": ("bert-classifier", {}, lorica.LoraConfig(r=2, target_modules=QKV, use_dora=True)),
    "pissa": ("bert-classifier", {}, lorica.LoraConfig(r=2, target_modules=QKV, init_lora_weights="pissa")),
    "olora": ("bert-classifier", {}, lorica.LoraConfig(r=2, target_modules=QKV, init_lora_weights="olora")),
    "embedding": (
        "bert-classifier",
        {},
        lorica.LoraConfig(r=2, target_modules=["word_embeddings", "query"]),
    ),
    "bitfit": ("bert-classifier", {}, lorica.BitFitConfig()),
    "full": ("bert-classifier", {}, lorica.FullConfig()),
    "top": ("bert-classifier", {}, lorica.TopConfig(blocks=1)),
    "adapter-h": ("bert-classifier", {}, lorica.AdapterHConfig(bottleneck=2)),
    "adapter-l": ("bert-classifier", {}, lorica.AdapterLConfig(bottleneck=2)),
    "adapter-p": ("bert-classifier", {}, lorica.AdapterPConfig(bottleneck=2)),
    "adapter-d": ("bert-classifier", {}, lorica.AdapterDConfig(bottleneck=2, dropped=1)),
    "prefix-embed": ("llama", {}, lorica.PreEmbedConfig(prefix=2)),
    "prefix-layer": ("llama", {}, lorica.PreLayerConfig(prefix=2)),
    "combination": (
        "llama",
        {},
        [lorica.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), lorica.PreEmbedConfig(prefix=2)],
    ),
    "tied": (
        "llama",
        {"tie_word_embeddings": True},
        lorica.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    ),
    "tokens": (
        "llama",
        {"tie_word_embeddings": True},
        lorica.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    ),
    "replicated": (
        "llama",
        {},
        lorica.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
    ),
    "conv1d": ("gpt2", {}, lorica.LoraConfig(r=2, target_modules=["c_attn", "c_proj"])),
    "experts": (
        "mixtral",
        {},
        lorica.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    ),
}


def base(name: str, settings: dict[str, Any]) -> str:
    """The file name of a base."""
    return "-".join([name, *settings])


def write_adapters(folder: Path) -> None:
    """The bases, the adapters, and what they compute together."""
    computed: dict[str, torch.Tensor] = {}
    (folder / "bases").mkdir()
    for name, (architecture, settings, config) in ADAPTERS.items():
        model = transformer(architecture, **settings)
        weights = folder / "bases" / f"{base(architecture, settings)}.safetensors"
        if not weights.exists():
            save_file({k: t.clone() for k, t in model.state_dict().items()}, weights)
        adapted(model, config)
        computed[name] = outputs(model, architecture)
        lorica.save(model, folder / "adapters" / name)
    save_file(computed, folder / "outputs.safetensors")


def write_work(folder: Path) -> None:
    """A run, a search and a comparison, which name their model and rows relative to their folder."""
    folder.mkdir()
    os.chdir(folder)
    silent = Console(file=io.StringIO(), width=200)
    model, rows = tiny.write_model(Path("model")), tiny.write_data(Path("rows"))
    train(tiny.recipe(model, rows, Path("run"), save_total_limit=4), console=silent)
    # The run as if it had been killed after its first checkpoint.
    shutil.copytree("run", "killed")
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (Path("killed") / file).unlink()
    shutil.rmtree("killed/checkpoints/checkpoint-20")
    recipe = Path("killed/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("output: run\n", "output: killed\n"))
    config = SearchConfig(trials=2, slots=2, metric="loss", max_t=2)
    search(
        tiny.recipe(model, rows, Path("unused"), batch_size=8), SPACE, Path("search"), config, console=silent
    )
    shutil.copytree("rows", "comparison-rows")
    made = content(
        Path(),
        output="comparison",
        tasks={"mood": {"task": "sequence-classification", "data": {"train": "comparison-rows"}}},
    )
    compare(Comparison.from_dict(made), console=silent, in_process=True)
    Path("compare.yaml").write_text(yaml.safe_dump(made, sort_keys=False))


def write_loralib(path: Path) -> None:
    """A state_dict with loralib's names."""
    loralib: Any = __import__("loralib")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        loralib.Linear(6, 8, r=2, lora_alpha=4), torch.nn.Tanh(), loralib.Linear(8, 3, r=2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    torch.save(loralib.lora_state_dict(model), path)


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    target.mkdir(parents=True)
    write_adapters(target)
    write_loralib(target / "loralib.pt")
    write_work(target / "work")
