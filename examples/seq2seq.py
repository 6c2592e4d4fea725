"""Sequence to sequence: adapt a T5 to a task of its own, as one does with PEFT.

python examples/seq2seq.py
python examples/seq2seq.py --model bigscience/mt0-large --data pairs.jsonl
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
from datasets import Dataset, DatasetDict
from small import words_tokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from lorica.peft import LoraConfig, PeftModel, TaskType, get_peft_model

WORDS = ("red", "green", "blue", "big", "small", "cat", "dog", "bird", "runs", "sings")


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Sentences, and the same from their end."""
    draw = random.Random(seed)
    sentences = [draw.choices(WORDS, k=draw.randint(2, 5)) for _ in range(count)]
    return [{"source": " ".join(words), "target": " ".join(reversed(words))} for words in sentences]


def load(model: str | None, data: Path | None, rows: int) -> tuple[Any, Any, DatasetDict]:
    """The base, its tokenizer and the tokenized rows."""
    if model is None:
        tokenizer: Any = words_tokenizer(WORDS)
        tiny: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        special: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}
        base: Any = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **tiny, **special))
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForSeq2SeqLM.from_pretrained(model)
    if data is None:
        train, test = pairs(rows, 0), pairs(max(rows // 8, 8), 1)
    else:
        lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        train, test = lines[: len(lines) * 9 // 10], lines[len(lines) * 9 // 10 :]

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return tokenizer(batch["source"], text_target=batch["target"], truncation=True)

    splits = DatasetDict({"train": Dataset.from_list(train), "test": Dataset.from_list(test)})
    return base, tokenizer, splits.map(tokenize, batched=True, remove_columns=["source", "target"])


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of target tokens that the model puts first."""
    logits = (
        prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    )
    kept = prediction.label_ids != -100
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids)[kept].mean())}


def train_in_trainer(model: PeftModel, tokenizer: Any, rows: DatasetDict, output: Path, epochs: float) -> Any:
    """Transformers' Trainer: evaluate and save after each epoch, keep the best."""
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(output),
            learning_rate=1e-3,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            num_train_epochs=epochs,
            weight_decay=0.01,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            report_to="none",
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],  # pyright: ignore[reportArgumentType]
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def train_in_loop(model: PeftModel, tokenizer: Any, rows: DatasetDict, epochs: float) -> float:
    """The same without a Trainer; returns the loss on the test rows."""
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    batches: Any = torch.utils.data.DataLoader(rows["train"], 32, shuffle=True, collate_fn=collate)  # type: ignore
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0.01
    )
    model.train()
    for _ in range(int(epochs)):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return float(model(**collate(list(rows["test"]))).loss)


def main(
    model: str | None = None,
    data: Path | None = None,
    output: Path = Path("out/seq2seq"),
    loop: Literal["trainer", "bare"] = "trainer",
    rows: int = 512,
    epochs: float = 2,
    push_to: str | None = None,
) -> float:
    """Adapt a sequence-to-sequence model.

    Args:
        model: name or folder of a base; without one a tiny T5 is made.
        data: JSON lines with "source" and "target"; without it, made-up sentences to be turned round.
        output: folder for the adapter.
        loop: transformers' Trainer, or a plain loop.
        rows: number of made-up sentences.
        epochs: of training.
        push_to: repository on the Hub to push the adapter to.

    Returns:
        The loss on the test rows.
    """
    torch.manual_seed(0)
    base, tokenizer, splits = load(model, data, rows)
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    adapted = get_peft_model(base, config)
    adapted.print_trainable_parameters()
    if loop == "trainer":
        loss = train_in_trainer(adapted, tokenizer, splits, output, epochs)
    else:
        loss = train_in_loop(adapted, tokenizer, splits, epochs)
    print(f"loss on the test rows: {loss:.3f}")
    adapted.save_pretrained(output)
    if push_to is not None:
        adapted.push_to_hub(push_to)
    return loss


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
