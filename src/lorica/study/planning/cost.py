"""The cost of training: parameters, files, memory and arithmetic, from a model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lorica.config import LoraConfig
from lorica.errors import ConfigError, listing
from lorica.model.adapt import adapt
from lorica.model.pretrained.skeleton import skeleton
from lorica.model.sharded import blocks_of
from lorica.study.planning.tracing import trace
from lorica.study.results import Result

Method = Literal["lora", "full", "qlora"]

GPT3 = {
    "model_type": "opt",
    "vocab_size": 50257,
    "hidden_size": 12288,
    "word_embed_proj_dim": 12288,
    "ffn_dim": 4 * 12288,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "max_position_embeddings": 2048,
}
"""GPT-3 175B's shape, as an OPT: the same layers, with a module each for the query and the value."""

OPTIMIZERS = {"adamw": 2, "sgd": 0, "momentum": 1}
"""Copies of what trains that an optimizer keeps."""

# The end of a model's class name → what it learns, where nobody says it.
_HEADS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForMaskedLM": "TOKEN_CLS",  # a label a token here too
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}

_NF4 = (
    4 + 8 / 64 + 32 / (64 * 256)
)  # bits a weight: blocks of 64 with an 8-bit scale, and theirs in blocks of 256


@dataclass(frozen=True, eq=False)
class Plan(Result):
    """The cost of one step of training; all memory in bytes.

    Args:
        method: how it is trained.
        batch: rows of a step.
        length: tokens of a row.
        parameters: of the model, adapters included.
        trainable: of these, that train.
        checkpoint: of the file that training makes.
        full_checkpoint: of the whole model's file.
        weights: of the model as it stands in memory.
        gradients: of what trains.
        optimizer: of the optimizer's state.
        activations: of all else at the fullest moment of the step.
        flops: of the matrix products of a step, forward and backward.
        assumptions: what all this rests on.
        gathered: of the weights that a rank holds whole at the fullest moment where the model is sharded.
    """

    method: str
    batch: int
    length: int
    parameters: int
    trainable: int
    checkpoint: int
    full_checkpoint: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    flops: int
    assumptions: tuple[str, ...]
    gathered: int = 0

    def on_ranks(self, ranks: int) -> dict[str, int]:
        """Bytes at the fullest moment on each of several ranks that each take this batch, by engine.

        ``"ddp"``: everything on each, and gradients once more, in the order in which they are sent.
        ``"fsdp2"`` (`lorica.parallel.shard`): each a part of weights, gradients and optimizer; two blocks at
        a time, and what stands outside of the blocks, are whole.

        Args:
            ranks: how many, at least 1.

        Raises:
            ConfigError: there are none.
        """
        if ranks < 1:
            raise ConfigError(f"ranks must be at least 1, not {ranks}")
        parts = -(-self.states // ranks)
        return {"ddp": self.memory + self.gradients, "fsdp2": parts + self.gathered + self.activations}

    @property
    def states(self) -> int:
        """Bytes of weights, gradients and optimizer: what does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def memory(self) -> int:
        """Bytes of everything at the fullest moment."""
        return self.states + self.activations

    def __str__(self) -> str:
        """A line for each figure, then the assumptions."""
        share = 100 * self.trainable / self.parameters
        rows = [
            ("trains", f"{self.trainable:,} of {self.parameters:,} parameters ({share:.4g} %)"),
            ("checkpoint", f"{_size(self.checkpoint)} (the whole model: {_size(self.full_checkpoint)})"),
            ("weights", _size(self.weights)),
            ("gradients", _size(self.gradients)),
            ("optimizer", _size(self.optimizer)),
            ("activations", f"{_size(self.activations)} ({self.batch} x {self.length} tokens)"),
            ("memory", _size(self.memory)),
            ("arithmetic", f"{self.flops:.3g} FLOPs a step"),
        ]
        lines = [f"{name:<12} {value}" for name, value in rows]
        return "\n".join([*lines, "assumed:", *(f"  {line}" for line in self.assumptions)])


def plan(
    model: Any,
    config: LoraConfig | None = None,
    *,
    method: Method = "lora",
    batch: int = 8,
    length: int = 128,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    checkpointing: bool = False,
) -> Plan:
    """The cost of a step of training, found without a weight of the model.

    The model is made on the meta device and taken through a forward and a backward pass there, so the
    activations are those that its own code holds, not a formula's.

    Args:
        model: transformers' configuration of it, its fields with ``"model_type"``, the folder or Hub name
            that it is loaded from, or ``"gpt3"``.
        config: what LoRA trains; its `task_type` gives the model its head. None is the usual one.
        method: ``"lora"``; ``"full"``, everything trains; ``"qlora"``, LoRA on weights in 4 bits.
        batch: rows of a step.
        length: tokens of a row.
        dtype: of the model's weights and activations; with full fine-tuning of gradients and optimizer too.
            What LoRA trains is in float32.
        optimizer: one of `OPTIMIZERS`.
        checkpointing: whether each block keeps its input alone and is computed again.

    Raises:
        ConfigError: a value is out of range, or no model configuration can be had from `model`.
        TargetError: the configuration names what the model does not have.
        MissingExtra: transformers is not installed.
    """
    return Planner(model, config, method, dtype, optimizer, checkpointing).plan(batch, length)


def largest_batch(
    model: Any,
    gigabytes: float,
    config: LoraConfig | None = None,
    *,
    method: Method = "lora",
    length: int = 128,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    checkpointing: bool = False,
) -> Plan:
    """The plan with the largest batch that fits into so much memory; arguments as of `plan`.

    Args:
        model: as of `plan`.
        gigabytes: memory there is, in units of 10⁹ bytes.
        config: as of `plan`.
        method: as of `plan`.
        length: as of `plan`.
        dtype: as of `plan`.
        optimizer: as of `plan`.
        checkpointing: as of `plan`.

    Raises:
        ConfigError: not even one row fits, or as of `plan`.
    """
    planner = Planner(model, config, method, dtype, optimizer, checkpointing)
    one, two = planner.plan(1, length), planner.plan(2, length)
    room = gigabytes * 1e9
    if one.memory > room:
        raise ConfigError(
            f"not even one row of {length} tokens fits into {gigabytes:g} GB: it takes {_size(one.memory)}, "
            f"of which {_size(one.states)} whatever the batch"
        )
    # Activations grow by the same with every row, once they outweigh what a layer needs in passing.
    batch = 1 + int((room - one.memory) // max(two.memory - one.memory, 1))
    found = planner.plan(batch, length)
    while found.memory > room and batch > 1:
        batch = max(1, min(batch - 1, int(batch * room / found.memory)))
        found = planner.plan(batch, length)
    return found


class Planner:
    """A model on the meta device, ready to be asked for several batches."""

    def __init__(
        self,
        model: Any,
        config: LoraConfig | None,
        method: Method,
        dtype: torch.dtype,
        optimizer: str,
        checkpointing: bool,
    ) -> None:
        if method not in get_args(Method):
            raise ConfigError(f"method must be one of {listing(get_args(Method))}, not {method!r}")
        if optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer must be one of {listing(OPTIMIZERS)}, not {optimizer!r}")
        self.method, self.dtype, self.checkpointing = method, dtype, checkpointing
        self.optimizer = optimizer
        config = config or LoraConfig(task_type="CAUSAL_LM" if model == "gpt3" else None)
        self.model = skeleton(GPT3 if model == "gpt3" else model, config.task_type, dtype=dtype).train()
        self.name = type(self.model).__name__
        head = next((task for end, task in _HEADS.items() if self.name.endswith(end)), None)
        self.task = config.task_type or head
        settings: Any = self.model.config
        settings.use_cache = False  # as trainers do: a cache is for generation
        self.full_checkpoint = _bytes(self.model.parameters())
        self.positions = _positions(self.model)
        # What bitsandbytes packs when transformers loads a model.
        from transformers.pytorch_utils import Conv1D

        self.dense = [m for m in self.model.modules() if type(m) is nn.Linear or isinstance(m, Conv1D)]
        outputs: Any = getattr(self.model, "get_output_embeddings", None)
        self.head = outputs() if outputs else None
        if method != "full":
            adapt(self.model, config)

    def plan(self, batch: int, length: int) -> Plan:
        """The plan for a batch."""
        if batch < 1 or length < 1:
            raise ConfigError(f"batch and length must be at least 1, not {batch} and {length}")
        parameters = list(self.model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        inputs = self._inputs(batch, length)
        try:
            step = trace(self.model, inputs, checkpointing=self.checkpointing)
        except Exception as error:  # of the model's own code, which may be anybody's
            raise ConfigError(
                f"{self.name} cannot be planned: a step on its {listing(inputs)} alone fails with "
                f"{type(error).__name__}: {error}"
            ) from error
        gradients, weights = _bytes(trained), _bytes(parameters)
        passing = 0
        if self.method == "qlora":
            packed = [m.weight for m in self.dense if m is not self.head and not m.weight.requires_grad]
            weights -= _bytes(packed) - round(sum(w.numel() for w in packed) * _NF4 / 8)
            passing = max(map(_bytes, ([w] for w in packed)), default=0)
        return Plan(
            method=self.method,
            batch=batch,
            length=length,
            parameters=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in trained),
            checkpoint=self.full_checkpoint if self.method == "full" else gradients,
            full_checkpoint=self.full_checkpoint,
            weights=weights,
            gradients=gradients,
            optimizer=OPTIMIZERS[self.optimizer] * gradients,
            activations=max(step.held - gradients, 0) + passing,
            flops=step.flops,
            assumptions=self._assumptions(),
            gathered=round(self._gathered() * weights / _bytes(parameters)),
        )

    def _gathered(self) -> int:
        """Bytes of the two largest blocks, and of what is in none, as the weights were made."""
        sizes = [_bytes(block.parameters()) for block in blocks_of(self.model)]
        return max(_bytes(self.model.parameters()) - sum(sizes), 0) + sum(sorted(sizes)[-2:])

    def _inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        config: Any = self.model.config
        if hasattr(config, "image_size") and not hasattr(config, "vocab_size"):
            size = (
                config.image_size if isinstance(config.image_size, (tuple, list)) else [config.image_size] * 2
            )
            return {
                "pixel_values": torch.empty(
                    batch, config.num_channels, *size, dtype=self.dtype, device="meta"
                )
            }
        if self.positions is not None and length > self.positions:
            raise ConfigError(
                f"length must be at most {self.positions}, the positions that {self.name} has, not {length}"
            )
        ids = torch.empty(batch, length, dtype=torch.long, device="meta")
        for name in (
            "pad_token_id",
            "decoder_start_token_id",
        ):  # which does not matter; that there is one does
            if getattr(config, name, None) is None:
                setattr(config, name, 0)
        if self.task == "SEQ_CLS":
            labels = ids[:, 0]
            if getattr(config, "problem_type", None) == "multi_label_classification":
                labels = torch.empty(batch, config.num_labels, dtype=self.dtype, device="meta")
            return {"input_ids": ids, "labels": labels if config.num_labels > 1 else labels.to(self.dtype)}
        if self.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS"):
            return {"input_ids": ids, "labels": ids}
        if getattr(config, "is_encoder_decoder", False):
            return {"input_ids": ids, "decoder_input_ids": ids}
        return {"input_ids": ids}

    def _assumptions(self) -> tuple[str, ...]:
        name = str(self.dtype).removeprefix("torch.")
        states = f"gradients and {self.optimizer}'s {OPTIMIZERS[self.optimizer]} copies of what trains"
        of = f"{states} too" if self.method == "full" else f"{states} in the dtypes of A, B and the head"
        lines = [
            f"weights and activations in {name}; {of}",
            "activations: what the model's own code holds at the fullest moment of a step, every row full; "
            "memory that an allocator keeps back is not counted",
        ]
        if self.checkpointing:
            lines.append("each block keeps its input alone and is computed again in the backward pass")
        if self.method == "qlora":
            lines.append(
                f"linear layers but the output head in {_NF4:.3f} bits a weight (NF4, double quantization); "
                f"one layer at a time stands beside that in {name}"
            )
        return tuple(lines)


def _positions(model: nn.Module) -> int | None:
    """The number of tokens that a model has places for; None where it needs no table of them."""
    most = getattr(model.config, "max_position_embeddings", None)
    tables = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in path or path.endswith("wpe"))
    ]
    # RoBERTa's count from behind the padding's place.
    places = [t.num_embeddings - (0 if t.padding_idx is None else t.padding_idx + 1) for t in tables]
    return min(most, *places) if isinstance(most, int) and places else None


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.4g} {unit}"
