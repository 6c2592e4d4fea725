"""What the ranks of these tests do: the models, the adapters, and one training in two ways."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import packing
import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import lorica
from lorica import parallel
from lorica.model.sharded import part_of

ROWS = torch.randint(3, tiny.VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(1))
Rows = list[Tensor]
FILE = "adapter_model.safetensors"


class Fused(nn.Module):
    """Modules whose weights others read, beside one that is called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(tiny.VOCABULARY, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.lin = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.encoder(x + self.attention(x, x, x)[0])
        return self.head(torch.tanh(self.lin(x))).mean(1)


class Case(NamedTuple):
    """An adapter on a model, and how it trains.

    Args:
        model: name of a `tiny.transformer`; None for `Fused`.
        config: the adapter's.
        settings: of the model.
        dtype: of the model.
        checkpointing: whether it checkpoints, and whether by reentrant passes.
        accumulate: train on half the rows at a time.
        second: a second adapter, which trains too.
        quantized: whether the base is in NF4.
    """

    model: str | None
    config: lorica.AdapterConfig
    settings: Mapping[str, Any] = MappingProxyType({})
    dtype: torch.dtype = torch.float32
    checkpointing: bool | None = None
    accumulate: bool = False
    second: lorica.AdapterConfig | None = None
    quantized: bool = False


def lora(*targets: str, **settings: Any) -> lorica.LoraConfig:
    given: dict[str, Any] = {"r": 2, "target_modules": [*targets] or ["q_proj", "v_proj", "down_proj"]}
    return lorica.LoraConfig(**given | settings)


_TIED = {"tie_word_embeddings": True}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BERT = "bert-classifier"
CASES = {
    "lora": Case("llama", lora()),
    "rank 1": Case("llama", lora(r=1)),
    "rslora": Case("llama", lora(use_rslora=True)),
    "dora": Case("llama", lora(use_dora=True)),
    "pissa": Case("llama", lora(init_lora_weights="pissa")),
    "olora": Case("llama", lora(init_lora_weights="olora")),
    "bias on B": Case(_BERT, lora("query", lora_bias=True), _STILL),
    "biases of all": Case(_BERT, lora("query", bias="all"), _STILL),
    "biases of adapted": Case(_BERT, lora("query", bias="lora_only"), _STILL),
    "biases in half": Case(_BERT, lora("query", bias="all"), _STILL, torch.bfloat16),
    "a head": Case(_BERT, lora("query", task_type="SEQ_CLS"), _STILL),
    "modules whole": Case("llama", lora(modules_to_save=["lm_head", "embed_tokens"])),
    "modules whole in half": Case("llama", lora(modules_to_save=["lm_head"]), {}, torch.bfloat16),
    "token rows": Case("llama", lora(trainable_token_indices=[3, 5])),
    "token rows, tied": Case("llama", lora(trainable_token_indices=[3, 5]), _TIED),
    "embeddings": Case("llama", lora("embed_tokens", "q_proj", "lm_head")),
    "tied": Case("llama", lora("embed_tokens", "lm_head", ensure_weight_tying=True), _TIED),
    "experts": Case(
        "mixtral", lora("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    ),
    "read past": Case(None, lora("attention", "linear1", "linear2", "lin")),
    "conv1d": Case("gpt2", lora("c_attn"), _GPT2),
    "two adapters": Case("llama", lora(), second=lora("o_proj", "q_proj")),
    "accumulation": Case("llama", lora(), accumulate=True),
    "checkpointing": Case("llama", lora(use_dora=True), checkpointing=False),
    "checkpointing, reentrant": Case("llama", lora(), checkpointing=True),
    "nf4": Case("llama", lora(), quantized=True),
    "bitfit": Case(_BERT, lorica.BitFitConfig(), _STILL),
    "accumulation, checkpointing": Case("llama", lora(use_dora=True), checkpointing=False, accumulate=True),
    "adapter H": Case("llama", lorica.AdapterHConfig(bottleneck=4)),
    "adapter L": Case("llama", lorica.AdapterLConfig(bottleneck=4)),
    "adapter P": Case("llama", lorica.AdapterPConfig(bottleneck=4)),
    "adapter D": Case("llama", lorica.AdapterDConfig(bottleneck=4, dropped=1)),
    "prefix embedding": Case("llama", lorica.PreEmbedConfig()),
    "prefix layer": Case("llama", lorica.PreLayerConfig()),
    "top layers": Case("llama", lorica.TopConfig()),
    "all": Case("llama", lorica.FullConfig()),
}
# Their gradients are summed up in another order than in one process, in parts and in copies.
_SUMS = {"token rows, tied", "tied", "accumulation", "accumulation, checkpointing"}
SUMMED_OTHERWISE = (_SUMS, _SUMS)
# What stands in the base's place is sharded there, and stays.
FIXED = {
    "pissa",
    "olora",
    "biases of all",
    "biases of adapted",
    "biases in half",
    "bitfit",
    "top layers",
    "all",
}


def build(case: Case) -> Any:
    """The model with its adapter, in training, away from the start."""
    if case.quantized:
        model: Any = quantized()
    elif case.model is None:
        model = Fused()
    else:
        model = tiny.transformer(case.model, dtype=case.dtype, **case.settings)
    model.train()
    lorica.adapt(model, case.config, seed=0)
    if case.second is not None:
        lorica.adapt(model, case.second, "second", seed=1)
        lorica.active(model, ["default", "second"])
    tiny.shake(model, size=0.1)
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing})
        if case.checkpointing:
            model.enable_input_require_grads()
    return model


def quantized(form: str = "nf4") -> nn.Module:
    """A model whose linear layers are packed."""
    model = tiny.transformer("llama", hidden_size=64, intermediate_size=64)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, packing.quantized(module, form))
    return model


def loss_of(model: Any, rows: Tensor) -> Tensor:
    outputs = model(input_ids=rows)
    if isinstance(outputs, Tensor):  # of `Fused`
        return outputs.square().mean()
    logits = outputs.logits
    if logits.ndim == 2:
        return F.cross_entropy(logits.float(), rows[:, 0] % 2)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())


def train(model: Any, batches: Iterable[Rows], *, sync: Callable[[bool], None] | None = None) -> list[float]:
    """Three steps; the gradient of each is the mean over what is in its batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    norms = []
    for rows in batches:
        for i, part in enumerate(rows):
            if sync is not None:
                sync(i == len(rows) - 1)
            loss_of(model, part).div(len(rows)).backward()
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


class Outcome(NamedTuple):
    """What came of a case, trained in parts (`shard`) and as whole copies (torch's DDP).

    Args:
        apart: the largest difference of any value from one process's, in parts and in copies.
        moved: the least that any tensor moved at most.
        norms: of the gradients, by step: in one process, in parts, in copies.
        same_file: whether the file is one process's, to the bit, in parts and in copies.
        base_apart: how far the outputs without the adapter are from the base's; a message where it refuses.
    """

    apart: tuple[float, float]
    moved: float
    norms: tuple[list[float], list[float], list[float]]
    same_file: tuple[bool, bool]
    base_apart: float | str


def together_and_alone(names: list[str], folder: str) -> dict[str, Outcome | str]:
    """Each case trained by all ranks, in parts and as copies, and by each rank alone on all rows."""
    found: dict[str, Outcome | str] = {}
    for i, name in enumerate(names):
        try:
            found[name] = outcome(CASES[name], Path(folder) / str(i))
        except Exception:
            found[name] = traceback.format_exc()
    return found


def outcome(case: Case, folder: Path) -> Outcome:
    rank = dist.get_rank()
    one, parts, copies = build(case), parallel.shard(build(case)), DistributedDataParallel(build(case))
    start = parallel.gather(parts, "default").named_tensors()
    assert part_of(parts) is not None
    rows = [ROWS[:1], ROWS[1:2], ROWS[2:3], ROWS[3:]] if case.accumulate else [ROWS[:2], ROWS[2:]]
    own = rows[rank * len(rows) // 2 : (rank + 1) * len(rows) // 2]
    norms = (
        train(one, [rows] * 3),
        train(parts, [own] * 3, sync=parts.set_requires_gradient_sync if case.accumulate else None),
        train(copies, [own] * 3, sync=lambda last: setattr(copies, "require_backward_grad_sync", last)),
    )
    alone = lorica.extract(one, "default")
    expected = alone.named_tensors()
    file = (lorica.write(alone, folder / f"one-{rank}") / FILE).read_bytes()
    lorica.save(parts, folder / "parts", "default")
    lorica.save(copies.module, folder / f"copies-{rank}", "default")
    found = [
        parallel.gather(parts, "default").named_tensors(),
        lorica.extract(copies.module, "default").named_tensors(),
    ]
    assert all(tensors.keys() == expected.keys() for tensors in found)
    return Outcome(
        (_apart(found[0], expected), _apart(found[1], expected)),
        min(float((value.float() - start[key].float()).abs().max()) for key, value in found[0].items()),
        norms,
        (
            (folder / "parts" / FILE).read_bytes() == file,
            (folder / f"copies-{rank}" / FILE).read_bytes() == file,
        ),
        base(one, parts),
    )


def _apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(float((found[key].float() - value.float()).abs().max()) for key, value in expected.items())


@torch.no_grad()
def base(one: Any, several: Any) -> float | str:
    """How far apart the two are where no adapter acts."""
    lorica.disabled(one)
    try:
        lorica.disabled(several)
    except lorica.LoricaError as error:
        return str(error)
    outputs = [model.eval()(input_ids=ROWS[:2]) for model in (one, several)]
    first, second = (y if isinstance(y, Tensor) else y.logits for y in outputs)
    return float((first - second).abs().max())


def refused(folder: str) -> dict[str, str]:
    """What each of these says on a sharded model."""
    model = parallel.shard(build(CASES["lora"]))
    before = parallel.gather(model).named_tensors()
    rank = dist.get_rank()
    (Path(folder) / "file").touch()
    tries: dict[str, Callable[[], Any]] = {
        "merge": lambda: lorica.merge(model),
        "switch": lambda: lorica.switch(model, "default"),
        "delta weight": lambda: lorica.delta_weight(model, "model.layers.0.self_attn.q_proj"),
        "detach": lambda: lorica.detach(model),
        "adapt": lambda: lorica.adapt(model, lora("o_proj"), "other"),
        "adapt biases": lambda: lorica.adapt(model, lorica.BitFitConfig(), "other"),
        "attach": lambda: lorica.attach(model, parallel.gather(model), "other"),
        "shard again": lambda: parallel.shard(model),
        "int8": lambda: parallel.shard(lorica.adapt(quantized("int8"), lora())),
        "not adapted": lambda: parallel.shard(nn.Linear(2, 2)),
        "no such block": lambda: parallel.shard(build(CASES["lora"]), blocks=["LlamaDecoderLayr"]),
        "a file in the way": lambda: lorica.save(model, Path(folder) / "file" / "adapter"),
        "another make": lambda: lorica.load_weights(
            model, lorica.save(build(CASES["rank 1"]), f"{folder}/{rank}")
        ),
    }
    said = {what: _said(action) for what, action in tries.items()}
    after = parallel.gather(model).named_tensors()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    return said


def adapters_apart() -> list[str]:
    """Two adapters, of which each rank trains another; then both the same; then rows that differ by rank."""
    model, rank = parallel.shard(build(CASES["two adapters"])), dist.get_rank()
    said = []

    def step() -> None:
        loss_of(model, ROWS[:2]).backward()

    lorica.active(model, ["default", "second"][rank])
    said.append(_said(step))
    lorica.active(model, "second")
    said.append(_said(step))
    with lorica.mixed(model, ["default", ["second", None][rank]]):
        said.append(_said(step))
    with torch.no_grad(), lorica.active(model, ["default", "second"][rank]):
        loss_of(model, ROWS[:2])  # nothing is averaged
    return said


def by_hand() -> list[str]:
    """As `adapters_apart`, for a model that was sharded without lorica."""
    from torch.distributed.fsdp import fully_shard

    model: Any = build(CASES["two adapters"])
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    lorica.active(model, ["default", "second"][dist.get_rank()])
    return [_said(lambda: loss_of(model, ROWS[:2]))]


def _said(action: Callable[[], Any]) -> str:
    try:
        action()
    except lorica.LoricaError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def after_wrapping() -> dict[str, str]:
    """What `lorica.adapt` says of a model in a wrapper, or out of it."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    wrapped = nn.parallel.DistributedDataParallel(tiny.transformer("llama"))
    mesh = dist.init_device_mesh("cpu", (2,))
    split = parallelize_module(
        tiny.transformer("llama"), mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()}
    )
    return {
        "ddp": _said(lambda: lorica.adapt(wrapped, lora())),
        "inside ddp": _said(lambda: lorica.adapt(wrapped.module, lora())),
        "tensor parallel": _said(lambda: lorica.adapt(split, lora("q_proj"))),
    }


def loaded(folder: str) -> dict[str, tuple[float, float]]:
    """How far a sharded model is from one process's, by values and outputs, that loaded the same file."""
    found = {}
    for name in (
        "lora",
        "pissa",
        "biases of all",
        "modules whole",
        "token rows, tied",
        "tied",
        "experts",
        "prefix layer",
    ):
        case = CASES[name]
        one = build(case)
        tiny.shake(one, seed=5, size=0.2)
        lorica.save(one, f"{folder}/{name}-{dist.get_rank()}")
        several = parallel.shard(build(case))
        lorica.load_weights(several, f"{folder}/{name}-{dist.get_rank()}")
        expected, got = lorica.extract(one).named_tensors(), parallel.gather(several).named_tensors()
        values = max(float((got[key] - value).abs().max()) for key, value in expected.items())
        with torch.no_grad():
            outputs = float((loss_of(one.eval(), ROWS) - loss_of(several.eval(), ROWS)).abs())
        found[name] = values, outputs
    return found


def goes_on(folder: str) -> dict[str, float | str]:
    """A run that was saved and gone on with, against the run itself; and what does not fit."""
    rank, case = dist.get_rank(), CASES["token rows"]
    half = ROWS[2 * rank : 2 * rank + 2]

    def made(case: Case = case) -> tuple[Any, torch.optim.Optimizer]:
        model = parallel.shard(build(case))
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        loss_of(model, half).backward()
        optimizer.step()
        optimizer.zero_grad()

    first, again = made(), made()
    step(*first)
    step(*first)
    parallel.save_checkpoint(*first, f"{folder}/2")
    parallel.save_checkpoint(*first, f"{folder}/2")
    lorica.save(first[0], f"{folder}/adapter")
    parallel.load_checkpoint(*again, f"{folder}/2")
    for run in (first, again):
        step(*run)
    ours, theirs = (parallel.gather(model).named_tensors() for model, _ in (first, again))
    return {
        "apart": max(float((ours[key] - value).abs().max()) for key, value in theirs.items()),
        "none": _said(lambda: parallel.load_checkpoint(*again, folder)),
        "another": _said(lambda: parallel.load_checkpoint(*made(CASES["rank 1"]), f"{folder}/2")),
    }


def settings() -> dict[str, float]:
    """How far one step is from one process's, for the ways in which a model can be sharded."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    rank, found = dist.get_rank(), {}
    ways: dict[str, dict[str, Any]] = {
        "blocks by class": {"blocks": ["LlamaMLP", "LlamaAttention"]},
        "blocks by module": {"blocks": ()},
        "kept after the forward pass": {"reshard": False},
        "a mesh": {"mesh": dist.init_device_mesh("cpu", (2,))},
        "bfloat16": {"precision": torch.bfloat16},
        "a policy": {"precision": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    }
    for way, given in ways.items():
        one, several = build(CASES["dora"]), build(CASES["dora"])
        if way == "blocks by module":
            given["blocks"] = [several.model.layers[1]]
        parallel.shard(several, **given)
        gradients = []
        for model, parts in ((one, [ROWS[:2], ROWS[2:]]), (several, [ROWS[2 * rank : 2 * rank + 2]])):
            sum(loss_of(model, rows) for rows in parts).div(len(parts)).backward()  # type: ignore[union-attr]
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        first, second = gradients
        assert first.keys() == second.keys()
        whole = {name: g.full_tensor() for name, g in second.items()}
        assert all(g.dtype == torch.float32 for g in whole.values())
        largest = max(float(g.abs().max()) for g in first.values())
        found[way] = max(float((whole[name] - g).abs().max()) for name, g in first.items()) / largest
    return found
