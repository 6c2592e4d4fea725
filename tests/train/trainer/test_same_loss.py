"""How rows are put into batches changes no loss: not gradient accumulation, not their order, not padding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from train import tiny

from lorica.train import DataConfig, Task, Trainer, TrainingConfig, tasks
from lorica.train.data.splits import Splits
from lorica.train.tasks.base import own_loss
from lorica.train.trainer.arguments import training_arguments

TEXTS = [row["text"] for row in tiny.sentences(8)]
WORDS = [text.split() for text in TEXTS]
ROWS: dict[str, dict[str, Any]] = {
    "sequence-classification": {"text": TEXTS, "label": [0, 1, 2, 1] * 2},
    "regression": {"text": TEXTS, "score": [0.5 * i for i in range(8)]},
    "multi-label-classification": {"text": TEXTS, "labels": [["a"], ["b", "a"], [], ["b"]] * 2},
    "token-classification": {"tokens": WORDS, "tags": [[word[0] for word in words] for words in WORDS]},
    "question-answering": {
        "question": ["film"] * 8,
        "context": TEXTS,
        "answers": [{"text": [words[0]], "answer_start": [0]} for words in WORDS],
    },
    "causal-lm": {"prompt": ["film"] * 8, "completion": TEXTS},
    "seq2seq-lm": {"source": TEXTS, "target": TEXTS[::-1]},
}
SMALL: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
BERT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    key: BERT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}
T5: dict[str, Any] = {
    "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}  # fmt: skip
FAMILIES = {
    name: ("T5", T5) if name == "seq2seq-lm" else ("Llama", LLAMA) if name == "causal-lm" else ("Bert", BERT)
    for name in ROWS
}
# transformers gives Llama's classifiers the same losses by another way.
MORE = [
    ("sequence-classification", "Llama"),
    ("regression", "Llama"),
    ("multi-label-classification", "Llama"),
]
CASES = [(name, family) for name, (family, _) in FAMILIES.items()] + MORE


def setting(name: str, family: str) -> tuple[Any, Dataset, Any, Any]:
    """A task, its encoded rows, a model in double precision, and a tokenizer."""
    task, rows = tasks.get(name), Dataset.from_dict(ROWS[name])
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    data = task.resolve(Splits(rows), DataConfig())
    encoded = task.encode(rows, data, tokenizer, 64, "the rows")
    small = {"Bert": BERT, "Llama": LLAMA, "T5": T5}[family]
    config = getattr(transformers, f"{family}Config")(**SMALL, **small, **task.head(data))
    torch.manual_seed(0)
    model = getattr(transformers, task.auto_class).from_config(config).double()
    return task, encoded.features, model, tokenizer


def trainer(name: str, family: str, folder: Path, **options: Any) -> Trainer:
    task, rows, model, tokenizer = setting(name, family)
    config = TrainingConfig(
        epochs=1, max_steps=1, logging_steps=1, learning_rate=1.0, max_grad_norm=0.0, report_to=[], **options
    )
    args = training_arguments(config, folder, task.best_metric, validated=False)
    args.optim, args.lr_scheduler_type, args.save_strategy = "sgd", "constant", "no"  # type: ignore[assignment]
    args.warmup_steps = 0
    args.prediction_loss_only = True
    return Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=task.collator(tokenizer),
        loss=own_loss(task),
    )


def gradient(name: str, family: str, folder: Path, **options: Any) -> tuple[Tensor, float]:
    """A step of plain gradient descent at rate 1, and the loss that was logged."""
    one = trainer(name, family, folder, **options)
    before = torch.cat([p.detach().flatten().clone() for p in one.model.parameters()])  # type: ignore[union-attr]
    one.train()
    after = torch.cat([p.detach().flatten() for p in one.model.parameters()])  # type: ignore[union-attr]
    return before - after, one.state.log_history[0]["loss"]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_batches_change_neither_loss_nor_gradient(name: str, family: str, tmp_path: Path) -> None:
    whole, loss = gradient(name, family, tmp_path, batch_size=8, group_by_length=False)
    assert whole.norm() > 0
    for size, grouped in ((8, True), (4, False), (4, True), (2, True), (1, False)):
        step, shown = gradient(
            name, family, tmp_path, batch_size=size, gradient_accumulation=8 // size, group_by_length=grouped
        )
        assert shown == pytest.approx(loss, abs=1e-6)
        assert ((step - whole).norm() / whole.norm()).item() <= 1e-6


@pytest.mark.parametrize(
    ("name", "family"),
    [("sequence-classification", "Bert"), ("sequence-classification", "Llama"), ("causal-lm", "Llama")],
)
def test_a_loss_of_ones_own_is_averaged_over_the_batches_of_a_step(
    name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(self: Task, outputs: Any, inputs: Any) -> Tensor:
        logits, labels = outputs.logits, inputs["labels"]
        if labels.dim() == 2:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return 2 * F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    expected, plain = gradient(name, family, tmp_path, batch_size=8)
    monkeypatch.setattr(type(tasks.get(name)), "loss", own)
    # Of three rows a batch, the last has two.
    for size in (8, 4, 3, 1):
        step, shown = gradient(name, family, tmp_path, batch_size=size, gradient_accumulation=-(-8 // size))
        assert shown == pytest.approx(2 * plain, abs=1e-6)
        assert ((step - 2 * expected).norm() / expected.norm()).item() <= 1e-6


@pytest.mark.parametrize(("name", "family"), CASES)
def test_batches_change_no_loss_of_an_evaluation(name: str, family: str, tmp_path: Path) -> None:
    losses = [
        trainer(name, family, tmp_path, eval_batch_size=size).evaluate()["eval_loss"] for size in (1, 3, 8)
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    _, loss = gradient(name, family, tmp_path, batch_size=8)
    assert losses[0] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_similar_lengths_share_a_batch_where_each_row_counts_alike(name: str, tmp_path: Path) -> None:
    one = trainer(name, FAMILIES[name][0], tmp_path, eval_batch_size=1)
    rows: Any = one.eval_dataset
    apart = [one.evaluate(rows.select([row]))["eval_loss"] for row in range(len(rows))]
    mean_over_rows = one.evaluate()["eval_loss"] == pytest.approx(sum(apart) / len(apart), abs=1e-5)
    assert tasks.get(name).by_length(TrainingConfig()) is mean_over_rows
    for said in (True, False):
        assert tasks.get(name).by_length(TrainingConfig(group_by_length=said)) is said


def test_labels_may_be_smoothed_for_an_encoder_and_decoder(tmp_path: Path) -> None:
    smoothed = {"arguments": {"label_smoothing_factor": 0.1}}
    whole, loss = gradient("seq2seq-lm", "T5", tmp_path, batch_size=8, **smoothed)
    step, shown = gradient("seq2seq-lm", "T5", tmp_path, batch_size=2, gradient_accumulation=4, **smoothed)
    assert shown == pytest.approx(loss, abs=1e-6)
    assert ((step - whole).norm() / whole.norm()).item() <= 1e-6
    found = trainer("seq2seq-lm", "T5", tmp_path, eval_batch_size=3, **smoothed).evaluate()
    assert found["eval_loss"] == pytest.approx(loss, abs=1e-6)


def test_the_loss_of_completions_is_the_hand_computed_sum(tmp_path: Path) -> None:
    _, rows, model, _ = setting("causal-lm", "Llama")
    total, count = 0.0, 0
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        logits = model(torch.tensor([ids])).logits[0].detach()
        for place, label in enumerate(labels):
            if label != -100:
                scores = logits[place - 1].tolist()
                total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
                count += 1
    assert count == sum(len(words) + 1 for words in WORDS)
    found = trainer("causal-lm", "Llama", tmp_path, eval_batch_size=3).evaluate()
    assert found["eval_loss"] == pytest.approx(total / count, abs=1e-6)
    assert found["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)
    _, loss = gradient("causal-lm", "Llama", tmp_path, batch_size=2, gradient_accumulation=4)
    assert loss == pytest.approx(total / count, abs=1e-6)
