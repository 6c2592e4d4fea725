"""What the ranks of these tests do with models that were made without values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from anonymous_memory import anonymous
from parallel import work
from torch import nn
from torch.distributed.fsdp import fully_shard

import lorica
from lorica import parallel
from lorica.parallel import materialize, shard

CASES = (
    *(
        "lora",
        "dora",
        "bias on B",
        "biases of all",
        "a head",
        "token rows, tied",
        "tied",
        "experts",
        "conv1d",
    ),
    *("embeddings", "biases in half", "modules whole in half", "adapter H", "prefix embedding"),
)


def whole(name: str) -> Any:
    """A case's model with its values and no adapter."""
    case = work.CASES[name]
    assert case.model is not None
    return tiny.transformer(case.model, dtype=case.dtype, **case.settings)


def bare(name: str) -> Any:
    """The same without values."""
    like = whole(name)
    with torch.device("meta"):
        return type(like)(like.config).to(work.CASES[name].dtype).train()


def one_step(model: Any, rows: work.Rows) -> None:
    work.train(model.train(), [rows])


def as_whole(folder: str, names: tuple[str, ...] = CASES) -> dict[str, tuple[float, float]]:
    """How far a model without values, sharded and filled, is from a whole one: at the start, after a step."""
    rank, found = dist.get_rank(), {}
    for i, name in enumerate(names):
        config = work.CASES[name].config
        one = lorica.adapt(whole(name), config, seed=3)
        several = shard(lorica.adapt(bare(name), config, seed=0))
        if i % 2 or name == "experts":  # whose files transformers arranges anew as it loads them
            materialize(several, whole(name).state_dict() if rank == 0 else None, seed=3)
        else:
            materialize(several, f"{folder}/{name}", seed=3)
        start = apart(one, several)
        one_step(one, [work.ROWS[:2], work.ROWS[2:]])
        one_step(several, [work.ROWS[2 * rank : 2 * rank + 2]])
        found[name] = start, apart(one, several)
    return found


def apart(one: nn.Module, several: nn.Module) -> float:
    expected, got = lorica.extract(one).named_tensors(), parallel.gather(several).named_tensors()
    assert got.keys() == expected.keys()
    return max(float((got[key].float() - value.float()).abs().max()) for key, value in expected.items())


def unfilled(folder: str) -> dict[str, str]:
    """What a first pass says, or `materialize`, of adapters without values."""
    saved = lorica.save(work.build(work.CASES["lora"]), f"{folder}/saved-{dist.get_rank()}")

    def passes(model: nn.Module) -> str:
        return work._said(lambda: work.loss_of(model, work.ROWS[:2]))

    def fresh() -> nn.Module:
        return lorica.adapt(bare("lora"), work.lora(), seed=0)

    emptied = shard(fresh()).to_empty(device="cpu")
    by_hand: Any = lorica.adapt(bare("lora"), work.lora(), seed=0)
    fully_shard(by_hand)
    by_hand.to_empty(device="cpu")
    loaded = shard(lorica.load(bare("lora"), saved))
    materialize(loaded, f"{folder}/lora", seed=0)
    said = {"to_empty": passes(emptied), "by hand": passes(by_hand), "loaded": passes(loaded)}
    lorica.load_weights(loaded, saved)
    said["loaded again"] = passes(loaded)
    assert apart(lorica.load(whole("lora"), saved), loaded) == 0.0
    tries: dict[str, Callable[[], Any]] = {
        "another base": lambda: materialize(fresh(), f"{folder}/a head", seed=0),
        "no files": lambda: materialize(fresh(), folder, seed=0),
        "no state": lambda: materialize(fresh(), None, seed=0),
        "pissa": lambda: materialize(lorica.adapt(bare("pissa"), work.CASES["pissa"].config), None, seed=0),
        "no adapter": lambda: materialize(bare("lora"), None, seed=0),
        "buffers": lambda: materialize(*_own(), seed=0),
    }
    return said | {what: work._said(action) for what, action in tries.items()}


class Own(nn.Module):
    """A model of no library, with a buffer that its state does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def _own() -> tuple[nn.Module, Any]:
    with torch.device("meta"):
        model = Own()
    state = Own().state_dict()
    return lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["lin"])), state


def growth(folder: str, way: str) -> tuple[int, float]:
    """By how much anonymous memory grew at most until a model was sharded; and its loss."""
    import threading

    import transformers
    from safetensors.torch import load_file

    most, before, stop = [0], anonymous(), threading.Event()

    def look() -> None:
        while not stop.wait(0.002):
            most[0] = max(most[0], anonymous() - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    adapter, config = work.lora("q_proj", "v_proj", r=8), transformers.AutoConfig.from_pretrained(folder)
    if way == "bare":
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        materialize(shard(lorica.adapt(model, adapter, seed=0)), folder, seed=1)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for file in Path(folder).glob("*.safetensors"):
            model.load_state_dict(load_file(file), strict=False)
        shard(lorica.adapt(model, adapter, seed=1))
    stop.set()
    watcher.join()
    return most[0], float(work.loss_of(model, work.ROWS))


def write_base(folder: Path, **settings: Any) -> None:
    """A Llama with random weights, in shards."""
    tiny.transformer("llama", **settings).save_pretrained(folder, max_shard_size="16MB")
