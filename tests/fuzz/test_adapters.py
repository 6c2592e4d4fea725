"""Adapters, checkpoints and bases damaged at random: a LoricaError each, and no model is changed."""

from __future__ import annotations

import json
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import streams
import torch
from fuzz import damage
from torch import Tensor, nn

import lorica
from lorica.checkpoint import loralib, stream


class Small(nn.Module):
    """One layer of each kind that an adapter may be on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.first = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)


def model() -> Small:
    torch.manual_seed(0)
    return Small()


def configs() -> Iterator[tuple[str, lorica.LoraConfig]]:
    targets = ["table", "conv", "first"]
    yield (
        "plain",
        lorica.LoraConfig(r=2, target_modules=targets, rank_pattern={"fir.t": 3}, modules_to_save=["head"]),
    )
    yield (
        "dora",
        lorica.LoraConfig(
            r=2, target_modules=["first"], use_dora=True, bias="all", alpha_pattern={"first": 4}
        ),
    )
    yield "pissa", lorica.LoraConfig(r=2, target_modules=["first", "head"], init_lora_weights="pissa")
    yield (
        "tokens",
        lorica.LoraConfig(r=2, target_modules=["first"], trainable_token_indices={"table": [1, 3]}),
    )
    yield "biased", lorica.LoraConfig(r=2, target_modules="fir.*|he.d", lora_bias=True, use_rslora=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    for name, config in configs():
        lorica.save(lorica.adapt(model(), config), folder / name)
    return {path.name: path for path in folder.iterdir()}


def state(root: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in root.state_dict().items()}


def attempt(folder: Path, what: str, draw: random.Random) -> None:
    """Read it, and put it on a model, which is as it was where that fails."""
    root = model()
    before, kinds = state(root), [type(module) for module in root.modules()]

    def load() -> None:
        lorica.read(folder)
        lorica.load(root, folder, trainable=draw.random() < 0.3)
        root.first(torch.ones(2, 6))
        lorica.merge(root)
        lorica.save(lorica.restore(root) or root, folder / "again")

    if not damage.survives(load, what, folder) and not lorica.adapters(root):
        after = state(root)
        assert before.keys() == after.keys(), what
        assert all(torch.equal(before[name], after[name]) for name in before), what
        assert [type(module) for module in root.modules()] == kinds, what


def run(
    tmp_path: Path, name: str, harm: Callable[[Path, random.Random], None], sources: dict[str, Path]
) -> None:
    draw = damage.generator(name)
    for case in range(damage.CASES):
        source = draw.choice(sorted(sources.values()))
        folder = tmp_path / str(case)
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        harm(folder, draw)
        attempt(folder, f"{name} {case} of {source.name}", draw)
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()


def test_configurations(tmp_path: Path, whole: dict[str, Path]) -> None:
    def harm(folder: Path, draw: random.Random) -> None:
        path = folder / "adapter_config.json"
        path.write_bytes(damage.as_text(damage.harmed(json.loads(path.read_text()), draw), draw))

    run(tmp_path, "config", harm, whole)


def test_safetensors(tmp_path: Path, whole: dict[str, Path]) -> None:
    def harm(folder: Path, draw: random.Random) -> None:
        path = folder / "adapter_model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        way = draw.random()
        if way < 0.4:
            tensors = odd_tensors(safetensors.torch.load(content), draw, pickled=False)
            safetensors.torch.save_file(tensors, path, metadata=header.get("__metadata__"))
        elif way < 0.8:
            text = damage.as_text(damage.harmed(header, draw), draw)
            path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        else:
            path.write_bytes(damage.corrupted(content, draw))

    run(tmp_path, "safetensors", harm, whole)


def test_pickled_weights(tmp_path: Path, whole: dict[str, Path]) -> None:
    def harm(folder: Path, draw: random.Random) -> None:
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        path = folder / "adapter_model.bin"
        torch.save(odd_tensors(tensors, draw, pickled=True), path)
        if draw.random() < 0.3:
            path.write_bytes(damage.corrupted(path.read_bytes(), draw))

    run(tmp_path, "pickled", harm, whole)


def test_loralibs_checkpoints(tmp_path: Path) -> None:
    draw = damage.generator("loralib")
    whole = {"q.lora_A": torch.ones(4, 6), "q.lora_B": torch.ones(6, 4), "k.bias": torch.ones(3)}
    for case in range(damage.CASES):
        path = tmp_path / draw.choice(("a.bin", "a.safetensors"))
        pickled = path.suffix == ".bin"
        tensors = odd_tensors(whole, draw, pickled=pickled)
        torch.save(tensors, path) if pickled else safetensors.torch.save_file(tensors, path)
        if draw.random() < 0.3:
            path.write_bytes(damage.corrupted(path.read_bytes(), draw))
        damage.survives(lambda path=path: loralib.read(path, 8), f"loralib {case}", path)


def odd_tensors(tensors: dict[str, Tensor], draw: random.Random, *, pickled: bool) -> Any:
    """Some of them as no layer can take them."""
    found: dict[Any, Any] = dict(tensors)
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice(sorted(map(str, found)) or ["x"])
        tensor = found.pop(name, torch.ones(2, 2))
        if not isinstance(tensor, Tensor) or not is_plain(tensor):
            continue
        way = draw.randrange(17 if pickled else 9)
        if way == 0:
            continue
        if way == 1:
            found[
                draw.choice(("base_model.model.x.lora_A.weight", "x", f"{name}.lora_A.weight", name[:-3]))
            ] = tensor
        elif way == 2:
            found[name] = tensor.reshape(draw.choice(((-1,), (1, -1), (-1, 1), (1, 1, -1), (-1, 1, 1))))
        elif way == 3:
            kinds = (torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64)
            found[name] = tensor.to(draw.choice((*kinds, torch.float8_e4m3fn)))
        elif way == 4:
            found[name] = tensor * draw.choice((float("nan"), float("inf"), 1e38))
        elif way == 5:
            found[name] = torch.zeros(draw.choice(((0,), (0, 2), (2, 0), (), (2, 0, 3))))
        elif way == 6:
            found[name] = tensor[: len(tensor) // 2].clone() if tensor.dim() else tensor
        elif way == 7:
            found[name] = torch.randn([draw.randrange(1, 5) for _ in range(draw.randrange(1, 6))])
        elif way == 8:
            found[name] = (
                tensor.repeat(draw.choice((2, 3)), *([1] * (tensor.dim() - 1))) if tensor.dim() else tensor
            )
        elif way == 9:
            found[name] = tensor.float().to_sparse()
        elif way == 10:
            found[name] = tensor.to("meta")
        elif way == 11:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
        elif way == 12:
            found[name] = torch.ones(1).expand(10**9, 10**3)
        elif way == 13:
            found[name] = draw.choice(damage.ODD)
        elif way == 14:
            found[draw.choice((1, None, "\ud800"))] = tensor
        elif way == 15:
            found[name] = tensor.to(torch.complex64)
        else:
            return draw.choice(([tensor], tensor, None, {"state_dict": found}, {"model": {"x": 1}}))
    return found


def is_plain(tensor: Tensor) -> bool:
    odd = tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized
    return not odd and tensor.numel() < 10**6


@pytest.mark.parametrize(
    "part", ["model.safetensors.index.json", "a shard", "config.json", ".merging/manifest.json"]
)
def test_bases_merged_on_disk(tmp_path: Path, part: str) -> None:
    draw = damage.generator(part)
    adapter = streams.adapter({"a": streams.factors(8, 6)})
    for case in range(damage.CASES):
        base, out = tmp_path / f"{case}-base", tmp_path / f"{case}-out"
        shards = {"a.weight": torch.randn(8, 6), "a.bias": torch.randn(8)}, {"c.weight": torch.randn(9, 9)}
        streams.write_base(
            base, *shards, config={"model_type": "x", "hidden_size": 6, "architectures": ["X"]}
        )
        if part == ".merging/manifest.json":
            interrupted(base, adapter, out)
            path = out / part
        else:
            path = draw.choice(sorted(base.glob("*.safetensors"))) if part == "a shard" else base / part
        content = path.read_bytes()
        if path.suffix == ".json":
            content = damage.as_text(damage.harmed(json.loads(content), draw), draw)
        else:
            (length,) = struct.unpack("<Q", content[:8])
            text = damage.as_text(damage.harmed(json.loads(content[8 : 8 + length]), draw), draw)
            whole = struct.pack("<Q", len(text)) + text + content[8 + length :]
            content = whole if draw.random() < 0.7 else damage.corrupted(content, draw)
        path.write_bytes(content)
        if damage.survives(
            lambda base=base, out=out: stream.merge(base, adapter, out), f"{part} {case}", base
        ):
            for file in out.glob("*.safetensors"):
                safetensors.torch.load_file(file)  # whoever merged it must have a file that loads


class Stopped(BaseException):
    """The merge is stopped."""


def interrupted(base: Path, adapter: lorica.Adapter, out: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done >= 0.6 * total:
            raise Stopped

    with pytest.raises(Stopped):
        stream.merge(base, adapter, out, progress=progress)
