"""What the ranks of these tests do with split models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from parallel import work
from torch import Tensor, nn

import lorica
from lorica import parallel

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = {
    "lora": work.lora(*LINEAR),
    "dora": work.lora(*LINEAR, use_dora=True),
    "bias on B": work.lora(*LINEAR, lora_bias=True),
    "head too": work.lora("q_proj", "lm_head"),
}


def _biased() -> Any:
    settings: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
    return tiny.transformer("llama", num_attention_heads=4, num_key_value_heads=4, **settings)


def _model(config: lorica.AdapterConfig) -> Any:
    model = _biased()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    lorica.adapt(model.train(), config, seed=0)
    tiny.shake(model, size=0.1)
    return model


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(one: Any, several: Any, rows: Tensor, own: Tensor) -> dict[str, float]:
    """Loss, gradients and what two steps make of the adapter, several ranks' against one process's."""
    losses = [work.loss_of(one, rows), work.loss_of(several, own)]
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    got = {name: _whole(p.grad) for name, p in several.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    worst = max(
        float((got[name] - g).abs().max() / g.abs().max().clamp_min(1e-3)) for name, g in expected.items()
    )
    total = losses[1].detach().clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    for model, batch in ((one, rows), (several, own)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.step()
            optimizer.zero_grad()
            work.loss_of(model, batch).backward()
    ours, theirs = (a.named_tensors() for a in (parallel.gather(several), lorica.extract(one)))
    moved = max(float((ours[key] - value).abs().max()) for key, value in theirs.items())
    return {
        "loss": abs(float(losses[0]) - float(total) / dist.get_world_size()),
        "gradients": worst,
        "steps": moved,
    }


def split_in_two(folder: str) -> dict[str, dict[str, float]]:
    mesh, found = dist.init_device_mesh("cpu", (2,)), {}
    for name, config in CASES.items():
        one, several = _model(config), parallel.split(_model(config), mesh)
        found[name] = compare(one, several, work.ROWS, work.ROWS)
        path = lorica.save(several, f"{folder}/{name}")
        again = parallel.split(_model(config), mesh)
        lorica.load_weights(again, path)
        with torch.no_grad():
            found[name]["loaded"] = float(
                (work.loss_of(again, work.ROWS) - work.loss_of(several, work.ROWS)).abs()
            )
    return found


def four(folder: str) -> dict[str, dict[str, float]]:
    """Split in two, and sharded in two: each pair of split ranks has half of the rows."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    half = dist.get_rank() // 2
    found = {}
    for name in ("lora", "dora"):
        one = _model(CASES[name])
        several = parallel.shard(parallel.split(_model(CASES[name]), mesh["tensor"]), mesh["data"])
        found[name] = compare(one, several, work.ROWS, work.ROWS[2 * half : 2 * half + 2])
    one, several = _model(CASES["dora"]), parallel.shard(_model(CASES["dora"]), mesh)  # replicas of shards
    rank = dist.get_rank()
    found["replicas"] = compare(one, several, work.ROWS, work.ROWS[rank : rank + 1])
    config = CASES["dora"]
    with torch.device("meta"):
        bare = type(one)(one.config).train()
    lorica.adapt(bare, config, seed=0)
    parallel.shard(parallel.split(bare, mesh["tensor"]), mesh["data"])
    base = _base()
    parallel.materialize(bare, base if dist.get_rank() == 0 else None, seed=0)
    whole = _biased()
    lorica.adapt(whole.train(), config, seed=0)
    found["made bare"] = compare(whole, bare, work.ROWS, work.ROWS[2 * half : 2 * half + 2])
    lorica.save(bare, f"{folder}/bare")
    files = [Path(f"{folder}/bare"), lorica.write(parallel.gather(bare), f"{folder}/{rank}")]
    first, second = ((file / "adapter_model.safetensors").read_bytes() for file in files)
    assert first == second
    return found


def _base() -> dict[str, Tensor]:
    return _biased().state_dict()


def refused() -> dict[str, str]:
    mesh = dist.init_device_mesh("cpu", (2,))

    def tried(config: lorica.AdapterConfig, plan: Any = None, model: Any = None) -> str:
        model = model or _model(config)
        return work._said(lambda: parallel.split(model, mesh, plan))

    head = {"lm_head": "colwise_gather_output"}
    twice = parallel.split(_model(work.lora()), mesh)
    return {
        "dropout": tried(work.lora("q_proj", lora_dropout=0.1)),
        "a head": tried(work.lora(modules_to_save=["lm_head"]), head),
        "unknown style": tried(work.lora(), {"lm_head": "diagonal"}),
        "unknown module": tried(work.lora(), {"lm_haed": "colwise"}),
        "no plan": tried(work.lora(), None, lorica.adapt(work.Fused(), work.lora("lin"))),
        "experts": tried(work.lora(), None, work.build(work.CASES["experts"])),
        "twice": work._said(lambda: parallel.split(twice, mesh)),
        "merge": work._said(lambda: lorica.merge(twice)),
        "adapt": work._said(lambda: lorica.adapt(twice, work.lora("o_proj"), "other")),
    }


class Pair(nn.Module):
    """Two layers of no library."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def by_torch() -> float:
    """torch's `parallelize_module` with lorica's styles on a model of one's own."""
    from torch.distributed.tensor.parallel import parallelize_module

    config, x = lorica.LoraConfig(r=2, target_modules=["up", "down"]), torch.randn(3, 6)
    one, several = (lorica.adapt(Pair(), config, seed=0) for _ in range(2))
    for model in (one, several):
        tiny.shake(model)
    plan: dict[str, Any] = {"up": parallel.Colwise(), "down": parallel.Rowwise()}
    parallelize_module(several, dist.init_device_mesh("cpu", (2,)), plan)
    return float((one(x) - several(x)).abs().max())
