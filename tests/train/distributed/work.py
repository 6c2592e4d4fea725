"""What the ranks of these tests do: runs that one process is compared with."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from train import tiny
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

import lorica
from lorica import parallel
from lorica.errors import LoricaError
from lorica.train import Interrupted, Recipe, Result, Trainer, evaluate, predict, prepared, train
from lorica.train.distributed.group import rank, world
from lorica.train.generation.writing import write
from lorica.train.settings import GenerationConfig


def write_models(folder: Path) -> Path:
    """A classifier's encoder and a decoder, without dropout, and rows for both."""
    tiny.write_model(folder / "encoder")
    config = folder / "encoder" / "config.json"
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps({**json.loads(config.read_text()), **without}))
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokens: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **small, **tokens)).save_pretrained(folder / "decoder")
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    tokenizer.save_pretrained(folder / "decoder")
    tiny.write_data(folder / "rows")
    for split, seed, count in (("train", 0, 37), ("validation", 1, 11)):
        texts = [row["text"].split() for row in tiny.sentences(count, seed)]
        pairs = [{"prompt": " ".join(t[:1]), "completion": " ".join(t[1:])} for t in texts]
        tiny.write_rows(folder / "pairs" / f"{split}.jsonl", pairs)
    return folder


def home_of(engine: str) -> str:
    """The folder of a run, by how many processes it has and how they share the model."""
    return f"in {world()}" if engine == "ddp" else "in parts"


def recipe(folder: Path, name: str, data: dict[str, Any], *, engine: str = "ddp", **training: Any) -> Recipe:
    """A run of so many rows a step in all: 8 to learn from, 6 to score."""
    language = name.startswith("language")
    made = tiny.recipe(
        folder / ("decoder" if language else "encoder"),
        folder / ("pairs" if language else "rows"),
        folder / name / home_of(engine),
        **{"batch_size": 8 // world(), "eval_batch_size": 6 // world(), "logging_steps": 1, **training},
    )
    made = made.replace(method=made.method.replace(lora_dropout=0.0), data=data)
    return made.replace(task="causal-lm") if language else made


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "five rows left": (
        {"train_rows": 37, "validation_rows": 11, "test_rows": 10},
        {"report_to": ["tensorboard"]},
    ),
    "one row left": ({"train_rows": 33, "validation_rows": 7, "test_rows": 12}, {"group_by_length": False}),
    "accumulation": ({"train_rows": 33}, {"gradient_accumulation": 2, "gradient_checkpointing": True}),
    "language": (
        {},
        {"metric_for_best": "loss", "early_stopping_patience": 1, "learning_rate": 0.1, "epochs": 8},
    ),
    "language, all logits": ({}, {"chunked_loss": False}),
}


def run(folder: str, name: str, engine: str = "ddp") -> dict[str, Any]:
    """One of the cases: what it came to in this process."""
    encoded: list[int] = []
    before = prepared._encode
    prepared._encode = lambda *args: (encoded.append(rank()), before(*args))[1]
    data, training = CASES[name]
    trainers: list[Trainer] = []
    step = Trainer.training_step
    Trainer.training_step = lambda self, *args: (trainers.append(self), step(self, *args))[1]  # type: ignore[method-assign]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            result = train(recipe(Path(folder), name, data, engine=engine, **training), engine=engine)
    finally:
        prepared._encode, Trainer.training_step = before, step  # type: ignore[method-assign]
    state = trainers[0].state
    return {
        "metrics": result.metrics,
        "steps": result.steps,
        "losses": [entry["loss"] for entry in state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in state.log_history if "grad_norm" in entry],
        "tokens": state.num_input_tokens_seen,
        "best": state.best_global_step,
        "chunked": trainers[0]._head is not None,
        "encoded": len(encoded),
        "printed": printed.getvalue(),
    }


def run_all(folder: str) -> dict[str, dict[str, Any]]:
    """All of them, then the scores and answers of one."""
    found = {name: run(folder, name) for name in CASES}
    kept = Path(folder) / "five rows left" / "in 1"
    if kept.is_dir():
        texts = [row["text"] for row in tiny.sentences(5, 3)]
        found["afterwards"] = {"scores": evaluate(kept), "answers": predict(kept, texts)}
        language = Path(folder) / "language" / "in 1"
        prompts = [" ".join(row["text"].split()[:2]) for row in tiny.sentences(5, 4)]
        found["written"] = {"answers": predict(language, prompts)}
    return found


def weights(folder: Path, name: str, where: str) -> dict[str, Tensor]:
    """What a case trained."""
    return load_file(folder / name / where / "adapter_model.safetensors")


@contextlib.contextmanager
def at_step(number: int, action: Callable[[], Any] | None) -> Iterator[None]:
    """Within it, something happens in a step of training, before the ranks meet."""
    step, calls = Trainer.training_step, 0

    def counted(self: Trainer, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == number and action is not None:
            action()
        return step(self, *args)

    Trainer.training_step = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.training_step = step  # type: ignore[method-assign]


def dropping(folder: str, name: str) -> Recipe:
    """Ten steps with dropout and a checkpoint every other one."""
    base = tiny.recipe(Path(folder) / "encoder", Path(folder) / "rows", Path(folder) / name, save_steps=2)
    return base.replace(training={"load_best": False})


def steady(home: Path, name: str, batch_size: int) -> Recipe:
    """Ten steps without dropout, in a folder that is the same in however many processes."""
    made = recipe(home, name, {}, batch_size=batch_size, eval_batch_size=6, load_best=False)
    return made.replace(output=str(home / name))


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


STOPS: dict[str, tuple[int | None, int | None]] = {
    "the second alone": (None, 3),
    "the first alone": (4, None),
    "one step apart": (3, 4),
    "both, in the last step of a pass": (5, 5),
}
"""In which step each rank is told to stop; None is in none."""


def stopped_and_resumed(folder: str) -> dict[str, Any]:
    """An uninterrupted run, and some that were stopped and resumed: each one's weights."""
    found: dict[str, Any] = {"whole": train(dropping(folder, "whole")).adapter_sha256}
    for name, steps in STOPS.items():
        number = steps[rank()]
        checkpoint: Path | None = None
        try:
            with at_step(number or 0, interrupt):
                train(dropping(folder, name))
        except Interrupted as stop:
            checkpoint = stop.checkpoint
        resumed: Result = train(dropping(folder, name), resume=True)
        found[name] = checkpoint and checkpoint.name, resumed.adapter_sha256
    return found


def killed(folder: str, name: str, victim: int, engine: str = "ddp") -> None:
    """A run in which one rank is killed in the fifth step; the others say what they have to say."""
    action = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if int(os.environ["RANK"]) == victim else None
    with at_step(5, action):
        train(dropping(folder, name), engine=engine)


def resumed(folder: str, names: dict[str, str]) -> list[str]:
    """What runs that were killed come to when they are resumed, each with its engine."""
    return [train(dropping(folder, n), resume=True, engine=e).adapter_sha256 for n, e in names.items()]


def refused(folder: str) -> dict[str, str]:
    """What is refused, and how."""
    found: dict[str, str] = {}

    def expect(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
            found[name] = "nothing was refused"
        except LoricaError as error:
            found[name] = f"{type(error).__name__}: {error}"

    home = Path(folder)
    data = {"train_rows": 16}
    expect("no such column", lambda: train(recipe(home, "refused", {"text": "nothing"})))
    expect("no such module", lambda: train(_targeting(recipe(home, "refused", data), ["nowhere"])))
    expect("unused", lambda: _trainer(home, use_cpu=True).train())
    expect("each on its own", lambda: _trainer(home))
    expect("searched batch", lambda: train(recipe(home, "refused", data, auto_batch_size=True)))
    goes_on: dict[str, Any] = {"resume": True, "changed_processes": True}
    expect("fewer processes", lambda: train(steady(home, "begun in one", 4), resume=True))
    expect("other rows a step", lambda: train(steady(home, "begun in one", 8), **goes_on))
    before = os.environ["WORLD_SIZE"]
    os.environ["WORLD_SIZE"] = "3"
    expect("another world", lambda: train(recipe(home, "refused", data)))
    os.environ["WORLD_SIZE"] = before
    train(steady(home, "begun in one", 4), **goes_on)
    return found


def _targeting(made: Recipe, modules: list[str]) -> Recipe:
    return made.replace(method=made.method.replace(target_modules=modules))


def _trainer(home: Path, **options: Any) -> Trainer:
    """Of a model with a module that nobody calls."""
    model = BertForSequenceClassification(BertConfig.from_pretrained(home / "encoder"))
    model.idle = torch.nn.Linear(4, 4)
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["query", "idle"]), seed=0)
    rows = Dataset.from_list([{"input_ids": [2, 5, 3], "labels": i % 2} for i in range(8)])
    args = TrainingArguments(str(home / "idle"), report_to="none", disable_tqdm=True, **options)
    return Trainer(model=model, args=args, train_dataset=rows)


IN_PARTS = ("one row left", "accumulation", "language")


def run_in_parts(folder: str) -> dict[str, Any]:
    """Some of the cases with the model in parts, and what such a model writes."""
    return {**{name: run(folder, name, "fsdp2") for name in IN_PARTS}, "written": _written()}


def _written() -> list[bool]:
    """Whether models in parts write what they write whole, in three batches of two processes."""
    sizes: dict[str, Any] = {"vocab_size": 32, "eos_token_id": 31, "pad_token_id": 0}
    narrow: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    llama: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    found = []
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    models: list[tuple[Any, Any]] = [
        (T5ForConditionalGeneration, T5Config(**sizes, **narrow, **start)),
        (LlamaForCausalLM, LlamaConfig(**sizes, **llama, num_hidden_layers=2)),
    ]
    for kind, config in models:
        torch.manual_seed(0)
        model = kind(config)
        lorica.adapt(model, lorica.LoraConfig(r=2, target_modules="all-linear"), seed=0)
        settings = GenerationConfig(max_new_tokens=6, batch_size=2, num_beams=2)
        prompts = [[5 + i] * (i + 1) for i in range(5)]
        whole = write(model, tiny.tokenizer(), prompts, settings)
        parallel.shard(model)
        found.append(write(model, tiny.tokenizer(), prompts, settings) == whole)
    return found


ENGINES = {
    "in parts throughout": ("fsdp2", "fsdp2"),
    "in parts, then whole": ("fsdp2", "ddp"),
    "whole, then in parts": ("ddp", "fsdp2"),
}


def stopped_in_parts(folder: str) -> dict[str, Any]:
    """Runs that the second rank alone is told to stop, and that go on with another engine."""
    found: dict[str, Any] = {}
    for name, (first, then) in ENGINES.items():
        with contextlib.suppress(Interrupted), at_step(3 if rank() else 0, interrupt):
            train(dropping(folder, name), engine=first)
        found[name] = train(dropping(folder, name), resume=True, engine=then).adapter_sha256
    return found
