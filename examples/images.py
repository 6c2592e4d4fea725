"""Images: adapt a ViT to classes of one's own, save it, load it again and ask it, as one does with PEFT.

python examples/images.py
python examples/images.py --model google/vit-base-patch16-224-in21k --data food101 --fp16 true
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import torch
from datasets import Dataset, load_dataset
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from lorica.peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

SMALL = 32  # pixels a side of the images of the tiny model


def digits() -> tuple[Dataset, list[str]]:
    """scikit-learn's handwritten digits as images, and the names of their classes."""
    found: Any = load_digits()
    pixels = np.repeat((found.images[..., None] / 16 * 255).astype("uint8"), 3, axis=-1)
    return Dataset.from_dict({"image": list(pixels), "label": found.target.tolist()}), [
        str(i) for i in range(10)
    ]


def transform(
    size: int, mean: Tensor, std: Tensor, *, training: bool
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Crop at random and flip in training, the whole image after it; scale and normalise."""

    def prepare(image: Any) -> Tensor:
        x = torch.as_tensor(np.array(image)).float().permute(2, 0, 1)[None] / 255
        if training:
            height, width = x.shape[-2:]
            share = float(torch.empty(()).uniform_(0.8, 1.0))
            h, w = max(1, round(share * height)), max(1, round(share * width))
            top, left = (int(torch.randint(n, ())) for n in (height - h + 1, width - w + 1))
            x = x[..., top : top + h, left : left + w]
            if torch.rand(()) < 0.5:
                x = x.flip(-1)
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        return (x[0] - mean[:, None, None]) / std[:, None, None]

    return lambda batch: {**batch, "pixel_values": [prepare(image) for image in batch["image"]]}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack the images and their labels."""
    return {
        "pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def load_base(model: str | None, labels: list[str]) -> Any:
    """The base with a new head for these classes."""
    names: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if model is None:
        torch.manual_seed(0)
        tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        config = ViTConfig(image_size=SMALL, patch_size=8, **tiny, **names)
        return ViTForImageClassification(config)
    return AutoModelForImageClassification.from_pretrained(model, ignore_mismatched_sizes=True, **names)


def attention_names(base: Any) -> list[str]:
    """Its query and value projections: transformers 5 calls a ViT's otherwise than 4 did."""
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    return ["query", "value"] if "query" in names else ["q_proj", "v_proj"]


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of images put into their class."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train_in_trainer(
    model: PeftModel,
    train: Dataset,
    test: Dataset,
    output: Path,
    epochs: float,
    fp16: bool,
    push_to: str | None,
) -> float:
    """Transformers' Trainer: evaluate and save after each epoch, keep the most accurate."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            remove_unused_columns=False,
            eval_strategy="epoch",
            save_strategy="epoch",
            learning_rate=5e-3,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=4,
            per_device_eval_batch_size=16,
            fp16=fp16,
            num_train_epochs=epochs,
            logging_steps=10,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            push_to_hub=push_to is not None,
            hub_model_id=push_to,
            label_names=["labels"],
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def train_in_loop(model: PeftModel, train: Dataset, test: Dataset, epochs: float) -> float:
    """The same without a Trainer; returns the accuracy on the test images."""
    batches: Any = DataLoader(train, 16, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    model.train()
    for _ in range(int(epochs)):
        for i, batch in enumerate(batches, 1):
            (model(**batch).loss / 4).backward()
            if i % 4 == 0 or i == len(batches):
                optimizer.step()
                optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        batches = DataLoader(test, 64, collate_fn=collate)  # type: ignore[arg-type]
        hits = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in batches]
    return float(torch.cat(hits).float().mean())


@torch.no_grad()
def ask(folder: Path, labels: list[str], image: Any, size: int, mean: Tensor, std: Tensor) -> str:
    """Load the base that the adapter names, the adapter onto it, and put one image into its class."""
    config = PeftConfig.from_pretrained(folder)
    model = PeftModel.from_pretrained(load_base(config.base_model_name_or_path, labels), folder)
    pixels = transform(size, mean, std, training=False)({"image": [image]})["pixel_values"][0]
    return model.config.id2label[int(model(pixel_values=pixels[None]).logits.argmax(-1))]


def main(
    model: str | None = None,
    data: str | None = None,
    output: Path = Path("out/images"),
    loop: Literal["trainer", "bare"] = "trainer",
    rows: int = 1200,
    epochs: float = 5,
    fp16: bool = False,
    push_to: str | None = None,
) -> float:
    """Adapt a classifier of images.

    Args:
        model: name or folder of a base; without one a tiny ViT is made.
        data: name or folder of a data set with "image" and "label", such as food101; without it, handwritten
            digits.
        output: folder for the adapter.
        loop: transformers' Trainer, or a plain loop.
        rows: number of images; a tenth is kept for testing.
        epochs: of training.
        fp16: train in half precision, on a GPU.
        push_to: repository on the Hub to push the adapter to.

    Returns:
        The accuracy on the test images.
    """
    if data is None:
        images, labels = digits()
    else:
        found: Any = load_dataset(data, split="train")
        images, labels = found, found.features["label"].names
    images = images.shuffle(seed=0).select(range(min(rows, len(images))))
    base = load_base(model, labels)
    processor: Any = AutoImageProcessor.from_pretrained(model) if model else None
    mean, std = (torch.tensor(getattr(processor, name, [0.5] * 3)) for name in ("image_mean", "image_std"))
    size = base.config.image_size
    parts = images.train_test_split(test_size=0.1, seed=0)
    train = parts["train"].with_transform(transform(size, mean, std, training=True))
    test = parts["test"].with_transform(transform(size, mean, std, training=False))
    config = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=attention_names(base),
        lora_dropout=0.1,
        bias="none",
        modules_to_save=["classifier"],
    )
    adapted = get_peft_model(base, config)
    adapted.print_trainable_parameters()
    if loop == "trainer":
        result = train_in_trainer(adapted, train, test, output, epochs, fp16, push_to)
    else:
        result = train_in_loop(adapted, train, test, epochs)
    print(f"accuracy on the test images: {result:.3f}")
    adapted.save_pretrained(output)
    one = parts["test"][0]
    print(f"one image: {labels[one['label']]}, told as {ask(output, labels, one['image'], size, mean, std)}")
    return result


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
