"""Sentiment: adapt DistilBERT to tell good reviews from bad ones, as one does with PEFT.

python examples/sentiment.py
python examples/sentiment.py --model distilbert-base-uncased --data rotten_tomatoes --loop bare --epochs 2
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
from datasets import Dataset, DatasetDict, load_dataset
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from small import words_tokenizer
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from lorica.peft import LoraConfig, PeftModel, TaskType, get_peft_model

LABELS = {0: "NEGATIVE", 1: "POSITIVE"}
GOOD = ("lovely", "great", "fine", "warm", "bright", "moving")
BAD = ("awful", "poor", "grim", "cold", "dull", "tired")
OTHER = ("the", "film", "story", "voice", "scene", "plot", "song", "cast", "light", "and", "its")


def reviews(count: int, seed: int) -> Dataset:
    """Made-up reviews: a label, and words that go with it."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = draw.choices(OTHER, k=draw.randint(3, 8)) + draw.choices(GOOD if i % 2 else BAD, k=2)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": i % 2})
    return Dataset.from_list(rows)


def load(model: str | None, data: str | None, rows: int, share: float) -> tuple[Any, Any, DatasetDict]:
    """The base, its tokenizer and the tokenized rows, or a share of them."""
    names: dict[str, Any] = {"id2label": LABELS, "label2id": {label: i for i, label in LABELS.items()}}
    if model is None:
        tokenizer: Any = words_tokenizer([*GOOD, *BAD, *OTHER])
        config = DistilBertConfig(
            vocab_size=len(tokenizer), dim=64, n_layers=2, n_heads=4, hidden_dim=128, **names
        )
        base: Any = DistilBertForSequenceClassification(config)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2, **names)
    if data is None:
        splits = DatasetDict({"train": reviews(rows, 0), "validation": reviews(max(rows // 8, 16), 1)})
    else:
        found: Any = load_dataset(data)
        splits = DatasetDict({"train": found["train"], "validation": found["validation"]})
    splits = splits.shuffle(seed=0)
    splits = DatasetDict({name: part.select(range(int(share * len(part)))) for name, part in splits.items()})

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return tokenizer(batch["text"], truncation=True)

    splits = splits.map(tokenize, batched=True).remove_columns("text").rename_column("label", "labels")
    return base, tokenizer, splits


def metrics(labels: Any, predicted: Any) -> dict[str, float]:
    """Weighted F1, precision and recall, and accuracy, over the whole split."""
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels,
        predicted,
        average="weighted",
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    names = ("F1 Score", "Precision", "Recall", "Accuracy")
    return dict(
        zip(names, map(float, (f1, precision, recall, accuracy_score(labels, predicted))), strict=True)
    )


def train_in_trainer(
    model: PeftModel, tokenizer: Any, rows: DatasetDict, output: Path, steps: int, lr: float
) -> None:
    """Transformers' Trainer, a line for each step."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output), learning_rate=lr, max_steps=steps, logging_steps=1, report_to="none"
        ),
        train_dataset=rows["train"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()


def train_in_loop(
    model: PeftModel, tokenizer: Any, rows: DatasetDict, output: Path, epochs: int, batch_size: int, lr: float
) -> None:
    """A plain loop that writes curves for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    collate = DataCollatorWithPadding(tokenizer)
    batches: Any = DataLoader(rows["train"], batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    with SummaryWriter(str(output / "curves")) as curves:
        step = 0
        for epoch in range(epochs):
            model.train()
            for batch in batches:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                curves.add_scalar("Loss", loss.item(), step)
            for name, value in evaluate(model, tokenizer, rows).items():
                curves.add_scalar(name, value, epoch)


@torch.no_grad()
def evaluate(model: PeftModel, tokenizer: Any, rows: DatasetDict) -> dict[str, float]:
    """Loss and metrics on the validation rows."""
    model.eval()
    batches: Any = DataLoader(rows["validation"], 64, collate_fn=DataCollatorWithPadding(tokenizer))  # type: ignore
    outputs = [(model(**batch), batch["labels"]) for batch in batches]
    labels = torch.cat([expected for _, expected in outputs])
    logits = torch.cat([output.logits for output, _ in outputs])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return {"Eval Loss": float(loss), **metrics(labels, logits.argmax(-1))}


def main(
    model: str | None = None,
    data: str | None = None,
    output: Path = Path("out/sentiment"),
    loop: Literal["trainer", "bare"] = "trainer",
    rows: int = 512,
    sample_pct: float = 1.0,
    steps: int = 10,
    epochs: int = 2,
    batch_size: int = 8,
    lr: float = 1e-5,
) -> dict[str, float]:
    """Adapt a classifier of reviews.

    Args:
        model: name or folder of a base; without one a tiny DistilBERT is made.
        data: name or folder of a data set with "text" and "label", such as rotten_tomatoes; without it,
            made-up reviews.
        output: folder for the adapter and the curves.
        loop: transformers' Trainer for `steps`, or a plain loop for `epochs`.
        rows: number of made-up reviews.
        sample_pct: share of the rows to use.
        steps: of the Trainer.
        epochs: of the plain loop.
        batch_size: of the plain loop.
        lr: learning rate.

    Returns:
        Loss and metrics on the validation rows.
    """
    torch.manual_seed(0)
    base, tokenizer, splits = load(model, data, rows, sample_pct)
    config = LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_lin", "v_lin"],
        lora_dropout=0.05,
        bias="none",
        task_type=TaskType.SEQ_CLS,
    )
    adapted = get_peft_model(base, config)
    adapted.print_trainable_parameters()
    before = evaluate(adapted, tokenizer, splits)
    if loop == "trainer":
        train_in_trainer(adapted, tokenizer, splits, output, steps, lr)
    else:
        train_in_loop(adapted, tokenizer, splits, output, epochs, batch_size, lr)
    after = evaluate(adapted, tokenizer, splits)
    for name, value in after.items():
        print(f"{name:10} {before[name]:.4f} -> {value:.4f}")
    adapted.save_pretrained(output)
    return after


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
