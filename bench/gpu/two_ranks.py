"""Two processes against one: DDP and FSDP2, each rank with half of the rows."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from llama import decoder, rows_of
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import lorica
from lorica import parallel

STEPS, ROWS, LENGTH = 4, 4, 128


def compare(engine: str, device: torch.device, *, small: bool) -> dict[str, Any]:
    """Train a few steps in both ways.

    Returns:
        ``ok``, the largest distance of a trained number over the largest, and seconds per step.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _rank, (engine, device.type, small, folder), nprocs=2, start_method="spawn"
        )
        ours = torch.load(Path(folder) / "weights", weights_only=False)
    theirs, seconds = train(_model(device, small), device, list(range(ROWS)))
    tensors = lorica.extract(theirs).named_tensors()
    apart = max(float((ours["tensors"][key] - value.cpu()).abs().max()) for key, value in tensors.items())
    largest = max(float(value.abs().max()) for value in tensors.values())
    return {
        "ok": apart / largest < 1e-3,
        "apart": apart / largest,
        "step, two processes": ours["seconds"],
        "step, one": seconds,
    }


def _rank(rank: int, engine: str, kind: str, small: bool, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model = _model(device, small)
    if engine == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        mesh = distributed.device_mesh.init_device_mesh(kind, (2,))
        wrapped = parallel.shard(model, mesh)
    half = ROWS // 2
    trained, seconds = train(wrapped, device, list(range(rank * half, (rank + 1) * half)))
    adapter = parallel.gather(trained) if engine == "fsdp2" else lorica.extract(model)
    if rank == 0:
        tensors = {key: value.cpu() for key, value in adapter.named_tensors().items()}
        torch.save({"tensors": tensors, "seconds": seconds}, Path(folder) / "weights")
    distributed.barrier()
    distributed.destroy_process_group()


def _model(device: torch.device, small: bool) -> nn.Module:
    model = decoder(device, torch.float32, small=small)
    return lorica.adapt(
        model, lorica.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]), seed=0
    )


def train(model: Any, device: torch.device, rows: list[int]) -> tuple[Any, float]:
    """Some steps on some of the rows; the model and seconds per step, the first left out."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=1e-3)
    taken = []
    for number in range(STEPS):
        batch = {
            key: value[rows].to(device)
            for key, value in rows_of(nn.Linear(1, 1), ROWS, LENGTH, number).items()
        }
        began = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return model, sum(taken[1:]) / (STEPS - 1)
