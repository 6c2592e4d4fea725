from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments, default_data_collator
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.trainer_pt_utils import LabelSmoother

import lorica
from lorica.train import Trainer
from lorica.train.trainer.deferred import DeferredLogits


def rows(count: int = 8, length: int = 12) -> Any:
    """Rows of which the first has all its labels, its first token's too, and the others only their last."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (length,), generator=draw)
        labels = ids.clone()
        labels[: max(0, length - 2 - i) if i else 0] = -100
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(made)


def trainer(model: Any, folder: Path, *, rows_at_once: int = 8, batches: int = 1, **options: Any) -> Trainer:
    """A trainer that makes one step of plain gradient descent at rate 1, so that the step is the gradient."""
    own = {key: options.pop(key) for key in ("chunked_loss", "compute_metrics") if key in options}
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=batches,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(model=model, args=args, train_dataset=rows(), data_collator=default_data_collator, **own)


def bart() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "d_model": 16,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 24,
    }
    return transformers.BartForCausalLM(
        transformers.BartConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=20, dropout=0.0, **shape)
    )


NO_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}


def make(name: str) -> Any:
    return bart() if name == "bart" else tiny.transformer(name, **NO_DROPOUT.get(name, {}))


def stepped(name: str, folder: Path, **options: Any) -> tuple[Tensor, float, Trainer]:
    """The gradient of a step, its loss, and the trainer."""
    model = make(name)
    before = parameters(model)
    one = trainer(model, folder, **options)
    one.train()
    return before - parameters(model), one.state.log_history[0]["loss"], one


def parameters(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bart"])
def test_mean_over_the_targets_of_a_step(name: str, chunked: bool, tmp_path: Path) -> None:
    model = make(name)
    loss = model(**default_data_collator(list(rows()))).loss
    loss.backward()
    one_batch = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    for at_once, batches in ((8, 1), (2, 4), (1, 8)):
        step, shown, _ = stepped(name, tmp_path, rows_at_once=at_once, batches=batches, chunked_loss=chunked)
        assert distance(step, one_batch) <= 1e-6
        assert shown == pytest.approx(loss.item(), rel=1e-6)


def test_chunks_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type] = []
    losses = LOSS_MAPPING
    plain = losses["ForCausalLM"]
    monkeypatch.setitem(
        losses, "ForCausalLM", lambda logits, *a, **k: seen.append(type(logits)) or plain(logits, *a, **k)
    )
    for chunked in (True, False):
        stepped("llama", tmp_path, chunked_loss=chunked)
    assert seen == [DeferredLogits, Tensor]


@pytest.mark.parametrize("batches", [1, 4])
def test_label_smoothing(batches: int, tmp_path: Path) -> None:
    options = {"label_smoothing_factor": 0.2, "rows_at_once": 8 // batches, "batches": batches}
    own, shown, one = stepped("llama", tmp_path, **options)
    plain, expected, other = stepped("llama", tmp_path, chunked_loss=False, **options)
    assert type(one.label_smoother) is not type(other.label_smoother)
    assert distance(own, plain) <= 1e-6
    assert shown == pytest.approx(expected, rel=1e-6)


def test_bfloat16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own, _, _ = stepped("llama", tmp_path, bf16=True)
    plain, _, _ = stepped("llama", tmp_path, bf16=True, chunked_loss=False)
    assert distance(own, plain) <= 2e-2
    assert not caplog.records


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["trunk", "head"])
def test_adapted(targets: list[str], tmp_path: Path) -> None:
    after = []
    for chunked in (True, False):
        model = tiny.adapted(tiny.transformer("llama"), lorica.LoraConfig(r=2, target_modules=targets))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer(model, tmp_path, rows_at_once=2, batches=4, chunked_loss=chunked).train()
        after.append(parameters(model))
        moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        assert all("lora_" in name for name in moved)
        assert any("lm_head" in name for name in moved) == ("lm_head" in targets)
    assert distance(*after) <= 1e-6


@pytest.mark.parametrize("metrics", [False, True])
def test_evaluation(metrics: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def shape(outcome: Any) -> dict[str, float]:
        return {"vocabulary": outcome.predictions.shape[-1]}

    model = tiny.transformer("llama")
    plain = trainer(model, tmp_path, chunked_loss=False).evaluate(rows())
    own = trainer(model, tmp_path, compute_metrics=shape if metrics else None).evaluate(rows())
    assert own["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert own.get("eval_vocabulary") == (tiny.VOCABULARY if metrics else None)
    assert not caplog.records


def test_says_once_when_logits_are_needed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Entropy(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(**inputs).logits.softmax(-1).square().sum()

    model = tiny.transformer("llama")
    one = trainer(model, tmp_path, rows_at_once=2, batches=4)
    one.__class__ = Entropy
    with caplog.at_level(logging.WARNING, "lorica"):
        one.train()
    (record,) = caplog.records
    assert record.getMessage() == (
        "LlamaForCausalLM: the loss is computed from all logits at once, because they are used in softmax"
    )


REASONS = {
    "torch_compile": "the model is compiled",
    "use_liger_kernel": "Liger's kernels compute it",
}


@pytest.mark.parametrize("option", REASONS)
def test_says_why_not(option: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.transformer("llama")
    one = trainer(model, tmp_path)
    setattr(one.args, option, True)
    with caplog.at_level(logging.WARNING, "lorica"):
        assert one._find_head(model) is None
    assert caplog.messages == [
        f"LlamaForCausalLM: the loss is computed from all logits at once, because {REASONS[option]}"
    ]


def test_says_why_not_for_hooks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.transformer("llama")
    model.lm_head.register_full_backward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "lorica"):
        one = trainer(model, tmp_path)
    assert "because the head has backward hooks" in caplog.text
    one.train()


def test_a_causal_model_without_a_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.transformer("llama")
    model.get_output_embeddings = lambda: None
    with caplog.at_level(logging.WARNING, "lorica"):
        trainer(model, tmp_path).train()
    assert "because it has not one head that makes them" in caplog.text


def test_other_models_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("bert-classifier", "bert-tokens"):
        one = trainer(tiny.transformer(name), tmp_path, label_smoothing_factor=0.1)
        assert one._head is None
        assert type(one.label_smoother) is LabelSmoother
        assert not one._loss_shifts_labels
    assert not caplog.records


@pytest.mark.parametrize("name", ["bert-masked", "t5"])
def test_losses_that_do_not_shift(name: str, tmp_path: Path) -> None:
    assert not trainer(tiny.transformer(name), tmp_path)._loss_shifts_labels


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5"])
@pytest.mark.filterwarnings(
    "ignore:a whole pass of the model did not call model.decoder.layers.0.encoder_attn"
)
def test_a_step_without_targets_changes_nothing(
    name: str, smoothing: float, chunked: bool, tmp_path: Path
) -> None:
    model = make(name)
    head = "lm_head"
    config = lorica.LoraConfig(r=2, target_modules="all-linear", modules_to_save=[head])
    lorica.adapt(model, config)
    before = parameters(model)
    one = trainer(model, tmp_path, chunked_loss=chunked, label_smoothing_factor=smoothing)
    assert isinstance(one.train_dataset, Dataset)
    one.train_dataset = one.train_dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    one.train()
    assert torch.equal(parameters(model), before)
