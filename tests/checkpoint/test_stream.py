"""Merging on disk, against the merge in memory: the same bits, whatever the architecture."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anonymous_memory
import pytest
import safetensors.torch
import torch
from tiny import adapted, outputs, transformer
from torch import Tensor, nn

import lorica
from lorica import checkpoint
from lorica.adapter import Adapter, Factors
from lorica.checkpoint import stream
from lorica.checkpoint.stream import blocks, merging
from lorica.checkpoint.stream.names import fused_rows
from lorica.errors import AdapterError, ConfigError, FileError, LoricaWarning

BFLOAT16 = torch.bfloat16


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def write_base(
    folder: Path, *shards: dict[str, Tensor], config: dict[str, Any] | None = None, name: str = "model"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        safetensors.torch.save_file(shards[0], folder / f"{name}.safetensors", metadata={"format": "pt"})
        return folder
    home: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"{name}-{i + 1:05}-of-{len(shards):05}.safetensors"
        safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
        home |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": home}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def factors(d_out: int, d_in: int, r: int = 2, *, size: float = 0.3) -> Factors:
    return Factors(torch.randn(r, d_in) * size, torch.randn(d_out, r) * size, 2.0)


def adapter(updates: dict[str, Factors], extras: dict[str, Tensor] | None = None, **config: Any) -> Adapter:
    return Adapter(
        lorica.LoraConfig(r=2, lora_alpha=4, target_modules=["x"], **config), updates, extras or {}
    )


def delta(update: Factors) -> Tensor:
    return update.scale * update.B @ update.A


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, Adapter]:
    """Three shards, of which the adapter touches two; config.json and a tokenizer."""
    shards = [
        {"a.weight": torch.randn(8, 6), "a.bias": torch.randn(8)},
        {"norm.weight": torch.randn(6), "steps": torch.arange(3)},
        {"b.weight": torch.randn(5, 8)},
    ]
    base = write_base(tmp_path / "base", *shards, config={"model_type": "toy"})
    (base / "tokenizer.json").write_text("{}")
    return base, adapter({"a": factors(8, 6), "b": factors(5, 8)})


# --- the same as in memory ---

TIED = {"tie_word_embeddings": True}
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], Any, str]] = {
    "llama, sharded": ("llama", BFLOAT16, {}, "all-linear", "10KB"),
    "llama, tied, embeddings": ("llama", torch.float32, TIED, ["q_proj", "embed_tokens"], "10KB"),
    "llama, tied, head": ("llama", BFLOAT16, TIED, ["v_proj", "lm_head"], "10KB"),
    "llama, tied, both": ("llama", BFLOAT16, TIED, ["embed_tokens", "lm_head"], "5GB"),
    "llama, tied, neither": ("llama", BFLOAT16, TIED, ["down_proj"], "5GB"),
    "gpt2, Conv1D": ("gpt2", torch.float32, {}, ["c_attn", "c_proj", "c_fc"], "10KB"),
    "gpt2, tied": ("gpt2", BFLOAT16, {}, ["c_proj", "wte"], "5GB"),
    "opt, float16": ("opt", torch.float16, {}, "all-linear", "5GB"),
    "bert, head": ("bert-classifier", torch.float32, {}, ["query", "dense", "word_embeddings"], "5GB"),
    "bert, biases": ("bert-classifier", BFLOAT16, {"bias": "all"}, ["query"], "5GB"),
    "t5": ("t5", BFLOAT16, {}, ["q", "v", "wo"], "5GB"),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_merge_in_memory(case: str, tmp_path: Path) -> None:
    name, dtype, given, targets, size = CASES[case]
    settings = dict(given)
    bias = settings.pop("bias", "none")
    model = transformer(name, dtype=dtype, **settings)
    model.save_pretrained(tmp_path / "base", max_shard_size=size)  # type: ignore[operator]
    task = "SEQ_CLS" if "classifier" in name else None
    adapted(model, lorica.LoraConfig(r=4, target_modules=targets, task_type=task, bias=bias))
    lorica.save(model, tmp_path / "adapter")
    report = lorica.merge(model)
    model.save_pretrained(tmp_path / "memory", max_shard_size=size)  # type: ignore[operator]

    streamed = stream.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk")

    assert_same(read_all(tmp_path / "memory"), read_all(tmp_path / "disk"))
    both = [json.loads((tmp_path / where / "config.json").read_text()) for where in ("memory", "disk")]
    assert both[0] == both[1]
    assert streamed.layers.keys() == report.layers.keys()
    for path, loss in report.layers.items():
        assert streamed.layers[path] == pytest.approx(loss, rel=1e-3), path
    memory, disk = (
        type(model).from_pretrained(tmp_path / where, dtype=dtype).eval()  # type: ignore[attr-defined]
        for where in ("memory", "disk")
    )
    assert torch.equal(outputs(disk, name.split("-")[0]), outputs(memory, name.split("-")[0]))


def test_tensors_of_many_blocks_come_to_the_same_bits(tmp_path: Path) -> None:
    """Rows that make no whole block, columns that are no multiple of anything, and the other layout."""
    torch.manual_seed(3)
    model = nn.ModuleDict({"tall": nn.Linear(301, 7013, dtype=BFLOAT16), "wide": nn.Embedding(5001, 333)})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = write_base(tmp_path / "base", state)
    lorica.adapt(model, lorica.LoraConfig(r=5, target_modules=["tall", "wide"], init_lora_weights=False))
    lorica.save(model, tmp_path / "adapter")
    lorica.merge(model)
    stream.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert_same(dict(model.state_dict()), read_all(tmp_path / "out"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype(tmp_path: Path, dtype: str) -> None:
    weight = torch.randn(8, 6).bfloat16()
    shards = {
        "a.weight": weight,
        "norm.weight": torch.ones(6, dtype=BFLOAT16),
        "odd": torch.zeros(3, dtype=torch.bool),
    }
    base = write_base(
        tmp_path / "base",
        shards,
        config={"dtype": "bfloat16", "text_config": {"model_type": "x", "torch_dtype": "bfloat16"}},
    )
    update = factors(8, 6)
    stream.merge(base, adapter({"a": update}), tmp_path / "out", dtype=dtype)
    out, wanted = read_all(tmp_path / "out"), getattr(torch, dtype)
    assert {name: tensor.dtype for name, tensor in out.items()} == {
        "a.weight": wanted,
        "norm.weight": wanted,
        "odd": torch.bool,
    }
    torch.testing.assert_close(
        out["a.weight"], (weight.float() + delta(update)).to(wanted), rtol=1e-3, atol=1e-6
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["torch_dtype"]) == (dtype, dtype)


# --- names ---


def test_a_base_saved_without_a_head_takes_an_adapter_that_brings_one(tmp_path: Path) -> None:
    model = transformer("bert-classifier", num_labels=3)
    model.bert.save_pretrained(tmp_path / "base")  # type: ignore[union-attr, operator]
    adapted(model, lorica.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    lorica.save(model, tmp_path / "adapter")
    lorica.merge(model)
    stream.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same(
        {k: v for k, v in model.state_dict().items() if "position_ids" not in k}, read_all(tmp_path / "out")
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 3
    again = type(model).from_pretrained(tmp_path / "out").eval()  # type: ignore[attr-defined]
    assert torch.equal(outputs(again), outputs(model))


def test_an_adapter_made_without_a_head_fits_a_base_with_one(tmp_path: Path) -> None:
    model = transformer("bert-classifier")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    body = adapted(model.bert, lorica.LoraConfig(r=4, target_modules=["query"]))  # type: ignore[arg-type]
    lorica.save(body, tmp_path / "adapter")
    lorica.merge(body)
    stream.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same(dict(model.state_dict()), read_all(tmp_path / "out"))


@pytest.mark.parametrize(
    ("module", "tensor"),
    [
        ("model.language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        ("model.vision_tower.layers.0.q_proj", "vision_tower.layers.0.q_proj"),
        ("model.language_model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("model.visual.blocks.0.proj", "visual.blocks.0.proj"),
        ("layers.0.q_proj", "model.decoder.layers.0.q_proj"),
        ("model.layers.0.q_proj", "layers.0.q_proj"),
    ],
)
def test_names_that_libraries_change(tmp_path: Path, module: str, tensor: str) -> None:
    weight = torch.randn(8, 6)
    update = factors(8, 6)
    base = write_base(tmp_path / "base", {f"{tensor}.weight": weight})
    stream.merge(base, adapter({module: update}), tmp_path / "out")
    torch.testing.assert_close(read_all(tmp_path / "out")[f"{tensor}.weight"], weight + delta(update))


def test_a_module_that_could_be_in_two_places_is_refused(tmp_path: Path) -> None:
    towers = {f"{tower}.layers.0.q_proj.weight": torch.randn(8, 6) for tower in ("text", "vision")}
    base = write_base(tmp_path / "base", towers)
    with pytest.raises(AdapterError, match=r"under 'text\.', under 'vision\.'"):
        stream.merge(base, adapter({"layers.0.q_proj": factors(8, 6)}), tmp_path / "out")


def test_modules_that_are_fused_on_disk_get_their_rows(tmp_path: Path) -> None:
    q, k, v, gate, up = factors(8, 6), factors(2, 6), factors(2, 6), factors(5, 6), factors(5, 6)
    W, G = torch.randn(12, 6), torch.randn(10, 6)
    base = write_base(tmp_path / "base", {"l.qkv_proj.weight": W, "l.gate_up_proj.weight": G})
    parts = {"l.q_proj": q, "l.v_proj": v, "l.up_proj": up}
    report = stream.merge(base, adapter(parts), tmp_path / "out")
    out = read_all(tmp_path / "out")
    nothing = torch.zeros(2, 6)
    torch.testing.assert_close(out["l.qkv_proj.weight"], W + torch.cat([delta(q), nothing, delta(v)]))
    torch.testing.assert_close(out["l.gate_up_proj.weight"], G + torch.cat([torch.zeros(5, 6), delta(up)]))
    assert report.layers.keys() == parts.keys()
    stream.merge(base, adapter({"l.k_proj": k, "l.gate_proj": gate}), tmp_path / "other")
    out = read_all(tmp_path / "other")
    torch.testing.assert_close(
        out["l.qkv_proj.weight"], W + torch.cat([torch.zeros(8, 6), delta(k), nothing])
    )
    torch.testing.assert_close(out["l.gate_up_proj.weight"], G + torch.cat([delta(gate), torch.zeros(5, 6)]))


def test_rows_that_fit_no_part_of_a_fused_tensor(tmp_path: Path) -> None:
    assert fused_rows("q_proj", 7, 12) is None
    assert fused_rows("k_proj", 6, 12) == (0, 6)
    assert fused_rows("v_proj", 6, 12) is None
    base = write_base(tmp_path / "base", {"l.gate_up_proj.weight": torch.randn(10, 6)})
    with pytest.raises(AdapterError, match=r"l\.up_proj: 4 rows are no part of the 10 of l\.gate_up_proj"):
        stream.merge(base, adapter({"l.up_proj": factors(4, 6)}), tmp_path / "out")


def test_a_fused_module_is_split_over_the_tensors_on_disk(tmp_path: Path) -> None:
    update = factors(12, 6)
    weights = {f"l.{n}_proj.weight": torch.randn(rows, 6) for n, rows in (("q", 8), ("k", 2), ("v", 2))}
    base = write_base(tmp_path / "base", weights)
    stream.merge(base, adapter({"l.qkv_proj": update}), tmp_path / "out")
    for (name, W), change in zip(weights.items(), delta(update).split([8, 2, 2]), strict=True):
        torch.testing.assert_close(read_all(tmp_path / "out")[name], W + change)


def test_a_square_weight_is_transposed_where_the_architecture_says_so(tmp_path: Path) -> None:
    W, update = torch.randn(6, 6), factors(6, 6)
    for model, expected in (("gpt2", W + delta(update).T), ("llama", W + delta(update))):
        base = write_base(tmp_path / model, {"h.c_proj.weight": W}, config={"model_type": model})
        stream.merge(base, adapter({"h.c_proj": update}, fan_in_fan_out=True), tmp_path / f"{model}-out")
        torch.testing.assert_close(read_all(tmp_path / f"{model}-out")["h.c_proj.weight"], expected)


def test_convolutions(tmp_path: Path) -> None:
    W, A, B = torch.randn(5, 3, 2, 2), torch.randn(2, 3, 2, 2), torch.randn(5, 2, 1, 1)
    base = write_base(tmp_path / "base", {"conv.weight": W})
    stream.merge(base, adapter({"conv": Factors(A, B, 0.5, "conv")}), tmp_path / "out")
    expected = W + 0.5 * torch.einsum("or,rikl->oikl", B[:, :, 0, 0], A)
    torch.testing.assert_close(read_all(tmp_path / "out")["conv.weight"], expected)


# --- refused, by name, with nothing written ---


def test_all_that_has_no_place_is_listed(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, _ = toy
    misfits = adapter(
        {"a": factors(8, 7), "c": factors(2, 2), "lm_head": factors(3, 3), "norm": factors(6, 1)},
        {"a.bais": torch.zeros(8), "b.weight": torch.zeros(4, 8)},
    )
    with pytest.raises(AdapterError) as caught:
        stream.merge(base, misfits, tmp_path / "out")
    for expected in (
        "shape of a: the update's is (8, 7), the base's (8, 6)",
        "c is not in the base",
        "lm_head is not in the base",
        "shape of norm",
        "a.bais is not in the base; did you mean 'a.bias'",
        "shape of b.weight: (4, 8) in the adapter, (5, 8) in the base",
    ):
        assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"a.weight": torch.zeros(8, 6, dtype=torch.uint8)})
    with pytest.raises(AdapterError, match="stored as U8, so it is quantized"):
        stream.merge(base, adapter({"a": factors(8, 6)}), tmp_path / "out")


def test_a_module_trained_whole_must_be_there_whole(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base",
        {"a.weight": torch.randn(8, 6), "head.weight": torch.randn(2, 8), "head.bias": torch.zeros(2)},
    )
    partial = adapter({"a": factors(8, 6)}, {"head.weight": torch.ones(2, 8)}, modules_to_save=["head"])
    with pytest.raises(AdapterError, match=r"missing: head\.bias"):
        stream.merge(base, partial, tmp_path / "out")


def test_a_tie_of_unknown_names_is_refused(tmp_path: Path) -> None:
    model = transformer("t5")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    table = model.get_parameter("shared.weight").shape
    update = Factors(torch.randn(2, table[0]), torch.randn(table[1], 2), 1.0, "embedding")
    with pytest.raises(AdapterError, match="the base ties it to its input embeddings"):
        stream.merge(tmp_path / "base", adapter({"shared": update}), tmp_path / "out")


def test_a_tie_that_the_file_contradicts_is_refused(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 9}
    tensors = {"model.embed_tokens.weight": torch.randn(9, 4), "lm_head.weight": torch.randn(9, 4)}
    base = write_base(tmp_path / "base", tensors, config=config)
    with pytest.raises(AdapterError, match="holds two that differ"):
        stream.merge(base, adapter({"lm_head": factors(9, 4)}), tmp_path / "out")


def test_values_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base", {"a.weight": torch.full((8, 6), 6e4).half(), "b": torch.full((4,), 7e4)}
    )
    large = adapter({"a": Factors(torch.ones(2, 6), torch.full((8, 2), 1e5), 1.0)})
    with pytest.raises(AdapterError, match="a: the merged weight would hold NaN or infinity"):
        stream.merge(base, large, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="b holds values that"):
        stream.merge(base, adapter({"a": factors(8, 6, size=10)}), tmp_path / "out", dtype="float16")


def test_dtypes_that_are_none(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'int8'"):
        stream.merge(*toy, tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match=r"torch\.int8"):
        stream.merge(*toy, tmp_path / "out", dtype=torch.int8)


def test_bases_that_are_none(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, value = toy
    cases: list[tuple[str, Callable[[Path], object]]] = [
        ("is not a folder", lambda folder: shutil.rmtree(folder)),
        ("it has none", lambda folder: [path.unlink() for path in folder.iterdir()]),
        ("is not there", lambda folder: (folder / "model-00002-of-00003.safetensors").unlink()),
        ("truncated", lambda folder: (folder / "model-00002-of-00003.safetensors").write_bytes(b"\xff" * 20)),
        ("its header speaks of", lambda folder: _shorten(folder / "model-00003-of-00003.safetensors")),
        ("no weight_map", lambda folder: (folder / "model.safetensors.index.json").write_text("{}")),
        ("should hold a JSON object", lambda folder: (folder / "config.json").write_text("[]")),
        ("as JSON", lambda folder: (folder / "config.json").write_text("{")),
    ]
    for i, (message, spoil) in enumerate(cases):
        copy = Path(shutil.copytree(base, tmp_path / f"base{i}"))
        spoil(copy)
        with pytest.raises(FileError, match=message):
            stream.merge(copy, value, tmp_path / "out")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = "model-00001-of-00003.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match="more: not in model-00001"):
        stream.merge(base, value, tmp_path / "out")


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


# --- files ---


def test_untouched_files_are_the_bases_and_other_forms_of_the_weights_stay_behind(
    toy: tuple[Path, Adapter], tmp_path: Path
) -> None:
    base, value = toy
    for name in ("pytorch_model.bin", "adapter_config.json", "consolidated.safetensors", ".hidden"):
        (base / name).write_text("old")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    checkpoint.write(value, tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}")
    report = stream.merge(base, tmp_path / "adapter", tmp_path / "out")
    found = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert found == {
        "config.json",
        "model.safetensors.index.json",
        "1_Pooling/config.json",
        "tokenizer_config.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }
    assert report.copied == ["model-00002-of-00003.safetensors"]
    assert set(report.left_out) == {"pytorch_model.bin", "adapter_config.json", "consolidated.safetensors"}
    for name in ("model-00002-of-00003.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert "copied as they are: model-00002" in str(report)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_all(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()


def test_a_file_system_that_cannot_copy_by_itself(
    toy: tuple[Path, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream.merge(*toy, tmp_path / "first")

    def refuse(*_: Any) -> int:
        raise OSError(errno.EXDEV, "not here")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    stream.merge(*toy, tmp_path / "second")
    for path in (tmp_path / "first").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_progress_ends_at_all_of_it(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = stream.merge(*toy, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {report.nbytes}
    assert report.nbytes - 1200 < seen[-1][0] <= report.nbytes  # the headers are not counted


def test_a_folder_in_use_is_left_alone(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(FileError, match="not empty"):
        stream.merge(*toy, tmp_path / "full")
    with pytest.raises(FileError, match="is a file"):
        stream.merge(*toy, tmp_path / "full" / "thesis.tex")
    with pytest.raises(FileError, match="Not a directory"):
        stream.merge(*toy, tmp_path / "full" / "thesis.tex" / "out")
    (tmp_path / "empty").mkdir()
    stream.merge(*toy, tmp_path / "empty")


# --- rounding ---


def test_a_dtype_that_would_eat_the_adapter_is_told_beforehand(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"a.weight": torch.randn(256, 256).bfloat16()})
    small = adapter({"a": factors(256, 256, size=0.02)})
    with pytest.warns(LoricaWarning, match=r"stored as bfloat16, .* float16 would lose"):
        report = stream.merge(base, small, tmp_path / "out")
    assert report.worst[0] == "a"
    assert 0.5 < report.worst[1] < 1
    better = stream.merge(base, small, tmp_path / "float32", dtype="float32")
    assert better.worst[1] < 1e-3


# --- interrupted ---


class Stop(BaseException):
    """Not an Exception: as Ctrl-C is not."""


def stop_at(fraction: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= fraction * total:
            raise Stop

    return progress


def test_the_same_call_goes_on_after_the_last_finished_file(
    toy: tuple[Path, Adapter], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        stream.merge(*toy, out, progress=stop_at(0.6))
    assert [path.name for path in out.iterdir()] == [".merging"]
    report = stream.merge(*toy, out)
    assert report.resumed[:1] == ["model-00001-of-00003.safetensors"]
    assert len(report.resumed) < 3
    assert report.layers.keys() == {"a", "b"}
    stream.merge(*toy, tmp_path / "whole")
    assert_same(read_all(tmp_path / "whole"), read_all(out))
    assert not (out / ".merging").exists()


def test_going_on_with_other_inputs_is_refused(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, value = toy
    out = tmp_path / "out"
    with pytest.raises(Stop):
        stream.merge(base, value, out, progress=stop_at(0.6))
    other = adapter({"a": factors(8, 6)})
    with pytest.raises(FileError, match=r"not the same: adapter, dtype"):
        stream.merge(base, other, out, dtype="float32")
    stream.merge(base, other, out, resume=False)
    stream.merge(base, other, tmp_path / "whole")
    assert_same(read_all(tmp_path / "whole"), read_all(out))


def test_a_finished_file_that_was_changed_is_written_again(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        stream.merge(*toy, out, progress=stop_at(0.6))
    (out / ".merging" / "model-00001-of-00003.safetensors").write_bytes(b"")
    assert "model-00001-of-00003.safetensors" not in stream.merge(*toy, out).resumed
    stream.merge(*toy, tmp_path / "whole")
    assert_same(read_all(tmp_path / "whole"), read_all(out))


def test_a_full_disk(toy: tuple[Path, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_write", full)
        with pytest.raises(FileError, match="No space left on device; what is finished is kept"):
            stream.merge(*toy, out)
    with monkeypatch.context() as patch:
        patch.setattr(merging.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(FileError, match="more bytes for weights, and 0 are free"):
            stream.merge(*toy, out)
    stream.merge(*toy, out)


def test_a_base_that_changes_meanwhile(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, value = toy
    path = base / "model-00001-of-00003.safetensors"
    with pytest.raises(FileError, match="was changed while it was read"):
        stream.merge(base, value, tmp_path / "out", progress=lambda *_: os.utime(path, ns=(1, 1)))


def test_two_processes_do_not_write_to_one_folder(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    def again(*_: int) -> None:
        with pytest.raises(FileError, match="another process is writing"):
            stream.merge(*toy, tmp_path / "out")

    stream.merge(*toy, tmp_path / "out", progress=again)


@pytest.fixture
def server() -> Any:
    """Processes that start in milliseconds, for they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorica.checkpoint.stream"])
    return context


def test_killed_at_fifty_moments_it_never_leaves_what_loads_and_is_wrong(tmp_path: Path, server: Any) -> None:
    shards = [{f"m{i}.weight": torch.randn(64, 64), f"n{i}.bias": torch.randn(7)} for i in range(4)]
    base = write_base(tmp_path / "base", *shards, config={"model_type": "toy"})
    checkpoint.write(adapter({f"m{i}": factors(64, 64) for i in range(4)}), tmp_path / "adapter")
    stream.merge(base, tmp_path / "adapter", tmp_path / "right")
    right = read_all(tmp_path / "right")
    names = {path.name for path in (tmp_path / "right").iterdir()}

    def start() -> Any:
        process = server.Process(target=stream.merge, args=(base, tmp_path / "adapter", out))
        process.start()
        return process

    out, draw, kills, whole, resumed = tmp_path / "out-0", random.Random(0), 0, 0, 0
    start().join()  # the server itself takes seconds to start
    shutil.rmtree(out)
    began = time.perf_counter()
    start().join()
    duration = time.perf_counter() - began
    shutil.rmtree(out)
    while kills < 50 or (not resumed and kills < 200):
        process = start()
        time.sleep(draw.uniform(0, duration))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        # The machine's pace changes; the moments are to fall all over the work.
        duration *= 1.05 if process.exitcode == -signal.SIGKILL else 0.8
        if (out / "config.json").exists():  # without it nothing loads it
            assert names <= {path.name for path in out.iterdir()}
            assert_same(right, read_all(out))
            whole += 1
            out = tmp_path / f"out-{kills}-{whole}"
        elif draw.random() < 0.4 and out.exists():
            report = stream.merge(base, tmp_path / "adapter", out)
            resumed += bool(report.resumed)
            assert_same(right, read_all(out))
            assert names == {path.name for path in out.iterdir()}
            out = tmp_path / f"out-{kills}-{whole}"
    assert resumed, "no kill came after a first file was finished: the test shows nothing"


@pytest.mark.skipif(not anonymous_memory.STATUS.exists(), reason="needs Linux's /proc")
def test_memory_stays_a_few_blocks_whatever_the_size_of_a_tensor(tmp_path: Path, server: Any) -> None:
    base = write_base(tmp_path / "base", {"a.weight": torch.zeros(8192, 8192, dtype=BFLOAT16)})
    checkpoint.write(adapter({"a": factors(8192, 8192)}), tmp_path / "adapter")
    here, there = server.Pipe(duplex=False)
    process = server.Process(
        target=anonymous_memory.report_growth, args=(base, tmp_path / "adapter", tmp_path / "out", there)
    )
    process.start()
    there.close()
    assert here.recv() < 48 << 20  # the tensor has 128 MiB
    process.join()


def test_entries_of_the_configuration_can_be_given(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    stream.merge(*toy, tmp_path / "out", config={"id2label": {"0": "bad", "1": "good"}})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "toy", "id2label": {"0": "bad", "1": "good"}}
